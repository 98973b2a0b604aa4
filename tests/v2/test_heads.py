"""An EAGLE-3 head on the V2 runner, interpreted: tokens, drafts, rows and pauses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.v2.results import Engines, passes
from tests.v2.runs import K

ENGINES = Engines(
    "tests.v2.heads",
    fast=("plain", "stock", "fixed", "async cached", "async auto", "async mixed"),
    slow=("cached", "tight", "async tight", "async trimmed"),
)
ACCEPTED, DRAFTED = ("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens")
WITH_HEAD = ENGINES.cases(*ENGINES.fast[1:], *ENGINES.slow)
COMPARED = ENGINES.cases("fixed", "async cached", "cached", "tight", "async tight")
CACHES = ENGINES.cases("async cached", "cached")


def seen(name: str, what: str = "greedy") -> Any:
    return ENGINES.run(name)[what]


@pytest.mark.parametrize("name", WITH_HEAD)
def test_heads_of_our_own_drafted(name: str) -> None:
    wanted = "EagleSpeculator" if name == "stock" else "UnpadEagleSpeculator"
    assert seen(name, "speculator") == wanted


@pytest.mark.parametrize("name", WITH_HEAD)
def test_tokens_are_plain_decoding(name: str) -> None:
    found, plain = passes(ENGINES.run(name)), ENGINES.run("plain")
    assert found
    for what, run in found.items():
        wanted = plain.get(what.split(", ")[-1], plain["greedy"])
        assert run["token_ids"] == wanted["token_ids"], what


def test_fixed_lengths_do_what_stock_does() -> None:
    """With as many rows."""
    stock, ours = seen("stock"), seen("fixed")
    assert stock["gained"][ACCEPTED] > 20
    assert ours["gained"] == stock["gained"]
    assert ours["draft_rows"] == stock["draft_rows"]
    assert ours["counts"]["num_padded_draft_rows"] == stock["draft_rows"]


@pytest.mark.parametrize("name", CACHES)
def test_all_ends_of_a_batch_cost_nothing_else(name: str) -> None:
    assert seen(name)["gained"][ACCEPTED] == seen("stock")["gained"][ACCEPTED]


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("what", ["ragged", "paused"])
def test_drafts_after_a_pause_are_those_of_a_head_that_saw_all(
    name: str, what: str
) -> None:
    run = seen(name, what)
    assert run["num_same"] == run["num_compared"] > 2
    assert 0 < run["draft_rows"] < seen(name)["draft_rows"]


def test_drafts_without_the_hidden_states_are_others() -> None:
    run = seen("fixed", "without states")
    assert run["num_same"] < run["num_compared"]


@pytest.mark.parametrize("name", COMPARED)
def test_counted_rows_are_those_of_the_head(name: str) -> None:
    for what, run in passes(ENGINES.run(name)).items():
        if what not in ("sessions", "failing"):
            assert run["counts"]["num_draft_rows"] == run["draft_rows"], what


@pytest.mark.parametrize("name", ENGINES.cases("tight", "async tight"))
def test_requests_are_preempted(name: str) -> None:
    assert seen(name)["gained"]["num_preemptions"] > 0


@pytest.mark.parametrize("name", CACHES)
def test_cached_prefixes_that_the_head_was_fed(name: str) -> None:
    first, again = seen(name), seen(name, "again")
    assert again["gained"]["prefix_cache_hits"] > 0
    assert again["counts"]["num_draft_restarts"] == 0
    assert again["gained"][ACCEPTED] == first["gained"][ACCEPTED]
    assert again["draft_rows"] < first["draft_rows"]


@pytest.mark.parametrize("name", CACHES)
def test_prefixes_that_it_was_not_fed_are_fed_by_what_is_kept_of_others(
    name: str,
) -> None:
    not_fed, shared = seen(name, "not fed"), seen(name, "shared")
    assert not_fed["draft_rows"] == 0
    assert shared["gained"]["prefix_cache_hits"] > 0
    assert shared["counts"]["num_draft_restarts"] == 0
    assert shared["num_same"] == shared["num_compared"] > 0
    assert shared["gained"][ACCEPTED] > 0.9 * seen(name)["gained"][ACCEPTED]


@pytest.mark.parametrize("name", CACHES)
def test_what_others_draft_changes_no_slot_of_what_is_kept(name: str) -> None:
    are_own = seen(name, "lost")["are_own"]
    assert are_own
    assert all(are_own)


@pytest.mark.parametrize("name", CACHES)
def test_what_finds_no_room_is_fed_before_it_is_lost(name: str) -> None:
    run, idle = seen(name, "few kept"), seen(name, "few kept, idle")
    assert run["num_same"] == run["num_compared"] > 0
    assert run["counts"]["num_draft_restarts"] == 0
    assert idle["counts"]["num_draft_tokens"] == 0 < idle["draft_rows"]
    num_prompt_tokens = idle["num_prompt_tokens"]
    assert idle["draft_rows"] < num_prompt_tokens + sum(map(len, idle["token_ids"]))


@pytest.mark.parametrize("name", CACHES)
def test_texts_begin_anew_behind_states_that_are_lost(name: str) -> None:
    """Of their own, and of a prefix that others were to feed."""
    for what in ("lost", "before, lost"):
        counts = seen(name, what)["counts"]
        assert counts["num_draft_restarts"] > 0
        assert counts["num_accepted_tokens"] > counts["num_draft_tokens"] / 4


def test_a_failing_head_costs_drafts_only() -> None:
    failing, healed = seen("fixed", "failing"), seen("fixed", "healed")
    assert min(failing["num_failures"]) > 0
    failures = failing["counts"]["num_failed_proposals"]
    assert failures == sum(failing["num_failures"])
    assert healed["gained"] == seen("fixed")["gained"]


def test_automatic_lengths_follow_the_costs() -> None:
    free, drawn = seen("async auto", "free"), seen("async auto", "drawn")
    assert free["counts"]["num_accepted_tokens"] > 0
    steps = list(zip(drawn["lengths"], drawn["num_forwards"], strict=True))
    assert {0, K} <= {n for lengths, _ in steps for n in lengths}
    idle = [n for lengths, n in steps if not any(lengths)]
    assert idle.count(0) > 0
    assert drawn["counts"]["num_draft_rows"] == drawn["draft_rows"] > 0


def test_forwards_of_the_head_are_timed() -> None:
    at_start, after = seen("async auto", "measured")["costs"]
    assert at_start["draft"][0][1] > 0
    assert at_start["draft"] != after["draft"]


def test_copies_and_drafts_of_a_head_are_accepted() -> None:
    assert min(seen("async mixed", "accepted").values()) > 5
    run = seen("async mixed", "edited")
    assert run["counts"]["num_draft_rows"] == run["draft_rows"]


@pytest.mark.slow
def test_drafts_that_the_device_left_out_do_not_count() -> None:
    run = seen("async trimmed")
    assert 0 < run["counts"]["num_draft_tokens"] < run["gained"][DRAFTED]
    assert run["counts"]["num_draft_rows"] == run["draft_rows"]
