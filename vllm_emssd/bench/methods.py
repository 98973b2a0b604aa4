"""The methods that `vllm-emssd bench` compares, as vLLM's `speculative_config`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

DESCRIPTIONS: dict[str, str] = {
    "plain": "no speculation",
    "stock": "vLLM's draft_model, K drafts",
    "ngram": "vLLM's ngram, llma's lengths: check_length to match, copy_length drafts",
    "ngram-longest": "vLLM's ngram, which prefers matches of up to 32 tokens, as llma",
    "suffix": "vLLM's suffix (arctic-inference), copy_length drafts, no old answers",
    "emssd": "emssd draft model, K drafts",
    "kN": "emssd draft model, N drafts (k1, k2, ...; with --one-engine k0 too)",
    "auto": "emssd draft model, automatic lengths",
    "padded": "emssd draft model, K drafts, padded inputs (unpad_inputs: false)",
    "llma": "emssd copy, copy_length drafts",
    "llma-auto": "emssd copy, automatic lengths",
    "llma-padded": "emssd copy, padded inputs",
    "mixed": "emssd copy or draft model per request, copy_length or K drafts",
    "mixed-auto": "the same, automatic lengths",
    "NAME={...}": "any --speculative-config, under a name",
}
FIXED_LENGTH = re.compile(r"k(0|[1-9]\d*)")
AUTOMATIC = "auto"  # whose engine runs fixed lengths too
MIXED = "mixed-auto"  # whose engine runs each of its proposers alone too
PROPOSERS_OF_MIXED = {MIXED: None, AUTOMATIC: "draft_model", "llma-auto": "llma"}
NEEDS_DRAFT_MODEL = {"stock", "emssd", "auto", "padded", "mixed", "mixed-auto"}
LONGEST_MATCH = 32  # as far as the llma proposer tells matches apart


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    speculative_config: dict[str, Any] | None


# A method of our workers, and its argument, for `collective_rpc`.
Setting = tuple[str, int | str | None]


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What the methods share. Lengths in tokens."""

    draft_model: str | None
    num_speculative_tokens: int = 5
    auto_tokens: int = 16
    check_length: int = 2
    copy_length: int = 7


def fixed_length(method: Method) -> int | None:
    """Drafts of every request; None where a policy chooses. Of `auto` and `kN`."""
    match = FIXED_LENGTH.fullmatch(method.name)
    return None if match is None else int(match.group(1))


def host_of(methods: Sequence[Method]) -> Method | None:
    """Of methods that are to take turns in one engine, the one whose engine it is."""
    by_name = {method.name: method for method in methods}
    return by_name.get(MIXED) or by_name.get(AUTOMATIC)


def setting_of(method: Method, host: Method) -> Setting | None:
    """What makes the host's engine run as `method`; None where nothing does."""
    if host.name == MIXED:
        if method.name not in PROPOSERS_OF_MIXED:
            return None
        return "emssd_use_proposer", PROPOSERS_OF_MIXED[method.name]
    length = fixed_length(method)
    if length is None and method.name != AUTOMATIC:
        return None
    return "emssd_fix_draft_length", length


def parse_method(text: str, options: MethodOptions) -> Method:
    """Raises ValueError for a name that is not known, or without its draft model."""
    name, is_custom, config = text.partition("=")
    if is_custom:
        return Method(name, _custom(name, config))
    needs_draft_model = name in NEEDS_DRAFT_MODEL or FIXED_LENGTH.fullmatch(name)
    if needs_draft_model and options.draft_model is None:
        raise ValueError(f"method {name!r} needs --draft-model")
    if name == "suffix" and find_spec("arctic_inference") is None:
        raise ValueError(
            "method 'suffix' needs the package arctic-inference; install it with "
            "'pip install arctic-inference==0.1.1'"
        )
    return Method(name, _known(name, options))


def _custom(name: str, config: str) -> dict[str, Any]:
    try:
        parsed = json.loads(config)
    except json.JSONDecodeError as error:
        raise ValueError(f"method {name!r}: {config!r} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"method {name!r}: give a JSON object, as vLLM takes it")
    return parsed


def _known(name: str, options: MethodOptions) -> dict[str, Any] | None:
    stock = {
        "method": "draft_model",
        "model": options.draft_model,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    fixed = stock | {"method": "emssd", "draft_length": "fixed"}
    auto = {"draft_length": "auto", "num_speculative_tokens": options.auto_tokens}
    llma = {
        "method": "emssd",
        "draft_length": "fixed",
        "check_length": options.check_length,
        "copy_length": options.copy_length,
    }
    mixed = fixed | llma | {"proposer": "mixed"}
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": options.copy_length,
        "prompt_lookup_min": options.check_length,
        "prompt_lookup_max": options.check_length,
    }
    # Answers are not remembered: in a bench each request comes once a round.
    suffix = {
        "method": "suffix",
        "num_speculative_tokens": options.copy_length,
        "suffix_decoding_max_cached_requests": 0,
    }
    known: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "stock": stock,
        "ngram": ngram,
        "suffix": suffix,
        "ngram-longest": ngram | {"prompt_lookup_max": LONGEST_MATCH},
        "emssd": fixed,
        "auto": fixed | auto,
        "padded": fixed | {"unpad_inputs": False},
        "llma": llma,
        "llma-auto": llma | {"draft_length": "auto"},
        "llma-padded": llma | {"unpad_inputs": False},
        "mixed": mixed,
        "mixed-auto": mixed | auto,
    }
    if name in known:
        return known[name]
    length = FIXED_LENGTH.fullmatch(name)
    if length is None:
        raise ValueError(
            f"unknown method {name!r}; choose from {', '.join(DESCRIPTIONS)}"
        )
    return fixed | {"num_speculative_tokens": int(length.group(1))}
