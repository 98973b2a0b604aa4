"""Following a reference: right, edited, wrong and hostile ones."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.unit.scripted_target import Replay, replay
from vllm_emssd.proposers.copy_lengths import LengthsByAcceptance
from vllm_emssd.proposers.llma import LlmaProposer
from vllm_emssd.proposers.reference import ReferencePointer

MODELS = Path(__file__).parents[2] / "models"
property_test = settings(max_examples=100, deadline=None, derandomize=True)
# Few tokens, so that everything matches everything by chance.
TOKENS = st.lists(st.integers(0, 3), max_size=60)


def proposer_of(
    reference: list[int] | None, copy_length: int = 7, check_length: int = 2
) -> LlmaProposer:
    proposer = LlmaProposer(check_length, copy_length, LengthsByAcceptance())
    if reference is not None:
        proposer.add_reference("r", np.array(reference, dtype=np.int32))
    return proposer


def pointer_after(reference: list[int], answer: list[int]) -> ReferencePointer:
    pointer = ReferencePointer(np.array(reference), 2)
    pointer.advance(answer, 0)
    return pointer


# ---------------------------------------------------------------- whole answers


@pytest.mark.parametrize("copy_length", [1, 7, 20])
def test_answer_equal_to_the_reference_is_copied_whole(copy_length: int) -> None:
    answer = list(range(1000, 1100))
    seen = replay(proposer_of(answer, copy_length), [5, 6], answer, copy_length)
    assert seen.num_accepted_tokens == seen.num_draft_tokens
    assert seen.num_forwards == -(-99 // (copy_length + 1))


def test_preamble_is_skipped_and_moved_parts_are_found() -> None:
    reference = list(range(1000, 1200))
    answer = [1, 2, 3, *reference[:40], *reference[100:160], *reference[50:100]]
    seen = replay(proposer_of(reference), [5, 6], answer, 7)
    assert seen.num_forwards <= len(answer) // 8 + 3 + 2 * 8


SOURCE = Path(textwrap.__file__).read_text()[:9000]


def edit(old: str, new: str) -> tuple[list[int], list[int], list[int]]:
    """A real source file, the same with one identifier changed throughout, and the
    instruction; as token ids of the shipped model's tokenizer."""
    tokenizer = Tokenizer.from_file(str(MODELS / "target" / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    assert len(re.findall(rf"\b{old}\b", SOURCE)) >= 10
    edited = re.sub(rf"\b{old}\b", new, SOURCE)
    return encode(SOURCE), encode(edited), encode(f"Rename {old} to {new}:\n")


@pytest.mark.parametrize("new", ["content", "T", "the_text_to_wrap"])
@pytest.mark.parametrize("prompt_has_the_file", [False, True])
def test_edit_of_a_real_file(new: str, prompt_has_the_file: bool) -> None:
    """At least 5 tokens a forward at copy_length 7, more with a longer one."""
    source, edited, instruction = edit("text", new)
    prompt = instruction + source if prompt_has_the_file else instruction
    seen = {k: replay(proposer_of(source, k), prompt, edited, k) for k in (7, 16)}
    assert seen[7].tokens_per_forward >= 5
    assert seen[16].tokens_per_forward > 1.5 * seen[7].tokens_per_forward
    without = replay(proposer_of(None), prompt, edited, 7)
    if prompt_has_the_file:  # the prompt itself is followed like a reference
        assert without.tokens_per_forward >= 5
    else:
        assert seen[7].tokens_per_forward > without.tokens_per_forward + 2
        assert seen[7].accepted_per_verified_row > without.accepted_per_verified_row


@pytest.mark.parametrize("kind", ["reversed", "of another file", "one token"])
def test_wrong_reference_is_soon_left_alone(kind: str) -> None:
    """It costs a few rows, and what the answer's own text offers is still copied."""
    source, _, instruction = edit("text", "content")
    wrong = {
        "reversed": source[::-1],
        "of another file": [t for t in source if t % 3],
        "one token": [source[0]] * len(source),
    }[kind]
    answer = source[:2000]
    without = replay(proposer_of(None), instruction + source, answer, 7)
    seen = replay(proposer_of(wrong), instruction + source, answer, 7)
    assert seen.num_forwards <= 1.1 * without.num_forwards + 5


def test_prompt_is_the_reference_once_a_stretch_of_it_was_copied() -> None:
    """Behind its start every tenth token is changed, throughout alike."""
    prompt = [t for i in range(40) for t in (1, *range(100 + i * 9, 109 + i * 9))]
    answer = prompt[:40] + [2 if t == 1 else t for t in prompt[40:]]
    seen = replay(proposer_of(None), prompt, answer, 7)
    assert seen.num_forwards <= len(answer) // 8 + 12


# ---------------------------------------------------------------- step by step


def test_departure_goes_on_behind_as_many_tokens() -> None:
    pointer = pointer_after(list(range(20)), [0, 1, 2, 90])
    assert pointer.continuation(3) == [4, 5, 6]


def test_departure_goes_on_behind_an_equal_token() -> None:
    """Two tokens instead of three: 5 is where both agree again."""
    pointer = pointer_after(list(range(20)), [0, 1, 90, 91, 5])
    assert pointer.continuation(3) == [6, 7, 8]


def test_long_departure_is_not_guessed_at() -> None:
    pointer = pointer_after(list(range(20)), [0, 1, 90, 91, 92])
    assert pointer.continuation(3) == []
    pointer.advance([7, 8], 0)
    assert pointer.continuation(3) == [9, 10, 11]


REFERENCE = [1, 2, 50, 3, 4, 5, 50, 6, 7, 8, 50, 9]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([1, 2, 90, 3, 4, 5], [90, 6, 7, 8, 90, 9]),  # replaced by one
        ([1, 2, 90, 91, 3, 4, 5], [90, 91, 6, 7, 8, 90, 91, 9]),  # by two
        ([1, 2, 50, 90, 3, 4, 5], [50, 90, 6, 7, 8, 50, 90, 9]),  # appended to
        ([1, 2, 3, 4, 5], [6, 7, 8, 9]),  # left out
    ],
)
def test_edit_is_made_again_where_its_like_occurs(
    first: list[int], then: list[int]
) -> None:
    pointer = pointer_after(REFERENCE, first)
    assert pointer.continuation(20) == then
    pointer.advance(then[:2], 0)
    assert pointer.continuation(20) == then[2:]


