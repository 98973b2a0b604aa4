"""The soak's own checks see what they look for."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.load_test import load, soak
from scripts.load_test.load import Answer, Known, Load, WrongAnswerError

CLEAN = {
    "vllm_emssd:num_emitted_tokens_total": 30.0,
    "vllm_emssd:num_accepted_tokens_total": 10.0,
    "vllm_emssd:num_request_steps_total": 20.0,
    "vllm_emssd:num_draft_tokens_total": 50.0,
    "vllm_emssd:num_failed_proposals_total": 0.0,
    "vllm:spec_decode_num_accepted_tokens_total": 10.0,
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "vllm:num_preemptions_total": 3.0,
}


def test_what_adds_up_is_clean() -> None:
    assert soak.check_counters(CLEAN, 30, 0) == []


@pytest.mark.parametrize(
    ("cut_short", "counted_by_vllm", "adds_up"),
    [(2, 10, True), (2, 1, True), (1, 5, True), (1, 4, False), (2, 11, False)],
)
def test_vllm_may_leave_out_what_was_cut_short(
    cut_short: int, counted_by_vllm: int, adds_up: bool
) -> None:
    """At most K accepted drafts of each request that was aborted in mid-step."""
    counted = {"vllm:spec_decode_num_accepted_tokens_total": counted_by_vllm}
    assert (soak.check_counters(CLEAN | counted, 30, cut_short) == []) == adds_up


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vllm_emssd:num_request_steps_total", 21, "one a step"),
        ("vllm:spec_decode_num_accepted_tokens_total", 9, "vLLM counts 9"),
        ("vllm_emssd:num_draft_tokens_total", 9, "more drafts accepted"),
        ("vllm_emssd:num_failed_proposals_total", 1, "proposals failed"),
        ("vllm:num_requests_running", 1, "left running"),
        ("vllm:num_requests_waiting", 1, "left waiting"),
        ("vllm:kv_cache_usage_perc", 0.1, "blocks are left"),
        ("vllm:num_preemptions_total", 0, "nothing was preempted"),
    ],
)
def test_what_does_not_add_up_is_named(name: str, value: float, message: str) -> None:
    [wrong] = soak.check_counters(CLEAN | {name: value}, 30, 0)
    assert message in wrong


def test_clients_cannot_get_more_than_was_emitted() -> None:
    [wrong] = soak.check_counters(CLEAN, 31, 0)
    assert "fewer tokens emitted" in wrong


def test_growth_is_that_of_the_later_two_thirds() -> None:
    warm_up = [(minute / 10, 100.0 * minute) for minute in range(10)]
    later = [(1 + minute / 10, 1000 + 0.5 * minute) for minute in range(20)]
    assert soak.growth(warm_up + later) == pytest.approx(5.0)
    assert soak.growth(later[:2]) == 0


def test_errors_in_the_log_are_found(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("INFO all is well\n(EngineCore pid=1) ERROR 01-01 lost\nINFO\n")
    assert soak.check_log(log) == ["log: (EngineCore pid=1) ERROR 01-01 lost"]


def test_greedy_requests_are_of_every_kind_within_the_context() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(2048) for _ in range(300)] for _ in range(10)]
    requests = load.greedy_requests(prompts, 64, rng)
    assert {kind for kind, _ in requests} == {*load.GREEDY}
    for kind, arguments in requests:
        total = len(arguments["prompt"]) + arguments["max_tokens"]
        assert total <= load.MAX_MODEL_LEN
        assert (total == load.MAX_MODEL_LEN) == (kind == "full")
        assert arguments["temperature"] == 0
        assert arguments["extra_body"]["return_token_ids"]


EXPECTED = Answer([5, 6], "ab", "length", [-0.5, -0.25])
KNOWN = Known("plain", {"prompt": [1], "max_tokens": 2}, EXPECTED)


def load_that_gets(answer: Answer) -> Load:
    """As the OpenAI client gives it, whole or in chunks of one token."""

    def part(token_ids: list[int], text: str, reason: str | None, logprobs: Any) -> Any:
        return SimpleNamespace(
            choices=[
                SimpleNamespace(
                    model_extra={"token_ids": token_ids},
                    text=text,
                    finish_reason=reason,
                    logprobs=SimpleNamespace(token_logprobs=list(logprobs)),
                )
            ]
        )

    async def chunks() -> Any:
        for i, token in enumerate(answer.token_ids):
            yield part(
                [token], answer.text[i : i + 1], None, answer.logprobs[i : i + 1]
            )
        yield part([], "", answer.finish_reason, [])

    async def create(stream: bool = False, **arguments: Any) -> Any:
        if stream:
            return chunks()
        return part(
            list(answer.token_ids), answer.text, answer.finish_reason, answer.logprobs
        )

    fake: Any = SimpleNamespace(completions=SimpleNamespace(create=create))
    return Load(fake, [KNOWN], [[1]])


class StreamOrNot(random.Random):
    """`random() < 0.5` is when it streams."""

    def __init__(self, streams: bool) -> None:
        super().__init__(0)
        self._first = 0.0 if streams else 0.9

    def random(self) -> float:
        return self._first


@pytest.mark.parametrize("streams", [False, True])
def test_right_answer_is_counted(streams: bool) -> None:
    asker = load_that_gets(EXPECTED)
    asyncio.run(asker.greedy(StreamOrNot(streams)))
    assert asker.completion_tokens == 2


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        Answer([5, 7], "ab", "length", [-0.5, -0.25]),
        Answer([5, 6], "ac", "length", [-0.5, -0.25]),
        Answer([5, 6], "ab", "stop", [-0.5, -0.25]),
        Answer([5, 6], "ab", "length", [-0.5, -0.35]),
        Answer([5], "a", "length", [-0.5]),
    ],
)
def test_wrong_answer_is_seen(wrong: Answer, streams: bool) -> None:
    with pytest.raises(WrongAnswerError):
        asyncio.run(load_that_gets(wrong).greedy(StreamOrNot(streams)))


@pytest.mark.parametrize("seed", range(8))
def test_sampled_answer_of_another_length_is_seen(seed: int) -> None:
    """The seed chooses what is asked for; what comes is one choice of 2 tokens."""
    with pytest.raises(WrongAnswerError):
        asyncio.run(load_that_gets(EXPECTED).sampled(random.Random(seed)))


def test_accepting_a_bad_request_is_seen() -> None:
    with pytest.raises(WrongAnswerError, match="of a bad request"):
        asyncio.run(load_that_gets(EXPECTED).refuse(random.Random(0)))
