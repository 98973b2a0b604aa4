"""The simulated engine: rows and milliseconds by hand, and a plain oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.made_traces import (
    constant_trace,
    random_trace,
    request,
    straight_costs,
    trace,
)
from vllm_emssd.simulate import simulator
from vllm_emssd.simulate.simulator import (
    Decoding,
    Outcome,
    Setting,
    SimulatedEngine,
    simulate,
)
from vllm_emssd.simulate.traces import RequestTrace, Trace

ALL = [
    Decoding("plain"),
    Decoding("fixed", 3),
    Decoding("padded", 3),
    Decoding("auto", 4),
]


def run_once(
    found: Trace,
    method: Decoding,
    max_tokens: int = 1000,
    setting: Setting | None = None,
) -> Outcome:
    """All requests of the trace, from an engine that has just started."""
    setting = setting or Setting(len(found.requests))
    engine = SimulatedEngine(found, straight_costs(), method, setting)
    engine.run(found.requests, max_tokens)
    return engine.outcome


# ---------------------------------------------------------------- by hand

# Two requests, prompts of 3 and 2, 4 tokens each. With K = 2: both sample their first
# token; then the first gets 2 accepted and ends, the second none; then the second 1.
TWO = trace(request(3, [0, 2, 0, 0], 2), request(2, [0, 0, 1, 0], 2))


def test_plain_by_hand() -> None:
    outcome = run_once(TWO, Decoding("plain"))
    # 5 rows of prompt, then three steps of 2 rows; 3 ms besides for 2 requests.
    assert outcome.ms == pytest.approx((14 + 3) + 3 * (11 + 3))
    assert (outcome.num_tokens, outcome.counters.num_steps) == (8, 4)


def test_fixed_by_hand() -> None:
    outcome = run_once(TWO, Decoding("fixed", 2))
    steps = [
        (14 + 3.5) + (7 + 2),  # drafter: both prompts and a token each, then a row each
        (15 + 3.5) + (1 + 1),  # one has ended
        (12 + 2),  # the other too, without a draft
    ]
    assert outcome.ms == pytest.approx(sum(steps))
    assert outcome.draft_ms == pytest.approx(9 + 2)
    counters = outcome.counters
    assert (counters.num_steps, counters.num_request_steps) == (3, 5)
    assert (counters.num_draft_forwards, counters.num_draft_rows) == (4, 11)
    assert (counters.num_draft_tokens, counters.num_accepted_tokens) == (6, 3)
    assert (counters.num_verify_rows, counters.num_emitted_tokens) == (11, 8)
    assert outcome.num_tokens == 8


def test_padded_by_hand() -> None:
    outcome = run_once(TWO, Decoding("padded", 2))
    steps = [
        (14 + 3.5) + (7 + 2),
        (15 + 3.5) + (2 * 4 + 2),  # K+2 rows each, then one each
        (12 + 2.5) + (4 + 1),
    ]
    assert outcome.ms == pytest.approx(sum(steps))
    counters = outcome.counters
    assert (counters.num_draft_forwards, counters.num_draft_rows) == (6, 24)
    assert counters.num_draft_rows_decode == 24 - 5
    assert counters.num_accepted_tokens == 3


def test_prompts_in_chunks_by_hand() -> None:
    """4 rows a step: 3 + 1 of the prompts, then the other one and what decodes."""
    setting = Setting(2, max_num_batched_tokens=4)
    outcome = run_once(TWO, Decoding("plain"), setting=setting)
    # 4 rows; then 1 + 1; then two steps of 2 rows, and one of the second alone.
    assert outcome.ms == pytest.approx((13 + 3) + 3 * (11 + 3) + (10 + 2))
    assert outcome.num_tokens == 8


def test_cached_blocks_are_fed_to_neither_model_by_hand() -> None:
    """Blocks of 2: the first prompt's 2 leading tokens; of the second's 2 none, as its
    last token is always computed."""
    setting = Setting(2, cached_block=2)
    outcome = run_once(TWO, Decoding("fixed", 2), setting=setting)
    steps = [(12 + 3.5) + (5 + 2), (15 + 3.5) + (1 + 1), (12 + 2)]
    assert outcome.ms == pytest.approx(sum(steps))
    assert outcome.counters.num_draft_rows == 11 - 2
    assert outcome.num_tokens == 8


def test_third_request_takes_the_place_of_the_first_that_ends() -> None:
    three = trace(*(request(2, [0] * n, 2) for n in (1, 3, 2)))
    outcome = run_once(three, Decoding("plain"), setting=Setting(2))
    # 2 + 2 rows, and the first has ended; 1 + 2; 1 + 1.
    assert outcome.ms == pytest.approx((13 + 3) + (12 + 3) + (11 + 3))


def test_what_is_sampled_beyond_the_end_does_not_count() -> None:
    found = trace(request(2, [3] * 6, 3))
    outcome = run_once(found, Decoding("fixed", 3), max_tokens=3)
    assert (outcome.num_tokens, outcome.counters.num_emitted_tokens) == (3, 5)


# ---------------------------------------------------------------- host and device


def ms_a_step(target_host_ms: float, draft_host_ms: float, is_async: bool) -> float:
    """Of one request's, by the clock: 10 ms of the target for one row, 1 ms a row
    more; drafts of 1 ms; 2 ms and half a ms besides. None is accepted."""
    costs = straight_costs()
    for model, ms in ((costs.target, target_host_ms), (costs.draft, draft_host_ms)):
        model.host_ms.append((1, ms))
    found = trace(request(1, [0] * 100, 2))
    setting = Setting(1, async_scheduling=is_async)
    engine = SimulatedEngine(found, costs, Decoding("fixed", 2), setting)
    engine.run(found.requests, 50)
    before = engine.outcome.ms
    engine.run(found.requests, 100)
    return (engine.outcome.ms - before) / 100


def test_host_is_waited_for_where_launching_takes_longer() -> None:
    """A launch of 30 ms hides the target's 12, two of 20 the drafts'; what comes
    before is not hidden, asynchronous or not."""
    step = 2.5 + 30 + 2 * 20
    for is_async in (False, True):
        assert ms_a_step(30.0, 20.0, is_async) == pytest.approx(step, rel=0.02)


def test_device_is_waited_for_where_it_takes_longer() -> None:
    """Asynchronous scheduling hides all that the host does."""
    device = 12 + 1 + 1
    assert ms_a_step(0.5, 0.1, True) == pytest.approx(device, rel=0.02)
    assert ms_a_step(0.5, 0.1, False) == pytest.approx(2.5 + device, rel=0.02)


def waits_for_each_step(clocks: Any, is_async: bool) -> None:
    clocks.host = max(clocks.host, clocks.device)


def hides_nothing(clocks: Any, ms: float, host_ms: float) -> None:
    clocks.host += ms + host_ms
    clocks.device = clocks.host


@pytest.mark.parametrize(
    ("name", "wrong"), [("end_step", waits_for_each_step), ("launch", hides_nothing)]
)
def test_wrong_clocks_are_noticed(
    name: str, wrong: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator._Clocks, name, wrong)
    with pytest.raises(AssertionError):
        test_device_is_waited_for_where_it_takes_longer()


# ---------------------------------------------------------------- what must hold


def by_request(found: Trace, k: int) -> tuple[int, int]:
    """Steps in which a request samples and drafts accepted, each request alone."""
    num_steps = num_accepted = 0
    for one in found.requests:
        known, num_steps = 1, num_steps + 1
        while known < len(one.accepted):
            accepted = min(one.accepted[known], k)
            known += accepted + 1
            num_steps, num_accepted = num_steps + 1, num_accepted + accepted
    return num_steps, num_accepted


def last_emitted(one: RequestTrace, k: int) -> int:
    known = emitted = 1
    while known < len(one.accepted):
        emitted = min(one.accepted[known], k) + 1
        known += emitted
    return emitted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("fixed", Setting(5)),
        ("fixed", Setting(2)),
        ("padded", Setting(5)),
        # Prompts in chunks; room for all drafts, and for what the drafter catches up.
        ("fixed", Setting(3, max_num_batched_tokens=3 * (1 + 4 + 1))),
        ("padded", Setting(3, max_num_batched_tokens=3 * (1 + 4 + 1))),
    ],
)
def test_accepts_what_each_request_alone_accepts(
    seed: int, name: str, setting: Setting
) -> None:
    found = random_trace(seed, k=4)
    for k in (1, 2, 4):
        counters = run_once(found, Decoding(name, k), setting=setting).counters
        wanted = by_request(found, k)
        assert (counters.num_request_steps, counters.num_accepted_tokens) == wanted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ALL, ids=str)
@pytest.mark.parametrize("setting", [Setting(5), Setting(3, 7)])
def test_every_output_is_decoded_to_its_end(
    seed: int, method: Decoding, setting: Setting
) -> None:
    found = random_trace(seed, k=4)
    outcome = run_once(found, method, setting=setting)
    assert outcome.num_tokens == sum(len(r.accepted) for r in found.requests)
    assert outcome.counters.num_emitted_tokens >= outcome.num_tokens


@pytest.mark.parametrize("seed", range(3))
def test_drafter_is_fed_each_known_token_once(seed: int) -> None:
    """With one draft a step nothing else is fed, whatever is accepted; what a request's
    last step emits is not."""
    several = [r for r in random_trace(seed, k=4).requests if len(r.accepted) > 1]
    found = random_trace(seed, k=4).model_copy(update={"requests": several})
    for setting in (Setting(5), Setting(2), Setting(3, 9)):
        counters = run_once(found, Decoding("fixed", 1), setting=setting).counters
        known = counters.num_emitted_tokens
        known += sum(len(r.prompt_ids) for r in found.requests)
        last = sum(last_emitted(r, 1) for r in found.requests)
        assert counters.num_draft_rows == known - last


def test_plain_is_fixed_zero() -> None:
    found = random_trace(0, k=4)
    assert run_once(found, Decoding("plain")) == run_once(found, Decoding("fixed", 0))


@pytest.mark.parametrize("method", ALL, ids=str)
def test_same_again(method: Decoding) -> None:
    found = random_trace(1, k=4)
    assert run_once(found, method) == run_once(found, method)


# ---------------------------------------------------------------- automatic lengths


@pytest.mark.parametrize("batch", [1, 4])
def test_automatic_gives_up_useless_drafts(batch: int) -> None:
    found = constant_trace(0, 5, 4, 300)
    costs = straight_costs(draft_row_ms=0.05, speculation_ms=0.0)
    plain = simulate(found, costs, Decoding("plain"), Setting(batch), 300, 4)
    auto = simulate(found, costs, Decoding("auto", 5), Setting(batch), 300, 4)
    assert auto.tokens_per_s > 0.96 * plain.tokens_per_s
    assert auto.counters.num_draft_forwards > 0, "probes go on"


@pytest.mark.parametrize("batch", [1, 4])
def test_automatic_drafts_where_all_is_accepted(batch: int) -> None:
    found, costs = constant_trace(5, 5, 4, 200), straight_costs(draft_row_ms=0.2)
    auto = simulate(found, costs, Decoding("auto", 5), Setting(batch), 200, 4)
    best = simulate(found, costs, Decoding("fixed", 5), Setting(batch), 200, 4)
    assert auto.tokens_per_s > 0.97 * best.tokens_per_s
    assert auto.accepted_per_request_step > 4


def test_automatic_drafts_nothing_beyond_the_end() -> None:
    found = constant_trace(5, 5, 4, 21)
    counters = run_once(found, Decoding("auto", 5)).counters
    assert counters.num_accepted_tokens > 0
    assert counters.num_emitted_tokens == 4 * 21


@pytest.mark.parametrize(
    ("batch", "num_prompts", "ended"), [(1, 6, 6), (4, 6, 8), (6, 1, 6), (8, 9, 16)]
)
def test_prompts_are_whole_batches_and_the_warm_up_is_not_counted(
    batch: int, num_prompts: int, ended: int
) -> None:
    """All of one length: when those before have ended, the last sample a token each."""
    found, costs = constant_trace(2, 5, 6, 50), straight_costs()
    setting = Setting(batch)
    outcome = simulate(found, costs, Decoding("fixed", 2), setting, 30, num_prompts)
    assert outcome.num_tokens == ended * 30 + batch


def test_no_place_is_left_empty() -> None:
    """Outputs of 1 and 20 tokens in turns, two at once: in whole batches the long one
    would end alone."""
    found = trace(*(request(2, [0] * n, 2) for n in (1, 20) * 3))
    outcome = simulate(found, straight_costs(), Decoding("plain"), Setting(2), 20, 6)
    assert outcome.num_tokens == 2 * outcome.counters.num_steps
    assert outcome.num_tokens > 2 * 21, "ends when the last of eight starts"


# ---------------------------------------------------------------- bounds, copies


@pytest.mark.parametrize("copies", [False, True])
def test_an_oracle_makes_just_the_drafts_that_are_accepted(copies: bool) -> None:
    found = repeating_trace() if copies else random_trace(1, k=4)
    counters = run_once(found, Decoding("oracle", 4, copies=copies)).counters
    assert counters.num_draft_tokens == counters.num_accepted_tokens > 0
    fixed = run_once(found, Decoding("fixed", 4, copies=copies)).counters
    assert fixed.num_draft_tokens > fixed.num_accepted_tokens


def repeating_trace() -> Trace:
    """A text that goes on with itself, but for every ninth token."""
    text = [token if i % 9 else 1000 + i for i, token in enumerate([7, 8, 9] * 20)]
    one = request(3, [0] * 50, 4)
    return trace(one.model_copy(update={"output_ids": text[:54]}))


def test_copies_cost_no_forward_of_a_drafter() -> None:
    outcome = run_once(repeating_trace(), Decoding("auto", 4, copies=True))
    assert outcome.draft_ms == 0
    assert outcome.accepted_per_request_step > 0.5
    assert outcome.num_tokens == 50


def test_a_threshold_stops_and_trims_by_what_the_trace_says() -> None:
    """All drafts have one confidence, and most are accepted."""
    half = [(4, 0)[i % 2] for i in range(200)]
    found = trace(request(3, half, 4))

    def drafts(stop: float, trim: float = 0.0) -> float:
        method = Decoding("threshold", 4, stop, trim)
        return run_once(found, method).drafts_per_request_step

    assert drafts(0.0) > 3.5
    assert drafts(0.99) < 1.05
    assert drafts(0.0, 0.99) == 0


# ---------------------------------------------------------------- refusals


def test_more_drafts_than_recorded() -> None:
    with pytest.raises(ValueError, match=r"k = 4.*record more"):
        run_once(random_trace(0, k=4), Decoding("fixed", 5))
