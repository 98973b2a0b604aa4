"""Figures of a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_emssd.bench.methods import DESCRIPTIONS, FIXED_LENGTH

Result = dict[str, Any]
SIZE = (7.5, 4.5)  # inches
MARKERS = "os^vDPX*<>h"
# Methods of vLLM's own, drawn in grey; a name may go on, as in ngram-longest, stock-k3.
VLLM = {"stock": "draft_model", "ngram": "ngram", "suffix": "suffix"}


def draw_all(result: Result, folder: Path, prefix: str) -> list[Path]:
    """Writes a PNG for each figure and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots(), result)
        figure.text(0.01, 0.005, _caption(result), fontsize=6, color="grey")
        path = folder / f"{prefix}-{name}.png"
        figure.savefig(path, dpi=150, metadata={"Software": "vllm-emssd"})
        paths.append(path)
    return paths


def _caption(result: Result) -> str:
    made = result["provenance"]
    workload = result["workload"]["name"]
    said = [workload, made["machine"], f"vLLM {made['vllm']}", made["commit"]]
    if "stock" in _methods(result) and "arguments" in result:
        said.append(f"K = {result['arguments']['num_speculative_tokens']}")
    return "; ".join(said)


def _methods(result: Result) -> list[str]:
    return list(result["results"][0]["methods"])


def draw_speed_up(axes: Axes, result: Result) -> None:
    """As the paper's figure 1: over plain, by batch size; bars are 95 % intervals."""
    results = result["results"]
    batches = [r["batch"] for r in results]
    positions = range(len(batches))
    axes.axhline(1.0, color="black", linewidth=1, label="plain")
    names = [name for name in _methods(result) if name != "plain"]
    for name, marker in zip(names, MARKERS * len(names), strict=False):
        title = f"{name}/plain"
        if title not in results[0]["ratios"]:
            continue
        ratios = [r["ratios"][title] for r in results]
        middle = [r["ratio"] for r in ratios]
        errors = [
            [r["ratio"] - r["low"] for r in ratios],
            [r["high"] - r["ratio"] for r in ratios],
        ]
        style = _style(name) | {"marker": marker, "label": label_of(name)}
        axes.errorbar(positions, middle, errors, capsize=3, **style)
    _draw_vanilla(axes, results)
    axes.set_xticks(positions, [str(batch) for batch in batches])
    axes.set_xlabel("requests at once")
    axes.set_ylabel("speed over plain decoding")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def label_of(method: str) -> str:
    """Says whose method it is; a user's own keeps its name."""
    name, _, variant = method.partition("-")
    if name in VLLM:
        return f"vLLM {VLLM[name]}" + (f", {variant}" if variant else "")
    if length := FIXED_LENGTH.fullmatch(method):
        return f"emssd fixed {length[1]}"
    return f"emssd {method}" if method in DESCRIPTIONS else method


def _style(method: str) -> dict[str, Any]:
    if method.partition("-")[0] in VLLM:
        return {"color": "grey", "linestyle": "--"}
    is_one_length = FIXED_LENGTH.fullmatch(method)
    return {"linestyle": "-", "linewidth": 0.8 if is_one_length else 2.0}


def _draw_vanilla(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    """The paper's vanilla, as far as its cache's padding was priced."""
    points = [
        (i, r["ratios"]["llma/plain"]["ratio"] / r["vanilla"]["llma"]["over_vanilla"])
        for i, r in enumerate(results)
        if r["vanilla"].get("llma", {}).get("over_vanilla")
        and "llma/plain" in r["ratios"]
    ]
    if points:
        axes.plot(*zip(*points, strict=True), "k:", label="vanilla, estimated")


def draw_rows(axes: Axes, result: Result) -> None:
    """Rows a token, at the largest batch; the prompts' rows are in it."""
    largest = result["results"][-1]["methods"]
    tokens = {name: m["tokens_per_s"] * m["seconds"] for name, m in largest.items()}
    _stack(
        axes,
        list(largest),
        {
            "target": [m["target_rows"] / tokens[n] for n, m in largest.items()],
            "draft model": [m["draft_rows"] / tokens[n] for n, m in largest.items()],
        },
    )
    axes.set_ylabel(f"rows computed a token, {_batch(result)}")


def draw_acceptance(axes: Axes, result: Result) -> None:
    """Share of request-steps by accepted drafts, at the largest batch."""
    drawn = {
        name: histogram
        for name, method in result["results"][-1]["methods"].items()
        if (histogram := _histogram(method)).keys() - {0}
    }
    width = 0.8 / max(len(drawn), 1)
    for i, (name, histogram) in enumerate(drawn.items()):
        total = sum(histogram.values())
        accepted = sorted(histogram)
        axes.bar(
            [n + (i - (len(drawn) - 1) / 2) * width for n in accepted],
            [histogram[n] / total for n in accepted],
            width,
            label=label_of(name),
        )
    axes.set_xlabel(f"accepted drafts, {_batch(result)}")
    axes.set_ylabel("share of request-steps")
    if drawn:
        axes.legend(fontsize=8)


def _histogram(method: dict[str, Any]) -> dict[int, int]:
    return {int(n): count for n, count in method["accepted_histogram"].items()}


def draw_step_time(axes: Axes, result: Result) -> None:
    """How a step's time splits, at the largest batch."""
    largest = result["results"][-1]["methods"]
    parts = next(iter(largest.values()))["step_ms"]
    _stack(
        axes,
        list(largest),
        {part: [m["step_ms"][part] for m in largest.values()] for part in parts},
    )
    axes.set_ylabel(f"ms a step, {_batch(result)}")


def _stack(axes: Axes, names: list[str], parts: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(names)
    for part, heights in parts.items():
        axes.bar(names, heights, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.tick_params("x", rotation=30)
    axes.legend(fontsize=8)


def _batch(result: Result) -> str:
    return f"batch {result['results'][-1]['batch']}"


FIGURES: dict[str, Callable[[Axes, Result], None]] = {
    "speed-up": draw_speed_up,
    "rows": draw_rows,
    "acceptance": draw_acceptance,
    "step-time": draw_step_time,
}
