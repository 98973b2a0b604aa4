"""Kernels that find what to copy, in the texts and references on the device.

They do what `proposers/llma.py`, `ngram_index.py` and `reference.py` do, token for
token, and say how where a program of a device has to do it otherwise. Those explain
why.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from vllm.triton_utils import tl, triton

from vllm_emssd.proposers import llma, ngram_index, reference

# A request's state, int32. Lengths are in tokens, places are of the request's text, but
# `POSITION`, which is of the reference.
MAX_DRAFTS = tl.constexpr(0)
END = tl.constexpr(1)  # the length at which the request ends
NUM_FOLLOWED = tl.constexpr(2)  # tokens of the text, in the reference
REFERENCE_LEN = tl.constexpr(3)  # 0: there is none
POSITION = tl.constexpr(4)
DEPARTURE = tl.constexpr(5)  # where it begins; -1: the answer follows the reference
JUST_EDITED = tl.constexpr(6)
RUN = tl.constexpr(7)
NUM_EDITS = tl.constexpr(8)  # ever made
NUM_COPIED = tl.constexpr(9)  # not yet verified, and of which kind, from where
KIND = tl.constexpr(10)
SOURCE = tl.constexpr(11)
MATCH_LEN = tl.constexpr(12)
STATE_SIZE = tl.constexpr(13)

# Of each edit that it made, int32. The key is 2 t + 2 of an insertion, t the token
# before or -1, and 2 t + 3 of a replacement, t the first token replaced.
KEY = tl.constexpr(0)
OLD_START = tl.constexpr(1)  # in the reference
OLD_LEN = tl.constexpr(2)
NEW_START = tl.constexpr(3)
NEW_LEN = tl.constexpr(4)
HELD = tl.constexpr(5)
EDIT_FIELDS = tl.constexpr(8)  # a power of two
MAX_EDITS = tl.constexpr(64)  # the oldest are forgotten
NO_KEY = -1

# Of copies, by the bit length of the match: first those of the own text, then those of
# a reference, 0 while the answer has departed from it.
NUM_KINDS = tl.constexpr(32)
_FIRST_OF_REFERENCE = tl.constexpr(8)

_MAX_CANDIDATES = tl.constexpr(ngram_index.MAX_CANDIDATES)
_MAX_MATCH = tl.constexpr(ngram_index.MAX_MATCH_LENGTH)
_NEAR = tl.constexpr(reference._NEAR)
_FAR_MATCH = tl.constexpr(reference._FAR_MATCH_LENGTH)
_LONGEST_EDIT = tl.constexpr(reference._LONGEST_EDIT)
_ANCHOR_WINDOW = tl.constexpr(reference._ANCHOR_WINDOW)
_MAX_GUESSES = tl.constexpr(reference._MAX_GUESSES)
_LONGEST_DEPARTURE = tl.constexpr(reference._LONGEST_DEPARTURE)
_PRIOR_TESTS = tl.constexpr(llma._PRIOR_TESTS)
_FORGET = tl.constexpr(llma._FORGET)
_IDLE_FORGET = tl.constexpr(llma._IDLE_FORGET)
_WORTHLESS = tl.constexpr(llma._WORTHLESS)
_HEAD_START = tl.constexpr(llma._REFERENCE_HEAD_START)
_DEPARTED_MATCH = tl.constexpr(llma._DEPARTED_MATCH)
_PROMPT_STRETCH = tl.constexpr(llma._PROMPT_STRETCH)
_LAST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_reqs", "text_address"])
def observe_copies_kernel(
    idx_mapping,  # [num_reqs] int64: request states
    num_sampled,  # [num_reqs] int32
    first_rows,  # [num_reqs + 1] int32: verified, drafts and one more of each request
    total_len,  # [max_num_reqs] int32
    prompt_len,  # [max_num_reqs] int32
    text_address,  # of the texts, [max_num_reqs, max_model_len] int32
    text_stride,
    reference_addresses,  # [max_num_reqs] int64
    state,  # [max_num_reqs, STATE_SIZE] int32
    records,  # [NUM_KINDS, 2] float64: accepted, tested
    num_idle,  # [NUM_KINDS] int32: copies not worth it
    num_reqs,
    BLOCK_SIZE: tl.constexpr,
):
    """A program a kind: how its copies fared. A request that repeated a stretch of its
    prompt has it for its reference from then on."""
    kind = tl.program_id(0)
    accepted = tl.load(records + 2 * kind)
    tested = tl.load(records + 2 * kind + 1)
    for _ in range(tl.load(num_idle + kind)):
        accepted *= _IDLE_FORGET
        tested *= _IDLE_FORGET
    tl.store(num_idle + kind, 0)
    num_tested = 0
    new_accepted = 0
    new_tested = 0
    for first in range(0, num_reqs, BLOCK_SIZE):
        i = first + tl.arange(0, BLOCK_SIZE)
        is_req = i < num_reqs
        req = tl.load(idx_mapping + i, mask=is_req, other=0)
        row = state + req * STATE_SIZE
        drafts = tl.load(first_rows + i + 1, mask=is_req, other=0) - 1
        drafts = drafts - tl.load(first_rows + i, mask=is_req, other=0)
        drafts = tl.minimum(drafts, tl.load(row + NUM_COPIED, mask=is_req, other=0))
        is_tested = (tl.load(row + KIND, mask=is_req, other=-1) == kind) & (drafts > 0)
        sampled = tl.load(num_sampled + i, mask=is_req, other=1)
        kept = tl.minimum(sampled - 1, drafts)
        seen = tl.minimum(kept + 1, drafts)
        num_tested += tl.sum(is_tested.to(tl.int32), 0)
        new_accepted += tl.sum(tl.where(is_tested, kept, 0), 0)
        new_tested += tl.sum(tl.where(is_tested, seen, 0), 0)

        prompt = tl.load(prompt_len + req, mask=is_tested, other=0)
        source_end = tl.load(row + SOURCE, mask=is_tested, other=0) + kept
        repeated = tl.load(row + MATCH_LEN, mask=is_tested, other=0) + kept
        repeats = (repeated >= _PROMPT_STRETCH) & (source_end <= prompt)
        has_none = tl.load(row + REFERENCE_LEN, mask=is_tested, other=1) == 0
        repeats = repeats & has_none
        followed = tl.load(total_len + req, mask=repeats, other=0) - sampled + kept
        tl.store(row + REFERENCE_LEN, prompt, mask=repeats)
        tl.store(row + POSITION, source_end, mask=repeats)
        tl.store(row + RUN, repeated, mask=repeats)
        tl.store(row + NUM_FOLLOWED, followed, mask=repeats)
        address = text_address + req * text_stride * 4
        tl.store(reference_addresses + req, address, mask=repeats)
    if num_tested > 0:
        accepted = accepted * _FORGET + new_accepted
        tested = tested * _FORGET + new_tested
    tl.store(records + 2 * kind, accepted)
    tl.store(records + 2 * kind + 1, tested)


@triton.jit
def find_copies_kernel(
    idx_mapping,  # [num_reqs] int64: request states
    num_sampled,  # [num_reqs] int32, 0 where nothing was
    total_len,  # [max_num_reqs] int32
    token_ids,  # [max_num_reqs, max_model_len] int32
    token_ids_stride,
    reference_addresses,  # [max_num_reqs] int64
    state,  # [max_num_reqs, STATE_SIZE] int32
    edits,  # [max_num_reqs, EDIT_FIELDS, MAX_EDITS] int32
    records,  # [NUM_KINDS, 2] float64: accepted, tested
    num_idle,  # [NUM_KINDS] int32: copies not worth it
    drafts,  # [num_reqs, K] int64
    out_found,  # [num_reqs, 2] float64: tokens copied, how many are to be accepted
    max_model_len,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,  # a power of two
    CHECK_LENGTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A program a request: what it may copy next. Drafts not made are its last token
    again."""
    i = tl.program_id(0)
    req = tl.load(idx_mapping + i)
    row = state + req * STATE_SIZE
    text = token_ids + req * token_ids_stride
    text_len = tl.load(total_len + req)
    is_over = (tl.load(num_sampled + i) == 0) | (text_len >= tl.load(row + END))
    room = tl.maximum(max_model_len - text_len - 1, 0)
    length = tl.where(is_over, 0, tl.minimum(tl.load(row + MAX_DRAFTS), room))

    ref = tl.load(reference_addresses + req).to(tl.pointer_type(tl.int32))
    edits += req * (EDIT_FIELDS * MAX_EDITS)
    position, departure, just_edited, run, held_edits = _follow(
        text, text_len, ref, row, edits, length, CHECK_LENGTH, BLOCK_SIZE
    )
    ref_len = tl.load(row + REFERENCE_LEN)
    ref_tokens, num_ref = _copy_of_reference(
        text,
        text_len,
        ref,
        ref_len,
        position,
        departure,
        just_edited,
        held_edits,
        length,
        K_PADDED,
    )
    last = text_len - 1
    num_ends = tl.where(length > 0, text_len - CHECK_LENGTH, 0)
    match_len, steps = _longest_match(
        text, last, num_ends, text, text_len, -1, False, CHECK_LENGTH, BLOCK_SIZE
    )
    source = last - steps
    num_own = tl.where(match_len > 0, length, 0)

    own_kind = tl.minimum(_bit_length(match_len), NUM_KINDS - 1)
    own = _acceptance(own_kind, match_len, records)
    ref_kind = tl.where(departure < 0, _bit_length(run), 0) + _FIRST_OF_REFERENCE
    ref_kind = tl.minimum(ref_kind, NUM_KINDS - 1)
    ref_match = tl.where(departure < 0, run + _HEAD_START, _DEPARTED_MATCH)
    by_ref = _acceptance(ref_kind, ref_match, records)
    own_gain = _gain(own, num_own, K)
    ref_gain = _gain(by_ref, num_ref, K)
    is_own = own_gain > ref_gain
    kind = tl.where(is_own, own_kind, ref_kind)
    num_copied = tl.where(is_own, num_own, num_ref)
    gain = tl.where(is_own, own_gain, ref_gain)
    if (num_copied > 0) & (tl.where(is_own, own, by_ref) < _WORTHLESS):
        num_copied = 0
        tl.atomic_add(num_idle + kind, 1)

    # A copy that reaches the end goes on with what it just copied.
    offsets = tl.arange(0, K_PADDED)
    from_source = text + source + offsets % tl.maximum(text_len - source, 1)
    own_tokens = tl.load(from_source, mask=is_own & (offsets < K), other=0)
    last_token = tl.maximum(_token(text, last, text_len), 0)
    copied = tl.where(is_own, own_tokens, ref_tokens)
    copied = tl.where(offsets < num_copied, copied, last_token)
    tl.store(drafts + i * K + offsets, copied.to(tl.int64), mask=offsets < K)
    tl.store(out_found + 2 * i, num_copied.to(tl.float64))
    tl.store(out_found + 2 * i + 1, tl.where(num_copied > 0, gain, 0.0))
    tl.store(row + NUM_COPIED, num_copied)
    tl.store(row + KIND, kind)
    tl.store(row + SOURCE, source)
    tl.store(row + MATCH_LEN, tl.where(is_own, match_len, 0))


