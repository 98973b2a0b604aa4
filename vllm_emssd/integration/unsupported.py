"""Models that emssd does not speculate for or draft with, each with the fix.

They are looked at in the front end, before anything is loaded. What only the loaded
layers tell is in `kv_cache.py`, what a runner lacks in `runners.py`. All raise
ValueError.
"""

from __future__ import annotations

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.platforms import current_platform

from vllm_emssd.config import METHOD

METHOD_NAME = f'"method": "{METHOD}"'
_REMOVE = "Remove --speculative-config"


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
