"""The reading of the plugin's use of vLLM: nothing is amiss with the installed one, and
each kind of drift, planted into a copy of one file, is found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import vllm

from scripts.check_patches import Patch, check_headers, check_overrides, patches_for
from scripts.plugin_uses import PluginUses
from scripts.source_types import Scope
from scripts.vllm_source import Definition, Function, Parameters, SourceTree

INSTALLED = Path(vllm.__file__).parent.parent
RUNNER = "vllm/v1/worker/gpu_model_runner.py"
DRAFTER = "vllm/v1/spec_decode/llm_base_proposer.py"


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    """A folder with one changed file, to lie before the installed vLLM."""
    source = (INSTALLED / file).read_text()
    assert old in source
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(source.replace(old, new))
    return folder


def test_installed_vllm_has_all_that_the_plugin_uses() -> None:
    uses = PluginUses(INSTALLED)
    assert uses.problems() == []
    assert len(list(uses.imports())) > 40
    assert len(uses.overrides()) > 10
    assert uses.num_judged() > 200


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        pytest.param(
            "vllm/v1/sample/rejection_sampler.py",
            "class RejectionSampler(",
            "class StrictSampler(",
            "vllm.v1.sample.rejection_sampler has no RejectionSampler",
            id="imported name",
        ),
        pytest.param(
            "vllm/distributed/parallel_state.py",
            "def get_tp_group(",
            "def get_tensor_group(",
            "vllm.distributed has no get_tp_group",
            id="name of a star import",
        ),
        pytest.param(
            "vllm/sampling_params.py",
            "def _validate_spec_decode(\n        self,",
            "def _validate_spec_decode(\n        self, model_config,",
            "_validate_spec_decode: takes (self, model_config, speculative_config)",
            id="hook's signature",
        ),
        pytest.param(
            "vllm/sampling_params.py",
            "_validate_spec_decode",
            "_validate_speculation",
            "_validate_spec_decode: is missing",
            id="hook's target",
        ),
        pytest.param(
            RUNNER,
            "def _get_spec_decode_draft_probs(\n        self,",
            "def _get_spec_decode_draft_probs(\n        self, logits,",
            "UnpadSamplingMixin._get_spec_decode_draft_probs takes",
            id="overridden method",
        ),
        pytest.param(
            RUNNER,
            "self.discard_request_mask",
            "self.request_mask",
            "has no attribute discard_request_mask",
            id="attribute of a base",
        ),
        pytest.param(
            "vllm/v1/worker/gpu_input_batch.py",
            "self.num_tokens_no_spec",
            "self.num_known_tokens",
            "InputBatch has no attribute num_tokens_no_spec",
            id="attribute of an object",
        ),
        pytest.param(
            DRAFTER,
            "def _determine_batch_execution_and_padding(\n        self,",
            "def _determine_batch_execution_and_padding(\n        self, is_first,",
            "_determine_batch_execution_and_padding needs num_tokens too",
            id="method's parameters",
        ),
        pytest.param(
            "vllm/v1/attention/backend.py",
            "    seq_lens_cpu_upper_bound:",
            "    seq_lens_bound:",
            "CommonAttentionMetadata has no parameter seq_lens_cpu_upper_bound",
            id="field of a dataclass",
        ),
    ],
)
def test_planted_drift_is_found(
    tmp_path: Path, file: str, old: str, new: str, found: str
) -> None:
    uses = PluginUses(planted(tmp_path, file, old, new), INSTALLED)
    problems = list(map(str, uses.problems()))
    assert any(found in problem for problem in problems), problems
    assert all(problem.startswith("vllm_emssd/") for problem in problems)


def test_method_that_overrides_nothing_any_more_is_found(tmp_path: Path) -> None:
    old = "_input_fits_in_drafter"
    renamed = planted(tmp_path, RUNNER, old, "_drafter_takes")
    (problem,) = check_overrides(INSTALLED, renamed, INSTALLED)
    assert problem == f"UnpadRunnerMixin.{old} overrides nothing any more"
    assert check_overrides(INSTALLED, INSTALLED) == []


# ------------------------------------------------------------------ parameters


def parameters(text: str) -> Parameters:
    (function,) = ast.parse(f"def f({text}): ...").body
    assert isinstance(function, Function)
    return Parameters.of(function)


@pytest.mark.parametrize(
    ("ours", "stock", "fits"),
    [
        ("self, a, b", "self, a, b", True),
        ("self, a", "self, a, b", False),
        ("self, b, a", "self, a, b", False),
        ("self, a, *args, **kwargs", "self, a, b, *, c", True),
        ("self, a, *args", "self, a, b", False),
        ("self, a", "self, a, *, c", False),
        ("self, a, *, c", "self, a, *, c", True),
        ("self, *args, **kwargs", "self", True),
    ],
)
def test_override_takes_what_stock_takes(ours: str, stock: str, fits: bool) -> None:
    assert parameters(ours).accepts_what(parameters(stock)) is fits


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("f(1, 2)", None),
        ("f(1, b=2)", None),
        ("f(1)", "needs b too"),
        ("f(1, 2, 3, 4)", "takes 3 positional arguments, got 4"),
        ("f(1, 2, d=3)", "has no parameter d"),
        ("f(*rest)", None),
        ("f(1, **rest)", None),
    ],
)
def test_call_fits(call: str, why: str | None) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert parameters("self, a, b, c=0").misfit(node, is_bound=True) == why


# ------------------------------------------------------------------ types

LIBRARY = """
from dataclasses import dataclass

