"""The load of a soak test: what is asked of the server, and what must come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from random import Random
from typing import Any

import numpy as np
import openai

TARGET = "target"  # the target's name, as it is served
MAX_MODEL_LEN = 1280
LOGPROB_TOLERANCE = 1e-2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": [1, 2]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
GRAMMAR = {"structured_outputs": {"json": SCHEMA}}

Arguments = dict[str, Any]  # of a completion
GREEDY: dict[str, Callable[[Random], Arguments]] = {
    "plain": lambda rng: {"max_tokens": rng.randint(1, 96)},
    "long": lambda rng: {"max_tokens": 96, "extra_body": {"ignore_eos": True}},
    "stop": lambda rng: {"max_tokens": 96, "stop": ["\n\n", "def ", "return"]},
    "grammar": lambda rng: {"max_tokens": 64, "extra_body": GRAMMAR},
    "logprobs": lambda rng: {"max_tokens": rng.randint(1, 64), "logprobs": 3},
    "penalties": lambda rng: {"presence_penalty": 0.4, "frequency_penalty": 0.2},
    "bias": lambda rng: {"logit_bias": {rng.randrange(1, 500): 2 for _ in range(8)}},
    "full": lambda rng: {"max_tokens": 8, "extra_body": {"ignore_eos": True}},
}  # "full" fills the context to its last token
REFUSED: list[Arguments] = [
    {"prompt": [1] * (MAX_MODEL_LEN + 1)},
    {"prompt": []},
    {"temperature": -1},
    {"max_tokens": -1},
    {"extra_body": {"structured_outputs": {"json": "{not json"}}},
    {"logit_bias": {"99999999": 1}},
]


class WrongAnswerError(Exception):
    """The server answered something else than it must."""


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongAnswerError(otherwise)


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] = field(compare=False)  # where they were asked for


@dataclass(frozen=True, slots=True)
class Known:
    """A greedy request, and plain vLLM's answer to it."""

    kind: str
    arguments: Arguments
    answer: Answer


def greedy_requests(
    prompts: Sequence[list[int]], count: int, rng: Random
) -> list[tuple[str, Arguments]]:
    """(kind, arguments): all kinds in turns, about real prompts."""
    requests = []
    for kind in islice(cycle(GREEDY), count):
        arguments = {"model": TARGET, "temperature": 0, "max_tokens": 48}
        arguments |= GREEDY[kind](rng)
        prompt = rng.choice(prompts)[: rng.randint(1, 700)]
        if kind == "full":
            length = MAX_MODEL_LEN - arguments["max_tokens"]
            prompt = list(islice(chain.from_iterable(prompts), length))
        body = {"return_token_ids": True} | arguments.get("extra_body", {})
        requests.append((kind, arguments | {"prompt": prompt, "extra_body": body}))
    return requests


async def ask(
    client: openai.AsyncOpenAI, arguments: Arguments, streams: bool = False
) -> Answer:
    found = await client.completions.create(**arguments, stream=streams)
    chunks = [chunk async for chunk in found] if streams else [found]
    choices = [chunk.choices[0] for chunk in chunks]
    return Answer(
        [i for choice in choices for i in choice.model_extra.get("token_ids") or ()],
        "".join(choice.text for choice in choices),
        next(choice.finish_reason for choice in choices if choice.finish_reason),
        [p for c in choices if c.logprobs for p in c.logprobs.token_logprobs],
    )


async def least_gap(client: openai.AsyncOpenAI, arguments: Arguments) -> float:
    """Between the log probabilities of the two likeliest tokens of a greedy answer:
    rounding may decide a near tie, which says nothing."""
    found = await client.completions.create(**arguments | {"logprobs": 2})
    tops = [sorted(p.values()) for p in found.choices[0].logprobs.top_logprobs]
    return min((top[-1] - top[-2] for top in tops if len(top) > 1), default=0.0)


class Load:
    """Asks one server. Each kind of request is a method; WrongAnswerError is raised."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        known: Sequence[Known],
        prompts: Sequence[list[int]],
    ) -> None:
        self._client, self._known, self._prompts = client, known, prompts
        self.completion_tokens = 0  # of the requests that were not aborted
        self.cut_short = 0  # requests that vLLM may have ended in the middle of a step

    async def greedy(self, rng: Random) -> None:
        known = rng.choice(self._known)
        answer = await ask(self._client, known.arguments, rng.random() < 0.5)
        wanted = known.answer
        check(answer == wanted, f"{known.kind}: {answer}, not {wanted}")
        is_near = np.allclose(answer.logprobs, wanted.logprobs, 0, LOGPROB_TOLERANCE)
        check(is_near, f"{known.kind}: {answer.logprobs}, not {wanted.logprobs}")
        self.cut_short += known.kind == "stop"  # found in the front end
        self.completion_tokens += len(answer.token_ids)

    async def sampled(self, rng: Random) -> None:
        most, n, has_grammar = rng.randint(1, 64), rng.randint(1, 3), rng.random() < 0.2
        body = {"return_token_ids": True, "top_k": rng.choice([-1, 20])}
        body |= GRAMMAR if has_grammar else {"min_p": rng.choice([0.0, 0.05])}
        answer = await self._create(
            rng,
            n=n,
            max_tokens=most,
            temperature=rng.choice([0.3, 0.8, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.choice([openai.NOT_GIVEN, rng.randrange(1000)]),
            logprobs=rng.choice([openai.NOT_GIVEN, 2]),
            extra_body=body,
        )
        check(len(answer.choices) == n, f"{len(answer.choices)} choices for n={n}")
        for choice in answer.choices:
            num_tokens = len(choice.model_extra["token_ids"])
            self.completion_tokens += num_tokens
            stops = choice.finish_reason == "stop"
            is_full = num_tokens == most and choice.finish_reason == "length"
            check(num_tokens <= most, f"{num_tokens} tokens of {most}")
            check(stops or is_full, f"{num_tokens} tokens, {choice.finish_reason}")
            if has_grammar and stops:
                keys = list(json.loads(choice.text))
                check(keys == SCHEMA["required"], f"not the schema: {choice.text}")

    async def abort(self, rng: Random) -> None:
        """Goes away after a few chunks, or before the first."""
        self.cut_short += 1
        left, body = rng.randint(0, 6), {"ignore_eos": True}
        stream = await self._create(rng, max_tokens=200, stream=True, extra_body=body)
        async with stream:
            async for _ in stream:
                if (left := left - 1) < 0:
                    return

    async def refuse(self, rng: Random) -> None:
        """A request that must be refused, and must not hurt the others."""
        bad = rng.choice(REFUSED)
        try:
            await self._create(rng, **bad)
        except openai.BadRequestError:
            return
        raise WrongAnswerError(f"accepted {next(iter(bad))} of a bad request")

    async def _create(self, rng: Random, **arguments: Any) -> Any:
        shared = {"model": TARGET, "prompt": rng.choice(self._prompts)}
        return await self._client.completions.create(**shared | arguments)
