"""Automatic lengths in a closed loop: costs and acceptance are known, time is counted.

The bounds are what a user may rely on: never much worse than the best fixed length,
next to nothing where drafts do not pay, and a way back when they do again.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.draft_batches import step_of
from tests.unit.simulated_acceptance import (
    Loop,
    auto_policy,
    best_fixed,
    made_costs,
)
from vllm_emssd.draft_length import (
    AutoDraftLength,
    CostTable,
    FixedDraftLength,
    StepCosts,
)
from vllm_emssd.simulate.reliability import AT_STOP, AT_TRIM, CountedDraftLength

FIXED_LENGTHS = (0, 1, 2, 3, 5, 8)
WARM_UP = 50
CHEAP, MEDIUM, EXPENSIVE = (
    made_costs(draft_ms=1.0),
    made_costs(draft_ms=4.0),
    made_costs(draft_ms=10.0),
)
LONGEST_IDLE = 128  # steps between two probes


# ---------------------------------------------------------------- what a loop earns


@pytest.mark.parametrize("acceptance", [0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    "costs", [CHEAP, MEDIUM, EXPENSIVE], ids=["cheap", "mid", "expensive"]
)
@pytest.mark.parametrize("num_reqs", [1, 8, 32])
def test_as_good_as_the_best_fixed_length(
    num_reqs: int, costs: StepCosts, acceptance: float
) -> None:
    share = share_of_best_fixed(num_reqs, costs, lambda *_: acceptance)
    assert share >= 0.97


@pytest.mark.parametrize("costs", [CHEAP, MEDIUM], ids=["cheap", "mid"])
def test_mixed_batch_beats_every_fixed_length(costs: StepCosts) -> None:
    """Half of the requests are predictable, at any time: fast ones come more often."""
    share = share_of_best_fixed(16, costs, lambda _, i: (0.9, 0.1)[i % 2])
    assert share > 1.08


@pytest.mark.parametrize(("num_reqs", "speculation_ms"), [(32, 4.0), (16, 14.0)])
def test_what_stopping_gains_must_pay_for_speculating_at_all(
    num_reqs: int, speculation_ms: float
) -> None:
    """Requests are predictable at first, later one in four: no fixed length pays."""
    costs = dataclasses.replace(
        made_costs(draft_ms=2.0, per_row_ms=1.0), speculation_ms=speculation_ms
    )

    def quality(step: int, i: int) -> float:
        return 0.95 if step < 200 or i % 4 == 0 else 0.05

    policies = auto_policy(costs, 8), FixedDraftLength(0)
    auto, plain = (
        Loop(policy, costs, num_reqs, quality, seed=3).run(900).tokens_per_ms(500)
        for policy in policies
    )
    assert auto > 0.965 * plain


def share_of_best_fixed(
    num_reqs: int,
    costs: StepCosts,
    quality: object,
    num_steps: int = 250,
    **more: object,
) -> float:
    setting = {"costs": costs, "num_reqs": num_reqs, "quality": quality, "seed": 3}
    setting |= more
    loop = Loop(auto_policy(costs, 8), **setting).run(num_steps)
    auto = loop.tokens_per_ms(WARM_UP)
    best, best_length = best_fixed(FIXED_LENGTHS, num_steps, WARM_UP, **setting)
    print(
        f"{num_reqs} requests: auto {auto:.3f} tokens/ms, best fixed {best:.3f} at "
        f"K={best_length}: {auto / best:.3f}"
    )
    return auto / best


@pytest.mark.parametrize("power", [0.1, 1.0, 3.0])
def test_any_calibration_of_confidence_will_do(power: float) -> None:
    """Confidence is acceptance to this power: far over- and underconfident too."""
    setting = {"num_reqs": 8, "quality": lambda *_: 0.7, "power": power}
    loop = Loop(auto_policy(MEDIUM, 8), MEDIUM, **setting).run(250)
    best, _ = best_fixed(FIXED_LENGTHS, 250, WARM_UP, costs=MEDIUM, **setting)
    assert loop.tokens_per_ms(WARM_UP) >= 0.95 * best


# ---------------------------------------------------------------- when nothing pays


def probing_steps(loop: Loop) -> list[int]:
    return [i for i, step in enumerate(loop.steps) if step.draft_ms > 0]


@pytest.mark.parametrize("num_reqs", [1, 8, 32])
@pytest.mark.parametrize(
    "costs", [CHEAP, MEDIUM, EXPENSIVE], ids=["cheap", "mid", "expensive"]
)
def test_useless_drafter_is_hardly_run_yet_probed(
    num_reqs: int, costs: StepCosts
) -> None:
    loop = Loop(auto_policy(costs, 8), costs, num_reqs, lambda *_: 0.02).run(900)
    late = loop.steps[300:]
    draft_ms = sum(step.draft_ms for step in late)
    assert draft_ms < 0.03 * sum(step.ms for step in late)
    probes = [300, *[i for i in probing_steps(loop) if i >= 300], 900]
    assert max(np.diff(probes)) <= LONGEST_IDLE
    assert len(probes) > 2


@pytest.mark.parametrize("num_reqs", [1, 8, 32])
@pytest.mark.parametrize("costs", [CHEAP, MEDIUM], ids=["cheap", "mid"])
@pytest.mark.parametrize("power", [0.5, 0.01], ids=["seen", "unseen"])
def test_recovers_when_the_drafter_turns_good(
    num_reqs: int, costs: StepCosts, power: float
) -> None:
    """Whether its confidence shows that or not."""
    turns_good, bound = 400, 400

    def quality(step: int, slot: int) -> float:
        return 0.02 if step < turns_good else 0.95

    loop = Loop(auto_policy(costs, 8), costs, num_reqs, quality, power=power)
    loop.run(turns_good + bound)
    assert np.mean([s.made for s in loop.steps[turns_good - 50 : turns_good]]) < 1
    recovered = np.mean([s.verified for s in loop.steps[-30:]])
    assert recovered > 3
    drafting = [i for i in probing_steps(loop) if np.mean(loop.steps[i].made) > 1]
    after = next(i for i in drafting if i > turns_good) - turns_good
    print(f"{num_reqs} requests: drafts for all again after {after} steps")


def test_a_request_that_turns_predictable_is_found_while_others_draft() -> None:
    """There are no probes while drafts pay: a request's bad record has to fade."""

    def quality(step: int, slot: int) -> float:
        return 0.02 if slot == 0 and step < 150 else 0.9

    loop = Loop(auto_policy(CHEAP, 8), CHEAP, 16, quality, lifetime=100_000).run(400)
    assert np.mean([step.verified[0] for step in loop.steps[100:150]]) < 0.7
    assert np.mean([step.verified[0] for step in loop.steps[-100:]]) > 2


