"""The options of `"method": "emssd"`.

`--speculative-config` mixes our keys with vLLM's own. `EmssdConfig` holds ours;
all other keys keep vLLM's meaning and are handed on to vLLM.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

METHOD = "emssd"
ADDITIONAL_CONFIG_KEY = "emssd"  # where VllmConfig.additional_config carries ours

# Keys of vLLM's that contradict what the method does, and what to do instead.
REFUSED_STOCK_KEYS: dict[str, str] = {
    "disable_padded_drafter_batch": "emssd never pads the drafter's batch; remove it",
    "num_speculative_tokens_per_batch_size": (
        "emssd sets lengths by 'draft_length'; remove it"
    ),
    "parallel_drafting": "emssd drafts one token a forward; remove it",
    "prompt_lookup_max": "use 'copy_length' and 'check_length'",
    "prompt_lookup_min": "use 'check_length'",
    "use_heterogeneous_vocab": (
        "emssd needs a draft model with the target's vocabulary; "
        'remove it or use "method": "draft_model"'
    ),
}
ADAPTIVE = "enable_adaptive_verification"
LOSSY_VERIFICATION = (
    'vLLM\'s "fly" keeps drafts that the target would not emit; remove it or use '
    '"method": "draft_model"'
)
ProposerName = Literal["draft_model", "llma", "mixed"]
DraftLengthName = Literal["fixed", "auto"]
MAX_FIXED_DRAFTS, MAX_AUTO_DRAFTS = 8, 16  # of a draft model, by default
MAX_AUTO_COPIES = 15  # by default; for one request 16 rows of the target
PROPOSER_GROUP = "vllm_emssd.proposers"  # entry points by which packages bring more


def names_eagle3_head(*names: str) -> bool:
    """Whether vLLM would take a model for an EAGLE-3 head: by its name, or by one of
    the architectures that its config names."""
    return any("eagle3" in name.lower() for name in names)


def plugin_proposers() -> tuple[str, ...]:
    """Names of the proposers that other installed packages bring. Ours come first."""
    names = entry_points(group=PROPOSER_GROUP).names
    return tuple(sorted(names - set(get_args(ProposerName))))


def _known_proposer(name: Any) -> Any:
    known = (*get_args(ProposerName), *plugin_proposers())
    if name not in known:
        raise ValueError(f"Input should be one of {', '.join(map(repr, known))}")
    return name


class EmssdConfig(BaseModel):
    """Validated options; see README for what each means to a user."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    proposer: Annotated[str, BeforeValidator(_known_proposer)]
    num_speculative_tokens: int = Field(default=MAX_FIXED_DRAFTS, ge=1, le=128)
    draft_length: DraftLengthName = "auto"
    check_length: int = Field(default=2, ge=1, le=64)
    copy_length: int = Field(default=7, ge=1, le=128)
    unpad_inputs: bool = True

    @classmethod
    def carried_by(cls, additional_config: Mapping[str, Any]) -> EmssdConfig:
        """The options of an engine with emssd, from `VllmConfig.additional_config`."""
        return cls(**additional_config[ADDITIONAL_CONFIG_KEY])

    # Proposers of other packages do neither.
    @property
    def uses_draft_model(self) -> bool:
        return self.proposer in ("draft_model", "mixed")

    @property
    def copies(self) -> bool:
        return self.proposer in ("llma", "mixed")

    @property
    def max_draft_tokens(self) -> int:
        """Of a request and step, drafted or copied: what vLLM must make room for."""
        if self.proposer == "mixed":
            return max(self.num_speculative_tokens, self.copy_length)
        return self.num_speculative_tokens


_OUR_KEYS = frozenset(EmssdConfig.model_fields)
_LONGEST_SHOWN = 100  # characters


