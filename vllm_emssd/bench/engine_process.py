"""One method's engine in a process of its own, which runs a batch when asked."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_emssd.bench.methods import Method, Setting
from vllm_emssd.bench.request import Request
from vllm_emssd.bench.round import Round
from vllm_emssd.config import METHOD, parse_speculative_config

PREEMPTIONS = "vllm:num_preemptions"
CPU_FIXES_SWITCH = "EMSSD_CPU_FIXES"  # stock samples drafted rows wrongly on the CPU
GPU_SHARE = 0.9  # of its memory, for all engines together
STEPS_BEFORE = 5  # a profile: prompts that are cached, and what they leave


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Alike for every method of a run."""

    engine_args: dict[str, Any]  # as `vllm.LLM` takes them, `model` among them
    fix_cpu_sampling: bool = False
    logs: Path | None = None  # folder that gets what each engine prints


class EngineError(RuntimeError):
    """An engine did not start, or died; its own message is in it."""


def shared_gpu(num_engines: int) -> dict[str, Any]:
    """What each engine may ask for of a GPU on which all run: K/V caches have a size of
    their own, and this is what vLLM wants to find free."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory_utilization": GPU_SHARE / num_engines}


def same_graphs(methods: Sequence[Method], max_num_seqs: int) -> dict[str, Any]:
    """CUDA graphs of the steps of all methods, for each of them: vLLM's own stop at 512
    rows and emssd's do not, which is not what is compared."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from vllm_emssd.integration.frontend.capture_sizes import capture_sizes

    num_drafts = {_max_draft_tokens(method) for method in methods}
    sizes = {n for k in num_drafts for n in capture_sizes(1 + k, max_num_seqs)}
    return {"cudagraph_capture_sizes": sorted(sizes)}


def _max_draft_tokens(method: Method) -> int:
    """Of a request and step. Unknown keys are for the engine to refuse."""
    config = dict(method.speculative_config or {})
    if config.get("method") == METHOD:
        return parse_speculative_config(config, config)[0].max_draft_tokens
    return config.get("num_speculative_tokens") or 0


class EngineProcess:
    """The parent's end: starts the engine, sends batches, receives rounds. Wait until
    it is ready before sending any."""

    def __init__(self, method: Method, options: EngineOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._name, self._is_ready = method.name, False
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(method, options, child), daemon=True
        )
        self._process.start()
        child.close()

    def wait_until_ready(self) -> None:
        """Raises EngineError where the engine does not start."""
        if not self._is_ready:
            self._receive()
        self._is_ready = True

    def run(
        self,
        batches: list[list[Request]],
        max_concurrency: int,
        is_continuous: bool = False,
        setting: Setting | None = None,
    ) -> Round:
        """The batches one after the other, timed together.

        Args:
            max_concurrency: requests of a batch that run at once.
            is_continuous: a batch ends once no request is left to take the place of
                one that has ended; those still running are aborted.
            setting: for these batches and until there is another.
        """
        self._pipe.send((batches, max_concurrency, is_continuous, setting))
        return self._receive()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise EngineError(
                f"the engine of {self._name!r} died, exit code "
                f"{self._process.exitcode}; -9 is the kernel's for want of memory: "
                "compare fewer methods, or lower --kv-cache-memory-bytes"
            ) from None
        if isinstance(answer, str) and answer != "ready":
            raise EngineError(f"the engine of {self._name!r} failed:\n{answer}")
        return answer


# ---------------------------------------------------------------- in the child