def test_what_is_always_trimmed_is_not_drafted_for_ever() -> None:
    """Position says yes, confidence says no, and nothing is verified to settle it."""
    costs = made_costs(draft_ms=2.0, per_row_ms=1.2, free_rows=2)
    loop = Loop(auto_policy(costs, 8), costs, 32, lambda *_: 0.3).run(150)
    assert np.mean([step.made for step in loop.steps[50:]]) < 0.1


def test_new_requests_with_long_prompts_still_draft() -> None:
    loop = Loop(
        auto_policy(CHEAP, 8), CHEAP, 4, lambda *_: 0.9, prompt=300, lifetime=200
    ).run(200)
    assert np.mean([step.verified for step in loop.steps]) > 3


# ---------------------------------------------------------------- one decision


def test_prompts_are_fed_along_while_drafts_pay() -> None:
    good, useless = auto_policy(CHEAP, 8), auto_policy(CHEAP, 8)
    assert good.feeds_prompts
    Loop(good, CHEAP, 8, lambda *_: 0.9).run(30)
    Loop(useless, CHEAP, 8, lambda *_: 0.02).run(30)
    assert good.feeds_prompts
    assert not useless.feeds_prompts


def test_steps_of_prompts_only_are_not_idle() -> None:
    policy = auto_policy(CHEAP, 8)
    for _ in range(200):
        lens = policy.plan(step_of(3, num_prefill=3))
        assert lens.tolist() == [0, 0, 0]
        assert policy.feeds_prompts


def test_requests_in_prefill_draft_nothing_and_earn_nothing() -> None:
    policy = auto_policy(CHEAP, 4)
    assert policy.plan(step_of(4, num_prefill=2)).tolist() == [0, 0, 4, 4]
    alone = auto_policy(CHEAP, 4)
    alone.plan(step_of(2))
    assert policy._plan.tokens_per_ms <= alone._plan.tokens_per_ms * (1 + 1e-9)


