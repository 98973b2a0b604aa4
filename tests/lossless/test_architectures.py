"""Each family of models that vLLM serves: plain decoding's tokens, or a refusal.

The table is `architectures.INVENTORY`; docs/compatibility.md shows it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from tests.engine import (
    EngineConfig,
    greedy,
    running,
    stats,
    stop_counting_others,
    vllm_counters,
)
from tests.lossless.architectures import (
    BLOCK_SIZE,
    CACHE_KINDS,
    DOCUMENT,
    INVENTORY,
    WHY_NOT,
    Architecture,
    make_drafter,
    make_model,
    prompts,
    table,
)
from vllm_emssd.integration import unsupported

NUM_TOKENS = 40
FIXED = {"method": "emssd", "draft_length": "fixed", "num_speculative_tokens": 4}
COPIES = FIXED | {"check_length": 2}  # so that some copies are wrong


def rows(**wanted: Any) -> list[Any]:
    """Rows of the table with these values; those not fast are slow tests."""
    return [
        pytest.param(row, id=row.example, marks=() if row.is_fast else pytest.mark.slow)
        for row in INVENTORY
        if all(getattr(row, name) == value for name, value in wanted.items())
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a row's model, made once."""
    folder = tmp_path_factory.mktemp("models")

    def made(row: Architecture) -> Path:
        path = folder / row.model_type
        return path if path.exists() else make_model(row, path)

    return made


def engine(row: Architecture, model: Path, speculative: dict[str, Any] | None) -> Any:
    stop_counting_others()
    return running(
        EngineConfig(
            speculative,
            model=str(model),
            dtype=row.dtype,
            max_model_len=256,
            max_num_batched_tokens=128,  # prompts in chunks
            prefix_caching=speculative is not None,
            kv_cache_bytes=64 << 20,
            options={"skip_tokenizer_init": True, "block_size": BLOCK_SIZE}
            | row.options,
        )
    )


_plain: dict[str, list[list[int]]] = {}


def plain_tokens(row: Architecture, model: Path) -> list[list[int]]:
    if row.example not in _plain:
        with engine(row, model, None) as llm:
            _plain[row.example] = greedy(llm, prompts(), NUM_TOKENS)
    answers = _plain[row.example]
    assert len(set(map(tuple, answers))) == len(answers)  # not degenerate
    assert sum(len(set(answer)) for answer in answers) >= 8 * len(answers)
    return answers


def assert_plain(llm: Any, expected: list[list[int]]) -> None:
    """Twice: the second time prompts are in the prefix cache."""
    for _ in range(2):
        assert greedy(llm, prompts(), NUM_TOKENS) == expected


@pytest.mark.parametrize("row", rows(target="exact", drafter="exact"))
def test_target_and_drafter_of_one_family(
    row: Architecture, models: Any, tmp_path: Path
) -> None:
    """Some drafts are right and some are not, of the model and of copies."""
    model = models(row)
    expected = plain_tokens(row, model)
    drafter = str(make_drafter(model, tmp_path / "drafter"))
    mixed = COPIES | {"model": drafter, "proposer": "mixed"}
    with engine(row, model, mixed) as llm:
        assert_plain(llm, expected)
        counts, accepted = stats(llm), num_accepted(llm)
    assert counts["num_draft_forwards"] > 0
    assert 0 < accepted < counts["num_draft_tokens"]


