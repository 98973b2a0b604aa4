"""What goes wrong in a running engine costs drafts, never output nor the engine."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import (
    DRAFT,
    DRAFT_MODEL,
    LLMA,
    ONE_OUTCOME,
    EngineConfig,
    counting,
    greedy,
    model_runner,
    running,
    stats,
)
from tests.planted_failures import break_parts
from tests.regression.runs import batch_prompts, plain_tokens, run
from vllm_emssd.integration.v1.sampling import count_nan_as_one_hot
from vllm_emssd.integration.worker import memory_advice

BATCH = 8
SAMPLED_DRAFTS = DRAFT_MODEL | {"draft_sample_method": "probabilistic"}


@pytest.fixture(scope="module", autouse=True)
def _plain_engine_runs_first() -> None:
    """There is one engine at a time."""
    run("plain")


def accepted_share(llm: Any, generate: Callable[[], list[list[int]]]) -> float:
    """Of drafts verified meanwhile; checks what comes out."""
    with counting(llm) as gained:
        assert generate() == plain_tokens(BATCH)
    return gained["num_accepted_tokens"] / gained["num_draft_tokens"]


@pytest.mark.parametrize("proposer", ["draft_model", "llma"])
def test_failing_proposer_costs_drafts_only(
    proposer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    logger = logging.getLogger("vllm.emssd.failure_policy")
    monkeypatch.setattr(logger, "error", lambda text, **kwargs: logged.append(text))
    asked = DRAFT_MODEL if proposer == "draft_model" else LLMA
    with running(EngineConfig(asked)) as llm:

        def generate() -> list[list[int]]:
            return greedy(llm, batch_prompts(BATCH))

        healthy = accepted_share(llm, generate)
        ours = model_runner(llm)._proposer
        with monkeypatch.context() as context:
            broken = break_parts(
                context,
                (ours, "propose", 5),
                (ours, "record_verified", 13),
                (ours._drafter, "forward", 17)
                if proposer == "draft_model"
                else (ours, "_find", 17),
            )
            assert accepted_share(llm, generate) > 0.5 * healthy
        failures = [part.num_failures for part in broken]
        assert min(failures) >= 2
        assert stats(llm)["num_failed_proposals"] == sum(failures)
        assert len(logged) == 1
        # What remains of it: nothing. The same drafts, and the same accepted, but for
        # what was learned of copies.
        if proposer == "llma":
            ours._records.clear()
        assert accepted_share(llm, generate) == healthy


def nan_at_times(compute_logits: Callable[..., torch.Tensor]) -> Any:
    """Every third forward's logits are NaN, and of the others those of one row."""
    num_calls = 0

    def compute(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        logits = compute_logits(*args, **kwargs)
        logits[slice(None) if num_calls % 3 == 0 else 0] = float("nan")
        return logits

    return compute


def only_one_token_is_allowed(llm: Any) -> list[list[int]]:
    """Sampled: what is exact must equal greedy decoding."""
    return greedy(llm, batch_prompts(BATCH), **ONE_OUTCOME)


def test_nan_from_the_draft_model_costs_drafts_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(EngineConfig(SAMPLED_DRAFTS)) as llm:
        model = model_runner(llm).drafter.model
        monkeypatch.setattr(model, "compute_logits", nan_at_times(model.compute_logits))
        assert accepted_share(llm, lambda: greedy(llm, batch_prompts(BATCH))) > 0
        assert accepted_share(llm, lambda: only_one_token_is_allowed(llm)) > 0
        assert stats(llm)["num_failed_proposals"] == 0


def odd_draft_model(folder: Path, max_position: int) -> str:
    """Another dtype, fewer positions than the target's, and no tokenizer."""
    shutil.copytree(DRAFT, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    weights = load_file(folder / "model.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float16", "max_position_embeddings": max_position}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_odd_draft_model_drafts_as_far_as_it_goes(tmp_path: Path) -> None:
    lengths = sorted(len(p) for p in prompt_token_ids())
    limit = lengths[len(lengths) // 2] + 24  # half of the prompts reach it
    model = odd_draft_model(tmp_path / "draft", limit)
    with running(EngineConfig(DRAFT_MODEL | {"model": model})) as llm:
        positions = []
        drafter = model_runner(llm).drafter.model
        drafter.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(
                int(kwargs["positions"].max())
            ),
            with_kwargs=True,
        )
        share = accepted_share(llm, lambda: greedy(llm, batch_prompts(BATCH)))
        assert share > 0.1
        assert max(positions) == limit - 1
        drafted = stats(llm)["num_draft_tokens"]
    assert 0 < drafted < run("draft_model").first.counts["num_draft_tokens"]


def prompt_token_ids() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    return [tokenizer.encode(text) for text in batch_prompts(BATCH)]


def test_nan_distribution_counts_as_a_copy() -> None:
    nan = float("nan")
    probs = torch.tensor([[0.25, 0.75, 0.0], [nan, nan, nan], [nan, nan, nan]])
    count_nan_as_one_hot(probs, torch.tensor([0, 2, 0], dtype=torch.int32))
    assert probs.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_to_lower(error: Exception) -> None:
    with (
        pytest.raises(
            RuntimeError, match=r"while warming up\. Lower .*--max-num-seqs.*smaller"
        ) as caught,
        memory_advice("warming up"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)


def test_other_errors_at_start_pass_through() -> None:
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError) as caught, memory_advice("warming up"):
        raise error
    assert caught.value is error


def test_torch_out_of_memory_is_recognised() -> None:
    """What torch really raises here, on the CPU."""
    with pytest.raises(RuntimeError, match="Lower"), memory_advice("allocating"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_start_without_room_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the worker, where the KV cache is allocated."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def initialize(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", initialize)
    try:
        with (
            pytest.raises(RuntimeError, match=r"KV cache of target and draft.*Lower"),
            running(EngineConfig(DRAFT_MODEL)),
        ):
            pass
    finally:
        cleanup_dist_env_and_memory()  # for the next engine of this process