@pytest.mark.parametrize("num_reqs", [0, 1])
@pytest.mark.parametrize("num_spec_tokens", [1, 4])
def test_smallest_batches(num_reqs: int, num_spec_tokens: int) -> None:
    policy = auto_policy(CHEAP, num_spec_tokens)
    step = step_of(num_reqs, num_spec_tokens)
    assert policy.plan(step).tolist() == [num_spec_tokens] * num_reqs
    if num_reqs:
        goes_on = policy.continue_drafting(np.array([0]), np.array([0.99]), 0)
        assert goes_on.tolist() == [num_spec_tokens > 1]
        assert policy.trim(np.array([1])).tolist() == [1]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("num_drafts", "num_accepted", "is_good"),
    [(2, 2, True), (2, 1, False), (2, 0, False), (0, 0, False)],
)
def test_a_probe_is_found_among_the_requests_of_a_step(
    num_drafts: int, num_accepted: int, is_good: bool, at_once: bool
) -> None:
    policy = AutoDraftLength(CHEAP, 4, False, False)
    noted: list[bool] = []
    policy._probing.drafts_accepted = lambda: noted.append(True)  # type: ignore[method-assign]
    drafts, accepted = np.array([0, num_drafts]), np.array([0, num_accepted])
    if at_once:
        policy.observe_step(drafts, accepted)
    else:
        policy.observe("a", 0, 0)
        policy.observe("b", num_drafts, num_accepted)
    assert bool(noted) == is_good


def test_unsure_drafts_are_stopped_and_sure_ones_go_on() -> None:
    policy = auto_policy(MEDIUM, 8)
    for i in range(400):
        confidence = np.array([0.02 if i % 4 == 0 else 0.98])
        policy.acceptance.observe(confidence, 1, i % 4 > 0)
        policy.acceptance.update()
    policy.plan(step_of(16, most=8))
    confidence = np.where(np.arange(16) < 8, 0.98, 0.02)
    goes_on = policy.continue_drafting(np.arange(16), confidence, 0)
    assert goes_on.tolist() == [True] * 8 + [False] * 8
    kept = policy.trim(np.where(goes_on, 2, 1))
    assert (kept[8:] == 0).all()
    assert (kept[:8] >= 1).all()


def test_goes_on_beyond_a_stair_that_pays_as_a_whole() -> None:
    """The next draft of each alone would not pay the stair, all that fit on it do."""
    stair = CostTable([1, 17, 18, 40, 41, 300], [20.0, 20.0, 32.0, 32.0, 90.0, 349.0])
    costs = StepCosts(stair, CostTable([1], [0.1]), 1.0)
    policy = auto_policy(costs, 4)
    loop = Loop(policy, costs, 8, lambda *_: 0.8, num_spec_tokens=4, spread=0.05)
    verified = [sum(step.verified) for step in loop.run(200).steps[60:]]
    assert np.mean(verified) > 20


@pytest.mark.parametrize("seed", range(3))
def test_may_not_trim_never_trims(seed: int) -> None:
    """Where drafts are sampled, what was drafted is verified, whatever its odds."""
    policy = AutoDraftLength(MEDIUM, 8, may_trim=False)
    loop = Loop(policy, MEDIUM, 8, lambda _, i: 0.1 + 0.1 * i, seed=seed).run(150)
    assert all(step.made == step.verified for step in loop.steps)
    assert any(any(step.made) for step in loop.steps)


