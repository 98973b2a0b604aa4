"""What the ragged code must equal, one request and one token at a time.

Plain Python lists and loops, slow on purpose, and no vLLM: this file is to be read
and believed, the fast code is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

VOCAB_SIZE = 5  # small, so that wrong drafts are often right by chance
_MODULUS = (1 << 61) - 1

# ---------------------------------------------------------------- the draft model


def next_state(state: int, token: int) -> int:
    """A token's K/V: it depends on its token and, through `state`, on all before."""
    return (state * 1_000_003 + token + 7) % _MODULUS


def states(tokens: Sequence[int]) -> list[int]:
    """K/V of every position of a text."""
    state, found = 0, []
    for token in tokens:
        state = next_state(state, token)
        found.append(state)
    return found


def draft_after(state: int) -> int:
    """The token the draft model is sure of, after a text that ends in `state`."""
    return (state >> 7) % VOCAB_SIZE


def confidence_after(state: int) -> float:
    """Its highest probability there."""
    return (state >> 17) % 1009 / 1009


def drafts(tokens: Sequence[int], num_drafts: int) -> list[int]:
    """A naive drafter: reads the whole text again for every draft."""
    text = list(tokens)
    for _ in range(num_drafts):
        text.append(draft_after(states(text)[-1]))
    return text[len(tokens) :]


# ---------------------------------------------------------------- rows


def granted(wanted: Sequence[int], budget: int) -> list[int]:
    """Rows of each request: small wishes first, until the budget is used up."""
    given = [0] * len(wanted)
    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i], i)):
        given[i] = min(wanted[i], budget)
        budget -= given[i]
    return given


def rows(
    spans: Sequence[tuple[int, int, int]],
) -> tuple[list[int], list[int], list[int]]:
    """Of spans (batch row, start, end): query_start_loc, positions, row's request."""
    query_start_loc, positions, req_indices = [0], [], []
    for req_idx, start, end in spans:
        for position in range(start, end):
            positions.append(position)
            req_indices.append(req_idx)
        query_start_loc.append(len(positions))
    return query_start_loc, positions, req_indices


def slot(block_ids: Sequence[int], position: int, block_size: int) -> int:
    """Place of a position in the paged K/V."""
    return block_ids[position // block_size] * block_size + position % block_size


# ---------------------------------------------------------------- copying


def copied(
    tokens: Sequence[int],
    check_length: int,
    num_drafts: int,
    max_candidates: int,
    max_match_length: int,
) -> tuple[list[int], int]:
    """LLMA: find the end of the text earlier in it, write on as it went on there.

    Returns the copy, and how many tokens agreed before it."""
    num_tokens = len(tokens)
    run = list(tokens[num_tokens - check_length :])
    ends = [
        end
        for end in range(check_length, num_tokens)
        if list(tokens[end - check_length : end]) == run
    ]
    source, longest = None, -1
    for end in ends[-max_candidates:]:
        length = 0
        while (
            length < min(max_match_length, end)
            and tokens[end - 1 - length] == tokens[num_tokens - 1 - length]
        ):
            length += 1
        if length >= longest:  # the latest of equals
            source, longest = end, length
    if source is None:
        return [], 0
    text = list(tokens)
    for i in range(num_drafts):
        text.append(text[source + i])
    return text[num_tokens:], longest
