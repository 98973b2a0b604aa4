"""A draft model's tokenizer is compared by the ids it gives text, not by spellings."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from vllm.config import ModelConfig

from tests.engine import TARGET
from vllm_emssd.integration.frontend import draft_checks
from vllm_emssd.integration.frontend.draft_checks import (
    SAMPLE_TEXT,
    check_draft_tokenizer,
    shares_alike,
)

SPECIALS = [
    getattr(token["token_str"], "value", token["token_str"])
    for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS
]
WORDS = r"[^\s\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def learned_tokens(num_tokens: int = 300) -> list[bytes]:
    """Tokens of more than a byte, in the order in which they were merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _words()
    trainer = BpeTrainer(
        vocab_size=256 + num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [SAMPLE_TEXT, Path(draft_checks.__file__).read_text()]
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [_bytes_of(token) for token, _ in by_id if len(token) > 1]


def _words() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _spelled() -> dict[int, str]:
    """How Hugging Face's byte-level tokenizers spell each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(others)
    }


def _bytes_of(token: str) -> bytes:
    byte_of = {spelled: b for b, spelled in _spelled().items()}
    return bytes(byte_of[c] for c in token)


def tokens_by_rank() -> list[bytes]:
    return [bytes([b]) for b in range(256)] + learned_tokens()


def save_hf(
    folder: Path,
    tokens: list[bytes],
    specials: list[str] = SPECIALS,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> str:
    spelled = _spelled()
    names = ["".join(spelled[b] for b in token) for token in tokens]
    ids = {name: i for i, name in enumerate([*specials, *names])}
    merges = [
        (name[:i], name[i:])
        for name in names
        for i in range(1, len(name))
        if name[:i] in ids and name[i:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    if change is not None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return str(folder)


def save_mistral(folder: Path, tokens: list[bytes]) -> str:
    """The same tokenizer as Mistral's own library reads it."""
    vocab = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode("utf-8", errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": WORDS,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(SPECIALS) + len(tokens),
        "default_num_special_tokens": len(SPECIALS),
        "version": "v7",
    }
    specials = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocab, "special_tokens": specials})
    )
    return str(folder)


def target(tokenizer: str, **options: Any) -> ModelConfig:
    return ModelConfig(TARGET, tokenizer=tokenizer, **options)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        draft_checks.logger, "warning", lambda text, *args: said.append(text % args)
    )
    return said


def test_mistral_format_and_hugging_face_of_the_same_ids(
    tmp_path: Path, warnings: list[str]
) -> None:
    tokens = tokens_by_rank()
    mistral = save_mistral(tmp_path / "mistral", tokens)
    hf = save_hf(tmp_path / "hf", tokens)
    check_draft_tokenizer(hf, None, target(mistral, tokenizer_mode="mistral"))
    check_draft_tokenizer(mistral, None, target(mistral, tokenizer_mode="mistral"))
    assert not warnings


def test_planted_mismatch_is_refused_in_both_formats(tmp_path: Path) -> None:
    tokens = tokens_by_rank()
    mistral = save_mistral(tmp_path / "mistral", tokens)
    hf = save_hf(tmp_path / "hf", tokens)
    others = tokens[256:]
    random.Random(0).shuffle(others)
    shuffled = save_hf(tmp_path / "shuffled", tokens[:256][::-1] + others)
    for model, mode in ((mistral, "mistral"), (hf, "auto")):
        with pytest.raises(ValueError, match=r"another tokenizer .*remove 'model'"):
            check_draft_tokenizer(shuffled, None, target(model, tokenizer_mode=mode))


def test_other_special_tokens_are_told(tmp_path: Path, warnings: list[str]) -> None:
    tokens = tokens_by_rank()
    hf = save_hf(tmp_path / "hf", tokens)
    swapped = [*SPECIALS[:3], *SPECIALS[4:2:-1], *SPECIALS[5:]]  # [INST], [/INST]
    chat = save_hf(tmp_path / "chat", tokens, swapped)
    check_draft_tokenizer(chat, None, target(hf))
    (said,) = warnings
    assert "100% of a text's" in said
    assert "100% of special" not in said


def test_digits_grouped_otherwise_are_told(tmp_path: Path, warnings: list[str]) -> None:
    """Both know the same tokens, but one splits numbers into digits."""
    tokens = [*tokens_by_rank(), b"20", b"24", b"2024", b"12", b"123", b"00", b"000"]

    def groups_digits(content: dict[str, Any]) -> None:
        split = content["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = WORDS.replace(r"\p{N}| ?", r"\p{N}+| ?")

    hf = save_hf(tmp_path / "hf", tokens)
    grouping = save_hf(tmp_path / "grouping", tokens, change=groups_digits)
    check_draft_tokenizer(grouping, None, target(hf))
    (said,) = warnings
    assert "100% of special" in said
    assert "100% of a text's" not in said


def test_file_of_a_newer_tokenizers_library_is_no_reason_to_stop(
    tmp_path: Path, warnings: list[str]
) -> None:
    def is_newer(content: dict[str, Any]) -> None:
        content["model"]["type"] = "BPE2"

    hf = save_hf(tmp_path / "hf", tokens_by_rank())
    newer = save_hf(tmp_path / "newer", tokens_by_rank(), change=is_newer)
    check_draft_tokenizer(newer, None, target(hf))
    (said,) = warnings
    assert "was not compared with the target's" in said


class _Words:
    """Numbers words by their order in a list."""

    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()

    def __init__(self, ids: Callable[[int], int]) -> None:
        self._ids = ids

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self._ids(i) for i, _ in enumerate(text.split())]

    def get_vocab(self) -> dict[str, int]:
        return {}

    get_added_vocab = get_vocab


def test_share_of_ids_alike() -> None:
    def share(ids: Callable[[int], int]) -> float:
        return shares_alike(_Words(lambda i: i), _Words(ids))[0]

    num_words = len(SAMPLE_TEXT.split())
    assert share(lambda i: i) == 1
    assert share(lambda i: -i) == pytest.approx(1 / num_words)
    assert share(lambda i: i if i else -1) == pytest.approx(1 - 1 / num_words)
    assert share(lambda i: i + 1000) == 0