def test_edit_that_was_not_made_again_is_not_proposed_until_it_is() -> None:
    reference = [1, 2, 50, 3, 4, 5, 50, 6, 7, 8, 50, 9, 10, 11, 50, 12]
    pointer = pointer_after(reference, [1, 2, 90, 3, 4, 5, 50, 6, 7, 8])
    assert pointer.continuation(9) == [50, 9, 10, 11, 50, 12]
    pointer.advance([90], 0)
    assert pointer.continuation(9) == [9, 10, 11, 90, 12]


# ---------------------------------------------------------------- whatever comes


@property_test
@given(TOKENS, TOKENS, st.randoms(use_true_random=False), st.integers(1, 3))
def test_growing_answer_equals_all_at_once(
    reference: list[int], answer: list[int], random: Random, check_length: int
) -> None:
    at_once = ReferencePointer(np.array(reference, np.int32), check_length)
    at_once.advance(answer, 0)
    growing, num_known = ReferencePointer(np.array(reference), check_length), 0
    while num_known < len(answer):
        start, num_known = num_known, num_known + random.randint(1, 6)
        growing.advance(answer[:num_known], start)
        growing.continuation(5)  # looking changes nothing
    assert growing.continuation(9) == at_once.continuation(9)


@property_test
@given(TOKENS, TOKENS, TOKENS, st.integers(1, 9), st.integers(1, 3))
def test_any_reference_gives_the_answer(
    reference: list[int],
    prompt: list[int],
    answer: list[int],
    copy_length: int,
    check_length: int,
) -> None:
    """Drafts are tokens that were seen, never too many; the script checks the rest."""
    proposer = proposer_of(reference, copy_length, check_length)
    seen = replay(proposer, [0, *prompt], [1, *answer], copy_length)
    emitted = seen.num_accepted_tokens + seen.num_forwards
    assert emitted == len(answer)
    known = {0, 1, *reference, *prompt, *answer}
    pointer = ReferencePointer(np.array(reference, np.int32), check_length)
    pointer.advance([1, *answer], 0)
    for length in (0, 1, copy_length):
        copied = pointer.continuation(length)
        assert len(copied) <= length
        assert set(copied) <= known


@property_test
@given(
    st.lists(st.integers(10, 14), min_size=40, max_size=90),
    st.integers(1, 4),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_change_throughout_costs_little_more_than_none(
    reference: list[int], old_len: int, new_len: int, random: Random
) -> None:
    """Whatever an identifier is replaced by, for the places where it stands."""
    for _ in range(6):
        reference[(at := random.randrange(len(reference))) : at] = [*range(old_len)]
    old, new = list(range(old_len)), [*range(100, 100 + new_len)]
    answer, i = [9], 0
    while i < len(reference):
        is_old = reference[i : i + old_len] == old
        answer += new if is_old else reference[i : i + 1]
        i += old_len if is_old else 1
    seen = replay(proposer_of([9, *reference]), [8], answer, 7)
    unknown = replay(proposer_of([]), [8], answer, 7)
    assert seen.num_forwards <= len(answer) // 8 + 30
    assert seen.num_forwards <= unknown.num_forwards + 2


def test_released_request_leaves_no_reference_to_its_successor() -> None:
    answer = list(range(1000, 1050))
    proposer = proposer_of(answer)
    assert replay(proposer, [5], answer, 7).num_accepted_tokens > 0
    proposer.release(["r"])
    assert replay(proposer, [5], answer, 7).num_draft_tokens == 0


def test_shorter_text_under_the_same_id_begins_anew() -> None:
    """A request may be cut back; the reference is followed from its start again."""
    answer = list(range(1000, 1050))
    proposer = proposer_of(answer)
    first = replay(proposer, [5], answer, 7)
    assert replay(proposer, [5], answer, 7) == first == Replay(7, 42, 42)


@pytest.mark.parametrize("check_length", [2, 33, 64])
def test_way_back_is_found_whatever_must_agree(check_length: int) -> None:
    reference = list(range(1000, 1400))
    answer = [*reference[:100], 1, 2, 3, *reference[103:200]]
    pointer = ReferencePointer(np.array(reference), check_length)
    pointer.advance(answer, 0)
    assert pointer.continuation(3) == reference[200:203]
