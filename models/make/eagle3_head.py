"""An EAGLE-3 head: one layer that drafts from a Llama's hidden states.

Row p takes the token after position p and the target's hidden states at p, and predicts
the token after that. Its own output stands in for the target's hidden states in the
rows that follow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

WEIGHTS = "model.safetensors"
SHAPE = (  # of a Llama's config, that the head's layer has too
    "head_dim",
    "hidden_act",
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
)

# Keys and values of one forward, [batch, kv_heads, rows, head_dim] both.
KeysValues = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, width = config.head_dim, 2 * config.hidden_size
        query = config.num_attention_heads * self.head_dim
        key = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, ...], seen: list[KeysValues]
    ) -> torch.Tensor:
        """`seen`: of the forwards so far; this one's are appended. A row attends to the
        first forward's rows up to its own, and to its own row of the later ones."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        seen.append((k, v))
        first_k, first_v = seen[0]
        scores = q @ first_k.transpose(2, 3)
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
        own = [(q * key).sum(-1, keepdim=True) for key, _ in seen[1:]]
        scores = torch.cat([scores, *own], dim=-1) / self.head_dim**0.5
        shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        length = first_v.shape[2]
        out = shares[..., :length] @ first_v
        for i, (_, value) in enumerate(seen[1:]):
            out = out + shares[..., length + i, None] * value
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(size, eps)  # of the token's embedding
        self.hidden_norm = LlamaRMSNorm(size, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        embeddings: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        seen: list[KeysValues],
    ) -> torch.Tensor:
        residual = self.hidden_norm(hidden)
        both = torch.cat([self.input_layernorm(embeddings), residual], dim=-1)
        x = residual + self.self_attn(both, rotary, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: LlamaConfig, num_aux: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.fc = nn.Linear(num_aux * size, size, bias=False)
        self.layers = nn.ModuleList([Layer(config)])
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)


class Eagle3Head(nn.Module):
    """With random weights.

    Args:
        target: of which the head takes the shape.
        aux_layers: whose outputs it takes, counted from 1.
        intermediate_size: neurons of its MLP.
        draft_tokens: ids of the tokens that it can draft, rising; None: all, by the
            target's output matrix, which is then not saved with the head.
    """

    def __init__(
        self,
        target: LlamaForCausalLM,
        aux_layers: list[int],
        intermediate_size: int,
        draft_tokens: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        shape = {name: getattr(target.config, name) for name in SHAPE}
        self.config = LlamaConfig(
            **shape, num_hidden_layers=1, intermediate_size=intermediate_size
        )
        self.aux_layers, self.draft_tokens = aux_layers, draft_tokens
        self.model = Body(self.config, len(aux_layers))
        self.model.norm.load_state_dict(target.model.norm.state_dict())
        output = target.get_output_embeddings().weight.detach()
        if draft_tokens is not None:
            output = output[draft_tokens]
        self.lm_head = nn.Linear(*output.T.shape, bias=False)
        self.lm_head.weight = nn.Parameter(output.float().clone())
        self.lm_head.requires_grad_(draft_tokens is not None)

    def forward(
        self,
        embeddings: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        seen: list[KeysValues],
    ) -> torch.Tensor:
        """Hidden states before the last norm. [batch, rows, hidden_size], as the first
        two arguments; `positions`: [1, rows]."""
        rotary = self.model.rotary(hidden, positions)
        return self.model.layers[0](embeddings, hidden, rotary, seen)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., number of tokens that it can draft]"""
        return self.lm_head(self.model.norm(hidden))

    def speculators_config(self, verifier: str) -> dict[str, Any]:
        layer = self.config.to_dict() | {"model_type": "llama"}
        return {
            "architectures": ["Eagle3Speculator"],
            "draft_vocab_size": self.lm_head.out_features,
            "eagle_aux_hidden_state_layer_ids": self.aux_layers,
            "norm_before_residual": True,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": 5}
                ],
                "verifier": {
                    "architectures": ["LlamaForCausalLM"],
                    "name_or_path": verifier,
                },
            },
            "speculators_model_type": "eagle3",
            "tie_word_embeddings": False,
            "transformer_layer_config": layer,
        }

    def save(self, folder: Path, verifier: str, dtype: torch.dtype) -> None:
        """In the format of the speculators library, without the target's embedding."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name.removeprefix("model."): weight.to(dtype).contiguous()
            for name, weight in self.state_dict().items()
            if self.draft_tokens is not None or name != "lm_head.weight"
        }
        if self.draft_tokens is not None:
            is_drafted = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            is_drafted[self.draft_tokens] = True
            own_ids = torch.arange(len(self.draft_tokens))
            weights |= {"d2t": self.draft_tokens - own_ids, "t2d": is_drafted}
        save_file(weights, folder / WEIGHTS)
        config = self.speculators_config(verifier)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """The weights that `save` wrote."""
        weights = load_file(folder / WEIGHTS)
        own = self.state_dict()
        own |= {
            name: weights[name.removeprefix("model.")].float()
            for name in own
            if name.removeprefix("model.") in weights
        }
        self.load_state_dict(own)
