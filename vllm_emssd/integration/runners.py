"""Which of vLLM's model runners an engine of ours has, and what each of them lacks.

On GPUs that is V2, on CPUs V1, where V2 is interpreted. On a GPU V1 is for what V2 does
not do: vLLM takes it by itself for proposers of other packages, users take it by
VLLM_USE_V2_MODEL_RUNNER=0. All refusals raise ValueError.
"""

from __future__ import annotations

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_emssd.config import ADAPTIVE, EmssdConfig
from vllm_emssd.integration.unsupported import METHOD_NAME

logger = init_logger("vllm.emssd.runners")

USE_V1 = "Set VLLM_USE_V2_MODEL_RUNNER=0"
AUTO_NEEDS_V2 = (
    "--speculative-config: 'draft_length' \"auto\" measures costs on CPUs with vLLM's "
    "V1 model runner, and with a draft model on its V2 model runner; use "
    '"draft_length": "fixed".'
)
ADAPTIVE_NEEDS_V2 = (
    f"--speculative-config: {ADAPTIVE!r} works on vLLM's V2 model runner only; remove "
    "it."
)


def prefers_v2() -> bool:
    """Whether vLLM takes its V2 runner where it can."""
    use_v2 = envs.VLLM_USE_V2_MODEL_RUNNER
    return not current_platform.is_cpu() if use_v2 is None else use_v2


def may_run_on_v2(config: EmssdConfig) -> bool:
    """Whether vLLM could choose its V2 runner, and that can do what is asked for."""
    copies = config.copies and config.unpad_inputs
    return prefers_v2() and (config.uses_draft_model or copies)


def refuse_options(config: EmssdConfig) -> None:
    """On the V2 runner, options that the V1 runner alone has."""
    if not (config.uses_draft_model or config.copies):
        raise ValueError(
            f"--speculative-config: 'proposer' \"{config.proposer}\" works on vLLM's "
            f"V1 model runner only. {USE_V1}."
        )
    if not config.unpad_inputs:
        raise ValueError(
            "--speculative-config: 'unpad_inputs' false works on vLLM's V1 model "
            f"runner only. {USE_V1}, or remove 'unpad_inputs'."
        )


def refuse_unprepared_v1(vllm_config: VllmConfig, device: torch.device) -> None:
    """Where vLLM chose its V1 runner after the front end had prepared for V2."""
    config = EmssdConfig.carried_by(vllm_config.additional_config)
    if config.draft_length == "auto" and device.type != "cpu":
        raise ValueError(AUTO_NEEDS_V2)  # it goes by the wall clock
    if vllm_config.speculative_config.method == "ngram_gpu":
        raise ValueError(
            '"proposer": "llma" was prepared for vLLM\'s V2 model runner, but vLLM '
            f"chose V1 here. {USE_V1}."
        )
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            f"{METHOD_NAME} does not schedule asynchronously on vLLM's V1 model "
            f"runner, which vLLM chose here. {USE_V1}, or --no-async-scheduling."
        )


def refuse_deployment(vllm_config: VllmConfig) -> None:
    """What vLLM's V2 runner offers and emssd does not."""
    spec_config = vllm_config.speculative_config
    if vllm_config.watermark_config is not None:
        raise ValueError(
            f"{METHOD_NAME} does not support watermarking; remove --watermark-config."
        )
    if vllm_config.parallel_config.prefill_context_parallel_size > 1:
        raise ValueError(
            f"{METHOD_NAME} does not support prefill context parallelism; set "
            "--prefill-context-parallel-size 1."
        )
    if spec_config.method == "eagle3" and vllm_config.kv_transfer_config is not None:
        raise ValueError(
            "An EAGLE-3 head needs the target's hidden states of all tokens, which a "
            f"KV connector does not bring. {USE_V1}, or remove --kv-transfer-config."
        )


def advise_v2(vllm_config: VllmConfig, device: torch.device) -> None:
    """On a GPU where the user chose the V1 runner for what V2 does too."""
    if device.type == "cpu" or envs.VLLM_USE_V2_MODEL_RUNNER is None:
        return
    config = EmssdConfig.carried_by(vllm_config.additional_config)
    try:
        refuse_options(config)
        refuse_deployment(vllm_config)
    except ValueError:
        return
    logger.warning(
        "With vLLM's V1 model runner the GPU waits in each step until the host knows "
        "what was accepted. Unset VLLM_USE_V2_MODEL_RUNNER for V2, where it does not."
    )
