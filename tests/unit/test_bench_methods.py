"""Names of methods to what vLLM is asked for."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from vllm_emssd.bench import methods
from vllm_emssd.bench.methods import (
    DESCRIPTIONS,
    MethodOptions,
    fixed_length,
    parse_method,
)
from vllm_emssd.config import DraftLengthName, parse_speculative_config

OPTIONS = MethodOptions(draft_model="DRAFT", num_speculative_tokens=5)
STOCK_KEYS = {"method", "model", "num_speculative_tokens"}
NAMES = [name for name in DESCRIPTIONS if name.isidentifier() or "-" in name]


@pytest.fixture(autouse=True)
def arctic_inference_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as asking for it goes; it is not among what the tests need."""
    monkeypatch.setattr(methods, "find_spec", lambda name: name == "arctic_inference")


def config(name: str) -> dict[str, Any]:
    found = parse_method(name, OPTIONS).speculative_config
    assert found is not None
    return found


def test_plain_speculates_not() -> None:
    assert parse_method("plain", OPTIONS).speculative_config is None


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("plain", "kN")])
def test_emssd_accepts_its_own(name: str) -> None:
    """Every configuration of ours passes the plugin's own check."""
    asked = config(name)
    if asked["method"] == "emssd":
        ours, _ = parse_speculative_config(asked, STOCK_KEYS)
        copies = [n for n in ("llma", "mixed") if n in name]
        assert [ours.proposer] == (copies or ["draft_model"])
        assert ours.unpad_inputs == ("padded" not in name)
        assert ours.draft_length in get_args(DraftLengthName)
        assert (ours.draft_length == "auto") == ("auto" in name)


def test_same_lengths_on_both_sides() -> None:
    assert config("stock")["num_speculative_tokens"] == 5
    assert config("emssd")["num_speculative_tokens"] == 5
    ngram, llma = config("ngram"), config("llma")
    assert ngram["num_speculative_tokens"] == llma["copy_length"]
    assert ngram["prompt_lookup_min"] == ngram["prompt_lookup_max"]
    assert ngram["prompt_lookup_max"] == llma["check_length"]
    assert config("ngram-longest")["prompt_lookup_max"] > llma["check_length"]


def test_fixed_lengths_by_name() -> None:
    assert config("k12") == config("emssd") | {"num_speculative_tokens": 12}


def test_which_lengths_are_fixed() -> None:
    lengths = {n: fixed_length(parse_method(n, OPTIONS)) for n in ("k0", "k8", "auto")}
    assert lengths == {"k0": 0, "k8": 8, "auto": None}


def test_custom() -> None:
    method = parse_method('mine={"method": "suffix"}', OPTIONS)
    assert (method.name, method.speculative_config) == ("mine", {"method": "suffix"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k01", "unknown method"),
        ("vanilla", "choose from plain"),
        ("mine={", "not JSON"),
        ("mine=[]", "JSON object"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_method(text, OPTIONS)


@pytest.mark.parametrize("name", ["stock", "emssd", "k3", "auto", "padded", "mixed"])
def test_needs_a_draft_model(name: str) -> None:
    with pytest.raises(ValueError, match="--draft-model"):
        parse_method(name, MethodOptions(draft_model=None))


def test_suffix_names_the_package_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install arctic-inference"):
        parse_method("suffix", OPTIONS)


def test_suffix_drafts_as_many_as_llma_and_remembers_no_answers() -> None:
    suffix = config("suffix")
    assert suffix["num_speculative_tokens"] == config("llma")["copy_length"]
    assert suffix["suffix_decoding_max_cached_requests"] == 0
