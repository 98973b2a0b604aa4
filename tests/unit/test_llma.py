"""Copying from the text against a search that scans the whole text every time."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.unit.draft_batches import batch_of
from vllm_emssd.draft_length import CostTable, StepCosts, StepInfo
from vllm_emssd.proposers import llma
from vllm_emssd.proposers.base import DraftBatch
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.llma import Copy, LlmaProposer
from vllm_emssd.proposers.ngram_index import (
    MAX_CANDIDATES,
    MAX_MATCH_LENGTH,
    NgramIndex,
)

property_test = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def texts(draw: st.DrawFn) -> list[int]:
    """Repetitive texts: few tokens, short and long, pieces of themselves in them."""
    tokens = draw(st.lists(st.integers(0, 2), max_size=60))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(tokens)))
        piece = tokens[start : start + draw(st.integers(0, 50))]
        tokens = tokens + piece + draw(st.lists(st.integers(0, 2), max_size=3))
    return tokens


AskedDrafts = tuple[list[int], int, bool]  # text, most drafts, whether it samples
requests_of_a_step = st.lists(
    st.tuples(texts(), st.integers(0, 9), st.booleans()), min_size=1, max_size=5
)


def batch_asking(requests: list[AskedDrafts]) -> DraftBatch:
    known, limits, is_sampling = zip(*requests, strict=True)
    named = {f"r{i}": text for i, text in enumerate(known)}
    return batch_of(named, limits, is_sampling)


def proposer_of(check_length: int, copy_length: int) -> LlmaProposer:
    return LlmaProposer(check_length, copy_length, LengthsByAcceptance())


def expected(tokens: list[int], check_length: int, length: int) -> list[int]:
    return expected_match(tokens, check_length, length)[0]


def expected_match(
    tokens: list[int], check_length: int, length: int
) -> tuple[list[int], int]:
    return oracle.copied(tokens, check_length, length, MAX_CANDIDATES, MAX_MATCH_LENGTH)


@property_test
@given(
    texts(), st.integers(1, 4), st.integers(1, 12), st.randoms(use_true_random=False)
)
@example([1, 1, 1, 1], 1, 7, Random(0))  # shorter than the longest match told apart
@example([0, 1] * 60, 2, 7, Random(0))  # more occurrences than are compared
def test_copies_of_a_growing_text_are_what_a_full_scan_finds(
    tokens: list[int], check_length: int, copy_length: int, random: Random
) -> None:
    proposer, num_known = proposer_of(check_length, copy_length), 0
    while num_known < len(tokens):
        num_known += random.randint(1, 6)
        known = tokens[:num_known]
        drafts = proposer.propose(batch_of({"a": known}, [copy_length]))
        assert drafts == [expected(known, check_length, copy_length)]


@pytest.mark.parametrize("num_later", [MAX_CANDIDATES - 1, MAX_CANDIDATES])
def test_only_the_latest_occurrences_are_compared(num_later: int) -> None:
    """The first occurrence agrees longest, but is it among those compared?"""
    later = [token for i in range(num_later) for token in (200 + i, 6, 7)]
    tokens = [5, 6, 7, 100, *later, 5, 6, 7]
    found = 100 if num_later < MAX_CANDIDATES else 5
    assert proposer_of(2, 1).propose(batch_of({"a": tokens}, [1])) == [[found]]


class HalvesCopies(LengthsByAcceptance):
    """Verifies half of each copy; keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[StepInfo, np.ndarray]] = []

    def choose(self, step: StepInfo, acceptance: np.ndarray) -> np.ndarray:
        self.told.append((step, acceptance))
        return step.max_draft_tokens // 2


