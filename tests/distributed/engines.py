"""Jobs of the distributed suite, each run once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.job import Job, Report
from tests.distributed.processes import Tree, listeners, wait_for
from tests.distributed.ray_on_cpu.emssd_test_platform import SWITCH
from tests.engine import DRAFT_MODEL, EAGLE3, LLMA, MAX_MODEL_LEN, MIXED, TARGET

REPO = Path(__file__).parents[2]
SECONDS = 480  # for one job, on two slow cores
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "OMP_NUM_THREADS": "1",  # of each worker
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
PROPOSERS = {
    "draft_model": DRAFT_MODEL,
    "eagle3": EAGLE3,
    "llma": LLMA,
    "mixed": MIXED,
}


@dataclass(frozen=True)
class Setting:
    """How an engine is spread over workers, and what drafts."""

    proposer: str = "draft_model"
    draft_length: str = "auto"
    tp: int = 1
    dp: int = 1
    backend: str = "mp"
    incident: str | None = None

    def __str__(self) -> str:
        spread = (f"tp{self.tp}", f"dp{self.dp}", self.backend)
        return "-".join(
            filter(None, (*spread, self.proposer, self.draft_length, self.incident))
        )

    def job(self, address: str) -> Job:
        lengths = {"draft_length": self.draft_length}
        engine: dict[str, Any] = {
            "model": TARGET,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 128 << 20,
            "seed": 0,
            "tensor_parallel_size": self.tp,
            "worker_extension_cls": "tests.distributed.inspection.Inspection",
            "speculative_config": PROPOSERS[self.proposer] | lengths,
            "distributed_executor_backend": self.backend,
        }
        if self.dp > 1:
            engine |= {"data_parallel_size": self.dp}
        if self.dp > 1 and self.backend == "ray":
            engine |= {
                "data_parallel_backend": "ray",
                "data_parallel_address": address,
            }
        return Job(engine, incident=self.incident)


# One engine each for the smoke tests of what it says and of how it ends.
KILL_OVER_MP = Setting(tp=2, incident="kill")
DISAGREE_OVER_RAY = Setting(tp=2, backend="ray", incident="disagree")


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and what it left behind."""

    exit_code: int | None  # None: killed for taking too long
    report: Report
    log: str
    processes: list[str]
    segments: set[str]
    listeners: set[tuple[int, int]]

    def check(self) -> Outcome:
        assert self.exit_code == 0, self.log[-6000:]
        return self

    def left_nothing(self) -> None:
        assert self.processes == []
        assert self.segments == set()
        assert self.listeners == set()


def run_job(setting: Setting, folder: Path, cluster: RayCluster | None) -> Outcome:
    folder.mkdir()
    given, result = folder / "job.json", folder / "report.json"
    job = setting.job(cluster.address if cluster else "127.0.0.1")
    given.write_text(json.dumps(dataclasses.asdict(job)))
    tree = Tree(
        [sys.executable, "-m", "tests.distributed.job", str(given), str(result)],
        folder / "log",
        ENVIRONMENT | (cluster.environment if cluster else {}),
    )
    exit_code = tree.wait(SECONDS)
    processes = tree.leftovers()
    if cluster:
        processes += cluster.busy_workers()
    report = Report(**json.loads(result.read_text())) if result.exists() else Report()
    return Outcome(
        exit_code,
        report,
        tree.text,
        processes,
        segments=tree.segments(),
        # A port alone may be another engine's by now.
        listeners=listeners() & {(pid, port) for pid, port in report.listeners},
    )


class RayCluster:
    """A head made by scripts/launch_ray.py, with logical GPUs on the CPU."""

    NUM_GPUS = 4

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        own = self.own_environment()
        token = folder / "token"
        command = [sys.executable, str(REPO / "scripts" / "launch_ray.py"), "head"]
        command += ["--ray-port", str(port), "--token-file", str(token)]
        command += ["--num-gpus", str(self.NUM_GPUS), "--num-cpus", "8"]
        self.tree = Tree(command, folder / "log", own)
        ready = wait_for(lambda: "ready; the head is" in self.tree.text, 120)
        assert ready, self.tree.text
        self.head = self.tree.text.partition("ready; the head is ")[2].split(". ")[0]
        self.address = self.head.rpartition(":")[0]
        self.environment = own | {
            "RAY_ADDRESS": self.head,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "VLLM_HOST_IP": self.address,
        }

    @staticmethod
    def own_environment() -> dict[str, str]:
        """With the test platform on."""
        platform = str(Path(__file__).parent / "ray_on_cpu")
        python_path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], platform])
        return ENVIRONMENT | {SWITCH: "1", "PYTHONPATH": python_path}

    def busy_workers(self) -> list[str]:
        """Ray's processes that still hold a vLLM worker or engine."""

        def busy() -> list[str]:
            names = [" ".join(p.cmdline()) for p in self.tree.members()]
            return [n for n in names if "RayWorkerProc" in n or "EngineCore" in n]

        wait_for(lambda: not busy(), 20)
        return busy()

    def stop(self) -> tuple[int | None, list[str]]:
        """As when its terminal closes. Exit code, and what was left behind."""
        self.tree.process.send_signal(signal.SIGHUP)
        return self.tree.wait(60), self.tree.leftovers(5)
