"""Records an acceptance trace from a real pair of models, offline, with transformers.

The target writes, greedily or at a temperature; then the drafter drafts, greedily,
after every position of what it wrote. A draft counts as accepted where the target wrote
just it, which is as likely as that rejection sampling accepts it. All drafts of a
request are made together: the text is computed once, and each position attends to the
part of it that comes before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_emssd
from vllm_emssd.bench.request import Request
from vllm_emssd.simulate.traces import TRACE_FORMAT, RequestTrace, Trace, TraceHeader

MAX_AT_ONCE = 64  # positions that draft together: each has its own K/V
_CONFIDENCE_DIGITS = 4
_SEED = 0


class TraceRecorder:
    """Runs both models.

    Args:
        target, draft: folders or names of causal language models with one vocabulary.
        k: most drafts that can be replayed.
    """

    def __init__(
        self, target: str, draft: str, k: int, dtype: str, command: str
    ) -> None:
        self._k = k
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(target)
        self._target: Any = _load(target, dtype)
        self._draft: Any = _load(draft, dtype)
        self.header = TraceHeader(
            format=TRACE_FORMAT,
            target=Path(target).name,
            draft=Path(draft).name,
            k=k,
            confidence="highest probability of the drafter's distribution",
            provenance={
                "command": command,
                "vllm_emssd": vllm_emssd.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "dtype": dtype,
            },
        )

    @torch.inference_mode()
    def record_ids(
        self, prompt_ids: list[int], max_tokens: int, temperature: float = 0.0
    ) -> RequestTrace:
        output_ids = self._output(prompt_ids, max_tokens + self._k, temperature)
        # Position p is drafted after from the token before it.
        text = torch.tensor(prompt_ids + output_ids[: max_tokens - 1])
        tokens, confidences = self._drafts(text, len(prompt_ids) - 1)
        wanted = torch.tensor(output_ids).unfold(0, self._k, 1)[:max_tokens]
        agrees = (tokens == wanted).long().cumprod(dim=1).sum(dim=1)
        return RequestTrace(
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            accepted=agrees.tolist(),
            confidences=[
                [round(p, _CONFIDENCE_DIGITS) for p in row]
                for row in confidences.tolist()
            ],
        )

    def _output(
        self, prompt_ids: list[int], num_tokens: int, temperature: float
    ) -> list[int]:
        """Past the end of text too, as with `ignore_eos`."""
        dice = torch.Generator().manual_seed(_SEED)
        ids = torch.tensor([prompt_ids])
        known = self._target(input_ids=ids, use_cache=True)
        output_ids = [_sample(known.logits[0, -1], temperature, dice)]
        while len(output_ids) < num_tokens:
            last = torch.tensor([output_ids[-1:]])
            known = self._target(
                input_ids=last, past_key_values=known.past_key_values, use_cache=True
            )
            output_ids.append(_sample(known.logits[0, -1], temperature, dice))
        return output_ids

    def _drafts(
        self, text: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts after each token of the text from `first` on, and their confidence.

        `text`: [num_tokens]; returns two of [num_tokens - first, k].
        """
        known = self._draft(input_ids=text[None], use_cache=True)
        after = torch.arange(first, len(text))
        parts = [
            self._drafts_after(part, known.logits[0, part], known.past_key_values)
            for part in torch.split(after, MAX_AT_ONCE)
        ]
        tokens, confidences = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(confidences)

    def _drafts_after(
        self, after: torch.Tensor, logits: torch.Tensor, text_cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each of [num_positions] tokens `after` gets a copy of the text's K/V and sees
        of it what comes before, then its own drafts."""
        cache = copy.deepcopy(text_cache)
        cache.batch_repeat_interleave(len(after))
        is_seen = (torch.arange(cache.get_seq_length()) <= after[:, None]).long()
        tokens, confidences = [], []
        for j in range(self._k):
            highest = logits.float().softmax(dim=-1).max(dim=-1)
            tokens.append(highest.indices)
            confidences.append(highest.values)
            if j + 1 == self._k:
                break
            is_seen = torch.cat([is_seen, torch.ones_like(after)[:, None]], dim=1)
            logits = self._draft(
                input_ids=highest.indices[:, None],
                attention_mask=is_seen,
                position_ids=(after + 1 + j)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return torch.stack(tokens, dim=1), torch.stack(confidences, dim=1)


def record_trace(recorder: TraceRecorder, requests: Sequence[Request]) -> Trace:
    """One request after the other, each to its `max_tokens`.

    Of its sampling parameters, only a temperature can be recorded. Raises ValueError.
    """
    for request in requests:
        if unknown := set(request.sampling) - {"temperature"}:
            raise ValueError(
                f"a trace is recorded at a temperature only: leave out {unknown}"
            )
    traces = [
        recorder.record_ids(
            r.prompt_token_ids, r.max_tokens, r.sampling.get("temperature", 0.0)
        )
        for r in requests
    ]
    return Trace(header=recorder.header, requests=traces)


def _sample(logits: torch.Tensor, temperature: float, dice: torch.Generator) -> int:
    """One token. `logits`: [vocab_size]"""
    if temperature == 0:
        return int(logits.argmax())
    probs = (logits.float() / temperature).softmax(dim=-1)
    return int(torch.multinomial(probs, 1, generator=dice))


def _load(model: str, dtype: str) -> Any:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype)
    )
    return loaded.eval()