@property_test
@given(requests_of_a_step)
def test_lengths_are_chosen_by_length_of_the_match(
    requests: list[AskedDrafts],
) -> None:
    lengths = HalvesCopies()
    proposer = LlmaProposer(2, 7, lengths)
    batch = batch_asking(requests)
    drafts = proposer.propose(batch)
    [(step, acceptance)] = lengths.told
    assert step.req_ids == batch.req_ids
    assert step.missing_rows.tolist() == [0] * len(requests)
    assert step.num_prefill_rows == sum(
        len(text) for text, _, sampling in requests if not sampling
    )
    for i, (text, limit, sampling) in enumerate(requests):
        asks = sampling and limit > 0
        copy, match_len = expected_match(text, 2, min(limit, 7)) if asks else ([], 0)
        assert step.max_draft_tokens[i] == len(copy)
        assert drafts[i] == copy[: len(copy) // 2]
        if copy:
            assert (acceptance[i] == match_len / (match_len + 1)).all()


class CountedTokens(np.ndarray):
    """Tokens that count how many of them are read into Python."""

    num_read = 0

    def tolist(self) -> list[int]:
        CountedTokens.num_read += self.size
        return super().tolist()


@pytest.mark.parametrize("check_length", [1, 2, 4])
def test_work_per_new_token_does_not_grow(check_length: int) -> None:
    tokens = np.arange(2000).view(CountedTokens) % 7
    index = NgramIndex(check_length)
    for num_known in range(1, len(tokens) + 1):
        CountedTokens.num_read = 0
        index.extend(tokens[:num_known])
        assert CountedTokens.num_read <= check_length
        num_entries = max(0, num_known - check_length + 1)
        assert len(index.tokens) == num_known
        if num_known in (1, 2, 3, 4, 5, 1000, 2000):
            assert sum(map(len, index._ends.values())) == num_entries


REPEATS = [5, 6, 7, 8, 5, 6]


def proposer_with(num_reqs: int) -> LlmaProposer:
    """Requests r0, r1, ... have been proposed like copies."""
    proposer = proposer_of(2, 3)
    texts = {f"r{i}": REPEATS for i in range(num_reqs)}
    proposer.propose(batch_of(texts, [3] * num_reqs))
    return proposer


def find(proposer: LlmaProposer, req_id: str) -> Copy:
    [copy] = proposer.find(batch_of({req_id: REPEATS}, [3]))
    return copy


def test_a_new_request_expects_what_others_saw_of_like_copies() -> None:
    expectations = []
    for num_accepted in (0, 3):
        proposer = proposer_with(8)
        before = find(proposer, "before").acceptance
        for i in range(8):
            proposer.record_verified(f"r{i}", 3, num_accepted)
        expectations += [find(proposer, "after").acceptance, before]
    bad, guess, good, same_guess = expectations
    assert bad < guess == same_guess < good


def test_copies_that_fail_everywhere_are_tried_again_in_the_end() -> None:
    proposer = proposer_with(50)
    for i in range(50):
        proposer.record_verified(f"r{i}", 3, 0)
    assert find(proposer, "new").token_ids == []
    assert any(find(proposer, "new").token_ids for _ in range(200))


def test_what_all_requests_saw_fades_once_a_step_not_once_a_request() -> None:
    """One step of 64 requests whose copies hold outweighs one of one that did not."""
    proposer = proposer_with(64)
    for i in range(64):
        proposer.record_verified(f"r{i}", 3, 3)
    [record] = proposer._records.values()
    assert record.tested == 64 * 3
    proposer.propose(batch_of({"r0": REPEATS}, [3]))
    proposer.record_verified("r0", 3, 0)
    assert record.tested == pytest.approx(0.995 * 64 * 3 + 1)


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    """So that no step stalls; all requests of a step share what it may take in."""
    long = np.arange(2 * llma._INDEXED_A_STEP + 10) % 50_000
    texts = {"short": [7, 8, 9, 7, 8], "long": [*long.tolist(), 7, 8, 9, 7, 8]}
    proposer, batch = proposer_of(2, 1), batch_of(texts, [1, 1])
    assert [proposer.propose(batch) for _ in range(3)] == [
        [[9], []],
        [[9], []],
        [[9], [9]],
    ]


def test_copies_that_are_never_right_are_given_up_until_one_is_right() -> None:
    """By what became of them: with costs, more are made only where they pay."""
    costs = StepCosts(CostTable([1, 512], [20.0, 532.0]), CostTable([1], [0.0]), 4.0)
    proposer = LlmaProposer(2, 7, LengthsByAcceptance(costs))
    batch = batch_of({"a": [1, 2, 3, 4] * 10}, [7])
    made: list[int] = []
    for step in range(800):
        drafts = len(proposer.propose(batch)[0])
        proposer.record_verified("a", drafts, drafts if step >= 400 else 0)
        made.append(drafts)
    assert made[0] > 3
    assert 0 < sum(made[200:400]) <= 200 / 10
    assert min(made[-100:]) > 3
