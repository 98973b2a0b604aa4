"""Where an engine's counters are shown: on `/metrics`, and in one log line a minute.

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
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm_emssd.metrics import (
    COUNTER_HELP,
    Counters,
    SharedCounters,
    read_shared_counters,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.emssd.stats")

PREFIX = "vllm_emssd:"
LOG_STATS_KEY = "emssd_log_stats"  # in VllmConfig.additional_config
INTERVAL_SECONDS = 60.0


# ------------------------------------------------------- in the serving process


@dataclass(frozen=True, slots=True)
class ServedEngine:
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


def show_on_metrics(owner: object, model_name: str) -> str:
    """Show an engine's counters for as long as `owner` lives. Returns the directory
    that its workers are to write to."""
    directory = Path(tempfile.mkdtemp(prefix="vllm-emssd-"))
    if not _collector.engines:
        REGISTRY.register(_collector)
    engine = ServedEngine(directory, model_name, os.getpid())
    _collector.engines.append(engine)
    weakref.finalize(owner, _forget, engine)
    return str(directory)


def _forget(engine: ServedEngine) -> None:
    if engine.process_id != os.getpid():
        return
    shutil.rmtree(engine.directory, ignore_errors=True)
    _collector.engines.remove(engine)
    if not _collector.engines:
        REGISTRY.unregister(_collector)


# --------------------------------------------------------------- in the worker


class Publisher:
    """Shows the first rank's counters; those of the others are the same."""

    def __init__(self, counters: Counters, vllm_config: VllmConfig) -> None:
        self._counters = counters
        self._shared: SharedCounters | None = None
        self._log: StatsLog | None = None
        if vllm_config.parallel_config.rank:
            return
        engine_index = vllm_config.parallel_config.data_parallel_index
        # Not there if what serves the engine is elsewhere or shows no counters.
        directory = vllm_config.speculative_config.emssd_tag.counters_dir
        if directory is not None and Path(directory).is_dir():
            self._shared = SharedCounters(Path(directory), engine_index)
        if vllm_config.additional_config.get(LOG_STATS_KEY):
            self._log = StatsLog(counters, engine_index)

    def step_done(self) -> None:
        if self._shared is not None:
            self._shared.publish(self._counters)
        if self._log is not None:
            self._log.step_done()


class StatsLog:
    """Logs what the counters gained since the last line, at most once an interval."""

    def __init__(self, counters: Counters, engine_index: int) -> None:
        self._counters = counters
        self._engine_index = engine_index
        self._last_time = time.monotonic()
        self._last_counts = counters.as_dict()

    def step_done(self) -> None:
        now = time.monotonic()
        if now - self._last_time < INTERVAL_SECONDS:
            return
        counts = self._counters.as_dict()
        gained = {name: n - self._last_counts[name] for name, n in counts.items()}
        logger.info("Engine %03d: %s", self._engine_index, describe(gained))
        self._last_time, self._last_counts = now, counts


def describe(gained: dict[str, int]) -> str:
    """The line, from what each counter gained."""
    drafted, accepted = gained["num_draft_tokens"], gained["num_accepted_tokens"]
    parts = [
        f"Drafted: {drafted} tokens",
        f"Accepted: {accepted} tokens ({_percent(accepted, drafted)})",
    ]
    for kind in ("draft", "verify"):
        padded = gained[f"num_padded_{kind}_rows"]
        saved = padded - gained[f"num_{kind}_rows"]
        if padded or kind == "verify":  # copies have no draft rows
            share = _percent(saved, padded)
            parts.append(f"{kind.capitalize()} rows saved: {saved} ({share})")
    if failed := gained["num_failed_proposals"]:
        parts.append(f"Failed proposals: {failed}")
    return "emssd metrics: " + ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f}%"
