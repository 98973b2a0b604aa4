"""Kernels that find what to copy, in the texts and references on the device.

They do what `proposers/llma.py`, `ngram_index.py` and `reference.py` do, token for
token, and say how where a program of a device has to do it otherwise. Those explain
why. A request's state is a row of integers, `STATE`, and the edits it made, `EDITS`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from vllm.triton_utils import tl, triton

from vllm_emssd.proposers import llma, ngram_index, reference

# Of a request, int32. Lengths are in tokens, places are of the request's text, but
# `position`, which is of the reference.
STATE = (
    "most_drafts",
    "end",  # the length at which the request ends
    "num_followed",
    "reference_len",  # 0: there is none
    "is_prompt",  # that is the reference
    "position",
    "departure",  # where it begins; -1: the answer follows the reference
    "just_edited",
    "run",
    "num_edits",
    "num_copied",  # not yet verified, and of which kind, from where, known when
    "kind",
    "source",
    "match_len",
    "copied_at",
)
STATE_SIZE = len(STATE)
# Of each edit: a key, of an insertion 2 t + 2, t the token before or -1, of a
# replacement 2 t + 3, t the first token replaced; where in the reference the old tokens
# begin and how many; where in the text the new ones begin, how many; whether it held.
EDIT_FIELDS = 6
NUM_EDITS = 64  # the oldest are forgotten
NO_KEY = -1
NUM_KINDS = 32  # by the bit length of the match: first those of the own text, then
FIRST_OF_REFERENCE = 8

(
    _MOST,
    _END,
    _FOLLOWED,
    _REFERENCE_LEN,
    _IS_PROMPT,
    _POSITION,
    _DEPARTURE,
    _JUST_EDITED,
    _RUN,
    _NUM_EDITS,
    _NUM_COPIED,
    _KIND,
    _SOURCE,
    _MATCH_LEN,
    _COPIED_AT,
) = map(tl.constexpr, range(STATE_SIZE))
_STATE_SIZE = tl.constexpr(STATE_SIZE)
_KINDS = tl.constexpr(NUM_KINDS)
_FIRST_OF_REFERENCE = tl.constexpr(FIRST_OF_REFERENCE)
_EDITS = tl.constexpr(NUM_EDITS)
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
_POOL_FORGET = tl.constexpr(llma._POOL_FORGET)
_IDLE_FORGET = tl.constexpr(llma._IDLE_FORGET)
_WORTHLESS = tl.constexpr(llma._WORTHLESS)
_HEAD_START = tl.constexpr(llma._REFERENCE_HEAD_START)
_PROMPT_STRETCH = tl.constexpr(llma._PROMPT_STRETCH)
_LAST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_reqs"])
def observe_copies_kernel(
    idx_mapping,  # [num_reqs] int64: request states
    num_sampled,  # [num_reqs] int32
    first_rows,  # [num_reqs + 1] int32: verified, drafts and one more of each request
    state,  # [max_num_reqs, STATE_SIZE] int32
    records,  # [max_num_reqs, NUM_KINDS, 2] float64: accepted, tested
    pools,  # [NUM_KINDS, 2] float64
    num_idle,  # [NUM_KINDS] int32: copies not worth it, by a pool
    num_reqs,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """A program a kind: how its copies fared, of each request and of all."""
    kind = tl.program_id(0)
    accepted = tl.load(pools + 2 * kind)
    tested = tl.load(pools + 2 * kind + 1)
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
        row = state + req * _STATE_SIZE
        num_copied = tl.load(row + _NUM_COPIED, mask=is_req, other=0)
        drafts = tl.load(first_rows + i + 1, mask=is_req, other=0) - 1
        drafts = drafts - tl.load(first_rows + i, mask=is_req, other=0)
        drafts = tl.minimum(drafts, num_copied)
        is_tested = (tl.load(row + _KIND, mask=is_req, other=-1) == kind) & (drafts > 0)
        kept = tl.minimum(tl.load(num_sampled + i, mask=is_req, other=1) - 1, drafts)
        seen = tl.minimum(kept + 1, drafts)
        record = records + (req * _KINDS + kind) * 2
        before = tl.load(record, mask=is_tested, other=0.0)
        tl.store(record, before * _FORGET + kept, mask=is_tested)
        before = tl.load(record + 1, mask=is_tested, other=0.0)
        tl.store(record + 1, before * _FORGET + seen, mask=is_tested)
        num_tested += tl.sum(is_tested.to(tl.int32), 0)
        new_accepted += tl.sum(tl.where(is_tested, kept, 0), 0)
        new_tested += tl.sum(tl.where(is_tested, seen, 0), 0)
    if num_tested > 0:
        accepted = accepted * _POOL_FORGET + new_accepted
        tested = tested * _POOL_FORGET + new_tested
    tl.store(pools + 2 * kind, accepted)
    tl.store(pools + 2 * kind + 1, tested)


@triton.jit(do_not_specialize=["text_address"])
def find_copies_kernel(
    idx_mapping,  # [num_reqs] int64: request states
    num_sampled,  # [num_reqs] int32, 0 where nothing was
    first_rows,  # [num_reqs + 1] int32: verified, drafts and one more of each request
    total_len,  # [max_num_reqs] int32
    prompt_len,  # [max_num_reqs] int32
    token_ids,  # [max_num_reqs, max_model_len] int32
    token_ids_stride,
    text_address,  # of `token_ids`
    reference_addresses,  # [max_num_reqs] int64
    state,  # [max_num_reqs, STATE_SIZE] int32
    edits,  # [max_num_reqs, EDIT_FIELDS, NUM_EDITS] int32
    records,
    pools,
    num_idle,
    drafts,  # [num_reqs, K] int64
    out_found,  # [num_reqs, 2] float64: tokens copied, how many are to be accepted
    max_model_len,
    K: tl.constexpr,  # noqa: N803
    K_PADDED: tl.constexpr,  # noqa: N803  a power of two
    CHECK_LENGTH: tl.constexpr,  # noqa: N803
    TAIL_LENGTH: tl.constexpr,  # noqa: N803  of a long departure, kept
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """A program a request: what it may copy next. Drafts not made are its last token
    again."""
    i = tl.program_id(0)
    req = tl.load(idx_mapping + i)
    row = state + req * _STATE_SIZE
    text = token_ids + req * token_ids_stride
    text_len = tl.load(total_len + req)
    length = tl.minimum(tl.load(row + _MOST), max_model_len - text_len - 1)
    sampled = tl.load(num_sampled + i)
    is_over = (sampled == 0) | (text_len >= tl.load(row + _END))
    length = tl.where(is_over, 0, tl.maximum(length, 0))

    reference_len = tl.load(row + _REFERENCE_LEN)
    is_prompt = tl.load(row + _IS_PROMPT)
    position = tl.load(row + _POSITION)
    departure = tl.load(row + _DEPARTURE)
    just_edited = tl.load(row + _JUST_EDITED)
    run = tl.load(row + _RUN)
    followed = tl.load(row + _FOLLOWED)
    num_edits = tl.load(row + _NUM_EDITS)

    # Once a stretch of the prompt was repeated, it is the reference.
    verified = tl.load(first_rows + i + 1) - tl.load(first_rows + i) - 1
    verified = tl.minimum(verified, tl.load(row + _NUM_COPIED))
    accepted = tl.minimum(sampled - 1, verified)
    prompt = tl.load(prompt_len + req)
    source_end = tl.load(row + _SOURCE) + accepted
    repeated = tl.load(row + _MATCH_LEN) + accepted
    if (
        (verified > 0)
        & (reference_len == 0)
        & (repeated >= _PROMPT_STRETCH)
        & (source_end <= prompt)
    ):
        reference_len = prompt
        is_prompt = 1
        position = source_end
        run = repeated
        followed = tl.load(row + _COPIED_AT) + accepted

    address = tl.where(
        is_prompt > 0,
        text_address + req * token_ids_stride * 4,
        tl.load(reference_addresses + req),
    )
    ref = address.to(tl.pointer_type(tl.int32))
    lanes = tl.arange(0, _EDITS)
    edit = edits + req * (6 * _EDITS) + lanes
    keys = tl.load(edit)
    old_start = tl.load(edit + _EDITS)
    old_len = tl.load(edit + 2 * _EDITS)
    new_start = tl.load(edit + 3 * _EDITS)
    new_len = tl.load(edit + 4 * _EDITS)
    held = tl.load(edit + 5 * _EDITS)

    end = tl.where((reference_len > 0) & (length > 0), text_len, followed)
    for at in range(followed, end):
        if departure < 0:
            token = tl.load(text + at)
            lane = _edit_at(
                position, just_edited, ref, reference_len, keys, old_start, old_len
            )
            num_old = _of(lane, old_len)
            is_at = _token(ref, position, reference_len) == token
            is_left_out = (
                (is_at == 0)
                & (lane >= 0)
                & (_of(lane, new_len) == 0)
                & (_token(ref, position + num_old, reference_len) == token)
            )
            held = tl.where((lanes == lane) & is_at, 0, held)
            held = tl.where((lanes == lane) & is_left_out, 1, held)
            follows = is_at | is_left_out
            position += tl.where(follows, 1 + tl.where(is_left_out, num_old, 0), 0)
            run += tl.where(follows, 1, 0)
            just_edited = tl.where(follows, 0, just_edited)
            departure = tl.where(follows, -1, at)
        if departure >= 0:
            num_written = at + 1 - departure
            lane = _edit_at(
                position, just_edited, ref, reference_len, keys, old_start, old_len
            )
            lane = _if_begun(lane, text, departure, num_written, new_start, new_len)
            if lane >= 0:
                if _of(lane, new_len) == num_written:
                    held = tl.where(lanes == lane, 1, held)
                    position += _of(lane, old_len)
                    just_edited = 1
                    departure = -1
            elif num_written >= CHECK_LENGTH:
                found, agreed = _found_again(
                    ref, reference_len, position, text, at + 1, CHECK_LENGTH, BLOCK_SIZE
                )
                if agreed > 0:
                    common = tl.minimum(agreed, num_written)
                    common = tl.minimum(common, found - position)
                    num_old = found - common - position
                    num_new = num_written - common
                    if (common > 0) & (tl.maximum(num_old, num_new) <= _LONGEST_EDIT):
                        # Where nothing was replaced, what stands before.
                        first = tl.where(num_old > 0, position, position - 1)
                        first_token = _token(ref, first, reference_len)
                        key = 2 * first_token + tl.where(num_old > 0, 3, 2)
                        known = tl.max(tl.where(keys == key, lanes, -1), 0)
                        lane = tl.where(known >= 0, known, num_edits % _EDITS)
                        num_edits += tl.where(known >= 0, 0, 1)
                        keys = tl.where(lanes == lane, key, keys)
                        old_start = tl.where(lanes == lane, position, old_start)
                        old_len = tl.where(lanes == lane, num_old, old_len)
                        new_start = tl.where(lanes == lane, departure, new_start)
                        new_len = tl.where(lanes == lane, num_new, new_len)
                        held = tl.where(lanes == lane, 1, held)
                    position = found
                    run = agreed
                    just_edited = 0
                    departure = -1
                elif num_written >= _LONGEST_DEPARTURE:
                    departure = at + 1 - TAIL_LENGTH
    followed = end

    tokens, count = _along_reference(
        text,
        text_len,
        ref,
        reference_len,
        position,
        departure,
        just_edited,
        keys,
        old_start,
        old_len,
        new_start,
        new_len,
        held,
        length,
        K_PADDED,
    )
    offsets = tl.arange(0, K_PADDED)

    # The longest match in the own text.
    best = _longest_match(
        text,
        text_len - 1,
        tl.where(length > 0, text_len - CHECK_LENGTH, 0),
        text,
        text_len,
        _MAX_CANDIDATES,
        CHECK_LENGTH,
        -1,
        False,
        BLOCK_SIZE,
    )
    match_len = (best >> 32).to(tl.int32)
    source = text_len - 1 - (-(best & _LAST) + _LAST).to(tl.int32)
    num_own = tl.where(match_len > 0, length, 0)

    record = records + req * (_KINDS * 2)
    own_kind = tl.minimum(_bit_length(match_len), _KINDS - 1)
    own = _acceptance(own_kind, match_len, pools, record)
    ref_kind = tl.minimum(_bit_length(run) + _FIRST_OF_REFERENCE, _KINDS - 1)
    by_ref = _acceptance(ref_kind, run + _HEAD_START, pools, record)
    own_gain = _gain(own, num_own, K)
    ref_gain = _gain(by_ref, count, K)
    is_own = own_gain > ref_gain
    kind = tl.where(is_own, own_kind, ref_kind)
    num_copied = tl.where(is_own, num_own, count)
    tl.debug_barrier()  # all have read the record before one changes it
    is_worthless = (num_copied > 0) & (tl.where(is_own, own, by_ref) < _WORTHLESS)
    if is_worthless:
        num_copied = 0
        tested = tl.load(record + 2 * kind + 1)
        if tested > 0:
            faded = tl.load(record + 2 * kind) * _IDLE_FORGET
            tl.store(record + 2 * kind, faded)
            tl.store(record + 2 * kind + 1, tested * _IDLE_FORGET)
        else:
            tl.atomic_add(num_idle + kind, 1)

    # A copy that reaches the end goes on with what it just copied.
    period = tl.maximum(text_len - source, 1)
    own_tokens = tl.load(
        text + source + offsets % period, mask=is_own & (offsets < K), other=0
    )
    last = tl.maximum(_token(text, text_len - 1, text_len), 0)
    copied = tl.where(is_own, own_tokens, tokens)
    copied = tl.where(offsets < num_copied, copied, last)
    tl.store(drafts + i * K + offsets, copied.to(tl.int64), mask=offsets < K)
    gain = tl.where(is_own, own_gain, ref_gain)
    tl.store(out_found + 2 * i, num_copied.to(tl.float64))
    tl.store(out_found + 2 * i + 1, tl.where(num_copied > 0, gain, 0.0))

    tl.store(row + _FOLLOWED, followed)
    tl.store(row + _REFERENCE_LEN, reference_len)
    tl.store(row + _IS_PROMPT, is_prompt)
    tl.store(row + _POSITION, position)
    tl.store(row + _DEPARTURE, departure)
    tl.store(row + _JUST_EDITED, just_edited)
    tl.store(row + _RUN, run)
    tl.store(row + _NUM_EDITS, num_edits)
    tl.store(row + _NUM_COPIED, num_copied)
    tl.store(row + _KIND, kind)
    tl.store(row + _SOURCE, source)
    tl.store(row + _MATCH_LEN, tl.where(is_own, match_len, 0))
    tl.store(row + _COPIED_AT, text_len)
    tl.store(edit, keys)
    tl.store(edit + _EDITS, old_start)
    tl.store(edit + 2 * _EDITS, old_len)
    tl.store(edit + 3 * _EDITS, new_start)
    tl.store(edit + 4 * _EDITS, new_len)
    tl.store(edit + 5 * _EDITS, held)


@triton.jit
def _along_reference(
    text,
    text_len,
    ref,
    reference_len,
    position,
    departure,
    just_edited,
    keys,
    old_start,
    old_len,
    new_start,
    new_len,
    held,
    length,
    K_PADDED: tl.constexpr,  # noqa: N803
):
    """What follows in the reference, with the edits made so far: tokens [K_PADDED], and
    how many of them are meant, at most `length`."""
    offsets = tl.arange(0, K_PADDED)
    tokens = tl.zeros([K_PADDED], dtype=tl.int32)
    count = 0
    walk = position
    walk_edited = just_edited
    may_walk = (reference_len > 0) & (length > 0)
    if may_walk & (departure >= 0):
        num_written = text_len - departure
        lane = _edit_at(
            position, just_edited, ref, reference_len, keys, old_start, old_len
        )
        lane = _if_begun(lane, text, departure, num_written, new_start, new_len)
        walk_edited = 1
        if lane >= 0:
            count = _of(lane, new_len) - num_written
            rest = text + _of(lane, new_start) + num_written
            tokens = tl.load(rest + offsets, mask=offsets < count, other=0)
            walk = position + _of(lane, old_len)
        else:
            near = tl.arange(0, _ANCHOR_WINDOW)
            window = tl.load(
                ref + position + near, mask=position + near < reference_len, other=-1
            )
            last = tl.load(text + text_len - 1)
            anchor = tl.min(tl.where(window == last, near, _ANCHOR_WINDOW), 0)
            is_guess = (anchor < _ANCHOR_WINDOW) | (num_written <= _MAX_GUESSES)
            walk = position + tl.where(anchor < _ANCHOR_WINDOW, anchor + 1, num_written)
            walk = tl.where(is_guess, walk, reference_len)
    while may_walk & (count < length) & (walk < reference_len):
        lane = _edit_at(walk, walk_edited, ref, reference_len, keys, old_start, old_len)
        is_edited = (lane >= 0) & (_of(lane, held) > 0)
        num_new = tl.where(is_edited, _of(lane, new_len), 1)
        from_text = text + _of(lane, new_start)
        there = offsets - count
        is_new = (there >= 0) & (there < num_new)
        edited = tl.load(from_text + there, mask=is_new & is_edited, other=0)
        kept = tl.load(ref + walk, mask=is_edited == 0, other=0)
        tokens = tl.where(is_new, tl.where(is_edited, edited, kept), tokens)
        count += num_new
        walk += tl.where(is_edited, _of(lane, old_len), 1)
        walk_edited = is_edited.to(tl.int32)
    return tokens, tl.minimum(count, length)


@triton.jit
def _found_again(
    ref,
    reference_len,
    position,
    text,
    text_len,
    CHECK_LENGTH: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Where in the reference the text goes on after a departure at `position`, and how
    many tokens agree before there; none agree if it is not found."""
    behind = _longest_match(
        ref,
        position + 1,
        reference_len - position,
        text,
        text_len,
        _MAX_CANDIDATES // 2,
        CHECK_LENGTH,
        1,
        True,
        BLOCK_SIZE,
    )
    before = _longest_match(
        ref,
        position,
        position,
        text,
        text_len,
        _MAX_CANDIDATES // 2,
        CHECK_LENGTH,
        -1,
        True,
        BLOCK_SIZE,
    )
    is_before = (before >> 32) > (behind >> 32)
    best = tl.where(is_before, before, behind)
    steps = (-(best & _LAST) + _LAST).to(tl.int32)
    found = tl.where(is_before, position - steps, position + 1 + steps)
    return found, (best >> 32).to(tl.int32)


