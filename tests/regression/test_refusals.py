"""What is not supported stops the start with an error that names the fix."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from tests.engine import DRAFT, TARGET
from vllm_emssd.config import ADAPTIVE, ADDITIONAL_CONFIG_KEY, EmssdConfig
from vllm_emssd.integration import runners
from vllm_emssd.integration.frontend import method as frontend
from vllm_emssd.integration.frontend.serving import tag_of
from vllm_emssd.integration.v1.runner import UnpadGPUModelRunner


def _create(speculative_config: dict[str, Any], **options: Any) -> Any:
    args = EngineArgs(
        model=TARGET,
        max_model_len=512,
        speculative_config=speculative_config | {"method": "emssd"},
        **options,
    )
    return args.create_engine_config()


def test_accepted_config_reaches_every_process() -> None:
    config = _create({"model": DRAFT})
    assert config.additional_config["emssd"]["num_speculative_tokens"] == 16
    assert config.speculative_config.num_speculative_tokens == 16
    assert config.parallel_config.worker_cls.startswith("vllm_emssd.")
    assert config.additional_config["emssd"]["draft_length"] == "auto"
    assert not config.scheduler_config.async_scheduling


V2_ONLY = r"its own proposers on vLLM's V2 model runner.*--async-scheduling"


@pytest.mark.parametrize(
    ("is_cpu", "use_v2", "proposer", "may_be_auto", "may_be_async"),
    [
        (True, "1", "draft_model", True, True),
        (False, None, "draft_model", True, True),
        (False, "1", "draft_model", True, True),
        (False, "0", "draft_model", False, False),
        (False, None, "llma", False, True),
        (False, None, "mixed", True, True),
        (True, None, "draft_model", None, False),  # automatic lengths are the default
        (True, None, "llma", None, False),
    ],
)
def test_automatic_lengths_and_async_scheduling_go_by_the_runner(
    is_cpu: bool,
    use_v2: str | None,
    proposer: str,
    may_be_auto: bool | None,
    may_be_async: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lengths are fixed unless asked otherwise where no gain was measured; scheduling
    is asynchronous where lengths are known ahead."""
    monkeypatch.setattr(frontend.current_platform, "is_cpu", lambda: is_cpu)
    if use_v2 is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    config = EmssdConfig(proposer=proposer)
    fixed = config.model_copy(update={"draft_length": "fixed"})
    assert frontend._gain_was_measured() == (may_be_auto is None)
    if may_be_auto is not None:
        assert frontend._settle_draft_length(config, {}) == fixed
        assert frontend._settle_draft_length(fixed, {}) is fixed
        with refused(not may_be_auto, r"'draft_length' \"auto\".*\"fixed\""):
            asked = {"draft_length": "auto"}
            assert frontend._settle_draft_length(config, asked) is config

    for settled in (fixed, config) if may_be_auto else (fixed,):

        def is_async(asked: bool | None, config: EmssdConfig = settled) -> bool:
            args = SimpleNamespace(async_scheduling=asked)
            return frontend._settle_async_scheduling(args, config)

        assert is_async(None) == may_be_async
        assert not is_async(False)
        with refused(not may_be_async, V2_ONLY):
            assert is_async(True)


def refused(is_refused: bool, message: str) -> Any:
    return pytest.raises(ValueError, match=message) if is_refused else nullcontext()


def test_vllm_itself_decides_where_it_may_schedule_asynchronously(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that it takes for a reason against it is left in its config."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    args = EngineArgs(
        model=TARGET,
        speculative_config={"method": "emssd", "model": DRAFT, "draft_length": "fixed"},
    )
    spec_config = args.create_engine_config().speculative_config
    assert args.async_scheduling is None
    assert not spec_config.disable_padded_drafter_batch
    assert tag_of(spec_config) is not None


@pytest.mark.parametrize("proposer", ["draft_model", "llma", "mixed"])
def test_vllm_chooses_v2_where_it_can(
    proposer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr(frontend, "may_run_on_v2", lambda config: True)
    asked = {"proposer": proposer, "draft_length": "fixed"}
    model = {} if proposer == "llma" else {"model": DRAFT}
    assert _create(model | asked).use_v2_model_runner


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("draft_model", "VLLM_USE_V2_MODEL_RUNNER=0, or --no-async"),
        ("ngram_gpu", 'was prepared for.*"?VLLM_USE_V2_MODEL_RUNNER=0'),
    ],
)
def test_v1_refuses_what_was_prepared_for_v2(method: str, error: str) -> None:
    """Where vLLM chose it after the front end had thought of V2."""
    options = EmssdConfig(proposer="draft_model", draft_length="fixed").model_dump()
    vllm_config = SimpleNamespace(
        additional_config={ADDITIONAL_CONFIG_KEY: options},
        scheduler_config=SimpleNamespace(async_scheduling=True),
        speculative_config=SimpleNamespace(method=method),
    )
    with pytest.raises(ValueError, match=error):
        UnpadGPUModelRunner(vllm_config, torch.device("cuda"))


