"""The process that serves an emssd engine: what it does beside vLLM's own front end.

It accepts requests that stock refuses with speculation, checks what they say in their
extra arguments, and shows the engine's counters on `/metrics`. The hooks are installed
wherever a config for emssd is made or unpickled, and act on engines of emssd only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import make_async

from vllm_emssd.integration.hooks.hook import Hook, install
from vllm_emssd.integration.metrics import show_on_metrics
from vllm_emssd.integration.request_options import (
    REFERENCE_KEY,
    check_request_limit,
    has_text_reference,
    prediction_of,
    tokenize_reference,
)

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest


@dataclass
class EngineTag:
    """Marks vLLM's config as one for emssd, in every process that the config reaches.

    An attribute of vLLM's SpeculativeConfig: pickled with it, but not hashed. So it may
    hold what differs from start to start, for which vLLM would compile the model anew
    if `additional_config` held it. A copy of the config has a tag of its own.
    """

    counters_dir: str | None = None  # set by the process that serves the engine

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled: the config came from another process (Ray Serve makes it in a
        task), and this process may be the one that serves the engine."""
        self.__dict__.update(state)
        install_serving_hooks()


def attach_tag(spec_config: Any) -> None:
    spec_config.emssd_tag = EngineTag()


def tag_of(spec_config: Any) -> EngineTag | None:
    """The tag of vLLM's SpeculativeConfig; None for any other method, or none."""
    return getattr(spec_config, "emssd_tag", None)


def _make_validation_hook(stock: Callable[..., None]) -> Callable[..., None]:
    def _validate_spec_decode(
        self: SamplingParams, speculative_config: SpeculativeConfig | None
    ) -> None:
        if tag_of(speculative_config) is None:
            stock(self, speculative_config)

    return _validate_spec_decode


VALIDATION_HOOK = Hook(
    target="vllm.sampling_params:SamplingParams._validate_spec_decode",
    why="stock refuses min_p and logit_bias with speculation; emssd honours both",
    signature="self, speculative_config",
    remove_when="stock's V1 rejection sampler applies min_p and logit_bias",
    make=_make_validation_hook,
    when="in processes that a config for emssd reaches; passes other methods through",
    patch="0003-min-p-and-logit-bias-with-drafts",
)


def _make_init(stock: Callable[..., None]) -> Callable[..., None]:
    def __init__(  # noqa: N807  it takes the place of one
        self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> None:
        if (tag := tag_of(vllm_config.speculative_config)) is not None:
            # Before the engine's workers get the config.
            model_name = vllm_config.model_config.served_model_name
            tag.counters_dir = show_on_metrics(self, model_name)
            # Before vLLM's __init__, which keeps a reference to this method.
            self.process_inputs = partial(_process_inputs, self, self.process_inputs)
        stock(self, vllm_config, *args, **kwargs)

    return __init__


def _process_inputs(
    processor: Any, stock: Callable[..., EngineCoreRequest], *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    request = stock(*args, **kwargs)
    check_request_limit(request.sampling_params)
    tokenize_reference(processor, request.sampling_params)
    return request


INPUT_PROCESSOR_HOOK = Hook(
    target="vllm.v1.engine.input_processor:InputProcessor.__init__",
    why=(
        "here an engine's front end is made: its counters are shown, and its requests' "
        "references checked and tokenized where errors reach the client"
    ),
    signature="self, vllm_config, renderer, mm_registry",
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


ADD_REQUEST_HOOK = Hook(
    target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
    why="a long text must not be tokenized on the server's event loop",
    signature=(
        "self, request_id, prompt, params, arrival_time, lora_request, "
        "tokenization_kwargs, trace_headers, priority, data_parallel_rank, session_id, "
        "prompt_text, reasoning_ended, reasoning_parser_kwargs, kv_hints"
    ),
    remove_when="vLLM lets a plugin process SamplingParams.extra_args",
    make=_make_add_request,
    when="likewise; acts on requests with a text reference only",
    patch="0009-sampling-params-processors",
)


def _make_to_sampling_params(
    stock: Callable[..., SamplingParams],
) -> Callable[..., SamplingParams]:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = stock(self, *args, **kwargs)
        prediction = prediction_of(self)
        extra_args = params.extra_args or {}
        if prediction is not None and extra_args.get(REFERENCE_KEY) is None:
            params.extra_args = {**extra_args, REFERENCE_KEY: prediction}
        return params

    return to_sampling_params


PREDICTION_HOOK = Hook(
    target=(
        "vllm.entrypoints.openai.chat_completion.protocol:"
        "ChatCompletionRequest.to_sampling_params"
    ),
    why="vLLM accepts OpenAI's prediction field but does not hand it on",
    signature="self, max_tokens, default_sampling_params",
    remove_when="vLLM hands prediction on in SamplingParams",
    make=_make_to_sampling_params,
    when="in processes that a config for emssd reaches; requests with prediction only",
)

SERVING_HOOKS = (
    VALIDATION_HOOK,
    INPUT_PROCESSOR_HOOK,
    ADD_REQUEST_HOOK,
    PREDICTION_HOOK,
)


def install_serving_hooks() -> None:
    """Idempotent. Raises RuntimeError where one does not fit this vLLM."""
    install(SERVING_HOOKS)