# ------------------------------------------------------------ along the reference


@triton.jit
def _follow(text, text_len, ref, row, edits, length, CHECK_LENGTH, BLOCK_SIZE):
    """Follow the text along the reference to its end, if anything may be copied. Where
    that is in the reference, where in the text a departure began, whether an edit ended
    there, how many tokens agreed before; and the edits."""
    followed = tl.load(row + NUM_FOLLOWED)
    ref_len = tl.load(row + REFERENCE_LEN)
    position = tl.load(row + POSITION)
    departure = tl.load(row + DEPARTURE)
    just_edited = tl.load(row + JUST_EDITED)
    run = tl.load(row + RUN)
    num_edits = tl.load(row + NUM_EDITS)
    fields = tl.arange(0, EDIT_FIELDS)[:, None]
    edit_rows = edits + fields * MAX_EDITS + tl.arange(0, MAX_EDITS)[None, :]
    edits = tl.load(edit_rows)
    end = tl.where((ref_len > 0) & (length > 0), text_len, followed)
    for at in range(followed, end):
        edit = _edit_at(edits, position, just_edited, ref, ref_len)
        if departure < 0:
            token = tl.load(text + at)
            num_old = _of(edits, edit, OLD_LEN)
            is_at = _token(ref, position, ref_len) == token
            # An edit that leaves out: its first sign is the token behind.
            is_behind = _token(ref, position + num_old, ref_len) == token
            leaves_out = (edit >= 0) & (_of(edits, edit, NEW_LEN) == 0)
            is_left_out = (is_at == 0) & leaves_out & is_behind
            follows = is_at | is_left_out
            held = is_left_out.to(tl.int32)
            edits = _with(edits, tl.where(follows, edit, -1), HELD, held)
            position += tl.where(follows, 1 + held * num_old, 0)
            run += follows.to(tl.int32)
            just_edited = tl.where(follows, 0, just_edited)
            departure = tl.where(follows, -1, at)
        if departure >= 0:
            num_written = at + 1 - departure
            edit = _if_begun(edits, edit, text, departure, num_written)
            if edit >= 0:
                if _of(edits, edit, NEW_LEN) == num_written:
                    edits = _with(edits, edit, HELD, 1)
                    position += _of(edits, edit, OLD_LEN)
                    just_edited = 1
                    departure = -1
            elif num_written >= CHECK_LENGTH:
                found, agreed = _found_again(
                    ref, ref_len, position, text, at + 1, CHECK_LENGTH, BLOCK_SIZE
                )
                if agreed > 0:
                    common = tl.minimum(agreed, num_written)
                    common = tl.minimum(common, found - position)
                    num_old = found - common - position
                    num_new = num_written - common
                    if (common > 0) & (tl.maximum(num_old, num_new) <= _LONGEST_EDIT):
                        insertion_key, key = _keys(position, ref, ref_len)
                        key = tl.where(num_old > 0, key, insertion_key)
                        edits, num_edits = _remembered(
                            edits, num_edits, key, position, num_old, departure, num_new
                        )
                    position = found
                    run = agreed
                    just_edited = 0
                    departure = -1
                elif num_written >= _LONGEST_DEPARTURE:
                    # So much of it tells matches apart.
                    departure = at + 1 - max(CHECK_LENGTH, _MAX_MATCH)
    tl.store(row + NUM_FOLLOWED, end)
    tl.store(row + POSITION, position)
    tl.store(row + DEPARTURE, departure)
    tl.store(row + JUST_EDITED, just_edited)
    tl.store(row + RUN, run)
    tl.store(row + NUM_EDITS, num_edits)
    tl.store(edit_rows, edits)
    return position, departure, just_edited, run, edits


