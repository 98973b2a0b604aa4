"""What does not work on vLLM's V2 model runner, or on a GPU only there, each with the
flag to change."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.triton_utils import HAS_TRITON

from vllm_emssd.config import EmssdConfig

USE_V1 = "Set VLLM_USE_V2_MODEL_RUNNER=0"
AUTO_NEEDS_V2 = (
    "--speculative-config: 'draft_length' \"auto\" measures costs on CPUs, and on GPUs "
    'with "proposer": "draft_model" on vLLM\'s V2 model runner only; use '
    '"draft_length": "fixed".'
)


def refuse_options(config: EmssdConfig) -> None:
    """Raise ValueError for options that the V1 runner alone has."""
    if config.proposer != "draft_model":
        raise ValueError(
            f"--speculative-config: 'proposer' \"{config.proposer}\" works on vLLM's "
            f"V1 model runner only. {USE_V1}."
        )
    if not config.unpad_inputs:
        raise ValueError(
            "--speculative-config: 'unpad_inputs' false works on vLLM's V1 model "
            f"runner only. {USE_V1}, or remove 'unpad_inputs'."
        )


def refuse_async_v1(vllm_config: VllmConfig) -> None:
    """Raise ValueError where vLLM chose its V1 runner after the front end had let it
    schedule asynchronously."""
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            '"method": "emssd" does not schedule asynchronously on vLLM\'s V1 model '
            f"runner, which vLLM chose here. {USE_V1}, or --no-async-scheduling."
        )


def refuse_deployment(vllm_config: VllmConfig, config: EmssdConfig) -> None:
    """Raise ValueError for what vLLM's V2 runner offers and emssd does not."""
    spec_config = vllm_config.speculative_config
    if config.draft_length == "auto" and spec_config.use_local_argmax_reduction:
        raise ValueError(
            "--speculative-config: 'draft_length' \"auto\" goes by the probabilities "
            "of drafts, which 'use_local_argmax_reduction' does not compute; remove "
            'that, or use "draft_length": "fixed".'
        )
    if not HAS_TRITON:
        raise ValueError(
            f"vLLM's V2 model runner needs Triton, which this machine lacks. {USE_V1}."
        )
    if vllm_config.watermark_config is not None:
        raise ValueError(
            '"method": "emssd" does not support watermarking; remove '
            "--watermark-config."
        )
    if vllm_config.parallel_config.prefill_context_parallel_size > 1:
        raise ValueError(
            '"method": "emssd" does not support prefill context parallelism; set '
            "--prefill-context-parallel-size 1."
        )
