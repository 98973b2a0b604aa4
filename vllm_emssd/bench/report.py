"""Results on the terminal and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_emssd.bench.comparison import geometric_means
from vllm_emssd.bench.over_http import LATENCIES

WIDTH = 160
LINE = 800  # characters: a method and its medians
DIGITS = 5


def print_results(results: Sequence[dict[str, Any]]) -> None:
    console = Console(width=WIDTH)
    for title, cell in CELLS.items():
        console.print(_method_table(title, results, cell))
    console.print(_ratio_table("speed ratios", "ratios", results))
    if all(result["at_equal_speed"] for result in results):
        title = "the same, had the target's forwards been as slow in all rounds"
        console.print(_ratio_table(title, "at_equal_speed", results))
    if results[0]["saving"]:
        console.print(_saving_table(results))
    if any(result["vanilla"] for result in results):
        console.print(_vanilla_table(results))
    if any(m["num_preemptions"] for r in results for m in r["methods"].values()):
        console.print(
            "[red]Requests were preempted: counts and times are not those of this "
            "batch. Raise --kv-cache-mib.[/]"
        )


def print_http_results(results: Sequence[dict[str, Any]]) -> None:
    columns = ("concurrency", "method", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99")
    table = _table("over HTTP, medians of the rounds; latencies in ms", *columns)
    for result in results:
        for name, found in result["methods"].items():
            latencies = (f"{found[key]:.1f}" for key in LATENCIES)
            speed = f"{found['output_throughput']:.0f}"
            table.add_row(str(result["concurrency"]), name, speed, *latencies)
    Console(width=WIDTH).print(table)


def print_proposer_times(times: Sequence[dict[str, Any]]) -> None:
    columns = ("proposer", "context", "requests", "first step", "step", "step p99")
    table = _table("copy proposers alone, ms", *columns)
    for found in times:
        table.add_row(
            found["proposer"],
            str(found["num_context_tokens"]),
            str(found["num_reqs"]),
            *(f"{found[key]:.3f}" for key in ("first_ms", "step_ms", "step_ms_p99")),
        )
    Console(width=WIDTH).print(table)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """JSON for people: what fits a line is on one, floats have five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(_plain(result)) + "\n")


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


def _speed(result: dict[str, Any], name: str) -> str:
    speeds = {m: s["tokens_per_s"] for m, s in result["methods"].items()}
    base = speeds.get("plain", next(iter(speeds.values())))
    return f"{speeds[name]:.0f} ({speeds[name] / base:.2f})"


def _accepted(result: dict[str, Any], name: str) -> str:
    return f"{result['methods'][name]['accepted_per_request_step']:.2f}"


def _rows(result: dict[str, Any], name: str) -> str:
    summary = result["methods"][name]
    return f"{summary['target_rows']:.0f} + {summary['draft_rows']:.0f}"


def _spread(result: dict[str, Any], name: str) -> str:
    return f"{result['methods'][name]['spread']:.1%}"


# Table 2 of the paper, EMS-SD over "unpad KV only" and over vanilla, by batch size.
PAPER = {
    2: (1.09, 1.09),
    4: (1.19, 1.25),
    8: (1.48, 1.59),
    16: (1.72, 1.97),
    24: (1.87, 2.14),
}

CELLS = {
    "tokens/s, medians of alternating rounds (x first method, or plain)": _speed,
    "accepted drafts a request and step": _accepted,
    "rows a round: target + draft model": _rows,
    "spread: middle half of the rounds over their median": _spread,
}


def _method_table(title: str, results: Sequence[dict[str, Any]], cell: Any) -> Table:
    names = list(results[0]["methods"])
    table = _table(title, "batch", *names)
    for result in results:
        table.add_row(str(result["batch"]), *(cell(result, name) for name in names))
    return table


def _ratio_table(title: str, which: str, results: Sequence[dict[str, Any]]) -> Table:
    """One row a ratio: there are more of them than batch sizes."""
    batches = [f"batch {result['batch']}" for result in results]
    table = _table(f"{title} [95 % interval]", "ratio", *batches, "geom. mean")
    for title, mean in geometric_means(results, which).items():
        cells = [result[which][title] for result in results]
        table.add_row(
            title,
            *(f"{c['ratio']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in cells),
            f"{mean:.3f}",
        )
    return table


def _saving_table(results: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "emssd (fixed) against vLLM's draft_model",
        "batch",
        "row cost draft / target",
        "draft rows saved",
        "time saved / predicted",
        "bookkeeping / forwards",
    )
    for result in results:
        s = result["saving"]
        table.add_row(
            str(result["batch"]),
            f"{s['row_cost_ratio']:.3f}",
            f"{s['draft_rows_saved']:.0f}",
            f"{s['saving_over_predicted']:.2f}",
            f"{s['bookkeeping_over_forwards']:.2f}",
        )
    return table


def _vanilla_table(results: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "the paper's vanilla, replayed (its time: padded inputs + priced K/V padding)",
        "batch",
        "method",
        "rows / unpadded",
        "cache slots read / unpadded",
        "row-slots / unpadded",
        "speed over padded inputs (paper)",
        "over vanilla (paper)",
    )
    for result in results:
        for name, found in result["vanilla"].items():
            own, padded = found["counts"]["unpadded"], found["counts"]["vanilla"]
            table.add_row(
                str(result["batch"]),
                name,
                *(
                    f"{padded[count] / own[count]:.2f}"
                    for count in ("num_rows", "num_kv_slots", "num_row_slots")
                ),
                *_beside_paper(result["batch"], name, found),
            )
    return table


def _beside_paper(batch: int, name: str, found: dict[str, Any]) -> Iterator[str]:
    paper = PAPER.get(batch, (None, None)) if name == "llma" else (None, None)
    ours = (found["over_padded_inputs"], found["over_vanilla"])
    for own, theirs in zip(ours, paper, strict=True):
        yield f"{own:.2f}" + (f" ({theirs:.2f})" if theirs else "")


def _table(title: str, *columns: str) -> Table:
    """As wide as its title: a narrower table would break it."""
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _plain(value: Any) -> Any:
    """As JSON has it: string keys, lists, no nan. Floats are rounded."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
