"""What happens when a proposer raises: the step goes on without drafts.

The target then decodes as usual, and the draft cursor has not moved. With several
tensor-parallel ranks the error stops the engine: the other ranks may be in the middle
of a collective that this one has left, and would wait for ever. Data-parallel engines
never wait for each other; those of mixture-of-experts targets, which would, are refused
at the start.
"""

from __future__ import annotations

from vllm.config import ParallelConfig
from vllm.logger import init_logger

from vllm_emssd.metrics import Counters

logger = init_logger("vllm.emssd.failure_policy")


class FailurePolicy:
    """Counts failed proposals and logs the first; with several ranks it is fatal."""

    def __init__(self, counters: Counters, parallel_config: ParallelConfig) -> None:
        self._counters = counters
        self._is_alone = parallel_config.world_size == 1
        # vLLM's multiprocessing executor only logs what a rank other than the first
        # raises, and that rank goes on; it does notice a process that ends.
        self._must_end_process = parallel_config.distributed_executor_backend == "mp"

    def take(self, error: Exception) -> None:
        """Swallow `error`, or end this rank where other ranks wait for it.

        Raises: with several ranks SystemExit where processes are vLLM's own, else
        `error` itself.
        """
        if not self._is_alone and self._must_end_process:
            logger.error(
                "The proposer failed on one of several ranks, which cannot go on "
                "apart: stopping the engine.",
                exc_info=error,
            )
            raise SystemExit(1) from error
        if not self._is_alone:
            raise error
        self._counters.num_failed_proposals += 1
        if self._counters.num_failed_proposals == 1:
            logger.error(
                "The proposer failed; this step goes on without drafts, and so will "
                "others. Each is counted in num_failed_proposals; only this one is "
                "logged. Output stays exact.",
                exc_info=error,
            )
