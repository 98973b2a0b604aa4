"""A cost table from the result of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from vllm_emssd.simulate.costs import CostFile, ModelCosts, Point, table_of


def costs_of_result(result: Mapping[str, Any]) -> CostFile:
    """Forwards by the engine's own tables at the end of the last automatic round; what
    else a step takes, by the medians of plain decoding and of all methods that draft.

    Raises ValueError where the result lacks plain decoding or automatic lengths.
    """
    by_batch: dict[int, dict[str, dict[str, Any]]] = {
        found["batch"]: found["methods"] for found in result["results"]
    }
    costs = result.get("costs")
    if not costs or any("plain" not in methods for methods in by_batch.values()):
        raise ValueError(
            "costs are learned from a result of 'vllm-emssd bench' that has the "
            "methods plain and auto in it"
        )
    target, draft = costs["target"], costs["draft"]
    fixed = [
        (batch, round(_besides_forwards(methods["plain"], draft), 3))
        for batch, methods in sorted(by_batch.items())
    ]
    more = [
        _besides_forwards(method, draft) - table_of(fixed).at(batch)
        for batch, methods in by_batch.items()
        for method in methods.values()
        if method["draft_forwards"]
    ]
    provenance, arguments = result["provenance"], result["arguments"]
    return CostFile(
        kind="measured",
        target=ModelCosts(model=arguments["model"], points=target),
        draft=ModelCosts(model=str(arguments["draft_model"]), points=draft),
        fixed=fixed,
        speculation_ms=max(0.0, round(median(more), 3)) if more else 0.0,
        provenance={
            name: str(provenance[name])
            for name in ("machine", "command", "commit", "vllm", "torch")
        },
    )


def _besides_forwards(method: Mapping[str, Any], draft: list[Point]) -> float:
    """Of a method's step, ms. The draft forwards at their price in the table, which is
    that of the whole forward, its inputs and its logits included."""
    parts = method["step_ms"]
    ms = sum(parts.values()) - parts["target"]
    if method["draft_forwards"]:
        rows = method["draft_rows"] / method["draft_forwards"]
        forwards_per_step = method["draft_forwards"] / method["num_steps"]
        ms -= forwards_per_step * float(table_of(draft).ms(np.array(rows)))
    return float(ms)
