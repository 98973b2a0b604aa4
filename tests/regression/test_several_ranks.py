"""Of several ranks one fails: a clear stop, and soon, never a hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import DRAFT_MODEL, TARGET
from tests.fresh_process import python

STOP_SECONDS = 60  # vLLM itself would wait for 300

TWO_RANKS = f"""
import sys, time

def fail(worker, rank):
    runner = worker.model_runner
    if runner.parallel_config.rank != rank:
        return
    def propose(batch):
        raise ZeroDivisionError("planned")
    runner._proposer.propose = propose

def main():
    from vllm import LLM, SamplingParams
    llm = LLM({TARGET!r}, dtype="float32", enforce_eager=True, max_model_len=512,
        kv_cache_memory_bytes=64 << 20, max_num_seqs=4, tensor_parallel_size=2,
        speculative_config={DRAFT_MODEL!r})
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    [output] = llm.generate(["def "], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    assert all(s["num_accepted_tokens"] > 0 for s in llm.collective_rpc("emssd_stats"))
    llm.collective_rpc(fail, args=(int(sys.argv[1]),))
    started = time.monotonic()
    try:
        llm.generate(["def "], params, use_tqdm=False)
    except Exception as error:
        print("STOPPED", type(error).__name__, time.monotonic() - started, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_failing_rank_stops_the_engine(rank: int, tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    done = python(
        script,
        str(rank),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send `fail` to the workers
        OMP_NUM_THREADS="1",
        VLLM_LOGGING_LEVEL="INFO",
    )
    output = done.stdout + done.stderr
    stopped = [line for line in done.stdout.splitlines() if line.startswith("STOPPED")]
    assert stopped, output[-4000:]
    assert float(stopped[0].split()[2]) < STOP_SECONDS
    assert "failed on one of several ranks" in output