@triton.jit
def _copy_of_reference(
    text,
    text_len,
    ref,
    ref_len,
    position,
    departure,
    just_edited,
    edits,
    length,
    K_PADDED,
):
    """What may be copied behind the text that was followed: tokens [K_PADDED], and how
    many of them are meant, at most `length`."""
    length = tl.where(ref_len > 0, length, 0)
    offsets = tl.arange(0, K_PADDED)
    tokens = tl.zeros([K_PADDED], dtype=tl.int32)
    count = 0
    if departure >= 0:
        num_written = text_len - departure
        edit = _edit_at(edits, position, just_edited, ref, ref_len)
        edit = _if_begun(edits, edit, text, departure, num_written)
        just_edited = 1
        if edit >= 0:
            count = _of(edits, edit, NEW_LEN) - num_written
            rest = text + _of(edits, edit, NEW_START) + num_written
            tokens = tl.load(rest + offsets, mask=offsets < count, other=0)
            position += _of(edits, edit, OLD_LEN)
        else:
            last = tl.load(text + text_len - 1)
            position = _guess(position, num_written, last, ref, ref_len)
    while (count < length) & (position < ref_len):
        edit = _edit_at(edits, position, just_edited, ref, ref_len)
        is_edited = _of(edits, edit, HELD) > 0
        num_new = tl.where(is_edited, _of(edits, edit, NEW_LEN), 1)
        new = text + (_of(edits, edit, NEW_START) + offsets - count)
        is_new = (offsets >= count) & (offsets < count + num_new)
        edited = tl.load(new, mask=is_new & is_edited, other=0)
        kept = tl.load(ref + position, mask=is_edited == 0, other=0)
        tokens = tl.where(is_new, tl.where(is_edited, edited, kept), tokens)
        count += num_new
        position += tl.where(is_edited, _of(edits, edit, OLD_LEN), 1)
        just_edited = is_edited.to(tl.int32)
    return tokens, tl.minimum(count, length)


