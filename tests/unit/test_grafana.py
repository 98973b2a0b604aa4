"""The dashboard asks for nothing that `/metrics` does not have."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import vllm
from prometheus_client.samples import Sample

from vllm_emssd.integration.metrics import EmssdCollector, ServedEngine
from vllm_emssd.metrics import COUNTER_NAMES, SharedCounters

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "vllm-emssd.json"
METRIC = re.compile(r"\b(vllm(?:_emssd)?:\w+)")
VLLM_METRICS = ("v1/metrics/loggers.py", "v1/spec_decode/metrics.py")


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    variables = dashboard()["templating"]["list"]
    queries = [v["query"]["query"] for v in variables if v["type"] == "query"]
    targets = [t["expr"] for panel in dashboard()["panels"] for t in panel["targets"]]
    return queries + targets


def asked_for() -> set[str]:
    return {name for text in expressions() for name in METRIC.findall(text)}


def samples(directory: Path) -> list[Sample]:
    """Ours on /metrics."""
    SharedCounters(directory, 0)
    collector = EmssdCollector()
    collector.engines.append(ServedEngine(directory, "model", os.getpid()))
    return [sample for family in collector.collect() for sample in family.samples]


def of_emssd(directory: Path) -> set[str]:
    return {sample.name for sample in samples(directory)}


def of_vllm() -> set[str]:
    """Names that vLLM registers; a counter's sample ends in _total besides."""
    package = Path(vllm.__file__).parent
    text = "".join((package / path).read_text() for path in VLLM_METRICS)
    names = set(re.findall(r'"(vllm:\w+)"', text))
    return names | {f"{name}_total" for name in names}


def test_every_metric_exists(tmp_path: Path) -> None:
    assert asked_for()
    assert asked_for() <= of_emssd(tmp_path) | of_vllm()


def test_every_counter_of_ours_is_shown() -> None:
    assert {f"vllm_emssd:{name}_total" for name in COUNTER_NAMES} <= asked_for()


def test_labels_are_those_of_the_counters(tmp_path: Path) -> None:
    for sample in samples(tmp_path):
        assert set(sample.labels) == {"model_name", "engine"}
    labels = {
        label for text in expressions() for label in re.findall(r"\{(\w+)[=!]", text)
    }
    assert labels == {"model_name"}


@pytest.mark.parametrize("panel", dashboard()["panels"], ids=lambda p: p["title"])
def test_panel_is_whole(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["targets"]
    places = [tuple(sorted(p["gridPos"].items())) for p in dashboard()["panels"]]
    assert len(set(places)) == len(places), "two panels in one place"
    for target in panel["targets"]:
        for opening, closing in ("()", "{}", "[]"):
            assert target["expr"].count(opening) == target["expr"].count(closing)
