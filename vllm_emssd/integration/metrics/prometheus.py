"""The counters on the server's `/metrics`.

The process that serves an engine makes a directory for it, names it in the engine's
config, which its workers get, and registers a collector that reads it when scraped. The
first worker of each data-parallel rank writes there. The directory goes when the engine
does, or when the process that made it exits. With several API servers vLLM's `/metrics`
collects from its own files only, and these counters are not on it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_emssd.integration.frontend.engine_tag import tag_of
from vllm_emssd.metrics import COUNTER_HELP, SharedCounters, read_shared_counters

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm_emssd:"


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """One whose front end is in this process."""

    directory: Path
    model_name: str
    process_id: int  # a forked process does not serve its parent's engines


class EmssdCollector(Collector):
    """Yields `vllm_emssd:*_total`, labelled like vLLM's own counters.

    Of two engines with the same model name and index in one process the later one is
    shown, as vLLM does.
    """

    def __init__(self) -> None:
        self.engines: list[ServedEngine] = []  # oldest first

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts_of = {
            (engine.model_name, str(index)): counts
            for engine in self.engines
            if engine.process_id == os.getpid()
            for index, counts in read_shared_counters(engine.directory)
        }
        for family in self.describe():
            name = family.name.removeprefix(PREFIX)
            for labels, counts in counts_of.items():
                family.add_metric(labels, counts[name])
            yield family

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Named up front, so that registering reads nothing."""
        for name, text in COUNTER_HELP.items():
            yield CounterMetricFamily(
                PREFIX + name, text, labels=("model_name", "engine")
            )


_collector = EmssdCollector()


def show_on_metrics(owner: object, vllm_config: VllmConfig) -> None:
    """Show an engine's counters for as long as `owner` lives. Called in the process
    that serves it, before its workers get the config."""
    tag = tag_of(vllm_config.speculative_config)
    assert tag is not None, "only engines with emssd have counters"
    directory = Path(tempfile.mkdtemp(prefix="vllm-emssd-"))
    tag.counters_dir = str(directory)
    model_name = vllm_config.model_config.served_model_name
    if not _collector.engines:
        REGISTRY.register(_collector)
    engine = ServedEngine(directory, model_name, os.getpid())
    _collector.engines.append(engine)
    weakref.finalize(owner, _forget, engine)


def _forget(engine: ServedEngine) -> None:
    if engine.process_id != os.getpid():
        return
    shutil.rmtree(engine.directory, ignore_errors=True)
    _collector.engines.remove(engine)
    if not _collector.engines:
        REGISTRY.unregister(_collector)


def open_shared_counters(vllm_config: VllmConfig) -> SharedCounters | None:
    """Called in the worker. None where another worker of the engine publishes, or where
    the process that serves the engine is on another machine or shows no counters."""
    tag = tag_of(vllm_config.speculative_config)
    parallel_config = vllm_config.parallel_config
    if tag is None or tag.counters_dir is None or parallel_config.rank != 0:
        return None
    directory = Path(tag.counters_dir)
    if not directory.is_dir():
        return None
    return SharedCounters(directory, parallel_config.data_parallel_index)
