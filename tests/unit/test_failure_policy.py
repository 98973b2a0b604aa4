"""Which ranks go on after their proposer raised."""

from __future__ import annotations

import pytest
from vllm.config import ParallelConfig

from vllm_emssd.integration.failure_policy import FailurePolicy
from vllm_emssd.metrics import Counters


@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_a_rank_that_none_waits_for_goes_on(data_parallel_size: int) -> None:
    counters = Counters()
    parallel_config = ParallelConfig(data_parallel_size=data_parallel_size)
    failures = FailurePolicy(counters, parallel_config)
    for _ in range(3):
        failures.take(ZeroDivisionError())
    assert counters.num_failed_proposals == 3


@pytest.mark.parametrize(
    ("backend", "error"), [("mp", SystemExit), ("uni", ZeroDivisionError)]
)
def test_a_rank_that_others_wait_for_stops(
    backend: str, error: type[BaseException]
) -> None:
    counters = Counters()
    parallel_config = ParallelConfig(tensor_parallel_size=2)
    parallel_config.distributed_executor_backend = backend
    with pytest.raises(error):
        FailurePolicy(counters, parallel_config).take(ZeroDivisionError())
    assert counters.num_failed_proposals == 0