@triton.jit
def _guess(position, num_written, last, ref, ref_len):
    """Where the reference may go on after a departure that was written so far: behind
    the next token equal to the last one, else behind as many; or its end."""
    near = tl.arange(0, _ANCHOR_WINDOW)
    is_inside = position + near < ref_len
    window = tl.load(ref + position + near, mask=is_inside, other=-1)
    anchor = tl.min(tl.where(window == last, near, _ANCHOR_WINDOW), 0)
    behind = tl.where(num_written <= _MAX_GUESSES, position + num_written, ref_len)
    return tl.where(anchor < _ANCHOR_WINDOW, position + anchor + 1, behind)


# ------------------------------------------------------------ edits


@triton.jit
def _of(edits, edit, field):
    """Of one edit; 0 of none."""
    is_field = tl.arange(0, EDIT_FIELDS)[:, None] == field
    is_it = is_field & (tl.arange(0, MAX_EDITS)[None, :] == edit)
    return tl.sum(tl.where(is_it, edits, 0))


@triton.jit
def _with(edits, edit, field, value):
    """The edits with another value of one, or of none."""
    is_field = tl.arange(0, EDIT_FIELDS)[:, None] == field
    is_it = is_field & (tl.arange(0, MAX_EDITS)[None, :] == edit)
    return tl.where(is_it, value, edits)


