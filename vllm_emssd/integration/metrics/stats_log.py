"""One log line a minute beside vLLM's own, while something happens."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.logger import init_logger

from vllm_emssd.metrics import Counters

logger = init_logger("vllm.emssd.stats")

LOG_STATS_KEY = "emssd_log_stats"  # in VllmConfig.additional_config
INTERVAL_SECONDS = 60.0


class StatsLog:
    """What the counters gained since the last line, at most once an interval."""

    def __init__(
        self,
        counters: Counters,
        engine_index: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._engine_index = engine_index
        self._clock = clock
        self._last_time = clock()
        self._last_counts = counters.as_dict()

    def step_done(self) -> None:
        """Called after each step, the only time at which anything is counted."""
        now = self._clock()
        if now - self._last_time < INTERVAL_SECONDS:
            return
        counts = self._counters.as_dict()
        gained = {name: n - self._last_counts[name] for name, n in counts.items()}
        logger.info("Engine %03d: %s", self._engine_index, describe(gained))
        self._last_time, self._last_counts = now, counts


def describe(gained: dict[str, int]) -> str:
    """The line, from what each counter gained."""
    drafted, accepted = gained["num_draft_tokens"], gained["num_accepted_tokens"]
    draft_rows, verify_rows = gained["num_draft_rows"], gained["num_verify_rows"]
    padded_draft_rows = gained["num_padded_draft_rows"]
    padded_verify_rows = gained["num_padded_verify_rows"]
    parts = [
        f"Drafted: {drafted} tokens",
        f"Accepted: {accepted} tokens ({_percent(accepted, drafted)})",
    ]
    if padded_draft_rows:
        saved = padded_draft_rows - draft_rows
        share = _percent(saved, padded_draft_rows)
        parts.append(f"Draft rows saved: {saved} ({share})")
    saved = padded_verify_rows - verify_rows
    share = _percent(saved, padded_verify_rows)
    parts.append(f"Verify rows saved: {saved} ({share})")
    if failed := gained["num_failed_proposals"]:
        parts.append(f"Failed proposals: {failed}")
    return "emssd metrics: " + ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f}%"
