"""Results on the terminal and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 160
LINE = 1200  # characters: a method and its medians
DIGITS = 5

Result = dict[str, Any]  # of one number of requests at once


# Title, and what it shows of a method's medians.
TABLES = {
    "tokens/s, medians of alternating rounds (x plain, or the first method)": (
        "{tokens_per_s:.0f} ({over_base:.2f})"
    ),
    "spread: middle half of the rounds over their median": "{spread:.1%}",
    "accepted drafts a request and step": "{accepted_per_request_step:.2f}",
    "rows a round: target + draft model": "{target_rows:.0f} + {draft_rows:.0f}",
    "a step: GPU busy; host ms, kernels and graphs launched": (
        "{profile[gpu_busy]:.0%}; {profile[host_ms]:.1f}, {profile[kernels]:.0f}, "
        "{profile[graphs]:.0f}"
    ),
    "time to the first token, ms: median, 99th percentile": (
        "{p50_ttft_ms:.0f}, {p99_ttft_ms:.0f}"
    ),
    "time between outputs, ms: median, 99th percentile": (
        "{p50_itl_ms:.1f}, {p99_itl_ms:.1f}"
    ),
}


def print_results(results: Sequence[Result]) -> None:
    console = Console(width=WIDTH)
    for title, form in TABLES.items():
        table = _table(title, "at once", *results[0]["methods"])
        try:
            for result in results:
                table.add_row(str(result["batch"]), *_cells(result, form))
        except KeyError:
            continue  # not measured here
        console.print(table)
    console.print(_ratio_table(results))
    if any(result.get("padding") for result in results):
        console.print(_padding_table(results))
    methods = [m for result in results for m in result["methods"].values()]
    if any(method.get("num_preemptions") for method in methods):
        console.print(
            "[red]Requests were preempted: fewer ran at once than were asked for. "
            "Raise --kv-cache-memory-bytes.[/]"
        )


def _cells(result: Result, form: str) -> Iterator[str]:
    methods = result["methods"]
    base = methods.get("plain", next(iter(methods.values())))["tokens_per_s"]
    for method in methods.values():
        yield form.format(over_base=method["tokens_per_s"] / base, **method)


def _ratio_table(results: Sequence[Result]) -> Table:
    """One row a ratio: there are more of them than batch sizes."""
    batches = [f"{result['batch']} at once" for result in results]
    table = _table("speed ratios [95 % interval]", "ratio", *batches)
    for title in results[0]["ratios"]:
        cells = [result["ratios"][title] for result in results]
        form = "{ratio:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(title, *(form.format(**cell) for cell in cells))
    return table


def _padding_table(results: Sequence[Result]) -> Table:
    table = _table(
        "the same drafts, padded as the paper's vanilla pads them, over unpadded",
        *("at once", "method", "rows of the target", "cache positions read"),
    )
    for result in results:
        for name, found in result["padding"].items():
            own, vanilla = found["unpadded"], found["vanilla"]
            counts = ("num_rows", "num_kv_slots")
            cells = (f"{vanilla[c] / own[c]:.2f}" for c in counts)
            table.add_row(str(result["batch"]), name, *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    """As wide as its title: a narrower table would break it."""
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def write_result(path: Path, result: dict[str, Any]) -> None:
    """JSON for people: what fits a line is on one, floats have five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}")  # whoever is cut off leaves a whole file
    written.write_text(_lines(_plain(result)) + "\n")
    written.replace(path)


def _lines(value: Any, depth: int = 0) -> str:
    on_one_line = json.dumps(value)
    if not isinstance(value, dict | list) or len(on_one_line) <= LINE:
        return on_one_line
    indent = " " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_lines(v, depth + 1)}" for k, v in value.items()]
    else:
        items = [_lines(item, depth + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    body = f",\n{indent}".join(items)
    return f"{opening}\n{indent}{body}\n{indent[1:]}{closing}"


def _plain(value: Any) -> Any:
    """As JSON has it: string keys, lists, no nan. Floats are rounded."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
