"""A reference changes how many tokens a step brings, never which.

The one that is right is the answer itself, as plain decoding gave it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import counting, stop_counting_others
from tests.lossless.engines import NUM_PROMPTS, Sampled, engine, sample, texts
from tests.lossless.test_greedy import CASES
from tests.lossless.test_greedy import results as greedy_results

VOCABULARY = 2048
ENGINES = ["mixed", "llma", pytest.param("eagle3, mixed", marks=pytest.mark.slow)]
KINDS = {
    "none": [None] * NUM_PROMPTS,
    "empty text": [""] * NUM_PROMPTS,
    "empty list": [[]] * NUM_PROMPTS,
    "one token": [[i] for i in range(NUM_PROMPTS)],
    "of another request": None,  # filled in from the answers
    "right, text": None,
    "right, token ids": None,
    "right, then wrong": None,
    "one token throughout": [[7] * 1280] * NUM_PROMPTS,
    "scrambled": [[i * 7919 % VOCABULARY for i in range(1280)]] * NUM_PROMPTS,
    "not quite text": ["\ud800\x00<|endoftext|>" * 40] * NUM_PROMPTS,
}


def _references(kind: str, answers: Sampled) -> list[Any]:
    ids = answers.token_ids
    return {
        "of another request": [*ids[1:], ids[0]],
        "right, text": answers.texts,
        "right, token ids": ids,
        "right, then wrong": [t[:20] + [t[20] + 1] * 9 + t[20:] for t in ids],
    }.get(kind) or KINDS[kind]


def _params(reference: Any) -> SamplingParams:
    params = CASES["ignore_eos"]
    assert isinstance(params, SamplingParams)
    params = params.clone()
    if reference is not None:
        params.extra_args = {"emssd_reference": reference}
    return params


@cache
def _runs(name: str) -> dict[str, Sampled]:
    """Every kind on one engine."""
    answers = greedy_results("plain")["ignore_eos"]
    stop_counting_others()
    with engine(name) as llm:
        seen, drafted = {}, {}
        for kind in KINDS:
            params = [_params(r) for r in _references(kind, answers)]
            given = [p.extra_args and dict(p.extra_args) for p in params]
            with counting(llm) as gained:
                seen[kind] = sample(llm, texts(), params)
            assert [p.extra_args for p in params] == given, "the user's were changed"
            drafted[kind] = gained["num_draft_rows_decode"]
        _check_edit(llm)
        after = sample(llm, texts(), _params(None))
        assert after.token_ids == answers.token_ids
    if "mixed" in name:
        assert drafted["right, token ids"] < 0.3 * drafted["none"], "copies are free"
    return seen


def _check_edit(llm: Any) -> None:
    """One word of the reference differs throughout from what the model will write: at
    least 5 tokens a forward. The model is too small to edit as asked; so its own
    answer is the edited text, and the reference is made from it."""
    long = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
    prompts = texts()
    answers = sample(llm, prompts, long).token_ids
    edited = [_changed_throughout(llm.get_tokenizer(), answer) for answer in answers]
    given = [(p, e) for p, e in zip(prompts, edited, strict=True) if e is not None]
    assert len(given) >= 4
    params = []
    for _, reference in given:
        one = long.clone()
        one.extra_args = {"emssd_reference": reference}
        params.append(one)
    with counting(llm) as gained:
        again = sample(llm, [p for p, _ in given], params).token_ids
    assert again == [a for a, e in zip(answers, edited, strict=True) if e is not None]
    assert gained["num_emitted_tokens"] >= 5 * gained["num_request_steps"]


def _changed_throughout(tokenizer: Any, answer: list[int]) -> list[int] | None:
    """The answer with the word it uses most replaced by two tokens everywhere."""
    words = [t for t in answer if tokenizer.decode([t]).strip().isidentifier()]
    if not words:
        return None
    word = max(words, key=words.count)
    if words.count(word) < 4:
        return None
    return [t for token in answer for t in ([11, 12] if token == word else [token])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENGINES)
def test_tokens_are_plain_decoding(name: str, kind: str) -> None:
    seen = _runs(name)[kind]
    assert seen.token_ids == greedy_results("plain")["ignore_eos"].token_ids


@pytest.mark.parametrize("name", ENGINES)
def test_right_reference_is_copied_whole(name: str) -> None:
    """40 tokens: one from the prompt, then 8 a forward, of which one is the target's.
    Tokenized anew, text may give other tokens than the answer had."""
    runs = _runs(name)
    assert runs["right, token ids"].num_accepted_tokens >= NUM_PROMPTS * (39 - 5)
    assert runs["right, text"].num_accepted_tokens >= NUM_PROMPTS * 24
    right = runs["right, token ids"].num_accepted_tokens
    assert runs["none"].num_accepted_tokens < right
    assert runs["of another request"].num_accepted_tokens < right
