"""What can be seen of a draft model before anything large is loaded.

vLLM finds broken weights only when it loads them, after the target's, and says nothing
of which model they belong to; another tokenizer it does not find at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config, get_tokenizer

logger = init_logger("vllm.emssd.draft_checks")

_READ_AS_FILES = ("auto", "hf", "safetensors")  # load formats that read these
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_INDEX = "model.safetensors.index.json"
_FEWEST_ALIKE, _FEW_ALIKE = 0.5, 0.99  # of the target's tokens


def check_draft_weights(model: str, load_format: str) -> None:
    """Raise ValueError where a local draft model's weights are missing or cut short.

    Models of the hub are not looked at: vLLM downloads them, whole or not at all.
    """
    folder = Path(model)
    if folder.is_absolute() and not folder.exists():
        raise ValueError(_error(model, "does not exist; correct the path"))
    if not folder.is_dir() or load_format not in _READ_AS_FILES:
        return
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            _error(
                model, f"holds no weights ({', '.join(_WEIGHTS)}); download it again"
            )
        )
    for name in _listed_shards(folder):
        if not (folder / name).exists():
            raise ValueError(
                _error(model, f"lacks {name}, which {_INDEX} lists; download it again")
            )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass  # compares the header with the length of the file
        except (SafetensorError, OSError) as error:
            raise ValueError(
                _error(
                    model, f"{path.name} is broken ({error}); download the file again"
                )
            ) from error


def _listed_shards(folder: Path) -> set[str]:
    index = folder / _INDEX
    if not index.exists():
        return set()
    return set(json.loads(index.read_text())["weight_map"].values())


def check_draft_tokenizer(
    model: str, revision: str | None, target: ModelConfig
) -> None:
    """Raise ValueError where most token ids mean other text to the draft model.

    Output would still be the target's, but hardly a draft would be accepted. A draft
    model that comes without a tokenizer is taken at its word.
    """
    if target.skip_tokenizer_init:
        return
    try:
        draft = get_tokenizer(
            model, revision=revision, trust_remote_code=target.trust_remote_code
        )
    except (OSError, ValueError):
        return
    share = share_alike(
        cached_tokenizer_from_config(target).get_vocab(), draft.get_vocab()
    )
    if share < _FEWEST_ALIKE:
        raise ValueError(
            _error(
                model,
                f"has another tokenizer than the target ({share:.0%} of the token ids "
                "mean the same), so hardly a draft would be accepted; choose a draft "
                "model of the target's family, or remove 'model' to copy from the text",
            )
        )
    if share < _FEW_ALIKE:
        logger.warning(
            "Only %.1f%% of the token ids mean the same to the draft model %s and to "
            "the target: fewer drafts may be accepted.",
            100 * share,
            model,
        )


def share_alike(target: Mapping[str, int], draft: Mapping[str, int]) -> float:
    """Share of the target's tokens that have the same id in both vocabularies."""
    alike = sum(draft.get(token) == token_id for token, token_id in target.items())
    return alike / max(len(target), 1)


def _error(model: str, fix: str) -> str:
    return f"--speculative-config: 'model' {model!r} {fix}."
