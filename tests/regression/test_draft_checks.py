"""A draft model that cannot work stops the start, before anything large is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine import DRAFT, TARGET


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DRAFT, tmp_path / "draft"))


def create(model: Path | str, **options: Any) -> Any:
    return EngineArgs(
        model=TARGET,
        max_model_len=512,
        speculative_config={"method": "emssd", "model": str(model)},
        **options,
    ).create_engine_config()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_whole_draft_model_is_taken(draft: Path) -> None:
    assert create(draft).speculative_config.model == str(draft)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'model' .*nowhere' does not exist; correct"):
        create(tmp_path / "nowhere")


def test_weights_missing(draft: Path) -> None:
    (draft / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"'model' .* holds no weights .*download it again"
    ):
        create(draft)


def test_weights_need_not_be_there_to_be_made_up(draft: Path) -> None:
    (draft / "model.safetensors").unlink()
    assert create(draft, load_format="dummy").speculative_config.model == str(draft)


@pytest.mark.parametrize("size", [0, 7, 500, 1_000_000])
def test_weights_truncated(draft: Path, size: int) -> None:
    weights = draft / "model.safetensors"
    assert weights.stat().st_size > size
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is broken .*download the file again"
    ):
        create(draft)


def test_shard_missing(draft: Path) -> None:
    shards = {"a": "model.safetensors", "b": "model-00002.safetensors"}
    index = draft / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"lacks model-00002\.safetensors"):
        create(draft)


def test_config_missing(draft: Path) -> None:
    (draft / "config.json").unlink()
    with pytest.raises(ValueError, match=re.escape(str(draft))):
        create(draft)


def rotate_ids(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    tokens = list(vocab)
    tokenizer["model"]["vocab"] = dict(
        zip(tokens, [*list(vocab.values())[1:], vocab[tokens[0]]], strict=True)
    )
    tokenizer["added_tokens"] = []


def test_another_tokenizer_of_the_same_size(draft: Path) -> None:
    edit(draft / "tokenizer.json", rotate_ids)
    with pytest.raises(ValueError, match=r"another tokenizer .*remove 'model' to copy"):
        create(draft)


def test_draft_model_without_a_tokenizer_is_taken(draft: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (draft / name).unlink()
    assert create(draft).speculative_config.model == str(draft)
