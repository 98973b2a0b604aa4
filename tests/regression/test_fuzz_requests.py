"""Any request, also a wrong one: a server with drafts answers it as one without does.

Requests are made from the fields of vLLM's own request models, sensible values and
senseless ones, and sent in batches to two servers. Both must give the same answer or
the same kind of refusal, and both must live on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from tests.engine import DRAFT, DRAFT_MODEL, LLMA, MIXED, TARGET, prompts
from vllm_emssd.bench.server_process import ServerProcess, free_port, server_process

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
REASONING = {"reasoning_start_str": "self", "reasoning_end_str": "return x"}
FLAGS = (
    "--served-model-name target --dtype float32 --enforce-eager --seed 0 "
    "--max-model-len 640 --max-num-batched-tokens 4096 --host 127.0.0.1 "
    f"--kv-cache-memory-bytes {64 << 20} --max-logprobs 20"
).split()
FLAGS += ["--chat-template", TEMPLATE, "--reasoning-config", json.dumps(REASONING)]
METHODS = {
    "mixed": MIXED,
    "draft_model": DRAFT_MODEL,
    "llma": LLMA,
    "auto": DRAFT_MODEL | {"draft_length": "auto"},
    "by default": {"method": "emssd", "model": DRAFT},
}
TEXTS = [text[-300:] for text in prompts()[:6]]
SEEDS = st.integers(0, 3)
TOKENS = st.integers(0, 2047)
ODD_INTEGERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64])
ODD_FLOATS = st.sampled_from([-1.0, 0.0, 1e-9, 2.5, 1e9])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def _mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> Any:
    return st.one_of(usual, usual, usual, usual, odd)


_structured = st.sampled_from(
    [
        {"regex": r"[a-z]{2,9}"},
        {"choice": ["first", "second one"]},
        {"json": SCHEMA},
        {"grammar": 'root ::= "a" | "b" root'},
        {"regex": "("},
        {"json": {"type": "nonsense"}},
        {},
    ]
)
# Values that reach the engine; fields without an entry get whatever their type allows.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "frequency_penalty": _mostly(st.floats(-2, 2), ODD_FLOATS),
    "presence_penalty": _mostly(st.floats(-2, 2), ODD_FLOATS),
    "repetition_penalty": _mostly(st.floats(0.7, 1.5), ODD_FLOATS),
    "logit_bias": st.dictionaries(
        st.integers(0, 2100).map(str), st.floats(-100, 100), max_size=4
    ),
    "max_tokens": _mostly(st.integers(1, 24), ODD_INTEGERS),
    "max_completion_tokens": _mostly(st.integers(1, 24), ODD_INTEGERS),
    "max_output_tokens": _mostly(st.integers(1, 24), ODD_INTEGERS),
    "min_tokens": _mostly(st.integers(0, 12), ODD_INTEGERS),
    "n": st.sampled_from([1, 1, 2, 3, 0, -1]),
    "seed": _mostly(SEEDS, ODD_INTEGERS),
    "stop": st.one_of(st.sampled_from(["\n", "self", ["(", "="]]), st.just([])),
    "stop_token_ids": st.lists(st.integers(-1, 2100), max_size=5),
    "temperature": _mostly(st.sampled_from([0, 0, 0.7, 1.0]), ODD_FLOATS),
    "top_p": _mostly(st.floats(0.1, 1), ODD_FLOATS),
    "top_k": _mostly(st.integers(1, 60), ODD_INTEGERS),
    "min_p": _mostly(st.floats(0, 0.3), ODD_FLOATS),
    "bad_words": st.lists(st.sampled_from(["self", "return", " x", ""]), max_size=3),
    "allowed_token_ids": st.lists(_mostly(TOKENS, st.just(9999)), max_size=400),
    "logprob_token_ids": st.lists(_mostly(TOKENS, st.just(9999)), max_size=4),
    "prompt_logprobs": st.sampled_from([0, 1, 3, -1, 25]),
    "thinking_token_budget": st.sampled_from([0, 1, 2, 5, 30, -1]),
    "truncate_prompt_tokens": st.sampled_from([1, 5, 60, 0, -1]),
    "structured_outputs": _structured,
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        ]
    ),
    "text": st.sampled_from(
        [
            {"format": {"type": "text"}},
            {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        ]
    ),
    "repetition_detection": st.sampled_from(
        [
            {"max_pattern_size": 4, "min_count": 2},
            {"max_pattern_size": 1, "min_count": 1},
        ]
    ),
    "top_logprobs": st.sampled_from([0, 1, 5, 25]),
    "vllm_xargs": st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
}
# What would only test the front end, or names files, connectors and other models.
LEFT_OUT = """
model messages prompt input background previous_response_id previous_input_messages
stream stream_options request_id session_id prompt_embeds use_beam_search
length_penalty media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs
kv_transfer_params ec_transfer_params chat_template documents chat_template_kwargs
tools tool_choice watermarking routed_experts_prompt_start continue_final_message
add_generation_prompt stream_interval
"""


def _fields(request_type: Any) -> dict[str, st.SearchStrategy[Any]]:
    return {
        name: VALUES.get(name, st.from_type(field.annotation).filter(_is_json))
        for name, field in request_type.model_fields.items()
        if name not in LEFT_OUT.split()
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, UnicodeError):
        return False
    return True


@st.composite
def _bodies(draw: Any) -> tuple[str, dict[str, Any]]:
    """A path of the API, and what is sent there."""
    text = draw(st.sampled_from(TEXTS))
    usual = {"max_tokens": 16, "temperature": 0, "return_token_ids": True}
    kind = draw(st.sampled_from(["completions", "chat/completions", "responses"]))
    if kind == "completions":
        fields = _fields(CompletionRequest)
        body: dict[str, Any] = {"prompt": text}
        fields["logprobs"] = st.sampled_from([0, 1, 4, 25, -1])
    elif kind == "chat/completions":
        fields = _fields(ChatCompletionRequest)
        body = {"messages": [{"role": "user", "content": text}]}
        fields["logprobs"] = st.booleans()
    else:
        fields, body = _fields(ResponsesRequest), {"input": text}
        usual = {"max_output_tokens": 16, "temperature": 0}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True))
    body |= {"model": "target", **usual, **{c: draw(fields[c]) for c in chosen}}
    if body["temperature"] and "seed" not in body and draw(st.integers(0, 4)):
        body["seed"] = draw(SEEDS)  # else only the kind of answer can be compared
    return f"/v1/{kind}", body


BATCHES = st.lists(_bodies(), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("servers")


def _server(folder: Any, name: str, config: dict[str, Any] | None) -> Any:
    port = free_port()
    asked = [] if config is None else ["--speculative-config", json.dumps(config)]
    command = [sys.executable, "-m", "vllm_emssd", "serve", TARGET, *FLAGS, *asked]
    command += ["--port", str(port)]
    return server_process(name, command, port, folder / f"{name}.log")


@pytest.fixture(scope="module")
def plain(folder: Any) -> Iterator[ServerProcess]:
    with _server(folder, "plain", None) as server:
        yield server


def _answers(server: ServerProcess, batch: Any) -> list[httpx.Response]:
    def post(sent: tuple[str, dict[str, Any]]) -> httpx.Response:
        path, body = sent
        url = server.base_url + path
        return httpx.post(url, json=body, timeout=120, trust_env=False)

    with ThreadPoolExecutor(len(batch)) as pool:
        return list(pool.map(post, batch))


def _assert_alike(body: dict[str, Any], expected: Any, seen: Any) -> None:
    assert seen.status_code == expected.status_code, (body, seen.text, expected.text)
    if expected.status_code != 200:
        return
    is_drawn = body["temperature"] and body["temperature"] > 1e-5
    if is_drawn and body.get("seed") is None:
        return
    try:
        _assert_close(_generated(seen.json()), _generated(expected.json()))
    except AssertionError as error:
        raise AssertionError(f"{body}\n{seen.text}\n{expected.text}") from error


def _generated(answer: dict[str, Any]) -> list[Any]:
    """What was generated, and how much, without the ids of the answer itself."""
    if "choices" in answer:
        return [answer["usage"], *answer["choices"]]
    num_tokens = [answer["usage"][f"{of}_tokens"] for of in ("input", "output")]
    return [num_tokens, answer["status"], [o | {"id": ""} for o in answer["output"]]]


def _assert_close(seen: Any, expected: Any) -> None:
    """The same, but for the last digits of numbers."""
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys()
        for key in expected:
            _assert_close(seen[key], expected[key])
    elif isinstance(expected, list):
        assert len(seen) == len(expected)
        for a, b in zip(seen, expected, strict=True):
            _assert_close(a, b)
    elif isinstance(expected, float):
        assert seen == pytest.approx(expected, abs=1e-3)
    else:
        assert seen == expected


def _compare(plain: ServerProcess, ours: ServerProcess, max_examples: int) -> None:
    @settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(BATCHES)
    def answers_are_alike(batch: Any) -> None:
        # One by one: beside others, vLLM may force a finished request's end of thinking
        # into the answer of the one that moves into its row.
        expected = [_answers(plain, [sent])[0] for sent in batch]
        seen = _answers(ours, batch)
        for (_, body), a, b in zip(batch, expected, seen, strict=True):
            _assert_alike(body, a, b)

    answers_are_alike()
    assert ours.get("/health").is_success
    assert ours.metrics()["vllm_emssd:num_accepted_tokens_total"] > 0


def test_some_requests(plain: ServerProcess, folder: Any) -> None:
    with _server(folder, "mixed", METHODS["mixed"]) as ours:
        _compare(plain, ours, max_examples=25)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_many_requests(plain: ServerProcess, folder: Any, name: str) -> None:
    with _server(folder, name, METHODS[name]) as ours:
        _compare(plain, ours, max_examples=300)
