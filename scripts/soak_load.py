"""The load of scripts/soak: what is asked of the server, and what must come back."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import openai

TARGET = "target"  # the target's name, as it is served
MAX_MODEL_LEN = 1280
REQUEST_SECONDS = 180  # longer is stuck
LOGPROB_TOLERANCE = 1e-2
NEAR_TIE = 1e-3  # in log probability: the batch's shape may decide
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer"},
        "kind": {"enum": ["class", "function"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


class WrongAnswerError(Exception):
    """The server answered something else than it must."""


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    requests: Counter[str] = field(default_factory=Counter)  # by kind
    wrong: list[str] = field(default_factory=list)
    cut_short: int = 0  # requests that vLLM may have ended in the middle of a step
    completion_tokens: int = 0  # of the requests that were not aborted
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GreedyRequest:
    """One with a known answer."""

    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] = ()


def make_greedy_requests(
    token_ids: Sequence[list[int]],
    num_requests: int,
    rng: random.Random,
    models: Sequence[str] = (TARGET,),
) -> list[GreedyRequest]:
    """Of all kinds, from real prompts as token ids, of all models in turns."""
    makers = [_plain, _plain, _stop, _grammar, _logprobs, _penalties, _bias, _full]
    requests = []
    for i in range(num_requests):
        maker = makers[i % len(makers)]
        prompt = rng.choice(token_ids)
        prompt = prompt[: rng.randint(1, min(len(prompt), 700))]
        kind, more = maker(rng)
        if kind == "full":
            prompt = _fill(token_ids, MAX_MODEL_LEN - more["max_tokens"])
        body = {"return_token_ids": True} | more.pop("extra_body", {})
        model = models[i // len(makers) % len(models)]
        arguments = {"model": model, "prompt": prompt, "temperature": 0}
        arguments["extra_body"] = body
        requests.append(GreedyRequest(kind, arguments | more))
    return requests


def _plain(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "plain", {
        "max_tokens": rng.randint(1, 96),
        "extra_body": {"ignore_eos": rng.random() < 0.5},
    }


def _stop(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "stop", {"max_tokens": 96, "stop": ["\n\n", "def ", "return"]}


def _grammar(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "grammar", {
        "max_tokens": 64,
        "extra_body": {"structured_outputs": {"json": SCHEMA}},
    }


def _logprobs(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "logprobs", {"max_tokens": rng.randint(1, 64), "logprobs": 3}


def _penalties(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "penalties", {
        "max_tokens": 64,
        "presence_penalty": 0.4,
        "extra_body": {"repetition_penalty": 1.2},
    }


def _bias(rng: random.Random) -> tuple[str, dict[str, Any]]:
    bias = {str(rng.randrange(1, 500)): rng.choice([-100, 2]) for _ in range(8)}
    return "bias", {"max_tokens": 48, "logit_bias": bias}


def _full(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Fills the context to its last token."""
    return "full", {
        "max_tokens": rng.randint(1, 12),
        "extra_body": {"ignore_eos": True},
    }


def _fill(token_ids: Sequence[list[int]], num_tokens: int) -> list[int]:
    filled: list[int] = []
    for tokens in token_ids:
        filled += tokens
        if len(filled) >= num_tokens:
            return filled[:num_tokens]
    raise ValueError(f"the prompts have fewer than {num_tokens} tokens together")


