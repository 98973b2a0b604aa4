"""Users who do not ask for emssd get vLLM exactly as it is."""

from __future__ import annotations

import json

import pytest

from tests.fresh_process import python
from tests.regression.runs import batch_prompts, plain_tokens, run

WITHOUT_PLUGIN = """
import json, sys
from tests.engine import EngineConfig, greedy, running
with running(EngineConfig()) as llm:
    json.dump(greedy(llm, json.load(sys.stdin)), sys.stdout)
"""


def test_stock_classes_without_the_method() -> None:
    for name in ("plain", "stock"):
        assert run(name).worker == "vllm.v1.worker.cpu_worker.CPUWorker"
        assert run(name).scheduler == "Scheduler"


def test_our_classes_with_the_method() -> None:
    assert run("draft_model").worker.endswith("integration.cpu.worker.UnpadCPUWorker")
    assert run("llma").scheduler == "UnpadScheduler"


def test_runner_hook_is_gone_after_start() -> None:
    import vllm.v1.worker.cpu_worker as cpu_worker

    from vllm_emssd.integration.cpu.worker import CPU_RUNNER_HOOK
    from vllm_emssd.integration.hooks.hook import is_installed

    run("draft_model")
    assert not is_installed(CPU_RUNNER_HOOK)
    assert cpu_worker.CPUModelRunner.__module__ == "vllm.v1.worker.cpu_model_runner"


@pytest.mark.parametrize("asked", [None, {"method": "ngram"}])
def test_front_end_passes_other_methods_through(asked: dict | None) -> None:
    from types import SimpleNamespace

    from vllm_emssd.integration.frontend.method import _make_hook

    args = SimpleNamespace(
        speculative_config=asked, spec_method=None, spec_model=None, spec_tokens=None
    )
    before = dict(vars(args))
    seen = []
    hook = _make_hook(lambda *given: seen.append(given) or "stock's")
    assert hook(args, "model", "parallel") == "stock's"
    assert seen == [(args, "model", "parallel")]
    assert vars(args) == before


def test_output_without_the_plugin_is_the_same() -> None:
    texts = batch_prompts(8)
    done = python("-c", WITHOUT_PLUGIN, given=json.dumps(texts), VLLM_PLUGINS="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == plain_tokens(8)
