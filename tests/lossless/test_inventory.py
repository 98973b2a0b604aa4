"""No parameter of vLLM's is left out of the exactness tests.

The lists are vLLM's own: a field that a new version adds fails here until it is named
below, with the cases of `test_greedy.py` that prove it or the reason why drafts cannot
matter to it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import vllm.v1.sample
import vllm.v1.worker.gpu.sample
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.metadata import SamplingMetadata

import vllm_emssd.integration.cpu.worker  # noqa: F401  before vLLM's V2 runner
from tests.lossless.test_greedy import CASES

# vLLM rewrites what an engine has taken: a choice becomes a grammar.
AS_WRITTEN = copy.deepcopy(CASES)


@dataclass(frozen=True)
class NoMatter:
    """Why drafts cannot change what the parameter does."""

    reason: str


FOLLOWS = NoMatter("vLLM derives it from other fields of the request")
FRONT_END = NoMatter("the front end uses it before or after the engine")
OF_THE_PROMPT = NoMatter("it concerns the prompt, which is computed without drafts")
OTHER_MODELS = NoMatter("only multimodal or encoder models use it; they are refused")
OTHER_ENGINES = NoMatter("it needs an engine option that refuses speculation")

SAMPLING: dict[str, list[str] | NoMatter] = {
    "n": ["n", "seed, n"],
    "presence_penalty": ["penalties", "seed, all filters"],
    "frequency_penalty": ["penalties"],
    "repetition_penalty": ["penalties"],
    "temperature": ["seed", "ignore_eos"],
    "watermarking": OTHER_ENGINES,
    "top_p": ["seed, all filters"],
    "top_k": ["seed, all filters", "n"],
    "min_p": ["seed, all filters"],
    "seed": ["seed"],
    "stop": ["stop strings"],
    "stop_token_ids": ["stop token"],
    "ignore_eos": ["ignore_eos", "eos"],
    "max_tokens": ["one token", "two tokens", "eos"],
    "min_tokens": ["min_tokens", "seed, min_tokens"],
    "logprobs": ["logprobs", "seed, logprobs"],
    "prompt_logprobs": ["prompt_logprobs"],
    "prompt_logprob_token_ids": OF_THE_PROMPT,
    "prompt_logprob_start": OF_THE_PROMPT,
    "logprob_token_ids": [
        "logprob_token_ids",
        "logprobs of named and of likely tokens",
    ],
    "flat_logprobs": ["flat_logprobs"],
    "detokenize": ["no text"],
    "skip_special_tokens": ["text"],
    "spaces_between_special_tokens": ["text"],
    "include_stop_str_in_output": ["stop strings"],
    **dict.fromkeys(("output_kind", "stream_interval", "skip_clone"), FRONT_END),
    **dict.fromkeys(("output_text_buffer_length", "_eos_token_id"), FOLLOWS),
    **dict.fromkeys(("_all_stop_token_ids", "_watermarking_skipped"), FOLLOWS),
    "structured_outputs": ["json", "regex", "choice", "grammar", "seed, grammar"],
    "logit_bias": ["logit_bias"],
    "allowed_token_ids": ["allowed_token_ids"],
    "extra_args": ["no drafts", "at most one draft"],
    "bad_words": ["bad_words"],
    "_bad_words_token_ids": FOLLOWS,
    "skip_reading_prefix_cache": ["no prefix cache"],
    "thinking_token_budget": ["thinking_token_budget", "thinking_token_budget, seed"],
    "repetition_detection": ["repetition_detection"],
    "routed_experts_prompt_start": NoMatter(
        "routing is recorded by the target's own forwards"
    ),
    "trace_decode_token_ids": OTHER_ENGINES,
}
STRUCTURED: dict[str, list[str] | NoMatter] = {
    "json": ["json"],
    "regex": ["regex"],
    "choice": ["choice"],
    "grammar": ["grammar"],
    "json_object": ["json_object"],
    "disable_any_whitespace": ["json without white space"],
    "disable_additional_properties": NoMatter("only the grammar's text differs"),
    "whitespace_pattern": NoMatter("only the grammar's text differs"),
    "structural_tag": ["structural_tag"],
    "_backend": FOLLOWS,
    "_backend_was_auto": FOLLOWS,
}
METADATA: dict[str, list[str] | NoMatter] = {
    "temperature": ["seed"],
    "all_greedy": ["ignore_eos"],
    "all_random": ["seed"],
    "top_p": ["seed, all filters"],
    "top_k": ["seed, all filters"],
    "generators": ["seed"],
    "max_num_logprobs": ["logprobs"],
    "no_penalties": ["penalties"],
    "prompt_token_ids": ["penalties"],
    "frequency_penalties": ["penalties"],
    "presence_penalties": ["penalties"],
    "repetition_penalties": ["penalties"],
    "output_token_ids": ["penalties", "bad_words"],
    "allowed_token_ids_mask": ["allowed_token_ids"],
    "bad_words_token_ids": ["bad_words"],
    "logitsprocs": ["logit_bias", "min_tokens", "seed, all filters"],
    "logprob_token_ids": ["logprob_token_ids"],
    "spec_token_ids": ["penalties", "bad_words"],
    "thinking_budget_state_holder": ["thinking_token_budget"],
}
STATES: dict[str, list[str]] = {
    "MinTokensLogitsProcessor": ["min_tokens"],
    "LogitBiasLogitsProcessor": ["logit_bias"],
    "MinPLogitsProcessor": ["seed, all filters"],
    "ThinkingBudgetStateHolder": ["thinking_token_budget"],
}
# Likewise on the V2 runner, whose cases `tests/v2/test_parameters.py` runs.
STATES_V2: dict[str, list[str] | NoMatter] = {
    "SamplingStates": ["seed", "seed, all filters", "logprobs"],
    "PenaltiesState": ["penalties"],
    "LogitBiasState": ["logit_bias", "allowed_token_ids", "min_tokens"],
    "BadWordsState": ["bad_words"],
    "LogprobTokenIdsState": ["logprob_token_ids"],
    "ThinkingBudgetState": ["thinking_token_budget"],
    "PromptLogprobsWorker": ["prompt_logprobs"],
    "TraceReplayState": OTHER_ENGINES,
    "LogitsProcRequestState": NoMatter("a view of the requests' tokens"),
}
# The last ones are of vLLM 0.33 alone.
OF_THE_FRONT_END = """
messages model prompt input instructions suffix echo user stream stream_options
reasoning reasoning_effort include_reasoning parallel_tool_calls
truncate_prompt_tokens truncation_side truncation add_generation_prompt
continue_final_message add_special_tokens documents chat_template chat_template_kwargs
priority request_id session_id return_tokens_as_token_ids return_token_ids
return_token_offsets return_prompt_text cache_salt prompt_embeds background include
max_tool_calls metadata previous_response_id service_tier store prompt_cache_key
prompt_cache_options prompt_cache_retention return_weight_versions safety_identifier
enable_response_messages previous_input_messages
"""
# Of requests over HTTP: the field of SamplingParams that each becomes, or why it
# cannot matter.
REQUESTS: dict[str, str | NoMatter] = {
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "top_logprobs": "logprobs",
    "response_format": "structured_outputs",
    "text": "structured_outputs",
    "tools": "structured_outputs",
    "tool_choice": "structured_outputs",
    "vllm_xargs": "extra_args",
    "kv_transfer_params": "extra_args",
    "ec_transfer_params": OTHER_MODELS,
    "use_beam_search": NoMatter("beams are requests of one token each"),
    "length_penalty": NoMatter("it ranks finished beams"),
    **dict.fromkeys(
        ("media_io_kwargs", "mm_processor_kwargs", "mm_payload", "return_mm_kwargs"),
        OTHER_MODELS,
    ),
    **dict.fromkeys(OF_THE_FRONT_END.split(), FRONT_END),
}


def _classes(package: ModuleType) -> set[str]:
    return {
        name
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("triton")
        for name, member in vars(importlib.import_module(module.name)).items()
        if isinstance(member, type) and member.__module__ == module.name
    }


def _state_names() -> set[str]:
    """Built-in logits processors and everything of the sampler's that keeps state."""
    names = {processor.__name__ for processor in BUILTIN_LOGITS_PROCESSORS}
    return names | {n for n in _classes(vllm.v1.sample) if n.endswith("StateHolder")}