def parse_speculative_config(
    asked: Mapping[str, Any], stock_keys: Iterable[str], gain_was_measured: bool = False
) -> tuple[EmssdConfig, dict[str, Any]]:
    """Split a user's `--speculative-config` into our options and vLLM's.

    Args:
        asked: the user's dictionary, `"method": "emssd"` in it.
        stock_keys: all keys vLLM's own SpeculativeConfig knows.
        gain_was_measured: of automatic lengths on this platform: by default they copy
            more tokens then, and beside a model's drafts too.

    Returns: our options, and the user's keys for vLLM without `method`.

    Raises: ValueError naming the key and the fix.
    """
    known = _OUR_KEYS | set(stock_keys)
    for key in asked:
        if key not in known:
            raise _unknown_key(key, known)
        if key in REFUSED_STOCK_KEYS and asked[key] not in (None, False):
            raise _error(key, REFUSED_STOCK_KEYS[key])
    if asked.get("rejection_sample_method") == "fly":
        raise _error("rejection_sample_method", LOSSY_VERIFICATION)

    ours = {k: v for k, v in asked.items() if k in _OUR_KEYS and v is not None}
    given = set(ours)
    ours.setdefault("proposer", _default_proposer(asked, gain_was_measured))
    _check_pairs(ours, asked)
    if gain_was_measured and ours.get("draft_length", "auto") == "auto":
        ours.setdefault("copy_length", MAX_AUTO_COPIES)
    try:
        config = EmssdConfig(**ours)
    except ValidationError as error:
        raise _explained(error) from None
    most = ours.get("num_speculative_tokens")
    if config.proposer == "llma":
        most = min(most or config.copy_length, config.copy_length)
    elif config.uses_draft_model and config.draft_length == "auto":
        most = most or MAX_AUTO_DRAFTS
    if most is not None:
        lengths = {"num_speculative_tokens": most}
        if config.proposer == "mixed" and not {"proposer", "copy_length"} & given:
            lengths["copy_length"] = min(config.copy_length, most)
        config = config.model_copy(update=lengths)
    stock = {k: v for k, v in asked.items() if k not in _OUR_KEYS and k != "method"}
    return config, stock


def _default_proposer(
    asked: Mapping[str, Any], gain_was_measured: bool
) -> ProposerName:
    if not asked.get("model"):
        return "llma"
    only_drafts = asked.get("draft_length") == "fixed" or asked.get(ADAPTIVE)
    return "mixed" if gain_was_measured and not only_drafts else "draft_model"


def _check_pairs(ours: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    proposer, model = ours["proposer"], asked.get("model")
    if proposer in ("draft_model", "mixed") and not model:
        raise _error("proposer", f"{proposer!r} needs 'model', a draft model")
    if model and (proposer == "llma" or proposer in plugin_proposers()):
        rather = ", or use 'mixed' to copy and draft" if proposer == "llma" else ""
        raise _error("model", f"proposer {proposer!r} uses no model; remove it{rather}")
    if proposer != "draft_model" and asked.get(ADAPTIVE):
        raise _error(
            ADAPTIVE, 'only "proposer": "draft_model" has confidences; remove it'
        )
    for key in ("check_length", "copy_length"):
        if proposer == "draft_model" and key in ours:
            fix = 'only "proposer": "llma" and "mixed" copy; remove one of them'
            raise _error(key, fix)


def _shown(value: Any) -> str:
    """A value in an error message: what a user typed, not a megabyte of it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _error(key: str, fix: str, more: str = "") -> ValueError:
    return ValueError(
        f'--speculative-config: {_shown(key)} with "method": "{METHOD}": {fix}.{more}'
    )


def _unknown_key(key: str, known: Iterable[str]) -> ValueError:
    # Cut, as the search takes quadratic time.
    close = difflib.get_close_matches(key[:_LONGEST_SHOWN], sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    keys = f" Keys of emssd: {', '.join(sorted(_OUR_KEYS))}; vLLM's own keys keep their"
    return _error(key, f"unknown key; {hint}", f"{keys} meaning.")


def _explained(error: ValidationError) -> ValueError:
    reasons = [
        f"{'.'.join(map(str, detail['loc']))!r}: {detail['msg']}, "
        f"got {_shown(detail['input'])}"
        for detail in error.errors()
    ]
    return ValueError(
        f'--speculative-config with "method": "{METHOD}": ' + "; ".join(reasons)
    )
