"""vLLM's own scheduler with our changes, over traffic made at random: no models.

Requests share prompts, are cut into chunks, left out, preempted, resumed and aborted,
and ids are used again. The target's acceptance is made up too.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1 import request as vllm_request
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.engine import DRAFT_MODEL, EAGLE3, TARGET
from tests.oracle import VOCAB_SIZE
from tests.unit.draft_batches import batch_of
from vllm_emssd.draft_cursor import AdmittedRequest
from vllm_emssd.integration.drafting import block_updates
from vllm_emssd.integration.scheduler import UnpadScheduler
from vllm_emssd.proposers.base import DraftBatch


@dataclass(frozen=True)
class Setup:
    """One simulated deployment and the seed of its traffic."""

    seed: int
    num_steps: int = 40
    max_num_reqs: int = 4
    num_spec_tokens: int = 4
    block_size: int = 4
    num_spare_blocks: int = 8  # beyond what the longest request needs
    max_model_len: int = 32
    drafter_max_model_len: int = 32
    token_budget: int = 24  # the target's rows a step
    max_num_rows: int = 24  # the drafter's rows a forward
    trust_cached_blocks: bool = True
    drafts_always: bool = False  # the policy never asks for fewer than the most
    returns_confidence: bool = True  # the drafter, of each draft
    failure_chance: float = 0.0  # of each draft forward, and of each verification
    has_head: bool = False  # an EAGLE head drafts, not a draft model

    @property
    def max_blocks_per_req(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def num_blocks(self) -> int:
        return 1 + self.max_blocks_per_req + self.num_spare_blocks  # vLLM keeps one


@dataclass(eq=False)
class Request:
    req_id: str
    tokens: list[int]  # known
    num_prompt_tokens: int
    admission: int = -1  # differs each time it is admitted
    block_ids: list[int] = field(default_factory=list)
    num_hit_tokens: int = 0  # of this admission
    num_computed_tokens: int = 0
    drafts: list[int] = field(default_factory=list)  # pending
    has_drafted: bool = False  # in its last step since admission
    sampled: list[int] = field(default_factory=list)  # in this step


@dataclass
class Schedule:
    """What the worker is told of one step."""

    finished: list[str]
    num_scheduled: dict[Request, int]
    admitted: list[Request]
    block_updates: tuple[list[AdmittedRequest], list[tuple[str, list[int]]]]
    fresh_block_ids: list[int] = field(default_factory=list)


@cache
def _config(has_head: bool) -> VllmConfig:
    init_none_hash(sha256)
    method = EAGLE3 if has_head else DRAFT_MODEL
    args = EngineArgs(TARGET, max_model_len=512, speculative_config=method)
    return args.create_engine_config()


def _config_of(setup: Setup) -> VllmConfig:
    config = copy.copy(_config(setup.has_head))
    for part, name, value in (
        ("scheduler_config", "max_num_seqs", setup.max_num_reqs),
        ("scheduler_config", "max_num_batched_tokens", setup.token_budget),
        ("model_config", "max_model_len", setup.max_model_len),
        ("cache_config", "num_gpu_blocks", setup.num_blocks),
        ("speculative_config", "num_speculative_tokens", setup.num_spec_tokens),
    ):
        vars(config)[part] = changed = copy.copy(vars(config)[part])
        vars(changed)[name] = value  # past checks that a whole engine has to pass
    return config


def _make_scheduler(setup: Setup) -> UnpadScheduler:
    shape = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    spec = FullAttentionSpec(block_size=setup.block_size, **shape)
    no_grammars = SimpleNamespace(
        validate_tokens=lambda request, tokens: tokens,
        accept_tokens=lambda request, tokens: True,
    )
    return UnpadScheduler(
        _config_of(setup),
        KVCacheConfig(setup.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        no_grammars,
        setup.block_size,
    )


class Scheduler:
    """`schedule`, then `forward`, then `finish`."""

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        self._setup, self._rng = setup, rng
        self._vllm = _make_scheduler(setup)
        self._hasher = get_request_block_hasher(setup.block_size, sha256)
        self._requests: dict[str, Request] = {}
        self._texts = [self._random_tokens(setup.max_model_len) for _ in range(2)]
        self._num_req_ids = self._num_admissions = 0
        self._old_req_ids: list[str] = []
        self.seen: Counter[str] = Counter()  # what this run exercised

    def schedule(self) -> Schedule:
        for request in list(self._requests.values()):
            if self._chance(0.03):
                self.seen["aborted"] += 1
                self._end(request, RequestStatus.FINISHED_ABORTED)
        if self._vllm.running and self._chance(0.05):
            chosen = self._rng.choice(self._vllm.running)  # it may resume at once
            self._vllm.running.remove(chosen)
            self._vllm._preempt_request(chosen, 0.0)
        if not self._requests or self._chance(0.4):  # several at once
            while len(self._requests) < self._setup.max_num_reqs:
                self._add_request()
        self._rng.shuffle(self._vllm.running)
        budget = self._setup.token_budget
        if self._chance(0.3):
            budget = self._rng.randint(1, budget)
        self._vllm.max_num_scheduled_tokens = budget
        self._output = output = self._vllm.schedule()
        admitted, extended = block_updates(output, 0)
        schedule = Schedule(
            sorted(output.finished_req_ids),
            {self._requests[r]: n for r, n in output.num_scheduled_tokens.items()},
            [self._requests[told.req_id] for told in admitted],
            (admitted, extended),
        )
        for req_id in (output.preempted_req_ids or set()) & self._requests.keys():
            self._note_preemption(self._requests[req_id])
        for told in admitted:
            self._note_admission(self._requests[told.req_id], told)
            hit = told.num_computed_tokens // self._setup.block_size
            schedule.fresh_block_ids += told.block_ids[hit:]
        for req_id, block_ids in extended:
            self._requests[req_id].block_ids += block_ids
            schedule.fresh_block_ids += block_ids
        self._note_tokens(schedule)
        return schedule

    def forward(
        self,
        schedule: Schedule,
        requests: list[Request],
        record_verified: Callable[[Request, int, int], None],
    ) -> DraftBatch:
        """The target's forward and sampling. Returns what a proposer is given;
        `record_verified` is told of drafts and how many were accepted."""
        num_scheduled = [schedule.num_scheduled[request] for request in requests]
        prefilled, is_sampling = [], []
        for request, n in zip(requests, num_scheduled, strict=True):
            prefilled.append(request.num_computed_tokens + n)
            is_sampling.append(prefilled[-1] >= len(request.tokens))
            if is_sampling[-1]:
                num_drafts = len(request.drafts)
                record_verified(request, num_drafts, self._verify(request))
            else:
                request.num_computed_tokens = prefilled[-1]
        num_tokens = np.array([len(r.tokens) for r in requests], np.int64)
        room = np.minimum(
            self._setup.max_model_len - num_tokens - 1,
            self._setup.drafter_max_model_len - num_tokens + 1,
        )
        return batch_of(
            {r.req_id: r.tokens for r in requests},
            np.clip(room, 0, self._setup.num_spec_tokens),
            is_sampling,
            num_prompt_tokens=[r.num_prompt_tokens for r in requests],
            num_scheduled_tokens=num_scheduled,
            num_prefilled_tokens=prefilled,
        )

    def _verify(self, request: Request) -> int:
        """The target accepts some drafts and adds a token. Returns how many."""
        drafts = request.drafts
        num_accepted = len(drafts)
        if self._chance(0.5):
            num_accepted = self._rng.randint(0, len(drafts))
        bonus = self._rng.randrange(VOCAB_SIZE)
        if num_accepted < len(drafts) and bonus == drafts[num_accepted]:
            bonus = (bonus + 1) % VOCAB_SIZE  # rejected is rejected
        request.num_computed_tokens = len(request.tokens) + num_accepted
        request.sampled = [*drafts[:num_accepted], bonus]
        request.tokens = [*request.tokens, *request.sampled]
        request.drafts = []
        return num_accepted

    def finish(self) -> None:
        """vLLM's scheduler hears what was sampled and drafted."""
        ran = [self._requests[r] for r in self._output.num_scheduled_tokens]
        req_ids = [request.req_id for request in ran]
        self._vllm.update_from_output(
            self._output,
            ModelRunnerOutput(
                req_ids,
                {req_id: i for i, req_id in enumerate(req_ids)},
                [request.sampled for request in ran],
            ),
        )
        for request in ran:
            request.sampled = []
            if request.req_id not in self._vllm.requests:
                self.seen["reached max_model_len"] += 1
                self._forget(request)
            elif self._chance(0.04):
                self._end(request, RequestStatus.FINISHED_STOPPED)
        self._vllm.update_draft_token_ids(
            DraftTokenIds(req_ids, [list(request.drafts) for request in ran])
        )
        for req_id, known in self._vllm.requests.items():
            assert list(known.all_token_ids) == self._requests[req_id].tokens

    @property
    def known_req_ids(self) -> set[str]:
        """Requests that the worker may keep state of: all but the finished ones that it
        was told of."""
        return set(self._requests) | self._vllm.finished_req_ids

    # ------------------------------------------------------------ traffic

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _random_tokens(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    def _add_request(self) -> None:
        """Its prompt often begins as another text did, which may be an answer."""
        text, longest = self._rng.choice(self._texts), self._setup.max_model_len - 2
        shared = text[: self._rng.randint(0, longest - 1)]
        own = self._random_tokens(self._rng.randint(0 if shared else 1, 3))
        prompt = [*shared, *own][:longest]
        if self._old_req_ids and self._chance(0.1):
            req_id = self._old_req_ids.pop()
        else:
            self._num_req_ids += 1
            req_id = f"r{self._num_req_ids}"
        self._requests[req_id] = Request(req_id, prompt, len(prompt))
        params = SamplingParams(max_tokens=2**40, ignore_eos=True)
        self._vllm.add_request(
            vllm_request.Request(
                req_id, list(prompt), params, None, block_hasher=self._hasher
            )
        )

    def _end(self, request: Request, status: RequestStatus) -> None:
        self._vllm.finish_requests(request.req_id, status)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.req_id]
        self._old_req_ids.append(request.req_id)
        self._texts.append(request.tokens)

    # ------------------------------------------------------------ what was scheduled

    def _note_preemption(self, request: Request) -> None:
        self.seen["preempted"] += 1
        request.block_ids, request.drafts, request.has_drafted = [], [], False

    def _note_admission(self, request: Request, told: AdmittedRequest) -> None:
        self.seen["resumed"] += request.admission >= 0
        request.admission = self._num_admissions
        self._num_admissions += 1
        request.block_ids = list(told.block_ids)
        request.num_hit_tokens = told.num_computed_tokens
        request.num_computed_tokens = told.num_computed_tokens

    def _note_tokens(self, schedule: Schedule) -> None:
        scheduled_drafts = self._output.scheduled_spec_decode_tokens
        for request, num_scheduled in schedule.num_scheduled.items():
            drafts = list(scheduled_drafts.get(request.req_id, ()))
            assert drafts == request.drafts[: len(drafts)]
            self.seen["drafts trimmed"] += len(drafts) < len(request.drafts)
            request.drafts = drafts
            end = request.num_computed_tokens + num_scheduled
            self.seen["prefill chunked"] += end < len(request.tokens)
        for running in self._vllm.running:
            request = self._requests[running.request_id]
            if request not in schedule.num_scheduled and request.drafts:
                self.seen["left out with drafts pending"] += 1
