"""The counters, and their way to the API server."""

from __future__ import annotations

from pathlib import Path

from vllm_emssd.metrics import (
    COUNTER_HELP,
    COUNTER_NAMES,
    Counters,
    SharedCounters,
    read_shared_counters,
)

PUBLISHED = (  # the interface users and dashboards rely on
    "num_steps",
    "num_request_steps",
    "num_draft_forwards",
    "num_draft_rows",
    "num_draft_rows_decode",
    "num_padded_draft_rows",
    "num_padded_draft_rows_decode",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_verify_rows",
    "num_padded_verify_rows",
    "num_emitted_tokens",
    "num_draft_restarts",
    "num_failed_proposals",
)


def counters_of(first: int) -> Counters:
    return Counters(*range(first, first + len(COUNTER_NAMES)))


def test_names_are_the_published_ones() -> None:
    assert COUNTER_NAMES == PUBLISHED
    assert Counters().as_dict() == dict.fromkeys(PUBLISHED, 0)


def test_every_counter_has_a_help_of_its_own() -> None:
    assert tuple(COUNTER_HELP) == COUNTER_NAMES
    assert all(text.endswith(".") for text in COUNTER_HELP.values())
    assert len(set(COUNTER_HELP.values())) == len(COUNTER_NAMES)


def test_shared_counters_round_trip(tmp_path: Path) -> None:
    engines = {index: SharedCounters(tmp_path, index) for index in (0, 3, 12)}
    assert dict(read_shared_counters(tmp_path)) == dict.fromkeys(
        engines, Counters().as_dict()
    )
    for index, shared in engines.items():
        shared.publish(counters_of(2**40 + index))  # beyond 32 bits
    assert dict(read_shared_counters(tmp_path)) == {
        index: counters_of(2**40 + index).as_dict() for index in engines
    }


def test_restarted_engine_counts_from_zero(tmp_path: Path) -> None:
    SharedCounters(tmp_path, 0).publish(counters_of(5))
    SharedCounters(tmp_path, 0)
    assert list(read_shared_counters(tmp_path)) == [(0, Counters().as_dict())]


def test_reader_skips_what_is_no_engine_of_this_version(tmp_path: Path) -> None:
    SharedCounters(tmp_path, 1).publish(counters_of(5))
    (tmp_path / "0.counters").write_bytes(bytes(8))
    (tmp_path / "note.txt").write_text("not a counter")
    assert list(read_shared_counters(tmp_path)) == [(1, counters_of(5).as_dict())]
