"""What can be seen of a draft model before anything large is loaded.

vLLM finds broken weights only when it loads them, after the target's, and says nothing
of which model they belong to; another tokenizer it does not find at all.
"""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.tokenizers import (
    TokenizerLike,
    cached_tokenizer_from_config,
    get_tokenizer,
)
from vllm.transformers_utils.config import get_config

from vllm_emssd.config import names_eagle3_head

logger = init_logger("vllm.emssd.draft_checks")

_READ_AS_FILES = ("auto", "hf", "safetensors")  # load formats that read these
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_INDEX = "model.safetensors.index.json"
_FEWEST_ALIKE = 0.5  # of token ids, or hardly any draft would be accepted

# Words, code, several scripts, numbers, white space, markup.
SAMPLE_TEXT = """\
The committee hasn't decided yet whether next year's meeting will take place in
Edinburgh; members who can't travel may, however, join it from home. In 2024 it was
1234567.89, 100% of 3,000 or -0.5e-10; call 555-0199.
def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)  # e.g. mean([1.5, 2.5]) == 2.0
Größe und Maß, déjà vu, señor. Привет, как дела? Καλημέρα κόσμε. 你好世界。
今日は良い天気ですね。안녕하세요. नमस्ते दुनिया। مرحبا بالعالم 🙂
one  two   three\tfour\r\n\n\n  <p class="a">**five**</p> [six](https://example.org/?q=1)
"""


def check_draft_weights(model: str, load_format: str) -> None:
    """Raise ValueError where a local draft model's weights are missing or cut short.

    Models of the hub are not looked at: vLLM downloads them, whole or not at all.
    """
    folder, wrong = Path(model), ""
    if folder.is_absolute() and not folder.exists():
        wrong = "does not exist; correct the path"
    elif folder.is_dir() and load_format in _READ_AS_FILES:
        wrong = _wrong_in(folder)
    if wrong:
        raise ValueError(_error(model, wrong))


def _wrong_in(folder: Path) -> str:
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        return f"holds no weights ({', '.join(_WEIGHTS)}); download it again"
    index = folder / _INDEX
    if index.exists():
        for name in json.loads(index.read_text())["weight_map"].values():
            if not (folder / name).exists():
                return f"lacks {name}, which {_INDEX} lists; download it again"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass  # compares the header with the length of the file
        except (SafetensorError, OSError) as error:
            return f"{path.name} is broken ({error}); download the file again"
    return ""


def is_eagle3_head(model: str, revision: str | None, target: ModelConfig) -> bool:
    """As `names_eagle3_head`. What cannot be read is left to vLLM."""
    if names_eagle3_head(model):
        return True
    try:
        config = get_config(
            model,
            trust_remote_code=target.trust_remote_code,
            revision=revision,
            config_format=target.config_format,
        )
    except (OSError, ValueError):
        return False
    return names_eagle3_head(*(getattr(config, "architectures", None) or ()))


def check_draft_tokenizer(
    model: str, revision: str | None, target: ModelConfig
) -> None:
    """Raise ValueError where the draft model's tokenizer gives most text other ids.

    Output would still be the target's, but hardly any draft would be accepted. A draft
    model whose tokenizer cannot be loaded is not checked.
    """
    if target.skip_tokenizer_init:
        return
    try:
        target_tokenizer = cached_tokenizer_from_config(target)
        draft_tokenizer = _load_draft_tokenizer(model, revision, target)
        text, specials = shares_alike(target_tokenizer, draft_tokenizer)
    except Exception as error:  # the tokenizers library raises bare ones
        logger.warning(
            "The tokenizer of the draft model %s was not compared with the target's: "
            "%s. If they differ, hardly any draft is accepted.",
            model,
            error,
        )
        return
    same = f"{text:.0%} of a text's token ids, {specials:.0%} of special tokens alike"
    if text < _FEWEST_ALIKE:
        raise ValueError(
            _error(
                model,
                f"has another tokenizer than the target ({same}), so hardly any draft "
                "would be accepted; choose a draft model of the target's family, or "
                "remove 'model' to copy from the text",
            )
        )
    if min(text, specials) < 1:
        logger.warning(
            "The draft model %s gives some text other token ids than the target (%s): "
            "fewer drafts may be accepted there.",
            model,
            same,
        )


def _load_draft_tokenizer(
    model: str, revision: str | None, target: ModelConfig
) -> TokenizerLike:
    """In the target's tokenizer mode, or by its files where it has none for that."""
    load = partial(
        get_tokenizer,
        model,
        revision=revision,
        trust_remote_code=target.trust_remote_code,
    )
    try:
        return load(tokenizer_mode=target.tokenizer_mode)
    except Exception:
        if target.tokenizer_mode == "auto":
            raise
        return load(tokenizer_mode="auto")


def shares_alike(target: TokenizerLike, draft: TokenizerLike) -> tuple[float, float]:
    """Of the token ids of a sample of text, the share that both tokenizers give alike,
    and the same of the special tokens that both know.

    Ids are compared, not how they are spelled: the same id of a Mistral-format and a
    Hugging Face tokenizer is spelled differently. Special tokens are compared by name,
    since not every tokenizer parses them from text.
    """
    ours = target.encode(SAMPLE_TEXT, add_special_tokens=False)
    its = draft.encode(SAMPLE_TEXT, add_special_tokens=False)
    matches = SequenceMatcher(None, ours, its, autojunk=False).get_matching_blocks()
    of_text = sum(block.size for block in matches) / max(len(ours), len(its))
    special_ids = zip(target.all_special_tokens, target.all_special_ids, strict=True)
    named, known = target.get_added_vocab() | dict(special_ids), draft.get_vocab()
    is_alike = [named[token] == known[token] for token in named if token in known]
    return of_text, sum(is_alike) / len(is_alike) if is_alike else 1.0


def _error(model: str, fix: str) -> str:
    return f"--speculative-config: 'model' {model!r} {fix}."
