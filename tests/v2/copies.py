"""Copies found by the kernels, against those of the proposer for V1's runner."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.llma import NO_COPY, Copy, LlmaProposer

VOCAB = 40
MAX_LEN = 400
MAX_REQS = 5
STEPS = 18
OPTIONS = ((2, 7), (1, 10), (4, 3), (40, 7))  # tokens that must agree, most copied
SEEDS = range(1)


@dataclass
class Answer:
    """A request, and what the target will answer."""

    req_id: str
    tokens: list[int]
    num_prompt: int
    reference: np.ndarray | None
    end: int
    most: int
    answer: list[int]
    drafts: list[int] = field(default_factory=list)

    def next_tokens(self, num: int) -> list[int]:
        at = len(self.tokens) - self.num_prompt
        return self.answer[at : at + num]


def some_text(rng: random.Random, length: int) -> list[int]:
    """With runs that repeat."""
    text = [rng.randrange(VOCAB) for _ in range(10)]
    while len(text) < length:
        if rng.random() < 0.3:
            start = rng.randrange(len(text))
            text += text[start : start + rng.randint(1, 12)]
        text.append(rng.randrange(VOCAB))
    return text[:length]


def edited(rng: random.Random, text: list[int]) -> list[int]:
    """With a token renamed throughout, and some left out, put in or replaced."""
    names = {rng.randrange(VOCAB): rng.choices(range(VOCAB), k=rng.randint(0, 3))}
    out: list[int] = []
    at = 0
    while at < len(text):
        kind = rng.random()
        if kind < 0.01:
            at += rng.randint(1, 30)
        elif kind < 0.025:
            out += some_text(rng, 12)[: rng.choice([1, 2, 5, 12])]
        elif kind < 0.03:
            out += some_text(rng, 150)
        else:
            out += names.get(text[at], [text[at]])
            at += 1
    return out


def new_answer(rng: random.Random, number: int) -> Answer:
    has_reference = number % 2 == 1
    prompt = some_text(rng, 150 if number % 4 == 0 else rng.choice([1, 20, 120]))
    source, reference = prompt, None
    if has_reference:
        source = some_text(rng, rng.randint(1, 200))
        reference = np.array(source, dtype=np.int32)
    answer = edited(rng, source) + some_text(rng, MAX_LEN)
    end = min(len(prompt) + rng.randint(30, 150), MAX_LEN)
    most = rng.choice([7, 7, 7, 3, 0])
    return Answer(str(number), prompt, len(prompt), reference, end, most, answer)


class BothCopiers:
    """The same requests seen by the two."""

    def __init__(self, check_length: int, copy_length: int) -> None:
        from vllm_emssd.integration.v2.copier import DeviceCopier

        self.copy_length = copy_length
        ints = {"dtype": torch.int32}
        self.token_ids = torch.zeros(MAX_REQS, MAX_LEN, **ints)
        self.total_len, prompt_len = torch.zeros(2, MAX_REQS, **ints)
        self.states = SimpleNamespace(
            max_num_reqs=MAX_REQS,
            max_model_len=MAX_LEN,
            all_token_ids=SimpleNamespace(gpu=self.token_ids),
            total_len=SimpleNamespace(gpu=self.total_len),
            prompt_len=SimpleNamespace(gpu=prompt_len, np=prompt_len.numpy()),
            prefill_len=SimpleNamespace(np=prompt_len.numpy()),  # none is resumed
            max_seq_len=np.zeros(MAX_REQS, np.int32),
            num_speculative_steps=copy_length,
            device=torch.device("cpu"),
        )
        self.device = DeviceCopier(
            self.states,  # type: ignore[arg-type]
            check_length,
        )
        self.host = LlmaProposer(check_length, copy_length, LengthsByAcceptance())

    def admit(self, slot: int, answer: Answer) -> None:
        self.states.prompt_len.np[slot] = answer.num_prompt
        self.states.max_seq_len[slot] = answer.end
        self.write(slot, answer)
        self.device.admit(slot, answer.most, answer.reference)
        if answer.reference is not None:
            self.host.add_reference(answer.req_id, answer.reference)

    def write(self, slot: int, answer: Answer) -> None:
        self.total_len[slot] = len(answer.tokens)
        self.token_ids[slot, : len(answer.tokens)] = torch.tensor(answer.tokens)

    def propose(
        self, slots: list[int], answers: list[Answer], num_sampled: list[int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Drafts of each request, by the host and by the device."""
        lens = np.array([len(a.tokens) for a in answers])
        is_sampling = np.array(num_sampled) > 0
        most = np.minimum([a.most for a in answers], MAX_LEN - lens - 1)
        most[lens >= [a.end for a in answers]] = 0
        num_rows = torch.tensor([0] + [1 + len(a.drafts) for a in answers])
        for a, n in zip(answers, num_sampled, strict=True):
            if n:
                self.host.record_verified(a.req_id, len(a.drafts), n - 1)
        token_ids = np.zeros((len(answers), MAX_LEN), np.int32)
        for i, a in enumerate(answers):
            token_ids[i, : len(a.tokens)] = a.tokens
        batch = DraftBatch(
            [a.req_id for a in answers],
            token_ids,
            lens,
            np.array([a.num_prompt for a in answers]),
            np.ones_like(lens),
            lens,
            is_sampling,
            most,
        )
        by_host = self.host.propose(batch)
        drafts, found = self.device.find(
            torch.tensor(slots),
            torch.tensor(num_sampled, dtype=torch.int32),
            num_rows.cumsum(0).to(torch.int32),
        )
        by_device = [
            row[: int(n)]
            for row, (n, _) in zip(drafts.tolist(), found.tolist(), strict=True)
        ]
        gains = [pending.gain for pending in self.pending(answers, by_host)]
        np.testing.assert_allclose(found[:, 1], gains)
        return by_host, by_device

    def pending(self, answers: list[Answer], drafts: list[list[int]]) -> list[Copy]:
        copies = []
        for a, made in zip(answers, drafts, strict=True):
            request = self.host._requests.get(a.req_id)
            pending = request.pending if request and made else None
            copies.append(pending or NO_COPY)
        return copies


