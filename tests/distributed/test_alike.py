"""Several workers give the single worker's tokens, and all count alike."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from tests.distributed.conftest import Runs
from tests.distributed.engines import DISAGREE_OVER_RAY, KILL_OVER_MP, Setting
from tests.distributed.job import Report

pytestmark = pytest.mark.distributed

# Ranks' partial sums are added up in another order than one worker's sums, in float32.
# Where that turns a token, the two likeliest were this close (difference of logprobs).
NEAR_TIE = 1e-4

SINGLE = Setting(draft_length="fixed")
SMOKE = [KILL_OVER_MP, DISAGREE_OVER_RAY, Setting("llma", dp=2)]
DRAFTING = [
    ("draft_model", "fixed"),
    ("draft_model", "auto"),
    ("llma", "fixed"),
    ("llma", "auto"),
    ("mixed", "auto"),
]
SETTINGS = [
    *SMOKE,
    *(
        setting
        for backend, (tp, dp), drafting in product(
            ("mp", "ray"), ((2, 1), (1, 2), (2, 2)), DRAFTING
        )
        if (setting := Setting(*drafting, tp, dp, backend)) not in SMOKE
    ),
    Setting("eagle3", "fixed", tp=2),
    Setting("eagle3", "auto", tp=2),
]


def cases(settings: Iterable[Setting]) -> list[Any]:
    """Slow ones marked so."""
    marks = {
        setting: () if setting in SMOKE else pytest.mark.slow for setting in settings
    }
    return [pytest.param(s, marks=m, id=str(s)) for s, m in marks.items()]


ALL = cases(SETTINGS)
FIXED = cases(
    s
    for s in SETTINGS
    if s.draft_length == "fixed" and s.proposer in ("draft_model", "eagle3")
)
AUTO = cases(s for s in SETTINGS if s.draft_length == "auto")


def same_tokens(report: Report, single: Report) -> int:
    """Assert that; return how many requests part at a near tie."""
    num_parting = 0
    requests = zip(report.token_ids, single.token_ids, single.gaps, strict=True)
    for tokens, expected, gaps in requests:
        assert len(tokens) == len(expected)
        parts = [i for i, token in enumerate(tokens) if token != expected[i]]
        if parts:
            assert gaps[parts[0]] < NEAR_TIE
            num_parting += 1
    return num_parting


@pytest.mark.parametrize("setting", ALL)
def test_tokens_are_the_single_workers(setting: Setting, runs: Runs) -> None:
    single, several = runs.of(SINGLE).check().report, runs.of(setting).check().report
    assert same_tokens(several, single) <= len(single.token_ids) // 4


@pytest.mark.parametrize("setting", ALL)
def test_ranks_count_alike(setting: Setting, runs: Runs) -> None:
    report = runs.of(setting).check().report
    assert len(report.stats) == setting.tp
    assert all(stats == report.stats[0] for stats in report.stats)
    assert len(report.engine_stats) == setting.dp
    assert all(stats["num_steps"] > 0 for stats in report.engine_stats)
    for name in ("num_draft_tokens", "num_accepted_tokens"):
        assert sum(stats[name] for stats in report.engine_stats) > 0
    emitted = sum(stats["num_emitted_tokens"] for stats in report.engine_stats)
    assert emitted >= sum(map(len, report.token_ids))


@pytest.mark.parametrize("setting", FIXED)
def test_fixed_lengths_accept_what_the_single_worker_accepts(
    setting: Setting, runs: Runs
) -> None:
    single = runs.of(Setting(setting.proposer, "fixed")).check().report
    several = runs.of(setting).check().report
    if same_tokens(several, single):
        pytest.skip("requests parted at a near tie")
    for name in ("num_request_steps", "num_draft_tokens", "num_accepted_tokens"):
        total = sum(stats[name] for stats in several.engine_stats)
        assert total == single.engine_stats[0][name], name


@pytest.mark.parametrize("setting", AUTO)
def test_ranks_decide_by_the_same_costs(setting: Setting, runs: Runs) -> None:
    costs = runs.of(setting).check().report.costs
    assert len(costs) == setting.tp
    assert all(rank["used"] == costs[0]["used"] for rank in costs)
    assert runs.of(setting).report.stats[0]["num_steps"] > 64  # taken over since
    if setting.tp > 1:
        assert costs[0]["own"] != costs[1]["own"]


@pytest.mark.parametrize("setting", ALL)
def test_nothing_is_left_behind(setting: Setting, runs: Runs) -> None:
    runs.of(setting).check().left_nothing()
