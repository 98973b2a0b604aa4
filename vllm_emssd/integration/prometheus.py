"""The counters on the server's `/metrics`.

The first process that parses the arguments makes a directory, names it in its
environment (which its engine processes and further API servers inherit) and registers
a collector that reads it when scraped. The first worker of each engine writes there.
The directory goes when its maker exits. With several API servers vLLM's `/metrics`
collects from its own files only, and these counters are not on it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_emssd.metrics import COUNTER_HELP, SharedCounters, read_shared_counters

DIRECTORY_VARIABLE = "EMSSD_COUNTERS_DIR"
RAY_VARIABLES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"  # vLLM's own option
PREFIX = "vllm_emssd:"


class EmssdCollector(Collector):
    """Yields `vllm_emssd:*_total`, labelled like vLLM's own counters."""

    def __init__(self, directory: Path, model_name: str) -> None:
        self.directory = directory
        self.model_name = model_name

    def collect(self) -> Iterator[CounterMetricFamily]:
        engines = list(read_shared_counters(self.directory))
        for name, text in COUNTER_HELP.items():
            family = CounterMetricFamily(
                PREFIX + name, text, labels=("model_name", "engine")
            )
            for engine_index, counts in engines:
                family.add_metric((self.model_name, str(engine_index)), counts[name])
            yield family

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Named up front, so that registering reads nothing."""
        for name, text in COUNTER_HELP.items():
            yield CounterMetricFamily(PREFIX + name, text)


_collector: EmssdCollector | None = None


def publish_counters_on_metrics(model_name: str) -> None:
    """Called in the front end, once or more; the latest model name counts."""
    global _collector
    if _collector is not None:
        _collector.model_name = model_name
        return
    inherited = os.environ.get(DIRECTORY_VARIABLE)
    if inherited and Path(inherited).is_dir():
        directory = Path(inherited)
    else:
        directory = Path(tempfile.mkdtemp(prefix="vllm-emssd-"))
        os.environ[DIRECTORY_VARIABLE] = str(directory)
        copied = os.environ.get(RAY_VARIABLES)
        os.environ[RAY_VARIABLES] = ",".join(filter(None, [copied, DIRECTORY_VARIABLE]))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    _collector = EmssdCollector(directory, model_name)
    REGISTRY.register(_collector)


def open_shared_counters(engine_index: int) -> SharedCounters | None:
    """Called in the worker. None where the front end runs on another machine."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or not Path(directory).is_dir():
        return None
    return SharedCounters(Path(directory), engine_index)
