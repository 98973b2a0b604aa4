"""The figure of result files: speed over plain decoding, by requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vllm_emssd.bench.methods import DESCRIPTIONS, FIXED_LENGTH, stock_method

Result = dict[str, Any]
SIZE = (7.5, 4.5)  # inches
PANEL_SIZE = (4.2, 3.4)  # of each result, where there are several
PANELS_A_ROW = 3
NUM_COLORS = 128
MARKERS = "os^vDPX*<>h"
# Methods of vLLM's own, drawn in grey; a name may go on, as in ngram-longest, stock-k3.
VLLM = ("stock", "ngram", "suffix")


def draw_results(results: Sequence[Result], path: Path) -> None:
    """Writes a PNG, with a panel for each result where there are several."""
    num_columns = min(len(results), PANELS_A_ROW)
    num_rows = -(-len(results) // num_columns)
    width, height = PANEL_SIZE if len(results) > 1 else SIZE
    size = width * num_columns, height * num_rows
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel in panels[len(results) :]:
        panel.remove()
    for panel, result in zip(panels, results, strict=False):
        draw_speed_up(panel, result)
        if len(results) > 1:
            name, dtype = result["workload"]["name"], result["arguments"]["dtype"]
            panel.set_title(f"{name}, {dtype}", fontsize=9)
            panel.legend(fontsize=6)
    figure.supxlabel(_caption(results), x=0.01, ha="left", fontsize=6, color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    # Lines need few colors: with a palette the file is a third or less.
    Image.open(path).quantize(NUM_COLORS).save(path, optimize=True)


def _caption(results: Sequence[Result]) -> str:
    result, made = results[0], results[0]["provenance"]
    said = [result["workload"]["name"]] if len(results) == 1 else []
    said += [*made["gpus"], made["machine"], f"vLLM {made['vllm']}"]
    said += dict.fromkeys(one["provenance"]["commit"] for one in results)
    if "is_compiled" in result:
        said.append("compiled" if result["is_compiled"] else "eager")
    if "stock" in result["results"][0]["methods"] and "arguments" in result:
        said.append(f"K = {result['arguments']['num_speculative_tokens']}")
    return "; ".join(said)


def draw_speed_up(axes: Axes, result: Result) -> None:
    """As the paper's figure 1; bars are 95 % intervals."""
    results = result["results"]
    batches = [r["batch"] for r in results]
    positions = range(len(batches))
    names = list(results[0]["methods"])
    base = "plain" if "plain" in names else "k0"
    axes.axhline(1.0, color="black", linewidth=1, label=base)
    names = [name for name in names if f"{name}/{base}" in results[0]["ratios"]]
    stock = stock_method(result.get("arguments", {}).get("draft_model") or "")
    for name, marker in zip(names, MARKERS * len(names), strict=False):
        ratios = [r["ratios"][f"{name}/{base}"] for r in results]
        middle = [r["ratio"] for r in ratios]
        errors = [
            [r["ratio"] - r["low"] for r in ratios],
            [r["high"] - r["ratio"] for r in ratios],
        ]
        style = _style(name) | {"marker": marker, "label": label_of(name, stock)}
        axes.errorbar(positions, middle, errors, capsize=3, **style)
    axes.set_xticks(positions, [str(batch) for batch in batches])
    axes.set_xlabel("requests at once")
    axes.set_ylabel("speed over plain decoding")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def label_of(method: str, stock: str = "draft_model") -> str:
    """Says whose method it is; a user's own keeps its name."""
    name, _, variant = method.partition("-")
    if name in VLLM:
        name = stock if name == "stock" else name
        return f"vLLM {name}" + (f", {variant}" if variant else "")
    if length := FIXED_LENGTH.fullmatch(method):
        return f"emssd fixed {length[1]}"
    return f"emssd {method}" if method in DESCRIPTIONS else method


def _style(method: str) -> dict[str, Any]:
    if method.partition("-")[0] in VLLM:
        return {"color": "grey", "linestyle": "--"}
    is_one_length = FIXED_LENGTH.fullmatch(method)
    return {"linestyle": "-", "linewidth": 0.8 if is_one_length else 2.0}
