"""Verification on a CPU, whose kernels are `vllm/utils/cpu_triton_utils.py`.

The one that the plugin replaces is compared with a plain reference; a strict xfail says
that stock's is wrong, and fails once upstream fixes it. What comes out of all of them
together follows the target's law exactly.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON or not current_platform.is_cpu():
    pytest.skip("only the CPU build replaces its kernels", allow_module_level=True)

from vllm.triton_utils import dispatcher
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_emssd.integration.cpu import fixes as cpu_fixes
from vllm_emssd.integration.hooks.hook import installed

UNTOUCHED = -9  # what a kernel must leave alone
PLACEHOLDER = -1
RAGGED_COUNTS = [[3, 0, 1, 2, 0], [0, 0, 4], [1], [5], [0], [2, 2, 2]]
ragged = pytest.mark.parametrize("counts", RAGGED_COUNTS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _registered_kernels() -> None:
    """What the worker does at its start, once a process.

    The scan of all modules that registration makes trips over llvmlite's lazy
    attributes, so an earlier test's numba is put out of its sight.
    """
    current_platform.import_kernels()
    if "vllm.v1.sample.rejection_sampler.expand_kernel" in dispatcher._registry:
        return
    names = [name for name in sys.modules if name.split(".")[0] == "llvmlite"]
    hidden = {name: sys.modules.pop(name) for name in names}
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)


@pytest.fixture
def _cpu_fixes() -> Iterator[None]:
    with installed([cpu_fixes.EXPAND_HOOK]):
        yield


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def cumulative(counts: Sequence[int]) -> torch.Tensor:
    return int32(np.cumsum(counts))  # [num_reqs], inclusive, as the runner makes it


# ----- expand_kernel: temperature, top_k and top_p of every drafted row -----

EXPAND_DTYPES = [torch.float32, torch.int32, torch.int64]
LOST_WRITES = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason=(
        "_expand_kernel_impl fills the int64 temporary of _ensure_int64(output), and "
        "truncates floats (vllm-project/vllm#55005); drop the expand hook of cpu_fixes"
    ),
)
Expand = Callable[..., torch.Tensor]


def check_expand(expand: Expand, counts: Sequence[int], dtype: torch.dtype) -> None:
    """`expand` repeats every value `counts` times and makes greedy's 0 a 1."""
    values = torch.tensor([0.8, 0.0, 0.05, 1.0, 7.9])[: len(counts)].to(dtype)
    expected = np.repeat(np.where(values.numpy() == 0, 1, values.numpy()), counts)
    expanded = expand(values, cumulative(counts), sum(counts), 0, 1)
    assert expanded.dtype == dtype
    np.testing.assert_array_equal(
        expanded.numpy(), expected.astype(values.numpy().dtype)
    )
    unreplaced = expand(values, cumulative(counts), sum(counts))
    np.testing.assert_array_equal(unreplaced.numpy(), np.repeat(values.numpy(), counts))


def expand_with(launch: Callable[..., None]) -> Expand:
    """A kernel launch as `expand_batch_to_tokens`, on memory of known content."""

    def expand(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        output = x.new_full((num_tokens,), UNTOUCHED)
        launch(output, x, cu_num_tokens, replace_from, replace_to)
        return output

    return expand


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=LOST_WRITES),  # temperature, top_p
        pytest.param(torch.int32, marks=LOST_WRITES),  # top_k
        torch.int64,
    ],
    ids=str,
)
def test_stock_expand(dtype: torch.dtype) -> None:
    check_expand(expand_with(rejection_sampler._expand), [3, 0, 1, 2, 0], dtype)


@ragged
@pytest.mark.parametrize("dtype", EXPAND_DTYPES, ids=str)
def test_our_expand(counts: list[int], dtype: torch.dtype) -> None:
    check_expand(cpu_fixes.expand_batch_to_tokens, counts, dtype)


@pytest.mark.usefixtures("_cpu_fixes")
def test_our_expand_is_what_sampling_calls() -> None:
    expand = rejection_sampler.expand_batch_to_tokens
    check_expand(expand, [3, 0, 1], torch.float32)


# ----- rejection_sample end to end: the law of what comes out -----

NUM_SAMPLES = 100_000  # a request group
FALSE_ALARM = 1e-9  # a comparison; with about 20 of them, 2e-8 a run
BONUS = 5  # marks "all drafts accepted"; the sampler proper draws bonus tokens
TARGET_LOGITS = np.array([[1.5, 0.2, -1.0, 0.9, -0.3], [-0.7, 1.1, 0.4, -2.0, 1.6]])
DRAFT_PROBS = np.array([[8, 1, 2, 3, 2], [2, 4, 8, 1, 1]], np.float32) / 16


@dataclass(frozen=True)
class Request:
    """What many alike requests of a batch ask for."""

    temperature: float
    top_k: int = TARGET_LOGITS.shape[1]
    top_p: float = 1.0
    num_drafts: int = 2


UNCONSTRAINED = [Request(0.3), Request(0.8), Request(1.0), Request(1.7, num_drafts=1)]
CONSTRAINED = [
    Request(0.0),
    Request(0.8, top_k=2),
    Request(1.3, top_p=0.7),
    Request(1.0, top_k=4, top_p=0.8, num_drafts=1),
    Request(0.6, num_drafts=0),
]