def run(seed: int, check_length: int, copy_length: int) -> dict[str, int]:
    """Batches that requests join and leave. Raises AssertionError."""
    rng = random.Random(seed)
    both, seen = BothCopiers(check_length, copy_length), Counter[str]()
    running: dict[int, Answer] = {}
    for step in range(STEPS):
        for slot in range(MAX_REQS):
            if slot not in running and (step == 0 or rng.random() < 0.5):
                running[slot] = new_answer(rng, seen["requests"])
                seen["requests"] += 1
                both.admit(slot, running[slot])
        slots = rng.sample(list(running), rng.randint(1, len(running)))
        answers, num_sampled = [running[slot] for slot in slots], []
        for slot, answer in zip(slots, answers, strict=True):
            if rng.random() < 0.05:  # computes its prompt still
                answer.drafts = []
                num_sampled.append(0)
                continue
            # A grammar, or the room in a step, may cut what is verified.
            answer.drafts = answer.drafts[: rng.choice([99, 99, 99, 2, 0])]
            truth = answer.next_tokens(len(answer.drafts) + 1)
            num_kept = 0
            while answer.drafts[: num_kept + 1] == truth[: num_kept + 1] and (
                num_kept < len(answer.drafts)
            ):
                num_kept += 1
            num_kept = min(num_kept, answer.end - len(answer.tokens) - 1)
            answer.tokens += truth[: num_kept + 1]
            num_sampled.append(num_kept + 1)
            seen["accepted"] += num_kept
            both.write(slot, answer)
        by_host, by_device = both.propose(slots, answers, num_sampled)
        assert by_host == by_device, (seed, step, slots)
        for slot, answer, drafts in zip(slots, answers, by_host, strict=True):
            answer.drafts = drafts
            seen["drafts"] += len(drafts)
            request = both.host._requests.get(answer.req_id)
            if request is not None and request.pointer is not None:
                seen["followed prompts"] += answer.reference is None
                pointer = request.pointer
                seen["edits"] += len(pointer._insertions) + len(pointer._replacements)
            if len(answer.tokens) >= answer.end:
                del running[slot]
                both.host.release([answer.req_id])
                both.device.release(slot)
    return dict(seen)


def run_all() -> list[dict[str, int]]:
    return [run(seed, *options) for options in OPTIONS for seed in SEEDS]
