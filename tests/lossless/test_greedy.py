"""Greedy float32 output under every sampling parameter is plain decoding's."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine import stop_counting_others
from tests.lossless.engines import OURS, Sampled, engine, sample, texts

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer"},
    },
    "required": ["name", "size"],
}
# Stock refuses logit_bias with speculation, and samples n > 1 wrongly on the CPU.
NO_STOCK = ("logit_bias", "mixed batch", "n")


def _greedy(**parameters: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 40} | parameters))


def _structured(**constraint: Any) -> SamplingParams:
    return _greedy(structured_outputs=StructuredOutputsParams(**constraint))


CASES: dict[str, SamplingParams | list[SamplingParams]] = {
    "ignore_eos": _greedy(ignore_eos=True),
    "eos": _greedy(max_tokens=96),
    "stop strings": _greedy(stop=["\n", "self"], include_stop_str_in_output=True),
    "stop token": _greedy(stop_token_ids=[10, 13, 200]),
    "min_tokens": _greedy(min_tokens=20, stop_token_ids=[10, 13, 200]),
    "one token": _greedy(max_tokens=1),
    "two tokens": _greedy(max_tokens=2),
    "penalties": _greedy(
        presence_penalty=0.6,
        frequency_penalty=0.4,
        repetition_penalty=1.15,
        ignore_eos=True,
    ),
    "logit_bias": _greedy(logit_bias={10: 4.0, 200: -100.0, 201: 3.0}, ignore_eos=True),
    "bad_words": _greedy(bad_words=["self", "return", "import"], ignore_eos=True),
    "allowed_token_ids": _greedy(
        allowed_token_ids=list(range(180, 700)), ignore_eos=True
    ),
    # vLLM allows n > 1 only with a temperature; top_k 1 leaves one token to sample.
    "n": _greedy(n=3, temperature=0.8, top_k=1, ignore_eos=True),
    "logprobs": _greedy(logprobs=4, ignore_eos=True),
    "prompt_logprobs": _greedy(prompt_logprobs=2, ignore_eos=True),
    "json": _structured(json=json.dumps(SCHEMA)),
    "regex": _structured(regex=r"(foo|bar)(_[a-z]{2,5}){1,4}"),
    "choice": _structured(choice=["first", "second one", "third"]),
    "mixed batch": [
        _greedy(ignore_eos=True),
        _greedy(max_tokens=3),
        _greedy(logit_bias={201: 3.0}, ignore_eos=True),
        _greedy(presence_penalty=0.9, ignore_eos=True),
        _greedy(bad_words=["self"], max_tokens=17),
        _structured(regex=r"[a-z]{5,12}"),
        _greedy(logprobs=2, ignore_eos=True),
        _greedy(allowed_token_ids=list(range(180, 700)), ignore_eos=True),
    ],
}
# Nothing to draft, or a grammar too narrow for a drafter that does not know it.
MUST_ACCEPT = [c for c in CASES if c not in ("one token", "two tokens", "choice")]


@cache
def results(name: str) -> dict[str, Sampled]:
    """All cases on one engine."""
    stop_counting_others()
    skipped = NO_STOCK if name == "stock" else ()
    with engine(name) as llm:
        return {
            case: sample(llm, texts(), params)
            for case, params in CASES.items()
            if case not in skipped
        }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name",
    [
        *OURS,
        "mixed",
        pytest.param("draft_model, padded", marks=pytest.mark.slow),
        pytest.param("llma, padded", marks=pytest.mark.slow),
        pytest.param("mixed, padded", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_plain_decoding(name: str, case: str) -> None:
    expected, seen = results("plain")[case], results(name)[case]
    assert seen.token_ids == expected.token_ids
    assert seen.texts == expected.texts
    assert seen.finish_reasons == expected.finish_reasons
    for field in ("logprobs", "prompt_logprobs"):
        _assert_close(getattr(seen, field), getattr(expected, field))


def _assert_close(seen: list[Any], expected: list[Any]) -> None:
    """Same positions and tokens, values within 1e-4."""
    for ours, plain in zip(seen, expected, strict=True):
        assert len(ours) == len(plain)
        for at_ours, at_plain in zip(ours, plain, strict=True):
            assert at_ours == pytest.approx(at_plain, abs=1e-4)


@pytest.mark.parametrize("case", MUST_ACCEPT)
def test_drafts_are_accepted_as_by_stock(case: str) -> None:
    ours = results("draft_model")[case]
    assert ours.num_accepted_tokens > 0
    if case not in NO_STOCK:
        stock = results("stock")[case]
        assert ours.num_accepted_tokens == pytest.approx(
            stock.num_accepted_tokens, rel=0.1, abs=3
        )


@pytest.mark.parametrize("name", ["llma", "mixed"])
def test_copies_are_accepted(name: str) -> None:
    accepting = [c for c, seen in results(name).items() if seen.num_accepted_tokens]
    assert len(accepting) >= len(CASES) // 2