def _state_names_v2() -> set[str]:
    ends = ("State", "States", "Worker")
    return {n for n in _classes(vllm.v1.worker.gpu.sample) if n.endswith(ends)}


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (SAMPLING, set(SamplingParams.__struct_fields__)),
        (STRUCTURED, {f.name for f in dataclasses.fields(StructuredOutputsParams)}),
        (METADATA, {f.name for f in dataclasses.fields(SamplingMetadata)}),
        (STATES, _state_names()),
        (STATES_V2, _state_names_v2()),
    ],
    ids=[
        *("SamplingParams", "StructuredOutputsParams", "SamplingMetadata"),
        *("states", "states on V2"),
    ],
)
def test_every_field_is_named(
    table: dict[str, list[str] | NoMatter], names: set[str]
) -> None:
    assert names <= set(table)
    cases = {c for entry in table.values() if isinstance(entry, list) for c in entry}
    assert cases <= set(CASES)


@pytest.mark.parametrize(
    "request_type", [ChatCompletionRequest, CompletionRequest, ResponsesRequest]
)
def test_every_field_of_a_request_is_named(request_type: type) -> None:
    fields = set(request_type.model_fields)  # type: ignore[attr-defined]
    assert fields <= set(REQUESTS) | set(SAMPLING)
    becomes = {to for to in REQUESTS.values() if isinstance(to, str)}
    assert becomes <= set(SAMPLING)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        *(pytest.param(SAMPLING, name, id=name) for name in SAMPLING),
        *(pytest.param(STRUCTURED, name, id=name) for name in STRUCTURED),
    ],
)
def test_the_cases_of_a_parameter_use_it(
    table: dict[str, list[str] | NoMatter], name: str
) -> None:
    """A case that left its parameter at the default would prove nothing."""
    cases = table[name]
    if isinstance(cases, NoMatter):
        assert cases.reason
        return
    used = []
    for case in cases:
        params = AS_WRITTEN[case]
        each: list[Any] = params if isinstance(params, list) else [params]
        default: Any = SamplingParams()
        if table is STRUCTURED:
            each = [p.structured_outputs for p in each]
            default = StructuredOutputsParams(json_object=False)
        used.append(any(getattr(p, name) != getattr(default, name) for p in each))
    assert any(used)