def test_rows_of_padding_go_to_the_likeliest_drafts_left() -> None:
    """Two requests in 8 rows: six drafts, though one alone is worth its row."""
    costs = dataclasses.replace(MEDIUM, computed_rows=lambda rows: max(rows, 8))
    policy = auto_policy(costs, 4)
    policy.plan(step_of(2))
    policy._survival[:] = [[0.9, 0.2, 0.1, 0.05], [0.3, 0.25, 0.15, 0.01]]
    policy._verify_cost = 0.8
    assert policy.trim(np.array([4, 4])).tolist() == [3, 3]
    costs.computed_rows = lambda rows: rows
    assert policy.trim(np.array([4, 4])).tolist() == [1, 0]
    costs.computed_rows = lambda rows: 99
    assert policy.trim(np.array([4, 4])).tolist() == [4, 4]
    costs.computed_rows = lambda rows: max(rows, 8)
    policy._survival[:] = [[0.9, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]
    assert policy.trim(np.array([4, 4])).sum() == 6, "as many as there are rows"


def test_rows_of_prompts_leave_no_padding_to_the_next_step() -> None:
    costs = dataclasses.replace(MEDIUM, computed_rows=lambda rows: rows + 8)
    policy = auto_policy(costs, 4)
    policy.plan(step_of(2, num_prefill=1))
    policy._survival[1] = [0.9, 0.2, 0.1, 0.05]
    policy._verify_cost = 0.8
    assert policy.trim(np.array([0, 4])).tolist() == [0, 1]


def test_recovers_from_costs_measured_beside_another_process() -> None:
    """The drafter seems 15 times more expensive than it is, until it is tried."""
    real, seen = made_costs(draft_ms=1.5), made_costs(draft_ms=1.5)
    seen.draft = CostTable(
        [r for r, _ in real.draft.points], [ms * 15 for _, ms in real.draft.points]
    )
    policy = auto_policy(seen, 8)
    loop = Loop(policy, real, 8, lambda *_: 0.9, meter=seen)
    loop.run(1200)
    settled = loop.tokens_per_ms(1000)
    wanted = (
        Loop(auto_policy(real, 8), real, 8, lambda *_: 0.9)
        .run(1200)
        .tokens_per_ms(1000)
    )
    assert settled > 0.95 * wanted


def test_idle_steps_are_seldom_planned_and_end_when_drafts_pay() -> None:
    costs = made_costs(draft_ms=30.0)
    loop = Loop(auto_policy(costs, 4), costs, 4, lambda *_: 0.5, num_spec_tokens=4)
    loop.run(300)
    assert not any(any(step.made) for step in loop.steps[-3:])
    before = loop.num_plans
    loop.run(128)
    # Every fourth step after a probe whose drafts were accepted, else ever more rarely.
    assert loop.num_plans - before <= 33
    costs.draft = made_costs(draft_ms=0.5).draft
    made = [step.made for step in loop.run(40).steps[-40:]]
    assert any(all(lens) for lens in made), "by the next plan"


def test_confidence_is_asked_for_where_it_earns_its_cost() -> None:
    """Where requests are alike it tells little; a survey now and then finds out."""
    free = made_costs(draft_ms=0.5)
    costly = dataclasses.replace(made_costs(draft_ms=0.5), confidence_ms=3.0)

    def share_asked(costs: StepCosts, spread: float) -> float:
        policy = auto_policy(costs, 8)
        loop = Loop(policy, costs, 8, lambda *_: 0.7, spread=spread).run(200)
        asked = []
        for _ in range(96):
            loop.run(1)
            asked.append(policy.needs_confidence)
        return float(np.mean(asked))

    assert share_asked(free, spread=0.9) >= 63 / 64 - 1 / 96
    assert share_asked(costly, spread=0.1) == 1 / 16


@pytest.mark.parametrize(
    "asking", [{"confidence_ms": 1.0}, {"deciding_ms": 4.0}], ids=str
)
def test_what_asking_costs_is_not_lost(asking: dict[str, float]) -> None:
    """With confidences that cost a sixth of a step, as good as the best fixed length,
    whose drafter does not tell them."""
    costs = dataclasses.replace(made_costs(draft_ms=0.5), **asking)
    share = share_of_best_fixed(8, costs, lambda *_: 0.8, num_steps=400, spread=0.1)
    assert share >= 0.97


CONFIDENCES = st.lists(
    st.lists(st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.97]), min_size=4, max_size=4),
    min_size=3,
    max_size=3,
)


def kept_by(policy: AutoDraftLength, confidence: np.ndarray, num_steps: int) -> list:
    """What is decided about the first drafts of each request, by depth."""
    lens = policy.plan(step_of(len(confidence)))
    active, made = np.flatnonzero(lens), np.zeros(len(lens), dtype=np.int64)
    for position in range(int(lens.max())):
        made[active] += 1
        goes_on = policy.continue_drafting(
            active, confidence[active, position], position
        )
        active = active[goes_on & (lens[active] > position + 1)]
        if not active.size:
            break
    return np.minimum(policy.trim(made), num_steps).tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CONFIDENCES, CONFIDENCES, st.integers(0, 4))