@pytest.mark.parametrize("row", rows(target="exact", drafter="exact"))
def test_drafts_of_the_target_itself_are_all_accepted(
    row: Architecture, models: Any
) -> None:
    """So the drafter's K/V is right: beyond windows, blocks, chunks and cache hits."""
    model = models(row)
    expected = plain_tokens(row, model)
    with engine(row, model, FIXED | {"model": str(model)}) as llm:
        assert_plain(llm, expected)
        counts, accepted = stats(llm), num_accepted(llm)
    assert accepted > 0
    # The first token comes with the prompt, then five in each step.
    num_steps = sum(1 + -(-(len(answer) - 1) // 5) for answer in expected)
    assert counts["num_request_steps"] == 2 * num_steps


@pytest.mark.parametrize("row", rows(target="exact"))
def test_copies_without_a_draft_model(row: Architecture, models: Any) -> None:
    """Blocks that only windows need are then freed behind them, unlike above."""
    model = models(row)
    expected = plain_tokens(row, model)
    with engine(row, model, COPIES) as llm:
        assert_plain(llm, expected)
        counts, accepted = stats(llm), num_accepted(llm)
    assert 0 < accepted < counts["num_draft_tokens"]


def num_accepted(llm: Any) -> int:
    return vllm_counters(llm)["vllm:spec_decode_num_accepted_tokens"]


def create(row: Architecture, model: Path, speculative: dict[str, Any]) -> Any:
    return EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=256,
        speculative_config=speculative,
        **row.options,
    ).create_engine_config()


@pytest.mark.parametrize("proposer", ["draft_model", "llma", "mixed"])
@pytest.mark.parametrize("row", rows(target="refused"))
def test_target_refused_at_start(row: Architecture, proposer: str, models: Any) -> None:
    model = models(row)
    speculative = FIXED | {"proposer": proposer}
    if proposer != "llma":
        speculative |= {"model": str(model)}
    with pytest.raises(ValueError, match=row.says) as refusal:
        create(row, model, speculative)
    assert re.search(r"--[a-z]", str(refusal.value))  # the flag to change


@pytest.mark.parametrize("row", rows(drafter="refused"))
def test_drafter_refused_at_start(row: Architecture, models: Any) -> None:
    (dense,) = (row for row in INVENTORY if row.example == "Llama")
    with pytest.raises(ValueError, match=row.drafter_says) as refusal:
        create(dense, models(dense), FIXED | {"model": str(models(row))})
    assert "--speculative-config: 'model'" in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.example) for r in INVENTORY if r.vllm_says],
)
def test_vllm_itself_cannot_run_it_here(row: Architecture, models: Any) -> None:
    """A row to be decided once it can."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with (
            pytest.raises(AttributeError, match=row.vllm_says),
            engine(row, models(row), None) as llm,
        ):
            greedy(llm, prompts(), NUM_TOKENS)
    finally:
        cleanup_dist_env_and_memory()


def test_stock_speculation_with_fixes_refuses_recurrent_state(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMSSD_CPU_FIXES", "1")
    (hybrid,) = (row for row in INVENTORY if row.example == "Granite 4")
    (dense,) = (row for row in INVENTORY if row.example == "Llama")
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    with pytest.raises(ValueError, match="Speculation does not support Granite"):
        create(hybrid, models(hybrid), ngram)
    config = create(dense, models(dense), ngram)
    assert config.parallel_config.worker_cls.endswith("FixedCPUWorker")


def test_on_gpus_recurrent_state_beside_attention_is_taken(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes it back there, as the worker checks layer by layer."""
    monkeypatch.setattr(unsupported.current_platform, "is_cpu", lambda: False)

    def refuse(example: str) -> None:
        (row,) = (row for row in INVENTORY if row.example == example)
        config = ModelConfig(str(models(row)), skip_tokenizer_init=True)
        unsupported.refuse_target(config)

    refuse("Granite 4")
    with pytest.raises(ValueError, match=r"has recurrent state.* --speculative-config"):
        refuse("Mamba-Codestral")


def test_every_row_has_an_outcome() -> None:
    assert len({row.example for row in INVENTORY}) == len(INVENTORY)
    for row in INVENTORY:
        assert row.target in ("exact", "refused")
        assert row.drafter in ("exact", "refused")
        assert bool(row.says) == (row.target == "refused"), row.example
        assert bool(row.drafter_says) == (row.drafter == "refused"), row.example


def test_every_kind_of_cache_that_vllm_has_is_in_the_table() -> None:
    kinds = {
        kind.__name__
        for kind in vars(kv_cache_interface).values()
        if isinstance(kind, type) and issubclass(kind, KVCacheSpec)
    }
    kinds |= {f"MambaSpec, {kind.name}" for kind in MambaAttentionBackendEnum}
    assert kinds == CACHE_KINDS.keys() | WHY_NOT.keys()
    assert set(CACHE_KINDS.values()) <= {row.example for row in INVENTORY}


def test_document_shows_the_table() -> None:
    assert table() in DOCUMENT.read_text(), "python -m tests.lossless.architectures"
