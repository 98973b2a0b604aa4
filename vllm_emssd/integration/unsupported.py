"""What emssd does not do: models, options and deployments, each with the fix.

Models and options are looked at in the front end, before anything is loaded; what vLLM
settles later, in the worker. What only the loaded layers tell is in `kv_cache.py`. All
raise ValueError.
"""

from __future__ import annotations

from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_emssd.config import ADAPTIVE, METHOD, EmssdConfig

METHOD_NAME = f'"method": "{METHOD}"'
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
ONLY_MIXED_CHOOSES = 'only "proposer": "mixed" has proposers to choose from'
_REMOVE = "Remove --speculative-config"

# ---------------------------------------------------------------------- models


def refuse_target(target: ModelConfig) -> None:
    """A target that cannot be speculated for."""
    if target.runner_type != "generate":
        raise ValueError(
            f"{METHOD_NAME} needs a target that generates text, found --runner "
            f"{target.runner_type}. {_REMOVE}."
        )
    if target.is_encoder_decoder:
        raise ValueError(
            f"{METHOD_NAME} does not support encoder-decoder targets, which vLLM does "
            f"not verify drafts of. {_REMOVE}."
        )
    if target.supports_multimodal_inputs:
        raise ValueError(
            f"{METHOD_NAME} supports multimodal targets with text prompts only. Add "
            "--language-model-only."
        )
    if target.enable_prompt_embeds:
        raise ValueError(
            f"{METHOD_NAME} drafts from the tokens of a prompt, which embeddings in "
            "their place do not tell. Remove --enable-prompt-embeds."
        )
    refuse_wrong_verification(target, METHOD_NAME)


def refuse_wrong_verification(target: ModelConfig, method: str) -> None:
    """A target whose drafts vLLM does not verify rightly.

    Recurrent state (Mamba, linear attention, short convolution) is not taken back to
    the last accepted token: of any model on a CPU, elsewhere of those without
    attention. And on a CPU latent attention is wrong for several rows of a text.

    Args:
        method: which speculation, to begin the error with.
    """
    is_cpu = current_platform.is_cpu()
    fix = f"{_REMOVE}, or serve this model on a GPU."
    if target.is_attention_free or (target.is_hybrid and is_cpu):
        why = (
            "it has recurrent state, which vLLM does not take back there to the last "
            "accepted token"
        )
        fix = f"{_REMOVE}." if target.is_attention_free else fix
    elif target.use_mla and is_cpu:
        why = (
            "it has latent attention (MLA), which vLLM computes wrongly there for "
            "several tokens at once"
        )
    else:
        return
    where = " on a CPU" if is_cpu else ""
    raise ValueError(
        f"{method} does not support {target.architecture}{where}: {why}, so answers "
        f"would be wrong. {fix}"
    )


def refuse_drafter(spec_config: SpeculativeConfig) -> None:
    """A model that cannot draft on its own, nor as an EAGLE-3 head of the target."""
    if what := _why_no_drafter(spec_config):
        raise ValueError(
            f"--speculative-config: 'model' {spec_config.draft_model_config.model!r} "
            f"{what}. Choose another 'model', or remove it to copy from the text "
            "(llma)."
        )


def _why_no_drafter(spec_config: SpeculativeConfig) -> str:
    """Why its model cannot draft here, "" if it can."""
    draft = spec_config.draft_model_config
    if "eagle" in (name := draft.architecture.lower()) and "eagle3" not in name:
        return "is a head of another kind than EAGLE-3"
    if spec_config.method == "eagle3":
        if what := _why_no_head(draft, spec_config.target_model_config):
            return what
    elif spec_config.method != "draft_model":
        return f'is one that vLLM drafts with by its method "{spec_config.method}" only'
    if draft.is_hybrid or draft.is_attention_free:
        return "has recurrent state, which rejected drafts would spoil"
    if draft.is_encoder_decoder:
        return "is an encoder-decoder model"
    if draft.use_mla and current_platform.is_cpu():
        return "has latent attention (MLA), which vLLM drafts wrongly with on a CPU"
    if draft.uses_mrope:
        return "has multimodal rotary positions, which vLLM does not draft with"
    return ""


def _why_no_head(head: ModelConfig, target: ModelConfig) -> str:
    """Why it cannot be the target's EAGLE-3 head, "" if it can."""
    config = head.hf_config
    size = getattr(config, "target_hidden_size", None) or config.hidden_size
    if size != target.get_hidden_size():
        return (
            f"is an EAGLE-3 head for a hidden size of {size}, and the target's is "
            f"{target.get_hidden_size()}"
        )
    if config.vocab_size != target.get_vocab_size():
        return (
            f"is an EAGLE-3 head for a vocabulary of {config.vocab_size} tokens, and "
            f"the target's has {target.get_vocab_size()}"
        )
    return ""


# ---------------------------------------------------------------- vLLM's runners


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


def refuse_unprepared_v1(vllm_config: VllmConfig) -> None:
    """Where vLLM chose its V1 runner after the front end had prepared for V2."""
    if vllm_config.speculative_config.enable_adaptive_verification:
        raise ValueError(ADAPTIVE_NEEDS_V2)
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


def refuse_deployment(vllm_config: VllmConfig, config: EmssdConfig) -> None:
    """What vLLM's V2 runner offers and emssd does not."""
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
    if spec_config.method == "eagle3" and vllm_config.lora_config is not None:
        raise ValueError(
            "vLLM's V2 model runner tells the LM head one LoRA adapter a request, not "
            "one a draft, so an EAGLE-3 head's drafts cannot be verified with adapters "
            f"there. {USE_V1}, or remove --enable-lora."
        )
