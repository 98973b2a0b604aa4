"""Times the parts of an engine's steps and records what each step accepted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm_emssd.bench.round import RequestStep, Round


class StepProfiler:
    """Hooks on the models, the runner and the scheduler of one in-process engine."""

    def __init__(self, llm: Any) -> None:
        engine_core = llm.llm_engine.engine_core.engine_core
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.round = Round()
        self._request_index: dict[str, int] = {}  # engine's request id -> in the round
        self._time_forwards(runner.model, "target_forwards")
        self._time_drafting(runner)
        self._record_steps(engine_core.scheduler)

    def start_round(self) -> Round:
        """What is recorded from now on goes into the round returned."""
        self.round = Round()
        self._request_index.clear()
        return self.round

    def add(self, req_id: str) -> None:
        """The next request of the round, by the engine's own id."""
        self._request_index[req_id] = len(self._request_index)

    def _time_drafting(self, runner: Any) -> None:
        """Of either runner: V2 calls its drafter a speculator."""
        speculator = getattr(runner, "speculator", None)
        drafter = speculator or getattr(runner, "drafter", None)
        if speculator is not None:
            self._time(speculator, "propose", "propose_ms")
        elif hasattr(runner, "propose_draft_token_ids"):
            self._time(runner, "propose_draft_token_ids", "propose_ms")
        drafter_model = getattr(drafter, "model", None)
        if drafter_model is not None:
            self._time_forwards(drafter_model, "draft_forwards")
            self._time(drafter_model, "compute_logits", "logits_ms")

    def _time_forwards(self, model: Any, into: str) -> None:
        started: list[float] = []

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            started.append(time.perf_counter())

        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ms = (time.perf_counter() - started.pop()) * 1e3
            rows = int(kwargs["input_ids"].shape[0])
            getattr(self.round, into).append((rows, ms))

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)

    def _time(self, owner: Any, name: str, into: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                ms = (time.perf_counter() - start) * 1e3
                setattr(self.round, into, getattr(self.round, into) + ms)

        setattr(owner, name, timed)

    def _record_steps(self, scheduler: Any) -> None:
        update: Callable[[Any, Any], Any] = scheduler.update_from_output

        def recorded(scheduler_output: Any, model_runner_output: Any) -> Any:
            scheduled = scheduler_output.num_scheduled_tokens
            drafts = scheduler_output.scheduled_spec_decode_tokens
            step = [
                RequestStep(
                    self._request_index[req_id],
                    num_scheduled,
                    len(drafts.get(req_id, ())),
                    len(_sampled(model_runner_output, req_id)),
                )
                for req_id, num_scheduled in scheduled.items()
                # scheduled asynchronously, the last round's may still come
                if req_id in self._request_index
            ]
            if step:
                self.round.steps.append(step)
            return update(scheduler_output, model_runner_output)

        scheduler.update_from_output = recorded


def _sampled(model_runner_output: Any, req_id: str) -> list[int]:
    if not model_runner_output.sampled_token_ids:
        return []
    index = model_runner_output.req_id_to_index[req_id]
    return model_runner_output.sampled_token_ids[index]