@triton.jit
def _remembered(edits, num_edits, key, old_start, old_len, new_start, new_len):
    """The edits with this one, in place of one with the same key or of the oldest; and
    how many were ever made."""
    known = _edit_with(edits, key)
    edit = tl.where(known >= 0, known, num_edits % MAX_EDITS)
    edits = _with(edits, edit, KEY, key)
    edits = _with(edits, edit, OLD_START, old_start)
    edits = _with(edits, edit, OLD_LEN, old_len)
    edits = _with(edits, edit, NEW_START, new_start)
    edits = _with(edits, edit, NEW_LEN, new_len)
    edits = _with(edits, edit, HELD, 1)
    return edits, num_edits + (known < 0).to(tl.int32)


@triton.jit
def _keys(position, ref, ref_len):
    """Of an edit there that puts tokens in, and of one that replaces some."""
    before = _token(ref, position - 1, ref_len)
    here = _token(ref, position, ref_len)
    return 2 * before + 2, 2 * here + 3


@triton.jit
def _edit_with(edits, key):
    """The edit with that key, or -1."""
    is_key = (tl.arange(0, EDIT_FIELDS)[:, None] == KEY) & (edits == key)
    return tl.max(tl.where(is_key, tl.arange(0, MAX_EDITS)[None, :], -1))


@triton.jit
def _edit_at(edits, position, just_edited, ref, ref_len):
    """The edit that may be made there, or -1."""
    insertion_key, replacement_key = _keys(position, ref, ref_len)
    insertion = _edit_with(edits, insertion_key)
    replacement = _edit_with(edits, replacement_key)
    num_old = _of(edits, replacement, OLD_LEN)
    old = ref + _of(edits, replacement, OLD_START)
    is_inside = position + num_old <= ref_len
    num_old = tl.where(is_inside, num_old, 0)
    may_replace = is_inside & _are_same(old, ref + position, num_old)
    replacement = tl.where(may_replace, replacement, -1)
    edit = tl.where((insertion >= 0) & (just_edited == 0), insertion, replacement)
    return tl.where(position < ref_len, edit, -1)


@triton.jit
def _if_begun(edits, edit, text, departure, num_written):
    """The edit, if what was written is its beginning, or -1."""
    may_be = num_written <= _of(edits, edit, NEW_LEN)
    num_written = tl.where(may_be, num_written, 0)
    new = text + _of(edits, edit, NEW_START)
    is_begun = may_be & _are_same(new, text + departure, num_written)
    return tl.where(is_begun, edit, -1)


@triton.jit
def _are_same(tokens, others, num_tokens):
    """So many tokens, at most `_LONGEST_EDIT`."""
    offsets = tl.arange(0, _LONGEST_EDIT)
    is_token = offsets < num_tokens
    token = tl.load(tokens + offsets, mask=is_token, other=0)
    other = tl.load(others + offsets, mask=is_token, other=0)
    return tl.max((token != other).to(tl.int32), 0) == 0


# ------------------------------------------------------------ searches


@triton.jit
def _found_again(ref, ref_len, position, text, text_len, CHECK_LENGTH, BLOCK_SIZE):
    """Where in the reference the text goes on after a departure at `position`, and how
    many tokens agree before there; none agree if it is not found."""
    rest = ref_len - position
    ahead, num_ahead = _longest_match(
        ref, position + 1, rest, text, text_len, 1, True, CHECK_LENGTH, BLOCK_SIZE
    )
    back, num_back = _longest_match(
        ref, position, position, text, text_len, -1, True, CHECK_LENGTH, BLOCK_SIZE
    )
    found = tl.where(back > ahead, position - num_back, position + 1 + num_ahead)
    return found, tl.maximum(ahead, back)


