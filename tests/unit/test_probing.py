"""Idle steps: seldom planned, more seldom probed, and left as soon as drafts pay."""

from __future__ import annotations

import pytest

from vllm_emssd.draft_length.probing import Probing

STEP_MS = 20.0


def run(probing: Probing, num_steps: int, probe_ms: float) -> tuple[int, list[int]]:
    """Idle steps in which no plan pays: how many plans, and probes when."""
    num_plans, probes = 0, []
    for step in range(num_steps):
        if probing.skips_step(8):
            continue
        num_plans += 1
        assert not probing.pays(0.0, 8)
        if probing.is_due(probe_ms, STEP_MS):
            probes.append(step)
    return num_plans, probes


@pytest.mark.parametrize(("gain", "is_idle"), [(0.0, True), (0.01, True), (0.1, False)])
def test_idle_where_a_plan_gains_too_little(gain: float, is_idle: bool) -> None:
    probing = Probing()
    assert probing.pays(gain, 8) != is_idle
    assert probing.is_idle == is_idle


def test_no_step_is_skipped_while_drafts_pay() -> None:
    probing = Probing()
    assert not any(probing.skips_step(8) or not probing.pays(0.5, 8) for _ in range(99))


def test_plans_get_rare_but_never_too_rare() -> None:
    probing = Probing()
    run(probing, 400, probe_ms=1.0)
    num_plans, _ = run(probing, 320, probe_ms=1.0)
    assert 320 / 32 <= num_plans <= 320 / 32 + 2


def test_a_batch_of_another_size_is_planned() -> None:
    probing = Probing()
    run(probing, 400, probe_ms=1.0)
    while probing.skips_step(8):
        pass
    probing.pays(0.0, 8)
    assert [probing.skips_step(n) for n in (8, 5, 16)] == [True] * 3
    assert not probing.skips_step(1)
    assert not probing.skips_step(0)


@pytest.mark.parametrize("probe_ms", [0.1, 1.0, 12.0])
def test_hopeless_probes_take_half_a_percent_of_the_time(probe_ms: float) -> None:
    probing = Probing()
    run(probing, 400, probe_ms)
    num_steps = 6400
    _, probes = run(probing, num_steps, probe_ms)
    assert probes, "there are some"
    assert len(probes) * probe_ms <= 0.005 * num_steps * STEP_MS + probe_ms


def test_a_probe_that_succeeds_is_soon_followed_by_another() -> None:
    probing = Probing()
    run(probing, 3000, probe_ms=0.1)
    probing.drafts_accepted()
    _, probes = run(probing, 12, probe_ms=0.1)
    assert probes
    assert probes[0] <= 8


def test_drafts_accepted_while_drafts_pay_are_no_probe() -> None:
    probing, fresh = Probing(), Probing()
    probing.drafts_accepted()
    assert run(probing, 200, probe_ms=1.0) == run(fresh, 200, probe_ms=1.0)


def test_idle_again_is_as_the_first_time() -> None:
    probing, fresh = Probing(), Probing()
    run(probing, 900, probe_ms=1.0)
    while probing.skips_step(8):
        pass
    assert probing.pays(0.5, 8)
    assert run(probing, 200, probe_ms=1.0) == run(fresh, 200, probe_ms=1.0)