def test_v1_on_a_gpu_refuses_automatic_lengths() -> None:
    """Where vLLM chose it after the front end had let them through."""
    options = EmssdConfig(proposer="draft_model").model_dump()
    vllm_config = SimpleNamespace(additional_config={ADDITIONAL_CONFIG_KEY: options})
    with pytest.raises(ValueError, match=r"'draft_length' \"auto\".*\"fixed\""):
        UnpadGPUModelRunner(vllm_config, torch.device("cuda"))


def test_heads_on_the_v2_runner_are_refused_with_a_kv_connector() -> None:
    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="eagle3"),
        kv_transfer_config=None,
        watermark_config=None,
        parallel_config=SimpleNamespace(prefill_context_parallel_size=1),
    )
    runners.refuse_deployment(vllm_config)
    vllm_config.kv_transfer_config = object()
    with pytest.raises(ValueError, match=r"hidden states.*--kv-transfer-config"):
        runners.refuse_deployment(vllm_config)


@pytest.mark.parametrize("draft_tp", [{}, {"draft_tensor_parallel_size": 2}])
def test_accepted_on_several_workers(draft_tp: dict[str, Any]) -> None:
    config = _create(
        {"model": DRAFT, "draft_length": "auto", **draft_tp},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    assert config.parallel_config.world_size == 2
    assert config.speculative_config.draft_tensor_parallel_size == 2


def test_creating_the_config_twice_gives_the_same() -> None:
    args = EngineArgs(
        model=TARGET, max_model_len=512, speculative_config={"method": "emssd"}
    )
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert args.speculative_config == {"method": "emssd"}


def test_spec_flags_are_merged() -> None:
    config = EngineArgs(
        model=TARGET,
        max_model_len=512,
        spec_method="emssd",
        spec_model=DRAFT,
        spec_tokens=3,
    ).create_engine_config()
    assert config.additional_config["emssd"]["proposer"] == "mixed"
    assert config.speculative_config.num_speculative_tokens == 3


@pytest.mark.parametrize(
    ("speculative", "options", "message"),
    [
        ({"copy_length": "7"}, {}, "'copy_length'"),
        ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        (
            {"model": DRAFT, "draft_tensor_parallel_size": 1},
            {"tensor_parallel_size": 2},
            "'draft_tensor_parallel_size' 1 differs from --tensor-parallel-size 2",
        ),
        ({}, {"enable_prompt_embeds": True}, "Remove --enable-prompt-embeds"),
        ({}, {"worker_cls": "mine.Worker"}, "remove --worker-cls"),
        ({}, {"scheduler_cls": "mine.Scheduler"}, "remove --scheduler-cls"),
        ({}, {"additional_config": [1]}, "must be a dictionary, got list"),
        ({}, {"async_scheduling": True}, "remove --async-scheduling"),
        ({"model": DRAFT, ADAPTIVE: True}, {}, f"'{ADAPTIVE}' works on .* V2"),
    ],
)
def test_refused(
    speculative: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _create(speculative, **options)


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"draft_length": "auto"}, r"'draft_length' \"auto\".*\"fixed\""),
        ({"model": DRAFT, "unpad_inputs": False}, "remove 'unpad_inputs'"),
    ],
)
def test_refused_on_the_v2_runner(
    monkeypatch: pytest.MonkeyPatch, speculative: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=message):
        _create(speculative)


def test_proposers_of_other_packages_are_refused_on_the_v2_runner() -> None:
    config = EmssdConfig.model_construct(proposer="follower")
    with pytest.raises(ValueError, match=r'"follower" works on .* V1 .*RUNNER=0'):
        runners.refuse_options(config)


def test_draft_model_of_another_vocabulary(tmp_path: Any) -> None:
    import json
    import shutil

    other = tmp_path / "draft"
    shutil.copytree(DRAFT, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 4096}))
    with pytest.raises(ValueError, match="'model' has a vocabulary of another size"):
        _create({"model": str(other)})
