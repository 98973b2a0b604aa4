"""The methods that `vllm-emssd bench` compares, as vLLM's `speculative_config`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_emssd.config import (
    MAX_AUTO_COPIES,
    MAX_AUTO_DRAFTS,
    METHOD,
    names_eagle3_head,
)

DESCRIPTIONS: dict[str, str] = {
    "plain": "no speculation",
    "stock": "vLLM's draft_model, with a head eagle3, K drafts; stock-kN: N drafts",
    "stock-adaptive": "stock, of whose drafts the likeliest are verified: on GPUs",
    "stock-by-batch": "stock with K drafts, 3 beyond 16 requests, 1 beyond 64",
    "ngram": "vLLM's ngram with the lengths of llma: 2 tokens must agree, 7 drafts",
    "ngram-longest": "vLLM's ngram, which prefers matches of up to 32 tokens, as llma",
    "suffix": "vLLM's suffix (arctic-inference), 7 drafts, no old answers",
    "emssd": "emssd draft model or head, K drafts; kN: N drafts",
    "auto": "emssd draft model or head alone, automatic lengths",
    "auto-adaptive": "the same, of whose drafts the likeliest are verified: on GPUs",
    "padded": "emssd draft model, K drafts, padded inputs (the paper's vanilla)",
    "llma": "emssd copy, 7 drafts",
    "llma-auto": "emssd copy, automatic lengths",
    "llma-padded": "emssd copy, 7 drafts, padded inputs (the paper's vanilla)",
    "mixed": "emssd copy or draft model per request, 7 or K drafts",
    "mixed-auto": "the same, automatic lengths: the default on CPUs",
    "NAME={...}": "any --speculative-config, under a name",
}
VLLM_OWN = re.compile(r"(stock|ngram|suffix)(-.*)?")
FIXED_LENGTH = re.compile(r"k(0|[1-9]\d*)")
AUTOMATIC = "auto"  # whose engine runs fixed lengths too
MIXED = "mixed-auto"  # whose engine runs each of its proposers alone too
PROPOSERS_OF_MIXED = {MIXED: None, AUTOMATIC: "draft_model", "llma-auto": "llma"}
CHECK_LENGTH, COPY_LENGTH = 2, 7  # emssd's defaults
LONGEST_MATCH = 32  # as far as the llma proposer tells matches apart

# A method of our workers, and its argument, for `collective_rpc`.
Setting = tuple[str, int | str | None]


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    speculative_config: dict[str, Any] | None
    setting: Setting | None = None  # tells an engine that runs several methods

    @property
    def measures_costs(self) -> bool:
        """Whether its engine may time forwards when it starts."""
        config = self.speculative_config or {}
        return config.get("method") == METHOD and config.get("draft_length") != "fixed"


def parse_method(
    text: str, draft_model: str | None, num_speculative_tokens: int = 5
) -> Method:
    """Raises ValueError for a name that is not known, or without its draft model."""
    name, is_custom, config = text.partition("=")
    if is_custom:
        return Method(name, _custom(name, config))
    base, num_drafts = name, num_speculative_tokens
    if length := re.fullmatch(rf"(stock-)?{FIXED_LENGTH.pattern}", name):
        base, num_drafts = "stock" if length[1] else "emssd", int(length[2])
    if name == "suffix" and find_spec("arctic_inference") is None:
        raise ValueError(
            "method 'suffix' needs the package arctic-inference; install it with "
            "'pip install arctic-inference==0.1.1'"
        )
    known = _known(draft_model, num_drafts)
    if base not in known:
        raise ValueError(
            f"unknown method {name!r}; choose from {', '.join(DESCRIPTIONS)}"
        )
    if draft_model is None and "model" in (known[base] or {}):
        raise ValueError(f"method {name!r} needs --draft-model")
    return Method(name, known[base])


def _custom(name: str, config: str) -> dict[str, Any]:
    try:
        parsed = json.loads(config)
    except json.JSONDecodeError as error:
        raise ValueError(f"method {name!r}: {config!r} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"method {name!r}: give a JSON object, as vLLM takes it")
    return parsed


def _known(
    draft_model: str | None, num_drafts: int
) -> dict[str, dict[str, Any] | None]:
    drafts = {"model": draft_model, "num_speculative_tokens": num_drafts}
    alone = drafts | {"proposer": "draft_model"}
    stock = drafts | {"method": stock_method(draft_model or "")}
    fewer = [(1, 16, num_drafts), (17, 64, 3), (65, 512, 1)]  # no more than K
    adaptive = {"enable_adaptive_verification": True}
    fixed = {"method": "emssd", "draft_length": "fixed"}
    auto = {"draft_length": "auto"}
    most = {"num_speculative_tokens": MAX_AUTO_DRAFTS}
    copies = {"copy_length": MAX_AUTO_COPIES}
    padded = {"unpad_inputs": False}
    llma = fixed | {"check_length": CHECK_LENGTH, "copy_length": COPY_LENGTH}
    mixed = drafts | llma | {"proposer": "mixed"}
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": COPY_LENGTH,
        "prompt_lookup_min": CHECK_LENGTH,
        "prompt_lookup_max": CHECK_LENGTH,
    }
    # Answers are not remembered: in a bench each request comes once a round.
    suffix = {
        "method": "suffix",
        "num_speculative_tokens": COPY_LENGTH,
        "suffix_decoding_max_cached_requests": 0,
    }
    return {
        "plain": None,
        "stock": stock,
        "stock-adaptive": stock | adaptive,
        "stock-by-batch": stock | {"num_speculative_tokens_per_batch_size": fewer},
        "ngram": ngram,
        "suffix": suffix,
        "ngram-longest": ngram | {"prompt_lookup_max": LONGEST_MATCH},
        "emssd": alone | fixed,
        "auto": alone | fixed | auto | most,
        "auto-adaptive": alone | fixed | auto | most | adaptive,
        "padded": alone | fixed | padded,
        "llma": llma,
        "llma-auto": llma | auto | copies,
        "llma-padded": llma | padded,
        "mixed": mixed,
        "mixed-auto": mixed | auto | most | copies,
    }


def stock_method(draft_model: str) -> str:
    """vLLM has another one for EAGLE-3 heads."""
    config = Path(draft_model) / "config.json"
    content = json.loads(config.read_text()) if config.is_file() else {}
    is_head = names_eagle3_head(draft_model, *(content.get("architectures") or ()))
    return "eagle3" if is_head else "draft_model"


def in_one_engine(methods: Sequence[Method]) -> tuple[Method, list[Method]]:
    """The method whose engine runs all of them, and each with what tells it to.

    Raises ValueError where no engine can.
    """
    by_name = {method.name: method for method in methods}
    host = by_name.get(MIXED) or by_name.get(AUTOMATIC)
    if host is None:
        raise ValueError(
            "'lengths' runs in the engine of 'auto' or 'mixed-auto': add one of them "
            "to --methods"
        )
    return host, [replace(method, setting=_setting(method, host)) for method in methods]


def _setting(method: Method, host: Method) -> Setting:
    if host.name == MIXED and method.name in PROPOSERS_OF_MIXED:
        return "emssd_use_proposer", PROPOSERS_OF_MIXED[method.name]
    length = FIXED_LENGTH.fullmatch(method.name)
    if method.name == AUTOMATIC:
        return "emssd_fix_draft_length", None
    if length and int(length[1]) <= MAX_AUTO_DRAFTS:
        return "emssd_fix_draft_length", int(length[1])
    raise ValueError(
        f"the engine of {host.name!r} cannot run {method.name!r}: 'lengths' compares "
        f"'auto' with kN up to {MAX_AUTO_DRAFTS}, and with 'llma-auto' if 'mixed-auto' "
        "is among --methods"
    )