def target_law(logits: np.ndarray, request: Request) -> np.ndarray:
    """Temperature, then top-k, then top-p, from their definitions."""
    if request.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    order = np.argsort(-logits)
    weights = np.exp(logits[order] / request.temperature)
    weights[request.top_k :] = 0
    probs = weights / weights.sum()
    probs[np.cumsum(probs) - probs >= request.top_p] = 0
    law = np.zeros(len(logits))
    law[order] = probs / probs.sum()
    return law


def output_law(request: Request, one_hot: bool) -> dict[tuple[int, ...], float]:
    """Exact probability of every output row: its rejection ends it, else `BONUS`."""
    law: Counter[tuple[int, ...]] = Counter()
    alive = {(): 1.0}  # all drafts accepted so far
    for pos in range(request.num_drafts):
        target, draft = target_law(TARGET_LOGITS[pos], request), DRAFT_PROBS[pos]
        certain = one_hot or request.temperature == 0
        accepted = target * draft if certain else np.minimum(target, draft)
        grown = {}
        for prefix, prob in alive.items():
            for token in range(len(target)):
                law[(*prefix, token)] += prob * (target - accepted)[token]
                grown[(*prefix, token)] = prob * accepted[token]
        alive = grown
    for prefix, prob in alive.items():
        law[(*prefix, BONUS)] += prob
    return law


def sampling_metadata(
    requests: Sequence[Request], generators: dict[int, torch.Generator] | None = None
) -> SamplingMetadata:
    """What the runner's input batch would build for these requests."""
    temperature = torch.tensor([r.temperature for r in requests])
    top_k, top_p = int32([r.top_k for r in requests]), [r.top_p for r in requests]
    constrained = any(p < 1 for p in top_p) or any(top_k < TARGET_LOGITS.shape[1])
    penalties = torch.empty(0)
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()),
        top_p=torch.tensor(top_p) if constrained else None,
        top_k=top_k if constrained else None,
        generators=generators or {},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=penalties,
        presence_penalties=penalties,
        repetition_penalties=penalties,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def speculate(
    requests: Sequence[Request],
    one_hot: bool,
    draft: torch.Tensor | None = None,
    generators: dict[int, torch.Generator] | None = None,
) -> np.ndarray:
    """Output rows of one verification step; drafts come from `DRAFT_PROBS`."""
    counts = [request.num_drafts for request in requests]
    positions = np.concatenate([np.arange(count) for count in counts])
    draft_probs = torch.tensor(DRAFT_PROBS[positions])
    if draft is None:
        draft = torch.multinomial(draft_probs, 1)[:, 0].int()
    metadata = sampling_metadata(requests, generators)
    logits = torch.tensor(TARGET_LOGITS[positions], dtype=torch.float32)
    return rejection_sampler.rejection_sample(
        draft,
        counts,
        max(counts),
        cumulative(counts),
        None if one_hot else draft_probs,
        rejection_sampler.apply_sampling_constraints(
            logits, cumulative(counts), metadata
        ),
        torch.full((len(counts), 1), BONUS, dtype=torch.int32),
        metadata,
    ).numpy()


def total_variation(rows: np.ndarray, law: dict[tuple[int, ...], float]) -> float:
    """Distance of the rows' empirical law from `law`; 1 if a row is impossible."""
    outputs, counts = np.unique(rows, axis=0, return_counts=True)
    observed = {
        tuple(output[output != PLACEHOLDER].tolist()): count / len(rows)
        for output, count in zip(outputs, counts, strict=True)
    }
    if any(law.get(output, 0) == 0 for output in observed):
        return 1.0
    return sum(abs(observed.get(output, 0) - p) for output, p in law.items()) / 2


def largest_likely_variation(num_outputs: int) -> float:
    """Exceeded by a right sampler with probability below `FALSE_ALARM`.

    Weissman et al. 2003: P(2 TV >= eps) <= 2**num_outputs * exp(-n eps**2 / 2).
    """
    exponent = num_outputs * np.log(2) - np.log(FALSE_ALARM)
    return float(np.sqrt(exponent / (2 * NUM_SAMPLES)))


@pytest.mark.usefixtures("_cpu_fixes")
@pytest.mark.parametrize("one_hot", [False, True], ids=["draft-probs", "one-hot"])
@pytest.mark.parametrize(
    "requests", [UNCONSTRAINED, CONSTRAINED], ids=["temperatures", "mixed"]
)
def test_output_has_the_target_law(requests: list[Request], one_hot: bool) -> None:
    torch.manual_seed(0)
    rows = speculate(requests * NUM_SAMPLES, one_hot)
    for i, request in enumerate(requests):
        law = output_law(request, one_hot)
        num_outputs = sum(p > 0 for p in law.values())
        variation = total_variation(rows[i :: len(requests)], law)
        assert variation < largest_likely_variation(num_outputs), request


@pytest.mark.usefixtures("_cpu_fixes")
def test_the_law_test_notices_a_wrong_temperature() -> None:
    torch.manual_seed(2)
    rows = speculate([Request(0.9)] * NUM_SAMPLES, one_hot=False)
    law = output_law(Request(0.8), one_hot=False)
    assert total_variation(rows, law) > largest_likely_variation(len(law))