class Leaf:
    def __init__(self, size: int):
        self.size = size

@dataclass
class Holder:
    leaves: list[Leaf]
    best: Leaf | None

class Base:
    def __init__(self, holder: Holder):
        self.holder = holder
        self.made = Leaf(1)
        self.first = self.make()

    def make(self) -> Leaf: ...
"""

USER = """
from vllm.library import Base, Leaf

class Mine(Base):
    def __init__(self, holder):
        super().__init__(holder)

    def use(self, leaf: "Leaf", other):
        held, made = self.holder, self.made
        for one in held.leaves:
            {}
        if isinstance(other, Leaf):
            pass
"""


@pytest.mark.parametrize(
    ("expression", "is_found"),
    [
        ("leaf.{}", True),
        ("self.made.{}", True),
        ("made.{}", True),
        ("self.first.{}", True),
        ("self.make().{}", True),
        ("held.best.{}", True),
        ("one.{}", True),
        ("held.leaves[0].{}", True),
        ("other.{}", True),
        ("self.{}", True),
        ("super().{}", True),
        ("Leaf(2).{}", True),
        ("unknown.{}", False),  # not judged
    ],
)
def test_class_of_an_expression(
    tmp_path: Path, expression: str, is_found: bool
) -> None:
    missing = USER.format(expression.format("no_such_name"))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "library.py").write_text(LIBRARY)
    (tmp_path / "user.py").write_text(missing)
    cls = ast.parse(missing).body[-1]
    assert isinstance(cls, ast.ClassDef)
    method = cls.body[-1]
    assert isinstance(method, Function)
    tree = SourceTree(tmp_path)
    scope = Scope(tree, "user", method, Definition("user", "Mine", cls))
    found = [what for node in ast.walk(method) if (what := scope.misfit(node))]
    assert [what.split()[-1] for what in found] == ["no_such_name"] * is_found


# ------------------------------------------------------------------ patches


@pytest.mark.parametrize(
    ("version", "folder"),
    [
        ("0.32.0", "vllm-0.32"),
        ("0.32.5+cpu", "vllm-0.32"),
        ("0.33.1rc1", "vllm-0.33"),
        ("0.99.0", "vllm-0.33"),
        ("0.31.0", "vllm-0.32"),
    ],
)
def test_patches_of_a_version(version: str, folder: str) -> None:
    patches = patches_for(version)
    assert {patch.path.parent.name for patch in patches} == {folder}
    assert check_headers(patches) == []


def test_header_without_a_reason_is_found(tmp_path: Path) -> None:
    path = tmp_path / "0001-silent.patch"
    path.write_text("Subject: x\n\nWhy: y\n---\n+Remove when: in the diff\n")
    assert check_headers([Patch(path)]) == [
        "0001-silent.patch lacks 'Upstream issue:'",
        "0001-silent.patch lacks 'Remove when:'",
    ]
