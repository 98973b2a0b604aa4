"""The soak's own checks see what they look for."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import soak
import soak_load
from soak_load import Answer, Client, GreedyRequest, Tally, WrongAnswerError

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
    assert soak.check_counters(CLEAN, Tally(completion_tokens=30), 5) == []


@pytest.mark.parametrize(
    ("cut_short", "counted_by_vllm", "adds_up"),
    [(2, 10, True), (2, 1, True), (1, 5, True), (1, 4, False), (2, 11, False)],
)
def test_vllm_may_leave_out_what_was_cut_short(
    cut_short: int, counted_by_vllm: int, adds_up: bool
) -> None:
    """At most K accepted drafts of each request that was aborted in mid-step."""
    counted = {"vllm:spec_decode_num_accepted_tokens_total": counted_by_vllm}
    tally = Tally(completion_tokens=30, cut_short=cut_short)
    assert (soak.check_counters(CLEAN | counted, tally, 5) == []) == adds_up


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vllm_emssd:num_request_steps_total", 21, "tokens emitted"),
        ("vllm:spec_decode_num_accepted_tokens_total", 9, "vLLM counts 9"),
        ("vllm_emssd:num_draft_tokens_total", 9, "more drafts accepted"),
        ("vllm_emssd:num_failed_proposals_total", 1, "proposals failed"),
        ("vllm:num_requests_running", 1, "num_requests_running"),
        ("vllm:num_requests_waiting", 1, "num_requests_waiting"),
        ("vllm:kv_cache_usage_perc", 0.1, "blocks are in use"),
        ("vllm:num_preemptions_total", 0, "nothing was preempted"),
    ],
)
def test_what_does_not_add_up_is_named(name: str, value: float, message: str) -> None:
    [wrong] = soak.check_counters(CLEAN | {name: value}, Tally(completion_tokens=30), 5)
    assert message in wrong


def test_clients_cannot_get_more_than_was_emitted() -> None:
    [wrong] = soak.check_counters(CLEAN, Tally(completion_tokens=31), 5)
    assert "fewer tokens emitted" in wrong


def test_growth_is_that_of_the_later_two_thirds() -> None:
    warm_up = [(minute / 10, {"all": 100.0 * minute}) for minute in range(10)]
    later = [
        (1 + minute / 10, {"server": 800.0, "engine": 200 + 0.5 * minute})
        for minute in range(20)
    ]
    assert soak.growth(warm_up + later) == pytest.approx(5.0)
    assert soak.growth(later[:2]) == 0


def test_every_kind_is_asked_of_every_model() -> None:
    prompts = [list(range(700))] * 4
    requests = soak_load.make_greedy_requests(prompts, 32, random.Random(0), "ab")
    kinds = {request.kind for request in requests}
    for model in "ab":
        asked = [r for r in requests if r.arguments["model"] == model]
        assert {request.kind for request in asked} == kinds


@pytest.mark.parametrize("num_samples", [1, 2, 20, 21, 22, 41, 720])
def test_the_record_keeps_few_samples_of_memory_but_the_last(num_samples: int) -> None:
    memory = [(float(minute), {"server": 1.0}) for minute in range(num_samples)]
    kept = [sample["minutes"] for sample in soak.thinned(memory)]
    assert kept[0] == 0
    assert kept[-1] == num_samples - 1
    assert len(set(kept)) == len(kept) <= 21


def test_errors_in_the_log_are_found(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("INFO all is well\n(EngineCore pid=1) ERROR 01-01 lost\nINFO\n")
    assert soak.check_log(log) == ["log: (EngineCore pid=1) ERROR 01-01 lost"]


def test_catalogue_has_every_kind_within_the_context() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(2048) for _ in range(300)] for _ in range(10)]
    requests = soak_load.make_greedy_requests(prompts, 64, rng)
    assert {r.kind for r in requests} == {
        "plain",
        "stop",
        "grammar",
        "logprobs",
        "penalties",
        "bias",
        "full",
    }
    for request in requests:
        arguments = request.arguments
        total = len(arguments["prompt"]) + arguments["max_tokens"]
        assert total <= soak_load.MAX_MODEL_LEN
        assert (total == soak_load.MAX_MODEL_LEN) == (request.kind == "full")
        assert arguments["temperature"] == 0
        assert arguments["extra_body"]["return_token_ids"]


REQUEST = GreedyRequest("plain", {"prompt": [1], "max_tokens": 2})
EXPECTED = Answer((5, 6), "ab", "length", (-0.5, -0.25))


def client_that_answers(answer: Answer, tally: Tally) -> Client:
    """As the OpenAI client does, whole or in chunks of one token."""

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
    return Client(fake, tally)


@pytest.mark.parametrize("streams", [False, True])
def test_right_answer_is_counted(streams: bool) -> None:
    tally = Tally()
    client = client_that_answers(EXPECTED, tally)
    asyncio.run(client.check_greedy(REQUEST, EXPECTED, streams))
    assert tally.completion_tokens == 2


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        Answer((5, 7), "ab", "length", (-0.5, -0.25)),
        Answer((5, 6), "ac", "length", (-0.5, -0.25)),
        Answer((5, 6), "ab", "stop", (-0.5, -0.25)),
        Answer((5, 6), "ab", "length", (-0.5, -0.35)),
        Answer((5,), "a", "length", (-0.5,)),
    ],
)
def test_wrong_answer_is_seen(wrong: Answer, streams: bool) -> None:
    client = client_that_answers(wrong, Tally())
    with pytest.raises(WrongAnswerError):
        asyncio.run(client.check_greedy(REQUEST, EXPECTED, streams))


@pytest.mark.parametrize("seed", range(8))
def test_sampled_answer_of_another_length_is_seen(seed: int) -> None:
    """The seed chooses what is asked for; what comes is one choice of 2 tokens."""
    client = client_that_answers(EXPECTED, Tally())
    with pytest.raises(WrongAnswerError):
        asyncio.run(client.check_sampled([1], random.Random(seed)))


def test_accepting_a_bad_request_is_seen() -> None:
    client = client_that_answers(EXPECTED, Tally())
    with pytest.raises(WrongAnswerError, match="of a bad request"):
        asyncio.run(client.refuse([1], random.Random(0)))
