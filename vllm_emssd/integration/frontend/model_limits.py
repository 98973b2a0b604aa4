"""Which models emssd does not speculate with, told from their configs.

Checked in the front end, before anything is loaded. What only the loaded layers tell is
checked in the worker (`kv_cache.py`).
"""

from __future__ import annotations

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.platforms import current_platform

_REMOVE = "Remove --speculative-config"


def refuse_target(target: ModelConfig) -> None:
    """Raise ValueError for a target that cannot be speculated for."""
    if target.runner_type != "generate":
        raise ValueError(
            '"method": "emssd" needs a target that generates text, found --runner '
            f"{target.runner_type}. {_REMOVE}."
        )
    if target.is_encoder_decoder:
        raise ValueError(
            '"method": "emssd" does not support encoder-decoder targets, which vLLM '
            f"does not verify drafts of. {_REMOVE}."
        )
    if target.supports_multimodal_inputs:
        raise ValueError(
            '"method": "emssd" supports multimodal targets with text prompts only. Add '
            "--language-model-only."
        )
    refuse_wrong_verification(target, '"method": "emssd"')


def refuse_wrong_verification(target: ModelConfig, method: str) -> None:
    """Raise ValueError for a target whose drafts vLLM does not verify rightly.

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
    """Raise ValueError for a model that cannot draft on its own."""
    draft = spec_config.draft_model_config
    what = ""
    if spec_config.method != "draft_model":
        what = f'is one that vLLM drafts with by its method "{spec_config.method}" only'
    elif draft.is_hybrid or draft.is_attention_free:
        what = "has recurrent state, which rejected drafts would spoil"
    elif draft.is_encoder_decoder:
        what = "is an encoder-decoder model"
    elif draft.use_mla and current_platform.is_cpu():
        what = "has latent attention (MLA), which vLLM drafts wrongly with on a CPU"
    elif draft.uses_mrope:
        what = "has multimodal rotary positions, which vLLM does not draft with"
    if what:
        raise ValueError(
            f"--speculative-config: 'model' {draft.model!r} {what}. Choose another "
            "'model', or remove it to copy from the text (llma)."
        )