def _serve(method: Method, options: EngineOptions, pipe: Connection) -> None:
    if options.logs is not None:
        _print_into(options.logs / f"{method.name}.log")
    try:
        engine = _Engine(method, options)
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            pipe.send(engine.run(*asked))
    except EOFError:  # the parent is gone
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _print_into(log: Path) -> None:
    """Sends all that this process prints, compiled code too, to a file."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class _Engine:
    def __init__(self, method: Method, options: EngineOptions) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if options.fix_cpu_sampling:
            os.environ[CPU_FIXES_SWITCH] = "1"
        import torch
        from vllm import LLM

        from vllm_emssd.bench.step_profiler import StepProfiler

        self._llm = LLM(
            **options.engine_args,
            speculative_config=method.speculative_config,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            seed=0,
        )
        self._is_emssd = (method.speculative_config or {}).get("method") == "emssd"
        self._profiler = StepProfiler(self._llm)
        self._num_requests = 0
        self._setting: Setting | None = None
        self._has_gpu = torch.cuda.is_available()
        self._profiles: dict[tuple[int, Setting | None], dict[str, float]] = {}

    def run(
        self,
        batches: list[list[Request]],
        max_concurrency: int,
        is_continuous: bool,
        setting: Setting | None = None,
    ) -> Round:
        if setting is not None and setting != self._setting:
            method, argument = self._setting = setting
            self._llm.collective_rpc(method, args=(argument,))
        done = self._profiler.start_round()
        stats, preemptions = self._emssd_stats(), self._num_preemptions()
        start = time.perf_counter()
        for batch in batches:
            outputs, unfinished = self._run_batch(batch, max_concurrency, is_continuous)
            done.unfinished |= {len(done.outputs) + i for i in unfinished}
            done.outputs += outputs
        done.seconds = time.perf_counter() - start
        done.num_tokens = sum(map(len, done.outputs))
        done.num_preemptions = self._num_preemptions() - preemptions
        now = self._emssd_stats()
        done.emssd_stats = {name: now[name] - stats[name] for name in now}
        if self._is_emssd:
            done.emssd_costs = self._llm.collective_rpc("emssd_costs")[0]
        if self._has_gpu:
            cell = max_concurrency, self._setting
            if cell not in self._profiles:
                self._profiles[cell] = self._profile(batches[-1][-max_concurrency:])
            done.profile = self._profiles[cell]
        return done

    def _run_batch(
        self, batch: list[Request], max_concurrency: int, is_continuous: bool
    ) -> tuple[list[list[int]], list[int]]:
        """The tokens of each request, in the order in which they started, and which of
        them were aborted."""
        engine = self._llm.llm_engine
        outputs: dict[str, Sequence[int]] = {}
        running: set[str] = set()
        waiting = deque(batch)
        while waiting or running:
            while waiting and len(running) < max_concurrency:
                name = self._add(waiting.popleft())
                running.add(name)
                outputs[name] = []
            if is_continuous and not waiting:
                break
            for output in engine.step():
                tokens = output.outputs[0].token_ids  # type: ignore[union-attr]
                outputs[output.request_id] = tokens
                if output.finished:
                    running.discard(output.request_id)
        engine.abort_request(list(running))
        unfinished = [i for i, name in enumerate(outputs) if name in running]
        return [list(tokens) for tokens in outputs.values()], unfinished

    def _profile(self, batch: list[Request]) -> dict[str, float]:
        """Of steps of these requests, each of which begins anew when it has ended."""
        from vllm_emssd.bench.gpu_profile import profile_steps

        engine, again = self._llm.llm_engine, cycle(batch)
        self._profiler.start_round()  # that nobody looks at
        running = {self._add(request) for request in batch}

        def step() -> None:
            for output in engine.step():
                if output.finished:
                    running.remove(output.request_id)
                    running.add(self._add(next(again)))

        for _ in range(STEPS_BEFORE):
            step()
        found = profile_steps(step)
        engine.abort_request(list(running))
        return found

    def _add(self, request: Request) -> str:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=request.max_tokens,
            ignore_eos=not request.stops_at_eos,
            **request.sampling,
        )
        self._num_requests += 1
        name = str(self._num_requests)
        prompt = {"prompt_token_ids": request.prompt_token_ids}
        req_id = self._llm.llm_engine.add_request(name, prompt, params)  # type: ignore[arg-type]
        self._profiler.add(req_id)
        return name

    def _emssd_stats(self) -> dict[str, int]:
        if not self._is_emssd:
            return {}
        return self._llm.collective_rpc("emssd_stats")[0]

    def _num_preemptions(self) -> int:
        return sum(
            int(metric.value)  # type: ignore[attr-defined]
            for metric in self._llm.get_metrics()
            if metric.name == PREEMPTIONS
        )
