"""Which vLLM versions this plugin works with, and all that differs between them.

Each function tells one difference from vLLM itself, so that a vLLM with a change of
`patches/` applied is seen whatever its version. It goes, with what it switches, once
the oldest supported vLLM has the change; no released version has any of them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")
PRIMITIVE_CACHE_SIZE = "ONEDNN_PRIMITIVE_CACHE_SIZE"  # patch 0011


def check_vllm_version(version: str | None = None) -> None:
    """Raise RuntimeError where the running vLLM is outside the supported range."""
    version = version or vllm.__version__
    try:
        base_version = Version(version).base_version
    except InvalidVersion:
        base_version = "0.1"
    if base_version == "0.1":  # what a build from source is called without git's tags
        raise RuntimeError(
            f'"method": "emssd" works with vLLM {SUPPORTED_VLLM}, and this one calls '
            f"itself {version!r}. Build it again with its version, e.g. "
            "VLLM_VERSION_OVERRIDE=0.32.0 pip install ."
        )
    if not SUPPORTED_VLLM.contains(base_version):
        raise RuntimeError(
            f'"method": "emssd" works with vLLM {SUPPORTED_VLLM}, found {version}. '
            'Install a vLLM in that range, e.g. pip install "vllm==0.32.*", '
            "or a vllm-emssd made for this vLLM."
        )


def method_registrar() -> Callable[[str, Callable[..., Any]], None] | None:
    """Patch 0002: vLLM's function by which plugins register speculative methods."""
    try:
        from vllm.v1.spec_decode.registry import register_speculative_method
    except ImportError:
        return None
    return register_speculative_method


def sampling_params_registrar() -> Callable[[Callable[..., Any]], None] | None:
    """Patch 0009: by which plugins check and change requests' sampling parameters."""
    try:
        from vllm.v1.engine.input_processor import register_sampling_params_processor
    except ImportError:
        return None
    return register_sampling_params_processor


def hands_prediction_on(to_sampling_params: Callable[..., Any] | None) -> bool:
    """Patch 0010: a chat request's prediction is in its `extra_args`, as text."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    if to_sampling_params is None:
        return False
    try:
        request = ChatCompletionRequest(
            messages=[], prediction={"type": "content", "content": "text"}
        )
        params = to_sampling_params(request, 1, {})
    except (AttributeError, TypeError, ValueError):
        return False  # not what it was; the hook's own check tells how
    return (params.extra_args or {}).get("prediction") == "text"


def speculator_registrar() -> Callable[[Callable[..., Any]], None] | None:
    """Patch 0007: by which plugins bring speculators of the V2 runner."""
    try:
        from vllm.v1.worker.gpu.spec_decode import register_speculator
    except ImportError:
        return None
    return register_speculator


def expands_floats(expand_batch_to_tokens: Callable[..., Any] | None) -> bool:
    """Patch 0001: vLLM's function repeats a float32 value once a draft token.

    True off the CPU, where the kernel it calls is another one.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

    if not current_platform.is_cpu():
        return True
    if expand_batch_to_tokens is None:
        return False
    values = torch.tensor([0.25, 0.75])
    counts = torch.tensor([2, 3], dtype=torch.int32)
    if dispatcher._registry:  # in a worker
        try:
            expanded = expand_batch_to_tokens(
                values, counts, 3, replace_from=0, replace_to=1
            )
        except TypeError:
            return False  # not what it was; the hook's own check tells how
    else:
        expanded = torch.full((3,), -1.0)
        current_platform.import_kernels()
        _cpu_kernel_of_expand()(expanded, values, counts, 0, 1)
    return expanded.tolist() == [0.25, 0.25, 0.75]


def _cpu_kernel_of_expand() -> Callable[..., None]:
    """What a worker registers in place of the Triton kernel."""
    from vllm.utils import cpu_triton_utils

    return cpu_triton_utils._expand_kernel_impl


def accepts_min_p_and_logit_bias(validate: Callable[..., Any] | None) -> bool:
    """Patch 0003: `SamplingParams._validate_spec_decode` lets both through."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    if validate is None:
        return False
    any_config = object()  # looked at for None only
    for params in (SamplingParams(min_p=0.5), SamplingParams(logit_bias={0: 1.0})):
        try:
            validate(params, any_config)
        except VLLMValidationError:
            return False
        except (AttributeError, TypeError):
            return False  # not what it was; the hook's own check tells how
    return True


def applies_with_drafts(processor: type) -> bool:
    """Patch 0003: the rejection sampler applies this processor to drafted rows."""
    return hasattr(processor, "apply_with_spec_decode")


def runner_builds_logitsprocs_in_a_method(original: object = None) -> bool:
    """Patch 0004: the V1 runner calls `_build_logitsprocs`, which ours overrides."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return hasattr(GPUModelRunner, "_build_logitsprocs")


def cpu_worker_makes_runner_in_a_method(original: object = None) -> bool:
    """Patch 0005: `CPUWorker` calls `_make_model_runner`, which ours overrides.

    It inherits one of that name from the GPU worker, which it does not call.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    return "_make_model_runner" in vars(CPUWorker)


def names_its_primitive_cache(original: object = None) -> bool:
    """Patch 0011: how many row counts a CPU's linear layers keep kernels for."""
    from vllm.model_executor.layers import utils

    return hasattr(utils, PRIMITIVE_CACHE_SIZE)
