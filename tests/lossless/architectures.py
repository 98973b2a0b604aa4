"""The families of models that vLLM serves, as tiny random models of `transformers`.

`INVENTORY` is the table: a row for each family, with what emssd does on a CPU when the
model is the target, and when it is the drafter of one like it. The models are made in a
temporary folder; their weights are random, but large enough that greedy answers differ
from prompt to prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

VOCAB_SIZE = 256
WINDOW = 24  # positions of a sliding window, less than most texts are long
MAX_POSITIONS = 512

BLOCK_SIZE = 32  # tokens: the least that vLLM's attention on a CPU takes
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"

Outcome = Literal["exact", "refused"]


def numbers(text: str) -> dict[str, int]:
    """Of words like `hidden_size=64`."""
    return {name: int(n) for name, n in (word.split("=") for word in text.split())}


SIZES = numbers(
    "hidden_size=64 intermediate_size=96 num_hidden_layers=2 num_attention_heads=2 "
    "num_key_value_heads=2 head_dim=32 bos_token_id=0 eos_token_id=1 pad_token_id=0"
) | {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
OWN_SIZES = ("idefics3", "whisper")  # model types that `SIZES` do not fit
MIXED_LAYERS = ["sliding_attention", "full_attention"]
MOE = numbers("moe_intermediate_size=48 num_experts=4 num_experts_per_tok=2")


@dataclass(frozen=True)
class Architecture:
    """One family of models, and what becomes of it on a CPU."""

    family: str
    example: str  # models that people run
    model_type: str  # of `transformers`
    sizes: dict[str, Any] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)  # of the engine
    needs: str = ""  # flags without which it is refused
    target: Outcome = "exact"
    drafter: Outcome = "exact"
    says: str = ""  # the refusal of the target, a regular expression
    drafter_says: str = ""
    vllm_says: str = ""  # where vLLM's CPU build does not run the model at all
    is_fast: bool = False


RECURRENT: dict[str, Any] = {
    "target": "refused",
    "says": "has recurrent state.* --speculative-config",
    "drafter": "refused",
    "drafter_says": "has recurrent state",
}
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 32}

INVENTORY = (
    Architecture("dense", "Llama", "llama"),
    Architecture("dense", "Qwen2", "qwen2"),
    Architecture("dense", "Qwen3", "qwen3"),
    Architecture("mixture of experts", "Mixtral", "mixtral", {"num_local_experts": 4}),
    Architecture(
        "mixture of experts",
        "Qwen3-MoE",
        "qwen3_moe",
        MOE | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Architecture(
        "sliding window, all layers",
        "Mistral 7B v0.1",
        "mistral",
        {"sliding_window": WINDOW},
    ),
    Architecture(
        "sliding window, some layers",
        "Gemma 2",
        "gemma2",
        GEMMA | {"tie_word_embeddings": True},  # vLLM takes no other
    ),
    Architecture(
        "sliding window, some layers",
        "Gemma 3 1B",
        "gemma3_text",
        GEMMA | {"layer_types": MIXED_LAYERS},
        is_fast=True,
    ),
    Architecture(
        "chunked local attention",
        "Llama 4",
        "llama4_text",
        numbers("num_local_experts=4 num_experts_per_tok=1 intermediate_size_mlp=96")
        | {
            "attention_chunk_size": BLOCK_SIZE,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
        },
    ),
    Architecture(
        "attention sinks",
        "gpt-oss",
        "gpt_oss",
        numbers("num_local_experts=4 num_experts_per_tok=2")
        | {"sliding_window": WINDOW, "layer_types": MIXED_LAYERS},
    ),
    Architecture(
        "multi-head latent attention",
        "DeepSeek-V2",
        "deepseek_v2",
        numbers(
            "q_lora_rank=32 kv_lora_rank=512 qk_nope_head_dim=32 qk_rope_head_dim=64 "
            "v_head_dim=32 moe_intermediate_size=48 n_routed_experts=4 "
            "num_experts_per_tok=2 n_group=1 topk_group=1 first_k_dense_replace=1"
        ),
        target="refused",
        says="has latent attention.* --speculative-config",
        drafter="refused",
        drafter_says="has latent attention",
        is_fast=True,
    ),
    Architecture(
        "hybrid, Mamba-2",
        "Granite 4",
        "granitemoehybrid",
        numbers(
            "mamba_n_heads=4 mamba_d_head=32 mamba_d_state=16 mamba_n_groups=1 "
            "mamba_expand=2 num_local_experts=0 shared_intermediate_size=96"
        )
        | {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
        **RECURRENT,
        is_fast=True,
    ),
    Architecture(
        "hybrid, Mamba-1",
        "Jamba",
        "jamba",
        numbers(
            "attn_layer_period=2 attn_layer_offset=1 expert_layer_period=2 "
            "expert_layer_offset=1 num_experts=1 num_experts_per_tok=1 "
            "mamba_d_state=16 mamba_dt_rank=8"
        )
        | {"use_mamba_kernels": False},
        **RECURRENT,
        vllm_says="selective_scan_fwd",
    ),
    Architecture(
        "hybrid, gated delta net",
        "Qwen3-Next",
        "qwen3_next",
        MOE
        | numbers(
            "linear_key_head_dim=128 linear_value_head_dim=128 linear_num_key_heads=2 "
            "linear_num_value_heads=2 shared_expert_intermediate_size=48"
        )
        | {"layer_types": ["linear_attention", "full_attention"]},
        dtype="bfloat16",  # its CPU kernels take no other
        **RECURRENT | {"drafter_says": 'its method "mtp" only'},
    ),
    Architecture(
        "hybrid, short convolution",
        "LFM2",
        "lfm2",
        numbers("conv_L_cache=3 conv_dim=64 conv_dim_out=64")
        | {"layer_types": ["conv", "full_attention"]},
        **RECURRENT,
    ),
    Architecture(
        "no attention, Mamba-1",
        "Mamba",
        "mamba",
        numbers("state_size=16 intermediate_size=128 time_step_rank=8"),
        **RECURRENT,
        vllm_says="selective_scan_fwd",
    ),
    Architecture(
        "no attention, Mamba-2",
        "Mamba-Codestral",
        "mamba2",
        numbers(
            "state_size=16 intermediate_size=128 num_heads=4 head_dim=32 n_groups=1 "
            "expand=2"
        ),
        **RECURRENT,
        is_fast=True,
    ),
    Architecture(
        "encoder-decoder",
        "Whisper",
        "whisper",
        numbers(
            "d_model=64 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 "
            "decoder_attention_heads=2 encoder_ffn_dim=96 decoder_ffn_dim=96 "
            "num_mel_bins=16 max_source_positions=64 decoder_start_token_id=0 "
            "bos_token_id=0 eos_token_id=1 pad_token_id=0"
        )
        | {"vocab_size": VOCAB_SIZE, "max_target_positions": MAX_POSITIONS},
        auto_class="AutoModelForSpeechSeq2Seq",
        target="refused",
        says="encoder-decoder targets.* --speculative-config",
        drafter="refused",
        drafter_says="encoder-decoder",
        is_fast=True,
    ),
    Architecture(
        "multimodal, text prompts",
        "Idefics 3",
        "idefics3",
        {
            "text_config": SIZES | {"model_type": "llama"},
            "vision_config": numbers(
                "hidden_size=32 intermediate_size=32 num_hidden_layers=1 "
                "num_attention_heads=1 image_size=28 patch_size=14"
            ),
            "tie_word_embeddings": False,
        }
        | numbers(
            "scale_factor=2 image_token_id=252 image_token_index=252 pad_token_id=0"
        ),
        auto_class="AutoModelForImageTextToText",
        options={"language_model_only": True},
        needs="--language-model-only",
    ),
    Architecture(
        "pooling",
        "BERT",
        "bert",
        auto_class="AutoModel",
        target="refused",
        says="generates text.* --speculative-config",
        drafter="refused",
        drafter_says="does not generate text",
        is_fast=True,
    ),
)

# Kinds of cache that vLLM has: the row of each, or why none can show it.
CACHE_KINDS = {
    "FullAttentionSpec": "Llama",
    "SlidingWindowSpec": "Gemma 3 1B",
    "ChunkedLocalAttentionSpec": "Llama 4",
    "MLAAttentionSpec": "DeepSeek-V2",
    "CrossAttentionSpec": "Whisper",
    "EncoderOnlyAttentionSpec": "BERT",
    "MambaSpec": "Granite 4",
    "MambaSpec, MAMBA1": "Jamba",
    "MambaSpec, MAMBA2": "Granite 4",
    "MambaSpec, GDN_ATTN": "Qwen3-Next",
    "MambaSpec, SHORT_CONV": "LFM2",
    "UniformTypeKVCacheSpecs": "Gemma 3 1B",
}
WHY_NOT = {
    "KVCacheSpec": "the base of all",
    "AttentionSpec": "the base of attention's",
    "HiddenStateCacheSpec": "of the method extract_hidden_states alone",
    "MambaSpec, LINEAR": "refused in the worker",
    "MambaSpec, CUSTOM": "refused in the worker",
    "SinkFullAttentionSpec": "openPangu; full attention with more tokens in front",
    "SlidingWindowMLASpec": "DeepSeek-V4; refused as a drafter",
    "RSWASpec": "Unlimited-OCR, which reads images; refused as a drafter",
    "CircularBufferSpec": "DeepSeek-V4.1, GLM-5 Next; refused as a drafter",
    "HiSparseHotSpec": "an option of sparse attention; refused as a drafter",
    "HiSparseResidentSpec": "an option of sparse attention; refused as a drafter",
}


def make_model(row: Architecture, folder: Path) -> Path:
    """Write the model of `row`; the same each time."""
    import transformers

    torch.manual_seed(0)
    sizes = row.sizes if row.model_type in OWN_SIZES else SIZES | row.sizes
    config = transformers.AutoConfig.for_model(row.model_type, **sizes)
    model = getattr(transformers, row.auto_class).from_config(config)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _enlarge(name, weight, is_tied)
    model.to(getattr(torch, row.dtype)).save_pretrained(folder)
    return folder


def _enlarge(name: str, weight: torch.Tensor, is_tied: bool) -> None:
    """Make matrices keep the size of what they are given; and those of the head larger,
    so that one token stands out. Where the embedding is the head too, each token would
    be followed by itself but for a last norm of random signs."""
    if is_tied and name.endswith("model.norm.weight"):
        weight.normal_(-1.0, 1.0)  # Gemma adds one
    if weight.dim() != 2 or "conv" in name or name.endswith("A_log"):
        return
    if "embed" in name:
        weight.normal_(0, weight.shape[-1] ** -0.5 if is_tied else 1.0)
    else:
        gain = 4.0 if "lm_head" in name else 1.0
        weight.normal_(0, gain * weight.shape[-1] ** -0.5)


def make_drafter(model: Path, folder: Path, noise: float = 0.1) -> Path:
    """A copy of `model` with other weights, alike enough that some drafts are right."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        weights = load_file(path)
        for name, weight in weights.items():
            if weight.dim() >= 2:
                scale = noise * weight.float().std()
                random = torch.randn(weight.shape, generator=generator) * scale
                weights[name] = weight + random.to(weight.dtype)
        save_file(weights, folder / path.name, {"format": "pt"})
    return folder


def prompts() -> list[dict[str, list[int]]]:
    """Token ids, of up to several windows and blocks; some repeat themselves."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for length in (3, 17, 40, 64, 65, 100, 150, 31):
        ids = torch.randint(2, 240, (length,), generator=generator).tolist()
        if length == 100:
            ids = ids[:25] * 4
        made.append({"prompt_token_ids": ids})
    return made


def table() -> str:
    """The inventory as a table of the documentation."""
    lines = [
        "| models | for example | as the target | as the draft model |",
        "|---|---|---|---|",
    ]
    for row in INVENTORY:
        target = row.target + (f" with `{row.needs}`" if row.needs else "")
        drafter = row.drafter
        if row.vllm_says:
            target += "; vLLM's CPU build does not run it"
        lines.append(f"| {row.family} | {row.example} | {target} | {drafter} |")
    return "\n".join(lines)


if __name__ == "__main__":
    before, begin, rest = DOCUMENT.read_text().partition("| models |")
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    DOCUMENT.write_text(before + table() + after)
