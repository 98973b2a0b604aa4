"""The process that serves an emssd engine: what it does beside vLLM's own front end.

It accepts requests that stock refuses with speculation, checks their limits of drafts,
turns references into token ids, and shows the engine's counters on `/metrics`. The
hooks are installed wherever a config for emssd is made or unpickled, and act only for
engines that have one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import make_async

from vllm_emssd.integration.frontend.engine_tag import tag_of
from vllm_emssd.integration.hooks import hook as hooks
from vllm_emssd.integration.metrics.prometheus import show_on_metrics
from vllm_emssd.integration.references import (
    PREDICTION_HOOK,
    has_text_reference,
    tokenize_reference,
)
from vllm_emssd.integration.request_limits import check_request_limit

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def _make_validation_hook(stock: Callable[..., None]) -> Callable[..., None]:
    def _validate_spec_decode(
        self: SamplingParams, speculative_config: SpeculativeConfig | None
    ) -> None:
        if tag_of(speculative_config) is None:
            stock(self, speculative_config)

    return _validate_spec_decode


VALIDATION_HOOK = hooks.Hook(
    target="vllm.sampling_params:SamplingParams._validate_spec_decode",
    why="stock refuses min_p and logit_bias with speculation; emssd honours both",
    signature="self, speculative_config",
    upstream="min_p and logit_bias in the rejection sampler",
    remove_when="stock's V1 rejection sampler applies min_p and logit_bias",
    make=_make_validation_hook,
    when="in processes that a config for emssd reaches; passes other methods through",
    patch="0003-min-p-and-logit-bias-with-drafts",
)


def serve_engine(processor: Any) -> Callable[[SamplingParams], None] | None:
    """Called with each InputProcessor, before its engine starts: show the counters of
    an emssd engine. Returns what is to be done to each request's own copy of its
    sampling parameters; None for an engine without emssd."""
    config: VllmConfig = processor.vllm_config
    if tag_of(config.speculative_config) is None:
        return None
    show_on_metrics(processor, config)

    def process_params(params: SamplingParams) -> None:
        check_request_limit(params)
        tokenize_reference(processor, params)

    return process_params


def _make_init(stock: Callable[..., None]) -> Callable[..., None]:
    def __init__(  # noqa: N807  it takes the place of one
        self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> None:
        self.vllm_config = vllm_config
        process_params = serve_engine(self)
        if process_params is not None:
            # Before vLLM's __init__, which keeps a reference to this method.
            self.process_inputs = partial(
                _process_inputs, self.process_inputs, process_params
            )
        stock(self, vllm_config, *args, **kwargs)

    return __init__


def _process_inputs(
    stock: Callable[..., EngineCoreRequest],
    process_params: Callable[[SamplingParams], None],
    *args: Any,
    **kwargs: Any,
) -> EngineCoreRequest:
    request = stock(*args, **kwargs)
    if request.sampling_params is not None:
        process_params(request.sampling_params)
    return request


INPUT_PROCESSOR_HOOK = hooks.Hook(
    target="vllm.v1.engine.input_processor:InputProcessor.__init__",
    why=(
        "here an engine's front end is made: its counters are shown, and its requests' "
        "references checked and tokenized where errors reach the client"
    ),
    signature="self, vllm_config, renderer, mm_registry",
    upstream="a hook for plugins to validate extra_args",
    remove_when="vLLM lets a plugin process SamplingParams.extra_args",
    make=_make_init,
    when="in processes that a config for emssd reaches; acts on engines of emssd only",
    patch="0009-sampling-params-processors",
)


def _make_add_request(
    stock: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if (
            has_text_reference(params)
            and tag_of(self.vllm_config.speculative_config) is not None
        ):
            params = params.clone()
            # In the one thread in which vLLM uses the tokenizer, as for prompts.
            executor = self.input_processor.renderer._executor
            await make_async(tokenize_reference, executor)(self.input_processor, params)
        return await stock(self, request_id, prompt, params, *args, **kwargs)

    return add_request


ADD_REQUEST_HOOK = hooks.Hook(
    target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
    why="a long text must not be tokenized on the server's event loop",
    signature=(
        "self, request_id, prompt, params, arrival_time, lora_request, "
        "tokenization_kwargs, trace_headers, priority, data_parallel_rank, session_id, "
        "prompt_text, reasoning_ended, reasoning_parser_kwargs, kv_hints"
    ),
    upstream="a hook for plugins to validate extra_args, off the event loop",
    remove_when="vLLM lets a plugin process SamplingParams.extra_args",
    make=_make_add_request,
    when="likewise; acts on requests with a text reference only",
    patch="0009-sampling-params-processors",
)

SERVING_HOOKS = (
    VALIDATION_HOOK,
    INPUT_PROCESSOR_HOOK,
    ADD_REQUEST_HOOK,
    PREDICTION_HOOK,
)


def install_serving_hooks() -> None:
    """Idempotent. Raises RuntimeError where one does not fit this vLLM."""
    hooks.install(SERVING_HOOKS)