class Client:
    """Sends requests of every kind to one server, and checks what comes back."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        tally: Tally,
        models: Sequence[str] = (TARGET,),
    ) -> None:
        self._client = client
        self._tally = tally
        self._models = cycle(models)  # of requests without a known answer

    async def answer(self, request: GreedyRequest, streams: bool) -> Answer:
        async with asyncio.timeout(REQUEST_SECONDS):
            arguments = request.arguments
            if streams:
                return await self._streamed(arguments)
            whole = await self._client.completions.create(**arguments)
        choice = whole.choices[0]
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else ()
        return Answer(
            tuple(choice.model_extra["token_ids"]),
            choice.text,
            choice.finish_reason,
            tuple(logprobs),
        )

    async def _streamed(self, arguments: dict[str, Any]) -> Answer:
        token_ids: list[int] = []
        logprobs: list[float] = []
        text, finish_reason = "", ""
        stream = await self._client.completions.create(**arguments, stream=True)
        async for chunk in stream:
            choice = chunk.choices[0]
            token_ids += choice.model_extra.get("token_ids") or ()
            text += choice.text
            finish_reason = choice.finish_reason or finish_reason
            if choice.logprobs:
                logprobs += choice.logprobs.token_logprobs
        return Answer(tuple(token_ids), text, finish_reason, tuple(logprobs))

    async def check_greedy(
        self, request: GreedyRequest, expected: Answer, streams: bool
    ) -> None:
        answer = await self.answer(request, streams)
        if answer.token_ids != expected.token_ids or answer.text != expected.text:
            raise WrongAnswerError(
                f"{request.kind}: {answer.token_ids} for {expected.token_ids}"
            )
        if answer.finish_reason != expected.finish_reason:
            raise WrongAnswerError(f"{request.kind}: ended by {answer.finish_reason}")
        for found, wanted in zip(answer.logprobs, expected.logprobs, strict=True):
            if abs(found - wanted) > LOGPROB_TOLERANCE:
                raise WrongAnswerError(f"{request.kind}: logprob {found} for {wanted}")
        self._tally.cut_short += request.kind == "stop"  # found in the front end
        self._tally.completion_tokens += len(answer.token_ids)

    async def check_sampled(self, prompt: list[int], rng: random.Random) -> None:
        n, max_tokens = rng.choice([1, 1, 2, 3]), rng.randint(1, 64)
        async with asyncio.timeout(REQUEST_SECONDS):
            answer = await self._client.completions.create(
                model=next(self._models),
                prompt=prompt,
                n=n,
                max_tokens=max_tokens,
                temperature=rng.choice([0.3, 0.8, 1.0, 1.5]),
                top_p=rng.choice([1.0, 0.9]),
                seed=rng.choice([openai.NOT_GIVEN, rng.randrange(1000)]),
                logprobs=rng.choice([openai.NOT_GIVEN, 2]),
                extra_body={
                    "return_token_ids": True,
                    "top_k": rng.choice([-1, 20]),
                    "min_p": rng.choice([0.0, 0.05]),
                },
            )
        if len(answer.choices) != n:
            raise WrongAnswerError(f"{len(answer.choices)} choices for n={n}")
        for choice in answer.choices:
            num_tokens = len(choice.model_extra["token_ids"])
            if num_tokens > max_tokens or choice.finish_reason not in (
                "stop",
                "length",
            ):
                raise WrongAnswerError(f"{num_tokens} tokens, {choice.finish_reason}")
            if choice.finish_reason == "length" and num_tokens != max_tokens:
                raise WrongAnswerError(f"{num_tokens} tokens of {max_tokens}")
            self._tally.completion_tokens += num_tokens

    async def check_sampled_grammar(self, prompt: list[int]) -> None:
        async with asyncio.timeout(REQUEST_SECONDS):
            answer = await self._client.completions.create(
                model=next(self._models),
                prompt=prompt,
                max_tokens=128,
                temperature=0.8,
                extra_body={
                    "return_token_ids": True,
                    "structured_outputs": {"json": SCHEMA},
                },
            )
        [choice] = answer.choices
        self._tally.completion_tokens += len(choice.model_extra["token_ids"])
        if choice.finish_reason == "stop":
            found = json.loads(choice.text)
            if set(found) != set(SCHEMA["required"]):
                raise WrongAnswerError(f"not as the schema says: {choice.text}")

    async def abort(self, prompt: list[int], rng: random.Random) -> None:
        """Goes away after a few chunks, or before the first."""
        num_chunks = rng.randint(0, 6)
        self._tally.cut_short += 1
        async with asyncio.timeout(REQUEST_SECONDS):
            stream = await self._client.completions.create(
                model=next(self._models),
                prompt=prompt,
                max_tokens=200,
                temperature=rng.choice([0, 1]),
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async with stream:
                async for _ in stream:
                    num_chunks -= 1
                    if num_chunks < 0:
                        return

    async def refuse(self, prompt: list[int], rng: random.Random) -> None:
        """A request that must be refused, and must not hurt the others."""
        bad = rng.choice(
            [
                {"prompt": (prompt * MAX_MODEL_LEN)[: MAX_MODEL_LEN + 1]},
                {"prompt": []},
                {"temperature": -1},
                {"max_tokens": -1},
                {"extra_body": {"structured_outputs": {"json": "{not json"}}},
                {"logit_bias": {"99999999": 1}},
            ]
        )
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._client.completions.create(
                    **({"model": TARGET, "prompt": prompt, "max_tokens": 4} | bad)
                )
        except openai.BadRequestError:
            return
        raise WrongAnswerError(f"accepted {next(iter(bad))} of a bad request")


async def least_gap(client: openai.AsyncOpenAI, request: GreedyRequest) -> float:
    """Least distance, in log probability, between the two likeliest tokens of a greedy
    answer: a near tie may be decided by rounding, which says nothing."""
    arguments = request.arguments | {"logprobs": 2}
    answer = await client.completions.create(**arguments)
    gaps = []
    for top in answer.choices[0].logprobs.top_logprobs:
        likeliest = sorted(top.values(), reverse=True)[:2]
        gaps.append(likeliest[0] - likeliest[-1] if len(likeliest) > 1 else 0.0)
    return min(gaps, default=0.0)
