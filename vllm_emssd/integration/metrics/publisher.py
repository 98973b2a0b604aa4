"""Where a rank's counters are shown: `/metrics`, and one log line a minute."""

from __future__ import annotations

from vllm.config import VllmConfig

from vllm_emssd.integration.metrics.prometheus import open_shared_counters
from vllm_emssd.integration.metrics.stats_log import LOG_STATS_KEY, StatsLog
from vllm_emssd.metrics import Counters


class Publisher:
    """Shows the first rank's counters; those of the others are the same."""

    def __init__(self, counters: Counters, vllm_config: VllmConfig) -> None:
        self._counters = counters
        self._shared = open_shared_counters(vllm_config)
        parallel_config = vllm_config.parallel_config
        logs = vllm_config.additional_config.get(LOG_STATS_KEY)
        self._log = (
            StatsLog(counters, parallel_config.data_parallel_index)
            if logs and parallel_config.rank == 0
            else None
        )

    def step_done(self) -> None:
        """Called after each step."""
        if self._shared is not None:
            self._shared.publish(self._counters)
        if self._log is not None:
            self._log.step_done()