@triton.jit
def _longest_match(
    text, start, num_ends, other, other_len, DIRECTION, FAR, CHECK_LENGTH, BLOCK_SIZE
):
    """Of the places in `text` before which stands what ends `other`, from `start` on
    and the first candidates alone, that before which most agrees, the first of equals:
    how many tokens agree, 0 if there is none; and the steps to it from `start`.

    `FAR`: there are half as many candidates, and far ones must agree for longer."""
    most: tl.constexpr = _MAX_CANDIDATES // 2 if FAR else _MAX_CANDIDATES
    best = tl.full([], 0, tl.int64)  # tokens that agree << 32 | _LAST - steps
    num_found = 0
    first = 0
    # After one of the greatest length later ones can only be as long.
    while (first < num_ends) & (num_found < most) & ((best >> 32) < _MAX_MATCH):
        step = first + tl.arange(0, BLOCK_SIZE)
        end = start + DIRECTION * step
        agrees = (step < num_ends) & (end >= CHECK_LENGTH)
        agrees = agrees & (other_len >= CHECK_LENGTH)
        for j in tl.static_range(CHECK_LENGTH):
            here = tl.load(text + end - 1 - j, mask=agrees, other=-2)
            agrees = agrees & (here == _token(other, other_len - 1 - j, other_len))
        number = num_found + tl.cumsum(agrees.to(tl.int32), 0)
        num_found += tl.sum(agrees.to(tl.int32), 0)
        agrees = agrees & (number <= most)
        if tl.max(agrees.to(tl.int32), 0) > 0:
            agreed = _agreed(text, end, other, other_len, agrees, CHECK_LENGTH)
            if FAR:
                is_near = (step < _NEAR) & (DIRECTION > 0)
                agreed = tl.where(is_near | (agreed >= _FAR_MATCH), agreed, 0)
            score = (agreed.to(tl.int64) << 32) | (-step + _LAST).to(tl.int64)
            score = tl.where(agreed > 0, score, 0)
            best = tl.maximum(best, tl.max(score, 0))
        first += BLOCK_SIZE
    return (best >> 32).to(tl.int32), (-(best & _LAST) + _LAST).to(tl.int32)


@triton.jit
def _agreed(text, end, other, other_len, agrees, CHECK_LENGTH):
    """Tokens that agree before each `end`, at most `_MAX_MATCH`; 0 but where those that
    were checked do. [BLOCK_SIZE] int32"""
    depth = min(CHECK_LENGTH, _MAX_MATCH)
    agreed = tl.where(agrees, depth, 0)
    while (depth < _MAX_MATCH) & (tl.max(agrees.to(tl.int32), 0) > 0):
        agrees = agrees & (depth < end) & (depth < other_len)
        here = tl.load(text + end - 1 - depth, mask=agrees, other=-2)
        agrees = agrees & (here == _token(other, other_len - 1 - depth, other_len))
        agreed += agrees.to(tl.int32)
        depth += 1
    return agreed


@triton.jit
def _token(text, place, text_len):
    """-1 outside."""
    is_inside = (place >= 0) & (place < text_len)
    return tl.load(text + place, mask=is_inside, other=-1)


# ------------------------------------------------------------ what copies are worth


@triton.jit
def _bit_length(number):
    return tl.sum(((number >> tl.arange(0, 32)) > 0).to(tl.int32), 0)


@triton.jit
def _gain(acceptance, num_copied, K: tl.constexpr):
    """Tokens expected to be accepted."""
    gain = acceptance * 0
    power = gain + 1
    for j in range(K):
        power *= acceptance
        gain += tl.where(j < num_copied, power, 0.0)
    return gain


@triton.jit
def _acceptance(kind, match_len, records):
    """By the length of the match, and as it was seen."""
    guess = match_len.to(tl.float64) / (match_len + 1).to(tl.float64)
    accepted = tl.load(records + 2 * kind)
    tested = tl.load(records + 2 * kind + 1)
    return (accepted + guess * _PRIOR_TESTS) / (tested + _PRIOR_TESTS)
