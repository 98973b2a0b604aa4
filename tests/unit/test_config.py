"""The options: every error names the key and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from vllm_emssd.config import (
    ADAPTIVE,
    LOSSY_VERIFICATION,
    REFUSED_STOCK_KEYS,
    EmssdConfig,
    parse_speculative_config,
)

STOCK_KEYS = {
    "method",
    "model",
    "num_speculative_tokens",
    "quantization",
    "rejection_sample_method",
    "revision",
    *REFUSED_STOCK_KEYS,
    ADAPTIVE,
}
OUR_KEYS = sorted(EmssdConfig.model_fields)


def parse(**asked: Any) -> tuple[EmssdConfig, dict[str, Any]]:
    return parse_speculative_config({"method": "emssd", **asked}, STOCK_KEYS)


def error_of(**asked: Any) -> str:
    with pytest.raises(ValueError, match="--speculative-config") as caught:
        parse(**asked)
    return str(caught.value)


def test_defaults_without_model_are_those_of_the_llma_paper() -> None:
    config, stock = parse()
    assert config == EmssdConfig(
        proposer="llma",
        num_speculative_tokens=7,
        draft_length="auto",
        check_length=2,
        copy_length=7,
        unpad_inputs=True,
    )
    assert stock == {}


def test_defaults_with_model() -> None:
    config, stock = parse(model="draft")
    assert (config.proposer, config.num_speculative_tokens) == ("draft_model", 16)
    assert parse(model="draft", num_speculative_tokens=5)[0].num_speculative_tokens == 5
    assert parse(model="draft", draft_length="fixed")[0].num_speculative_tokens == 8
    assert config.unpad_inputs
    assert stock == {"model": "draft"}


def test_drafts_and_copies_are_mixed_by_default_where_that_was_measured() -> None:
    def proposer(**more: Any) -> EmssdConfig:
        asked = {"method": "emssd", "model": "draft", **more}
        return parse_speculative_config(asked, STOCK_KEYS, gain_was_measured=True)[0]

    assert proposer().proposer == "mixed"
    assert proposer(draft_length="auto", copy_length=9).copy_length == 9
    assert proposer().copy_length == proposer(model=None).max_draft_tokens == 15
    assert proposer(model=None, draft_length="fixed").max_draft_tokens == 7
    for alone in ({"draft_length": "fixed"}, {ADAPTIVE: True}):
        assert proposer(**alone).proposer == "draft_model"
    assert proposer(proposer="draft_model").proposer == "draft_model"
    assert proposer(model=None).proposer == "llma"
    assert proposer(num_speculative_tokens=3).max_draft_tokens == 3


def test_all_of_ours_are_taken() -> None:
    asked = {
        "proposer": "llma",
        "num_speculative_tokens": 4,
        "draft_length": "fixed",
        "check_length": 3,
        "copy_length": 5,
        "unpad_inputs": False,
    }
    assert sorted(asked) == OUR_KEYS, "a new key needs a case here"
    config, stock = parse(**asked)
    assert config.model_dump() == asked
    assert stock == {}


def test_mixed_drafts_and_copies_each_up_to_its_own_length() -> None:
    config, stock = parse(proposer="mixed", model="draft", copy_length=20)
    assert (config.num_speculative_tokens, config.copy_length) == (16, 20)
    assert config.max_draft_tokens == 20
    assert config.uses_draft_model
    assert config.copies
    assert stock == {"model": "draft"}
    assert parse(proposer="mixed", model="draft")[0].max_draft_tokens == 16
    assert parse(copy_length=3)[0].max_draft_tokens == 3


def test_none_means_default() -> None:
    assert parse(**dict.fromkeys(OUR_KEYS))[0] == parse()[0]


def test_stock_keys_pass_through_untouched() -> None:
    asked = {
        "method": "emssd",
        "model": "draft",
        "quantization": {"bits": 4},
        "revision": None,
        "num_speculative_tokens": 3,
    }
    before = dict(asked)
    config, stock = parse_speculative_config(asked, iter(STOCK_KEYS))
    assert config.num_speculative_tokens == 3
    assert stock == {"model": "draft", "quantization": {"bits": 4}, "revision": None}
    assert stock["quantization"] is asked["quantization"]
    assert asked == before, "the user's dictionary was changed"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_speculative_token", "num_speculative_tokens"),
        ("copy_len", "copy_length"),
        ("unpad_input", "unpad_inputs"),
        ("quantisation", "quantization"),
    ],
)
def test_unknown_key_gets_a_suggestion(key: str, meant: str) -> None:
    message = error_of(**{key: 1})
    assert repr(key) in message
    assert f"did you mean {meant!r}?" in message


def test_unknown_key_like_no_other_is_to_be_removed() -> None:
    message = error_of(zzz=1)
    assert "'zzz'" in message
    assert "remove it" in message
    assert all(key in message for key in OUR_KEYS)


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("num_speculative_tokens", 0, "greater than or equal to 1"),
        ("num_speculative_tokens", 129, "less than or equal to 128"),
        ("num_speculative_tokens", "4", "valid integer"),
        ("check_length", 65, "less than or equal to 64"),
        ("copy_length", [7], "valid integer"),
        ("draft_length", "longest", "'fixed'"),
        ("unpad_inputs", 0, "valid boolean"),
        ("proposer", "copy", "'draft_model'"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(
    key: str, value: Any, fix: str
) -> None:
    message = error_of(**{key: value})
    assert repr(key) in message
    assert fix in message
    assert repr(value) in message


@pytest.mark.parametrize("value", ["draft-model", "ngram", 1])
def test_wrong_proposer_is_named_though_there_is_a_model(value: Any) -> None:
    """The model is right; "remove it" would be the wrong advice."""
    message = error_of(model="draft", proposer=value)
    assert "'proposer'" in message
    assert "'draft_model'" in message
    assert "remove it" not in message


def test_all_wrong_values_are_named_at_once() -> None:
    message = error_of(check_length=0, unpad_inputs=1)
    assert "'check_length'" in message
    assert "'unpad_inputs'" in message


@pytest.mark.parametrize(
    ("asked", "key", "fix"),
    [
        ({"proposer": "draft_model"}, "proposer", "needs 'model'"),
        ({"proposer": "draft_model", "model": ""}, "proposer", "needs 'model'"),
        ({"proposer": "llma", "model": "draft"}, "model", "remove it"),
        ({"model": "draft", "copy_length": 7}, "copy_length", "remove one"),
        ({"model": "draft", "check_length": 2}, "check_length", "remove one"),
        ({"proposer": "mixed"}, "proposer", "needs 'model'"),
        ({"proposer": "llma", "model": "draft"}, "model", "'mixed'"),
        (
            {"proposer": "mixed", "model": "draft", ADAPTIVE: True},
            ADAPTIVE,
            'only "proposer": "draft_model"',
        ),
        ({ADAPTIVE: True}, ADAPTIVE, 'only "proposer": "draft_model"'),
    ],
)
def test_impossible_pair_names_key_and_fix(
    asked: dict[str, Any], key: str, fix: str
) -> None:
    message = error_of(**asked)
    assert f"{key!r} with" in message
    assert fix in message


@pytest.mark.parametrize("key", sorted(REFUSED_STOCK_KEYS))
def test_contradicting_stock_key_is_refused(key: str) -> None:
    message = error_of(model="draft", **{key: True})
    assert repr(key) in message
    assert REFUSED_STOCK_KEYS[key] in message


@pytest.mark.parametrize("key", sorted(REFUSED_STOCK_KEYS))
@pytest.mark.parametrize("off", [None, False])
def test_contradicting_stock_key_may_be_off(key: str, off: bool | None) -> None:
    assert parse(model="draft", **{key: off})[1] == {"model": "draft", key: off}


def test_lossy_verification_is_refused() -> None:
    message = error_of(model="draft", rejection_sample_method="fly")
    assert "'rejection_sample_method'" in message
    assert LOSSY_VERIFICATION in message
    exact = parse(model="draft", rejection_sample_method="block")[1]
    assert exact == {"model": "draft", "rejection_sample_method": "block"}


VALUES_OF_EVERY_KIND: list[Any] = [
    *(-1, 0, 2**63, 10**30, 2.0, 7.5, math.nan, math.inf, True, False),
    *("", "7", "fixed ", "\x00", "x" * 10_000, b"7", [], [1], {}, {"a": 1}, object()),
]
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "proposer": lambda v: v in ("draft_model", "llma"),
    "draft_length": lambda v: v in ("fixed", "auto"),
    "unpad_inputs": lambda v: type(v) is bool,
    "num_speculative_tokens": lambda v: type(v) is int and 1 <= v <= 128,
    "check_length": lambda v: type(v) is int and 1 <= v <= 64,
    "copy_length": lambda v: type(v) is int and 1 <= v <= 128,
}


@pytest.mark.parametrize("key", OUR_KEYS)
@pytest.mark.parametrize("value", VALUES_OF_EVERY_KIND, ids=lambda v: repr(v)[:12])
def test_value_of_every_kind(key: str, value: Any) -> None:
    """Taken where it is allowed, else refused by name; never any other error."""
    if ALLOWED[key](value):
        assert getattr(parse(**{key: value})[0], key) == value
    else:
        assert f"{key!r}" in error_of(**{key: value})


@pytest.mark.parametrize("key", ["", "x" * 10_000, "\x00", "__class__", "model_config"])
def test_key_of_every_kind(key: str) -> None:
    assert repr(key)[:100] in error_of(**{key: 1})


def test_error_on_a_huge_value_stays_readable() -> None:
    assert len(error_of(copy_length="x" * 1_000_000)) < 2000
    assert len(error_of(**{"x" * 1_000_000: 1})) < 2000
