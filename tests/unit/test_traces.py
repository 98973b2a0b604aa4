"""Trace files: what is saved is loaded, and what is no trace is refused by line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_traces import random_trace
from vllm_emssd.simulate.traces import load_trace, save_trace


@pytest.mark.parametrize("name", ["t.jsonl", "sub/t.jsonl.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    saved = random_trace(0, k=3)
    save_trace(saved, tmp_path / name)
    assert load_trace(tmp_path / name) == saved


def test_the_same_trace_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        save_trace(random_trace(0, k=3), tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def lines_of(k: int = 3) -> list[dict[str, Any]]:
    made = random_trace(0, k)
    return [made.header.model_dump(), *(r.model_dump() for r in made.requests)]


def spoil(line: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda lines: lines[line].update(values)


def drop(line: int, key: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda lines: lines[line].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(0, format="other/1"), r"line 1 \(header\).*format"),
        (drop(0, "format"), r"line 1.*format"),
        (spoil(0, k=0), r"line 1.*k"),
        (spoil(0, draft=None), r"line 1.*draft"),
        (spoil(2, extra=1), r"line 3.*extra"),
        (spoil(2, prompt_ids=[]), r"line 3.*prompt_ids"),
        (spoil(2, prompt_ids=["x"]), r"line 3.*prompt_ids"),
        (spoil(2, output_ids=[-1]), r"line 3.*output_ids"),
        (spoil(2, output_ids=[1, 2]), r"request 1: output_ids has 2 tokens"),
        (spoil(2, accepted=[]), r"request 1: accepted has 0 entries"),
        (lambda lines: lines[2]["accepted"].__setitem__(0, 4), r"within 0\.\.3"),
        (lambda lines: lines[2]["confidences"][0].pop(), "needs 3 confidences"),
        (lambda lines: lines[2]["confidences"][0].__setitem__(0, 1.5), "confidences"),
        (lambda lines: lines.__delitem__(slice(1, None)), "requests"),
    ],
)
def test_malformed(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    lines = lines_of()
    change(lines)
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        load_trace(file)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.jsonl", b""),
        ("t.jsonl", b"not json"),
        ("t.jsonl", b"\xff\xfe"),
        ("t.jsonl.gz", b"not gzip"),
        ("t.jsonl.gz", gzip.compress(b"cut off" * 100, mtime=0)[:-9]),
    ],
)
def test_no_trace_at_all(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        load_trace(tmp_path / name)