def test_whether_a_draft_is_kept_does_not_depend_on_later_ones(
    first: list[list[float]], second: list[list[float]], same: int
) -> None:
    """Confidences up to and at a draft are fixed before it is sampled; later ones
    depend on its value. With other later ones, the same of the first is verified."""
    a, b = np.array(first), np.array(second)
    b[:, :same] = a[:, :same]
    policies = [auto_policy(MEDIUM, 4) for _ in range(2)]
    for policy in policies:
        Loop(policy, MEDIUM, 3, lambda _, i: 0.3 + 0.2 * i, num_spec_tokens=4).run(60)
    kept = [kept_by(p, c, same) for p, c in zip(policies, (a, b), strict=True)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("line", [AT_TRIM, AT_STOP])
def test_marginal_drafts_are_accepted_about_as_often_as_they_cost(line: int) -> None:
    """Those barely worth verifying, and those barely worth making."""
    policy = CountedDraftLength(
        CHEAP, 8, may_trim=True, num_accepted=lambda r: loop.num_acceptable[r]
    )
    loop = Loop(policy, CHEAP, 32, lambda _, i: 0.3 + 0.02 * i, lifetime=400)
    loop.run(400)
    number, *sums = policy.reliability[:, line]
    predicted, accepted, cost = np.array(sums) / number
    assert number > 500
    assert cost / 1.25 < predicted < 1.25 * cost
    assert accepted == pytest.approx(predicted, rel=0.15)


def test_released_request_leaves_nothing_behind() -> None:
    policy = auto_policy(CHEAP, 4)
    policy.plan(step_of(2))
    policy.continue_drafting(np.array([0, 1]), np.array([0.5, 0.5]), 0)
    policy.trim(np.array([1, 1]))
    policy.observe("r0", 1, 0)
    for req_id in ("r0", "r1", "unknown"):
        policy.release(req_id)
    assert policy._made == {}


def test_left_out_request_is_still_observed_by_its_own_drafts() -> None:
    """Its drafts stay pending while others go on; the batch has changed meanwhile."""
    policy = auto_policy(CHEAP, 2)
    step = step_of(2, most=2)
    policy.plan(step)
    policy.continue_drafting(np.array([0, 1]), np.array([0.9, 0.2]), 0)
    policy.trim(np.array([1, 1]))
    policy.observe("r1", 1, 0)
    policy.plan(dataclasses.replace(step, req_ids=["r1", "r2"]))
    policy.continue_drafting(np.array([0, 1]), np.array([0.3, 0.4]), 0)
    policy.trim(np.array([1, 1]))
    policy.observe("r0", 1, 1)
    [(made, num_verified, num_accepted)] = policy.acceptance._observed
    assert made.tolist() == [0.9]
    assert (num_verified, num_accepted) == (1, 1)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("seed", range(10))
def test_lengths_stay_lengths_while_costs_and_confidence_are_mad(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mad = (np.nan, np.inf, -np.inf, -5.0, 0.0, 1e-300, 1e300)
    costs = dataclasses.replace(
        MEDIUM,
        target=CostTable(*zip(*MEDIUM.target.points, strict=True)),
        draft=CostTable(*zip(*MEDIUM.draft.points, strict=True)),
    )
    policy = AutoDraftLength(costs, 4, may_trim=True)
    step = step_of(4)
    for _ in range(300):
        for table in (costs.target, costs.draft):
            table.observe(int(rng.integers(0, 300)), float(rng.choice(mad)))
        lens = policy.plan(step)
        assert ((lens >= 0) & (lens <= step.max_draft_tokens)).all()
        active, made = np.flatnonzero(lens), np.zeros(4, dtype=np.int64)
        for position in range(int(lens.max())):
            made[active] += 1
            # The highest probability of a drafter that computes NaN is given as 0.
            confidence = rng.choice([0.0, 1.0, 0.5], len(active))
            active = active[policy.continue_drafting(active, confidence, position)]
            active = active[lens[active] > position + 1]
            if not active.size:
                break
        kept = policy.trim(made)
        assert ((kept >= 0) & (kept <= made)).all()
        for req_id, num_drafts in zip(step.req_ids, kept.tolist(), strict=True):
            policy.observe(req_id, num_drafts, int(rng.integers(0, num_drafts + 1)))


def test_a_step_that_failed_leaves_nothing_to_the_next() -> None:
    """The drafter raised after `plan`: no drafts, and none observed."""
    whole, failed = auto_policy(CHEAP, 4), auto_policy(CHEAP, 4)
    step = step_of(3)
    for _ in range(20):
        failed.plan(step)
        for req_id in step.req_ids:
            failed.observe(req_id, 0, 0)
    for policy in (whole, failed):
        lens = policy.plan(step)
        confidence = np.full(3, 0.9)
        assert policy.continue_drafting(np.arange(3), confidence, 0).all()
        assert (policy.trim(np.minimum(lens, 2)) >= 1).all()
