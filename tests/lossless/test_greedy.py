"""Float32 output under every sampling parameter is plain decoding's, token for token:
of greedy requests, and of sampled ones that have a seed. `test_inventory.py` sees to it
that no parameter of vLLM's is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from tests.engine import model_runner, stop_counting_others
from tests.lossless.engines import (
    OURS,
    Sampled,
    engine,
    sample,
    sample_together,
    texts,
)
from tests.lossless.test_auto import random_costs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer"},
    },
    "required": ["name", "size"],
}
TAG = {  # text, in which an object follows each `self`
    "structures": [{"begin": "self", "schema": SCHEMA, "end": "."}],
    "triggers": ["self"],
}
GRAMMAR = 'root ::= "x = " digit "+" digit\ndigit ::= [0-9]+'


def _greedy(**parameters: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 40} | parameters))


def _structured(**constraint: Any) -> SamplingParams:
    return _greedy(structured_outputs=StructuredOutputsParams(**constraint))


def _seeded(**parameters: Any) -> list[SamplingParams]:
    """Sampled, with another seed for each of eight requests."""
    return [
        _greedy(**({"temperature": 0.8, "ignore_eos": True, "seed": i} | parameters))
        for i in range(8)
    ]


def _thinking(**parameters: Any) -> list[SamplingParams]:
    return [
        _greedy(**(parameters | {"ignore_eos": True, "thinking_token_budget": budget}))
        for budget in (0, 1, None, 3, 7, None, 2, 20)
    ]


def _limited(max_draft_tokens: int) -> SamplingParams:
    extra_args = {"emssd_max_draft_tokens": max_draft_tokens}
    return _greedy(ignore_eos=True, extra_args=extra_args)


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
    "grammar": _structured(grammar=GRAMMAR),
    "json_object": _structured(json_object=True),
    "json without white space": _structured(
        json=json.dumps(SCHEMA), disable_any_whitespace=True
    ),
    "structural_tag": _structured(structural_tag=json.dumps(TAG)),
    "flat_logprobs": _greedy(logprobs=2, flat_logprobs=True, ignore_eos=True),
    "logprob_token_ids": _greedy(logprob_token_ids=[5, 300, 6], ignore_eos=True),
    "logprobs of named and of likely tokens": [
        _greedy(logprob_token_ids=[5, 6], ignore_eos=True),
        _greedy(logprobs=0, ignore_eos=True),
        _greedy(ignore_eos=True),
        _greedy(logprob_token_ids=[7], logprobs=1, ignore_eos=True),
    ]
    * 2,
    "text": _greedy(
        max_tokens=96, skip_special_tokens=False, spaces_between_special_tokens=False
    ),
    "no text": _greedy(detokenize=False, ignore_eos=True),
    "no prefix cache": _greedy(skip_reading_prefix_cache=True, ignore_eos=True),
    "repetition_detection": _greedy(
        max_tokens=96,
        ignore_eos=True,
        repetition_detection=RepetitionDetectionParams(
            max_pattern_size=6, min_pattern_size=1, min_count=2
        ),
    ),
    "seed": _seeded(),
    "seed, all filters": _seeded(
        temperature=1.0, top_p=0.9, top_k=50, min_p=0.02, presence_penalty=0.3
    ),
    "seed, n": _seeded(n=2),
    # Prompts come in pieces, which must not move a generator.
    "seed, no prefix cache": _seeded(skip_reading_prefix_cache=True),
    "seed, logprobs": _seeded(logprobs=2),
    "seed, min_tokens": _seeded(ignore_eos=False, min_tokens=9, max_tokens=64),
    "seed, grammar": _seeded(
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(regex=r"[a-z]{5,12}"),
    ),
    "thinking_token_budget": _thinking(),
    "thinking_token_budget, seed": _thinking(temperature=0.9, seed=4),
    "no drafts": _limited(0),
    "at most one draft": _limited(1),
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
NONE = _greedy(ignore_eos=True)
# Stock refuses logit_bias, samples wrongly on the CPU and forces the end of thinking
# elsewhere; it has no logprobs of named tokens.
STOCK_CASES = ("ignore_eos", "eos", "stop strings", "penalties", "bad_words", "json")
# Nothing to draft, or a grammar too narrow for a drafter that does not know it.
FEW_DRAFTS = (
    "no drafts",
    "one token",
    "two tokens",
    "choice",
    "grammar",
    "json_object",
    "json without white space",
    "seed, grammar",
)
MUST_ACCEPT = [c for c in CASES if c not in FEW_DRAFTS]
AUTO = ("auto", "llma, auto", "mixed, auto")
SLOW = (
    "mixed",
    "eagle3",
    *AUTO,
    "draft_model, padded",
    "llma, padded",
    "mixed, padded",
)
PATHS = {"no drafts", "rejected draft", "behind all drafts"}


def engines(*names: str) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in names
    ]


@contextmanager
def recorded_paths(llm: Any) -> Iterator[set[str]]:
    """By which rows tokens were sampled: in a step without drafts, in the row of a
    draft that was rejected, and in the one behind the last draft."""
    runner, paths = model_runner(llm), set()
    plain, sample = runner.sampler.forward, runner._sample

    def sample_plainly(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("predict_bonus_token"):
            paths.add("no drafts")
        return plain(*args, **kwargs)

    def sample_any(logits: Any, metadata: Any) -> Any:
        output = sample(logits, metadata)
        if metadata is not None:
            num_sampled = (output.sampled_token_ids != -1).sum(dim=1)
            num_drafts = torch.tensor(metadata.num_draft_tokens)
            has_drafts = num_drafts > 0
            if (has_drafts & (num_sampled == num_drafts + 1)).any():
                paths.add("behind all drafts")
            if (has_drafts & (num_sampled <= num_drafts)).any():
                paths.add("rejected draft")
        return output

    runner.sampler.forward, runner._sample = sample_plainly, sample_any
    try:
        yield paths
    finally:
        del runner.sampler.forward, runner._sample


def shortened(params: SamplingParams, max_tokens: int) -> SamplingParams:
    params = params.clone()
    params.max_tokens = min(params.max_tokens or max_tokens, max_tokens)
    params.min_tokens = min(params.min_tokens, max_tokens - 5)
    return params


def arrangements(case: str) -> dict[str, tuple[list[str], list[SamplingParams]]]:
    """The case for all requests, for one alone, and beside requests that use none,
    which need fewer tokens. By "case" or "case, arrangement"."""
    params = CASES[case]
    each = params if isinstance(params, list) else [params] * len(texts())
    beside = [p if i % 2 else NONE for i, p in enumerate(each)]
    return {
        case: (texts(), each),
        f"{case}, alone": (texts()[3:4], [shortened(each[3], 14)]),
        f"{case}, beside": (texts(), [shortened(p, 24) for p in beside]),
    }


@cache
def results(name: str) -> dict[str, Sampled]:
    """All arrangements of all cases on one engine; of ours also one by `STOPS`."""
    stops = stops_at_min_tokens() if name in OURS else None
    stop_counting_others()
    seen = {}
    with engine(name) as llm, random_costs(llm) if name in AUTO else nullcontext():
        if name == "stock":
            return {case: sample(llm, texts(), CASES[case]) for case in STOCK_CASES}
        arranged = {k: v for case in CASES for k, v in arrangements(case).items()}
        if name == "plain":
            # Beside others, flat logprobs are padded to what those ask for, and the end
            # of thinking may be forced on the request that moves into a row.
            alone = {
                k: v for k, v in arranged.items() if k.startswith(("flat", "thinking"))
            }
            return {k: sample(llm, *v) for k, v in alone.items()} | sample_together(
                llm, {k: v for k, v in arranged.items() if k not in alone}
            )
        for key, (prompts, params) in arranged.items():
            with recorded_paths(llm) as paths:
                seen[key] = sample(llm, prompts, params)
            PATHS_SEEN[name, key] = paths
        if stops is not None:
            seen[STOPS] = sample(llm, *stops[:2])
    return seen


PATHS_SEEN: dict[tuple[str, str], set[str]] = {}
STOPS = "stop at min_tokens"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", engines(*OURS, *SLOW))
def test_tokens_are_plain_decoding(name: str, case: str) -> None:
    for key in (case, f"{case}, alone", f"{case}, beside"):
        expected, seen = results("plain")[key], results(name)[key]
        assert seen.token_ids == expected.token_ids, key
        assert seen.texts == expected.texts, key
        assert seen.finish_reasons == expected.finish_reasons, key
        for field in ("logprobs", "prompt_logprobs"):
            _assert_close(getattr(seen, field), getattr(expected, field))


def _assert_close(seen: list[Any], expected: list[Any]) -> None:
    """Same positions and tokens, values within 1e-4."""
    for ours, plain in zip(seen, expected, strict=True):
        assert len(ours) == len(plain)
        for at_ours, at_plain in zip(ours, plain, strict=True):
            assert at_ours == pytest.approx(at_plain, abs=1e-4)


@pytest.mark.parametrize("case", MUST_ACCEPT)
def test_each_kind_of_row_was_sampled(case: str) -> None:
    results("draft_model")
    everywhere = PATHS_SEEN["draft_model", case]
    assert everywhere | PATHS_SEEN["draft_model", f"{case}, beside"] == PATHS


@pytest.mark.parametrize("name", engines("llma", "mixed", "eagle3", *AUTO))
def test_each_kind_of_row_was_sampled_of_copies_and_automatic_lengths(
    name: str,
) -> None:
    """In most cases: not every answer has something to copy."""
    results(name)
    seen = [
        PATHS_SEEN[name, case] | PATHS_SEEN[name, f"{case}, beside"]
        for case in MUST_ACCEPT
    ]
    assert seen.count(PATHS) > len(MUST_ACCEPT) // 2


def test_budgets_end_thinking() -> None:
    """Else the cases with a budget would show nothing."""
    thinking = results("plain")["thinking_token_budget"].token_ids
    free = results("plain")["ignore_eos"].token_ids
    assert sum(a != b[: len(a)] for a, b in zip(thinking, free, strict=True)) >= 3


@pytest.mark.parametrize("case", MUST_ACCEPT)
def test_drafts_are_accepted_as_by_stock(case: str) -> None:
    ours = results("draft_model")[case]
    assert ours.num_accepted_tokens > 0
    if case in STOCK_CASES:
        stock = results("stock")[case]
        assert ours.num_accepted_tokens == pytest.approx(
            stock.num_accepted_tokens, rel=0.1, abs=3
        )


@pytest.mark.parametrize("name", engines("llma", "mixed"))
def test_copies_are_accepted(name: str) -> None:
    accepting = [c for c, seen in results(name).items() if seen.num_accepted_tokens]
    assert len(accepting) >= len(CASES) // 2


@pytest.mark.parametrize("name", engines(*OURS, "mixed", "eagle3"))
def test_requests_may_limit_their_drafts(name: str) -> None:
    seen = results(name)
    assert seen["no drafts"].num_draft_tokens == 0
    one = seen["at most one draft"]
    num_tokens = sum(map(len, one.token_ids))
    assert 0 < one.num_draft_tokens <= num_tokens - one.num_accepted_tokens
    assert one.num_accepted_tokens > 0
    assert seen["no drafts, beside"].num_draft_tokens > 0


def stops_at_min_tokens() -> tuple[list[str], list[SamplingParams], list[list[int]]]:
    """Prompts, parameters and right answers: every position of plain's answers is made
    the first one at which a stop token may end them."""
    prompts, params, expected = [], [], []
    answers = results("plain")["ignore_eos"].token_ids
    for text, answer in zip(texts(), answers, strict=True):
        for least in range(2, 36):
            if answer[least] not in answer[:least]:
                stop = [answer[least]]
                prompts.append(text)
                params.append(_greedy(min_tokens=least, stop_token_ids=stop))
                expected.append(answer[: least + 1])
    return prompts, params, expected


@pytest.mark.parametrize("name", OURS)
def test_a_stop_token_counts_once_min_tokens_are_reached(name: str) -> None:
    """One that stands right behind accepted drafts, too."""
    assert results(name)[STOPS].token_ids == stops_at_min_tokens()[2]
