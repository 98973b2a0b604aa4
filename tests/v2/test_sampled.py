"""Sampled output of the V2 runner follows the target's distribution, whatever drafts.

The target's comes from the V1 runner without speculation. See also
`tests/lossless/test_sampled.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.lossless.distribution import FALSE_ALARM
from tests.lossless.test_sampled import FAST, least_p_value, results
from tests.v2.results import results_of
from tests.v2.sampled import FAULTS

pytestmark = pytest.mark.slow


def seen() -> dict[str, Any]:
    return results_of("tests.v2.sampled", timeout=1200)


def p_value(name: str) -> float:
    return least_p_value(results("plain", FAST)["0.8"].token_ids, seen()[name])


def test_copies_beside_drafts_follow_the_targets_distribution() -> None:
    assert min(seen()["accepted"].values()) > 50
    assert p_value("right") > FALSE_ALARM


@pytest.mark.parametrize("fault", FAULTS)
def test_another_distribution_is_noticed(fault: str) -> None:
    assert p_value(fault) < FALSE_ALARM
