"""What requests may ask of emssd, through the real server: its request model, its
errors, its workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engine import MIXED, TARGET, prompts
from vllm_emssd.bench.server_process import free_port, server_process, vllm_command

pytestmark = pytest.mark.slow
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port = free_port()
    command = [vllm_command(), "serve", TARGET, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1280", "--kv-cache-memory-bytes", str(256 << 20)]
    command += ["--served-model-name", "target", "--chat-template", PLAIN_TEMPLATE]
    command += ["--port", str(port), "--speculative-config", json.dumps(MIXED)]
    log = tmp_path_factory.mktemp("server") / "log"
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        server_process("emssd", command, port, log, env) as process,
        httpx.Client(base_url=process.base_url, timeout=60, trust_env=False) as client,
    ):
        yield client


def _counter(client: httpx.Client, name: str) -> int:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"vllm_emssd:{name}_total"):
            return int(float(line.rsplit(" ", 1)[1]))
    raise AssertionError("no counters on /metrics")


def _accepted(client: httpx.Client) -> int:
    return _counter(client, "num_accepted_tokens")


def _post(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    settings = {"model": "target", "temperature": 0, "max_tokens": 40}
    return client.post(path, json=settings | {"ignore_eos": True} | body)


def _complete(client: httpx.Client, **body: Any) -> tuple[str, int]:
    """The answer, and how many drafts were accepted for it."""
    before = _accepted(client)
    done = _post(client, "/v1/completions", prompt=prompts()[0], **body)
    assert done.is_success, done.text
    return done.json()["choices"][0]["text"], _accepted(client) - before


def test_reference_is_copied_and_changes_nothing(server: httpx.Client) -> None:
    text, without = _complete(server)
    token_ids = server.post(
        "/tokenize", json={"prompt": text, "add_special_tokens": False}
    ).json()["tokens"]
    for reference in (text, token_ids):
        again, accepted = _complete(server, vllm_xargs={"emssd_reference": reference})
        assert again == text
        assert accepted > without + 5
    for reference in ("", [], "nothing of the kind", [3] * 1000):
        again, _ = _complete(server, vllm_xargs={"emssd_reference": reference})
        assert again == text


def test_a_request_may_turn_drafts_off(server: httpx.Client) -> None:
    text, accepted = _complete(server)
    assert accepted > 0
    before = _counter(server, "num_draft_tokens")
    without = {"emssd_max_draft_tokens": 0}
    assert _complete(server, vllm_xargs=without) == (text, 0)
    assert _counter(server, "num_draft_tokens") == before


def test_prediction_of_a_chat_request_is_a_reference(server: httpx.Client) -> None:
    def ask(**body: Any) -> tuple[str, int]:
        before = _accepted(server)
        messages = [{"role": "user", "content": prompts()[0]}]
        done = _post(server, "/v1/chat/completions", messages=messages, **body)
        assert done.is_success, done.text
        text = done.json()["choices"][0]["message"]["content"]
        return text, _accepted(server) - before

    text, without = ask()
    parts = [{"type": "text", "text": part} for part in (text[:20], text[20:])]
    for content in (text, parts):
        prediction = {"type": "content", "content": content}
        again, accepted = ask(prediction=prediction)
        assert again == text
        assert accepted > without + 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"vllm_xargs": {"emssd_reference": 7}}, "must be text or a list of token ids"),
        ({"vllm_xargs": {"emssd_reference": [1, 99999]}}, "has the token id 99999"),
        ({"vllm_xargs": {"emssd_reference": [1] * 1281}}, "shorten it"),
        ({"vllm_xargs": {"emssd_reference": "x y " * 1280}}, "shorten it"),
        ({"vllm_xargs": {"emssd_max_draft_tokens": -1}}, "must be an integer"),
        ({"vllm_xargs": {"emssd_max_draft_tokens": "2"}}, "must be an integer"),
    ],
)
def test_bad_option_is_the_clients_error(
    server: httpx.Client, body: dict[str, Any], message: str
) -> None:
    done = _post(server, "/v1/completions", prompt="x", **body)
    assert done.status_code == 400
    assert message in done.json()["error"]["message"]


def test_bad_prediction_is_the_clients_error(server: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "prediction": {"type": "content", "content": 7}}
    done = _post(server, "/v1/chat/completions", **body)
    assert done.status_code == 400
    assert "prediction must be" in done.json()["error"]["message"]
