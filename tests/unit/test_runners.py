"""Which of vLLM's model runners becomes which of ours, and what is said of that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from vllm_emssd.config import ADDITIONAL_CONFIG_KEY, EmssdConfig
from vllm_emssd.integration import runners, worker

DRAFT_MODEL = EmssdConfig(proposer="draft_model", draft_length="fixed")


@pytest.mark.parametrize(
    ("is_cpu", "use_v2", "name"),
    [
        (True, False, "v1.runner.UnpadCPUModelRunner"),
        (True, True, "v2.runner.UnpadCPUModelRunnerV2"),
        (False, False, "v1.runner.UnpadGPUModelRunner"),
        (False, True, "v2.runner.UnpadGPUModelRunnerV2"),
    ],
)
def test_runner_of_a_platform(
    monkeypatch: pytest.MonkeyPatch, is_cpu: bool, use_v2: bool, name: str
) -> None:
    monkeypatch.setattr(worker.current_platform, "is_cpu", lambda: is_cpu)
    made = worker.runner_class(use_v2)
    assert f"{made.__module__}.{made.__qualname__}".endswith(name)


@pytest.mark.parametrize(
    ("device", "use_v2", "options", "connector", "is_advised"),
    [
        ("cuda", "0", {}, None, True),
        ("cuda", None, {}, None, False),  # vLLM said itself why it took V1
        ("cpu", "0", {}, None, False),
        ("cuda", "0", {"unpad_inputs": False}, None, False),
        ("cuda", "0", {"proposer": "of a package"}, None, False),
        ("cuda", "0", {}, "any", False),  # which a head has on V1 only
    ],
)
def test_v2_is_advised_where_it_does_what_v1_was_chosen_for(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    use_v2: str | None,
    options: dict[str, Any],
    connector: str | None,
    is_advised: bool,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(runners, "logger", SimpleNamespace(warning=lines.append))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if use_v2 is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    config = DRAFT_MODEL.model_copy(update=options)
    vllm_config: Any = SimpleNamespace(
        additional_config={ADDITIONAL_CONFIG_KEY: config.model_dump()},
        speculative_config=SimpleNamespace(method="eagle3"),
        parallel_config=SimpleNamespace(prefill_context_parallel_size=1),
        kv_transfer_config=connector,
        watermark_config=None,
    )
    monkeypatch.setattr(EmssdConfig, "carried_by", lambda carried: config)
    runners.advise_v2(vllm_config, torch.device(device))
    assert len(lines) == is_advised
    assert all("VLLM_USE_V2_MODEL_RUNNER" in line for line in lines)
