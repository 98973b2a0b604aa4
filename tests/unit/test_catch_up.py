"""Over how many steps feeding missed text is charged."""

from __future__ import annotations

import pytest

from vllm_emssd.draft_length.catch_up import MOST_STEPS, CatchUps


def after(steps: list[str], times: int) -> float:
    """`steps`: the requests that draft in each, one letter each; over and over."""
    catch_ups = CatchUps()
    for _ in range(times):
        for drafting in steps:
            catch_ups.observe(drafting)
    return catch_ups.num_steps


def test_at_the_start_over_the_most() -> None:
    assert CatchUps().num_steps == MOST_STEPS
    assert after([""], 1000) == MOST_STEPS


def test_who_goes_on_drafting_needs_none() -> None:
    assert after(["ab"], 1000) == MOST_STEPS


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (["a", ""], 1.0),
        (["a", "b"], 1.0),
        (["ab", "ab", "a", "a", ""], 3.0),
        (["abcd"] * 9 + ["efgh"] * 9, 9.0),
    ],
)
def test_over_as_many_as_drafting_lasts(steps: list[str], wanted: float) -> None:
    assert after(steps, 1000) == pytest.approx(wanted, rel=0.1)


def test_what_was_seen_long_ago_is_forgotten() -> None:
    catch_ups = CatchUps()
    for _ in range(1000):
        catch_ups.observe("a")
        catch_ups.observe("")
    for _ in range(300):
        catch_ups.observe("a")
    assert catch_ups.num_steps > 5


def test_starts_over() -> None:
    catch_ups = CatchUps()
    for _ in range(1000):
        catch_ups.observe("a")
        catch_ups.observe("")
    catch_ups.start_over()
    assert catch_ups.num_steps == MOST_STEPS
