"""Names of methods to what vLLM is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_emssd.bench import methods
from vllm_emssd.bench.methods import (
    CHECK_LENGTH,
    COPY_LENGTH,
    DESCRIPTIONS,
    Method,
    in_one_engine,
    parse_method,
)
from vllm_emssd.config import DraftLengthName, EmssdConfig, parse_speculative_config

STOCK_KEYS = {"method", "model", "num_speculative_tokens"}
STOCK_KEYS |= {"enable_adaptive_verification"}
NAMES = [name for name in DESCRIPTIONS if "=" not in name]


@pytest.fixture(autouse=True)
def arctic_inference_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as asking for it goes; it is not among what the tests need."""
    monkeypatch.setattr(methods, "find_spec", lambda name: name == "arctic_inference")


def config(name: str) -> dict[str, Any]:
    found = parse_method(name, "DRAFT").speculative_config
    assert found is not None
    return found


def test_plain_speculates_not() -> None:
    assert parse_method("plain", None).speculative_config is None


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain"])
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
    ngram, llma, suffix = config("ngram"), config("llma"), config("suffix")
    assert ngram["num_speculative_tokens"] == llma["copy_length"] == COPY_LENGTH
    assert suffix["num_speculative_tokens"] == COPY_LENGTH
    assert ngram["prompt_lookup_min"] == ngram["prompt_lookup_max"] == CHECK_LENGTH
    assert config("ngram-longest")["prompt_lookup_max"] > CHECK_LENGTH
    ours = EmssdConfig(proposer="llma")
    assert (ours.check_length, ours.copy_length) == (CHECK_LENGTH, COPY_LENGTH)


def test_lengths_by_name() -> None:
    twelve = {"num_speculative_tokens": 12}
    assert config("k12") == config("emssd") | twelve
    assert config("stock-k12") == config("stock") | twelve
    assert parse_method("stock", "DRAFT", 12).speculative_config == config("stock-k12")


def test_what_vllm_itself_can_leave_out() -> None:
    asked = {"enable_adaptive_verification": True}
    assert config("stock-adaptive") == config("stock") | asked
    assert config("auto-adaptive") == config("auto") | asked
    by_batch = config("stock-by-batch")
    schedule = by_batch.pop("num_speculative_tokens_per_batch_size")
    assert by_batch == config("stock")
    found = build_dynamic_sd_schedule_lookup(schedule, 600, 5)
    assert [found[n] for n in (1, 16, 17, 64, 65, 600)] == [5, 5, 3, 3, 1, 1]


@pytest.mark.parametrize("architecture", ["Eagle3Speculator", "LlamaForCausalLMEagle3"])
def test_stock_with_a_head_is_vllms_eagle3(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    for head in (str(tmp_path), "someone/llama-EAGLE3"):
        found = parse_method("stock-k3", head).speculative_config
        asked = {"method": "eagle3", "model": head, "num_speculative_tokens": 3}
        assert found == asked
    assert config("stock-k3")["method"] == "draft_model"


def test_custom() -> None:
    method = parse_method('mine={"method": "suffix"}', None)
    assert (method.name, method.speculative_config) == ("mine", {"method": "suffix"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k01", "unknown method"),
        ("ngram-k3", "unknown method"),
        ("vanilla", "choose from plain"),
        ("mine={", "not JSON"),
        ("mine=[]", "JSON object"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_method(text, "DRAFT")


@pytest.mark.parametrize(
    "name",
    ["stock", "stock-k3", "stock-adaptive", "emssd", "k3", "auto", "padded", "mixed"],
)
def test_needs_a_draft_model(name: str) -> None:
    with pytest.raises(ValueError, match="--draft-model"):
        parse_method(name, None)


def test_suffix_names_the_package_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install arctic-inference"):
        parse_method("suffix", None)


# ---------------------------------------------------------------- in one engine


def test_lengths_are_told_to_the_engine_of_auto() -> None:
    asked = [Method(name, {}) for name in ("k0", "auto", "k3")]
    host, found = in_one_engine(asked)
    assert host == asked[1]
    assert {m.name: m.setting for m in found} == {
        "k0": ("emssd_fix_draft_length", 0),
        "auto": ("emssd_fix_draft_length", None),
        "k3": ("emssd_fix_draft_length", 3),
    }


def test_proposers_are_told_to_the_engine_of_mixed() -> None:
    asked = [Method(name, {}) for name in ("llma-auto", "mixed-auto", "auto", "k3")]
    host, found = in_one_engine(asked)
    assert host == asked[1]
    assert {m.name: m.setting for m in found} == {
        "llma-auto": ("emssd_use_proposer", "llma"),
        "mixed-auto": ("emssd_use_proposer", None),
        "auto": ("emssd_use_proposer", "draft_model"),
        "k3": ("emssd_fix_draft_length", 3),
    }


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["auto", "stock"], "cannot run 'stock'"),
        (["k1", "k2"], "add one of them to --methods"),
        (["auto", "llma-auto"], "cannot run 'llma-auto'"),
        (["auto", "k17"], "kN up to 16"),
        (["mixed-auto", "k17"], "cannot run 'k17'"),
    ],
)
def test_what_one_engine_cannot_run_is_refused(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        in_one_engine([Method(name, {}) for name in names])
