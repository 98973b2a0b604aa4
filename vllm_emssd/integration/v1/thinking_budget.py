"""Thinking budgets (`thinking_token_budget`) of requests with drafts, on the V1 runner.

vLLM follows a request's thinking by a state that moves on once a step, by one token.
With speculation its state guesses over several tokens, and forces the end of thinking
in other places than it does without. Here the state moves on by one token at a time,
drafted ones on a copy, so that each verified row is forced exactly where plain decoding
would force it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class ThinkingBudgets(ThinkingBudgetStateHolder):
    """Which token each row is forced to, by each request's own tokens alone."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(
            vllm_config.reasoning_config,
            vllm_config.scheduler_config.max_num_seqs,
            num_spec_tokens=0,
            device=device,
            is_pin_memory=False,
        )
        # Of each request with a budget, by batch row: one entry for every draft's row
        # and one for the row behind them.
        self._forced: dict[int, list[int | None]] = {}

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """vLLM's own leaves the state of a finished request behind where another one
        without a budget moves into its row."""
        process_dict_updates(self._state, batch_update, self._new_state)

    def _new_state(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> dict[str, Any] | None:
        if params.thinking_token_budget is None:
            return None
        return self._init_state_entry(prompt, params.thinking_token_budget)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        self._forced = {}
        for index, state in self._state.items():
            output = output_token_ids[index]
            for length in range(state.setdefault("num_followed", 0), len(output) + 1):
                self._follow(state, output[:length])
            state["num_followed"] = len(output) + 1
            drafts = spec_token_ids[index] if spec_token_ids else []
            forced, ahead = [self._forced_token(state)], dict(state)
            for length in range(1, len(drafts) + 1):
                self._follow(ahead, output + drafts[:length])
                forced.append(self._forced_token(ahead))
            self._forced[index] = forced

    def apply_to_logits(
        self,
        logits: torch.Tensor,
        predict_bonus_token: bool,
        spec_token_ids: list[list[int]] | None,
    ) -> torch.Tensor:
        """`logits`: one row a request where none has drafts, and for the bonus tokens;
        else one row a draft."""
        num_drafts = list(map(len, spec_token_ids or ()))
        has_row_a_request = predict_bonus_token or not any(num_drafts)
        rows, tokens = [], []
        for index, forced in self._forced.items():
            if has_row_a_request:
                first, of_rows = index, forced[-1:]
            else:
                first, of_rows = sum(num_drafts[:index]), forced[:-1]
            for row, token in enumerate(of_rows, first):
                if token is not None:
                    rows.append(row)
                    tokens.append(token)
        if rows:
            logits[rows, tokens] = 1e9  # as vLLM does
        return logits

    def _follow(self, state: dict[str, Any], output: list[int]) -> None:
        state["output_tok_ids"] = output
        state["spec_token_ids"] = []
        state["force_index"] = []
        self._update_think_state(state)

    def _forced_token(self, state: dict[str, Any]) -> int | None:
        if not (state["in_end"] and state["force_index"]):
            return None
        remaining = self.think_end_token_ids[state["end_count"] :]
        return remaining[0] if remaining else None
