"""Configs from another process, several engines in one, and what forks and restarts
change: requests are treated alike, and each engine's counters are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_process import python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    path, temporary = folder / "report.json", folder / "tmp"
    temporary.mkdir()
    module = "tests.regression.served_engines"
    done = python("-m", module, path, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_requests_where_the_config_came_from_another_process(
    report: dict[str, Any],
) -> None:
    found = report["processed"]
    assert found["text"] == {"emssd_reference": found["token_ids"]}
    assert found["token_ids"]
    assert found["min_p"] is found["logit_bias"] is None  # neither was refused


def test_what_differs_between_starts_is_not_in_the_hash(report: dict[str, Any]) -> None:
    assert len(set(report["hashes"])) == 1


def assert_own_counters(seen: Any) -> None:
    """/metrics shows what each engine counted itself."""
    shown, (one, two) = seen
    assert shown == {"one": one, "two": two}


def test_counters_of_another_engine_are_seen(report: dict[str, Any]) -> None:
    """A planted error: both engines were given one directory."""
    with pytest.raises(AssertionError):
        assert_own_counters(report["planted"])


def test_two_engines_in_one_process(report: dict[str, Any]) -> None:
    assert report["at_start"] == {"one": [0, 0, 0], "two": [0, 0, 0]}
    for when in ("one_ran", "both_ran"):
        assert_own_counters(report[when])
    (_, (one, before)), (_, (still_one, two)) = report["one_ran"], report["both_ran"]
    assert one == still_one
    assert one[-1] >= 20
    assert before == [0, 0, 0]
    assert 12 <= two[-1] < one[-1]


def test_another_server_with_the_same_environment(report: dict[str, Any]) -> None:
    shown, counts = report["other_process"]
    assert shown == {"one": counts}
    assert counts[-1] >= 5
    assert report["after_others"] == report["both_ran"][0]


def test_a_fork_shows_nothing_and_removes_nothing(report: dict[str, Any]) -> None:
    assert report["forked"] == {}
    assert report["dirs"] == 2


def test_an_engine_that_ended_is_gone_and_counts_from_zero_when_restarted(
    report: dict[str, Any],
) -> None:
    one = report["both_ran"][0]["one"]
    assert report["two_ended"] == {"one": one}
    assert report["restarted"] == {"one": one, "two": [0, 0, 0]}


def test_no_folder_is_left(report: dict[str, Any], folder: Path) -> None:
    assert report["left_by_maker"] == []
    assert not list((folder / "tmp").glob("vllm-emssd-*"))