@triton.jit
def _longest_match(
    text,
    first_end,
    num_ends,
    other,
    other_len,
    most_candidates,
    CHECK_LENGTH: tl.constexpr,  # noqa: N803
    DIRECTION: tl.constexpr,  # noqa: N803
    FROM_AFAR: tl.constexpr,  # noqa: N803  far ones must agree for longer
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Of the places in `text` before which stands what ends `other`, from `first_end`
    on and the first candidates alone, that before which most agrees, the first of
    equals: tokens that agree << 32 | _LAST - steps from `first_end`; 0: none."""
    least: tl.constexpr = CHECK_LENGTH if CHECK_LENGTH < _MAX_MATCH else _MAX_MATCH
    best = (first_end * 0).to(tl.int64)
    num_found = first_end * 0
    first = first_end * 0
    longest: tl.constexpr = _MAX_MATCH
    is_longest = first_end < first_end
    while (first < num_ends) & (num_found < most_candidates) & (is_longest == 0):
        step = first + tl.arange(0, BLOCK_SIZE)
        end = first_end + DIRECTION * step
        agrees = (step < num_ends) & (end >= CHECK_LENGTH)
        agrees = agrees & (other_len >= CHECK_LENGTH)
        for j in tl.static_range(CHECK_LENGTH):
            token = tl.load(other + other_len - 1 - j, mask=j < other_len, other=-2)
            here = tl.load(text + end - 1 - j, mask=agrees, other=-1)
            agrees = agrees & (here == token)
        number = num_found + tl.cumsum(agrees.to(tl.int32), 0)
        num_found += tl.sum(agrees.to(tl.int32), 0)
        agrees = agrees & (number <= most_candidates)
        if tl.max(agrees.to(tl.int32), 0) > 0:
            agreed = tl.where(agrees, least, 0)
            depth = num_found * 0 + least
            while (depth < _MAX_MATCH) & (tl.max(agrees.to(tl.int32), 0) > 0):
                agrees = agrees & (depth < end) & (depth < other_len)
                token = _token(other, other_len - 1 - depth, other_len)
                here = tl.load(text + end - 1 - depth, mask=agrees, other=-2)
                agrees = agrees & (here == token)
                agreed += agrees.to(tl.int32)
                depth += 1
            if FROM_AFAR:
                is_near = (step < _NEAR) & (DIRECTION > 0)
                agreed = tl.where(is_near | (agreed >= _FAR_MATCH), agreed, 0)
            score = (agreed.to(tl.int64) << 32) | (-step + _LAST).to(tl.int64)
            score = tl.where(agreed > 0, score, 0)
            best = tl.maximum(best, tl.max(score, 0))
            is_longest = (best >> 32) >= longest  # later ones can only be as long
        first += BLOCK_SIZE
    return best


@triton.jit
def _token(text, place, text_len):
    """-1 outside."""
    is_inside = (place >= 0) & (place < text_len)
    return tl.load(text + place, mask=is_inside, other=-1)


@triton.jit
def _of(lane, values):
    """Of an edit; 0 of none."""
    return tl.sum(tl.where(tl.arange(0, _EDITS) == lane, values, 0), 0)


@triton.jit
def _edit_at(position, just_edited, ref, reference_len, keys, old_start, old_len):
    """The edit that may be made there, or -1."""
    lanes = tl.arange(0, _EDITS)
    before = _token(ref, position - 1, reference_len)
    here = _token(ref, position, reference_len)
    insertion = tl.max(tl.where(keys == 2 * before + 2, lanes, -1), 0)
    replacement = tl.max(tl.where(keys == 2 * here + 3, lanes, -1), 0)
    offsets = tl.arange(0, _LONGEST_EDIT)
    is_old = offsets < _of(replacement, old_len)
    old = tl.load(ref + _of(replacement, old_start) + offsets, mask=is_old, other=-1)
    there = position + offsets
    new = tl.load(ref + there, mask=is_old & (there < reference_len), other=-2)
    differs = tl.max((is_old & (old != new)).to(tl.int32), 0)
    replacement = tl.where(differs > 0, -1, replacement)
    lane = tl.where((insertion >= 0) & (just_edited == 0), insertion, replacement)
    return tl.where(position < reference_len, lane, -1)


@triton.jit
def _if_begun(lane, text, departure, num_written, new_start, new_len):
    """The edit, if what was written is its beginning, or -1."""
    offsets = tl.arange(0, _LONGEST_EDIT)
    num_new = _of(lane, new_len)
    may_be = (lane >= 0) & (num_written <= num_new)
    is_written = may_be & (offsets < num_written)
    new = tl.load(text + _of(lane, new_start) + offsets, mask=is_written, other=-1)
    written = tl.load(text + departure + offsets, mask=is_written, other=-1)
    differs = tl.max((new != written).to(tl.int32), 0)
    return tl.where(may_be & (differs == 0), lane, -1)


@triton.jit
def _bit_length(number):
    return tl.sum(((number >> tl.arange(0, 32)) > 0).to(tl.int32), 0)


@triton.jit
def _gain(acceptance, num_copied, K: tl.constexpr):  # noqa: N803
    """Tokens expected to be accepted."""
    gain = acceptance * 0
    power = gain + 1
    for j in range(K):
        power *= acceptance
        gain += tl.where(j < num_copied, power, 0.0)
    return gain


@triton.jit
def _acceptance(kind, match_len, pools, record):
    """By the length of the match; then as it was seen, in all requests and in this."""
    guess = match_len.to(tl.float64) / (match_len + 1).to(tl.float64)
    return _share(record, kind, _share(pools, kind, guess))


@triton.jit
def _share(counts, kind, guess):
    """Accepted of those tested, and of some guessed; the guess where none were."""
    accepted = tl.load(counts + 2 * kind)
    tested = tl.load(counts + 2 * kind + 1)
    seen = (accepted + guess * _PRIOR_TESTS) / (tested + _PRIOR_TESTS)
    return tl.where(tested > 0, seen, guess)
