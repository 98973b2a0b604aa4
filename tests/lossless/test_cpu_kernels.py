"""vLLM's CPU stand-ins for its Triton kernels, against what the kernels promise.

Sampled and greedy speculation on the CPU runs on `vllm/utils/cpu_triton_utils.py`.
Each replacement is launched the way vLLM launches it and compared with a plain
reference written from the Triton kernel it replaces. Where stock is wrong, a strict
xfail documents it (it fails loudly once upstream mends it), and the plugin's own
answer is tested beside it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON or not current_platform.is_cpu():
    pytest.skip("only the CPU build replaces its kernels", allow_module_level=True)

from vllm.triton_utils import dispatcher
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode import utils as spec_decode
from vllm.v1.worker import block_table, mamba_utils

from vllm_emssd.integration import scheduler
from vllm_emssd.integration.cpu import fixes as cpu_fixes
from vllm_emssd.integration.hooks.hook import installed

UNTOUCHED = -9  # what a kernel must leave alone
PAD_SLOT_ID = -1
PLACEHOLDER = -1
RAGGED_COUNTS = [[3, 0, 1, 2, 0], [0, 0, 4], [1], [5], [0], [2, 2, 2]]
ragged = pytest.mark.parametrize("counts", RAGGED_COUNTS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _registered_kernels() -> None:
    """What the worker does at its start, once a process.

    The scan of all modules that registration makes trips over llvmlite's lazy
    attributes, so an earlier test's numba is put out of its sight.
    """
    current_platform.import_kernels()
    if "vllm.v1.sample.rejection_sampler.expand_kernel" in dispatcher._registry:
        return
    names = [name for name in sys.modules if name.split(".")[0] == "llvmlite"]
    hidden = {name: sys.modules.pop(name) for name in names}
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)


@pytest.fixture
def _cpu_fixes() -> Iterator[None]:
    with installed(cpu_fixes.CPU_FIXES):
        yield


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def int64(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int64)


def starts(lens: Sequence[int]) -> list[int]:
    """Row offsets of a ragged batch, [num_reqs + 1]."""
    return [0, *np.cumsum(lens).tolist()]


def cumulative(counts: Sequence[int]) -> torch.Tensor:
    return int32(np.cumsum(counts))  # [num_reqs], inclusive, as the runner makes it


# ----- expand_kernel: temperature, top_k and top_p of every drafted row -----

EXPAND_DTYPES = [torch.float32, torch.int32, torch.int64]
LOST_WRITES = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason=(
        "_expand_kernel_impl fills the int64 temporary of _ensure_int64(output), and "
        "truncates floats (vllm-project/vllm#55005); drop the expand hook of cpu_fixes"
    ),
)
Expand = Callable[..., torch.Tensor]


def check_expand(expand: Expand, counts: Sequence[int], dtype: torch.dtype) -> None:
    """`expand` repeats every value `counts` times and makes greedy's 0 a 1."""
    values = torch.tensor([0.8, 0.0, 0.05, 1.0, 7.9])[: len(counts)].to(dtype)
    expected = np.repeat(np.where(values.numpy() == 0, 1, values.numpy()), counts)
    expanded = expand(values, cumulative(counts), sum(counts), 0, 1)
    assert expanded.dtype == dtype
    np.testing.assert_array_equal(
        expanded.numpy(), expected.astype(values.numpy().dtype)
    )
    unreplaced = expand(values, cumulative(counts), sum(counts))
    np.testing.assert_array_equal(unreplaced.numpy(), np.repeat(values.numpy(), counts))


def expand_with(launch: Callable[..., None]) -> Expand:
    """A kernel launch as `expand_batch_to_tokens`, on memory of known content."""

    def expand(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        output = x.new_full((num_tokens,), UNTOUCHED)
        launch(output, x, cu_num_tokens, replace_from, replace_to)
        return output

    return expand


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=LOST_WRITES),  # temperature, top_p
        pytest.param(torch.int32, marks=LOST_WRITES),  # top_k
        torch.int64,
    ],
    ids=str,
)
def test_stock_expand(dtype: torch.dtype) -> None:
    check_expand(expand_with(rejection_sampler._expand), [3, 0, 1, 2, 0], dtype)


@ragged
@pytest.mark.parametrize("dtype", EXPAND_DTYPES, ids=str)
def test_our_expand(counts: list[int], dtype: torch.dtype) -> None:
    check_expand(cpu_fixes.expand_batch_to_tokens, counts, dtype)


@pytest.mark.usefixtures("_cpu_fixes")
def test_our_expand_is_what_sampling_calls() -> None:
    expand = rejection_sampler.expand_batch_to_tokens
    check_expand(expand, [3, 0, 1], torch.float32)


# ----- rejection kernels, one step at a time -----


def accept_prefix(
    counts: Sequence[int],
    accepted: np.ndarray,  # [num_tokens] bool
    tokens: np.ndarray,  # [num_tokens] emitted at each draft
    bonus: np.ndarray,  # [num_reqs]
    rows: Sequence[int],
) -> np.ndarray:
    """Emit each of `rows`' tokens up to its first rejection, else its bonus token."""
    output = np.full((len(counts), max(counts) + 1), UNTOUCHED)
    for row in rows:
        start = starts(counts)[row]
        for j in range(counts[row]):
            output[row, j] = tokens[start + j]
            if not accepted[start + j]:
                break
        else:
            output[row, counts[row]] = bonus[row]
    return output


def untouched_output(counts: Sequence[int]) -> torch.Tensor:
    shape = (len(counts), max(counts) + 1)
    return torch.full(shape, UNTOUCHED, dtype=torch.int32)


def is_greedy_mask(num_reqs: int) -> np.ndarray:
    return np.arange(num_reqs) % 2 == 0


@ragged
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bonus_dtype", [torch.int32, torch.int64], ids=str)
def test_greedy_rejection(
    counts: list[int], mixed: bool, bonus_dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(sum(counts))
    vocab_size, num_reqs = 3, len(counts)
    draft = rng.integers(-1, vocab_size, sum(counts))  # -1: a placeholder
    argmax = np.where(rng.random(sum(counts)) < 0.6, abs(draft), vocab_size - 1)
    bonus = rng.integers(0, vocab_size, num_reqs)
    greedy = is_greedy_mask(num_reqs) if mixed else np.ones(num_reqs, bool)
    output = untouched_output(counts)
    rejection_sampler._rejection_greedy_sample(
        output,
        cumulative(counts),
        int32(draft),
        int64(argmax),
        torch.tensor(bonus, dtype=bonus_dtype)[:, None],
        torch.tensor(greedy) if mixed else None,
        max(counts),
        None,
        None,
    )
    rows = np.flatnonzero(greedy)
    expected = accept_prefix(counts, draft == argmax, argmax, bonus, rows)
    np.testing.assert_array_equal(output.numpy(), expected)


def sparse_probs(
    rng: np.random.Generator, num_tokens: int, vocab_size: int
) -> np.ndarray:
    """[num_tokens, vocab_size] float32 with zeros, as after top-k."""
    weights = rng.random((num_tokens, vocab_size)) * rng.integers(
        0, 2, (num_tokens, vocab_size)
    )
    weights[:, -1] += 0.1  # never a row of nothing; the last token is always likely
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def launch_random_rejection(
    counts: Sequence[int],
    draft: Any,
    draft_probs: np.ndarray | None,
    target_probs: Any,
    bonus: torch.Tensor,
    recovered: Any,
    uniform: Any,
    is_greedy: np.ndarray,
) -> np.ndarray:
    output = untouched_output(counts)
    rejection_sampler._rejection_random_sample(
        output,
        cumulative(counts),
        int32(draft),
        None if draft_probs is None else torch.tensor(draft_probs),
        torch.as_tensor(target_probs),
        bonus[:, None],
        int32(recovered),
        torch.tensor(np.asarray(uniform, dtype=np.float64)),
        torch.tensor(is_greedy),
        max(counts),
        None,
    )
    return output.numpy()


@ragged
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bonus_dtype", [torch.int32, torch.int64], ids=str)
def test_random_rejection(
    counts: list[int], one_hot: bool, mixed: bool, bonus_dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(sum(counts))
    num_tokens, num_reqs, vocab_size = sum(counts), len(counts), 4
    target_probs = sparse_probs(rng, num_tokens, vocab_size)
    draft_probs = sparse_probs(rng, num_tokens, vocab_size)
    draft, recovered = rng.integers(0, vocab_size, (2, num_tokens))
    uniform = rng.random(num_tokens)
    bonus = rng.integers(0, vocab_size, num_reqs)
    greedy = is_greedy_mask(num_reqs) if mixed else np.zeros(num_reqs, bool)
    output = launch_random_rejection(
        counts,
        draft,
        None if one_hot else draft_probs,
        target_probs,
        torch.tensor(bonus, dtype=bonus_dtype),
        recovered,
        uniform,
        greedy,
    )
    at_draft = np.arange(num_tokens), draft
    q = np.ones(num_tokens) if one_hot else draft_probs[at_draft]
    accepted = (q > 0) & (target_probs[at_draft] >= uniform * q)
    tokens = np.where(accepted, draft, recovered)
    rows = np.flatnonzero(~greedy)
    expected = accept_prefix(counts, accepted, tokens, bonus, rows)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason=(
        "rejection_random_sample_kernel_impl looks a -1 up in the row before and can "
        "accept it (the Triton kernel: vllm-project/vllm#46533)"
    ),
)
@pytest.mark.parametrize("one_hot", [False, True])
def test_stock_random_rejection_rejects_a_placeholder(one_hot: bool) -> None:
    """The row before is certain of the vocabulary's last token, just before the -1."""
    certain = np.array([[0, 0, 1], [0.25, 0.5, 0.25]], np.float32)
    output = launch_random_rejection(
        [2],
        [2, PLACEHOLDER],
        None if one_hot else certain,
        certain,
        int32([0]),
        [0, 1],
        [0.5, 0.5],
        np.array([False]),
    )
    np.testing.assert_array_equal(output, [[2, 1, UNTOUCHED]])


def test_placeholders_are_not_scheduled() -> None:
    """Ours: a -1 reaches neither rows, nor counts, nor the kernel above."""
    output: Any = SimpleNamespace(
        scheduled_spec_decode_tokens={"a": [-1, -1], "b": [5], "c": []},
        num_scheduled_tokens={"a": 3, "b": 2, "c": 1},
        total_num_scheduled_tokens=6,
    )
    scheduler.drop_placeholder_drafts(output)
    assert output.scheduled_spec_decode_tokens == {"b": [5], "c": []}
    assert output.num_scheduled_tokens == {"a": 1, "b": 2, "c": 1}
    assert output.total_num_scheduled_tokens == 4


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason=(
        "accepts a draft of probability 0 when the uniform sample is exactly 0, which "
        "float64 makes a matter of 2**-53 a token: not worth a replacement"
    ),
)
def test_stock_random_rejection_rejects_an_impossible_draft() -> None:
    probs = np.array([[1, 0]], np.float32)
    greedy = np.array([False])
    output = launch_random_rejection(
        [1], [1], probs, probs, int32([1]), [0], [0.0], greedy
    )
    np.testing.assert_array_equal(output, [[0, UNTOUCHED]])


def test_draft_probs_of_another_dtype_are_refused() -> None:
    """Loudly, not misread: the kernels read float32 only."""
    output = untouched_output([1])
    probs = torch.full((1, 2), 0.5)
    with pytest.raises(RuntimeError, match="Float"):
        rejection_sampler._rejection_random_sample(
            output,
            cumulative([1]),
            int32([0]),
            probs.bfloat16(),
            probs,
            int32([[0]]),
            int32([0]),
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([False]),
            1,
            None,
        )


@ragged
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float64], ids=str)
def test_recovered_tokens(
    counts: list[int], one_hot: bool, noise_dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(sum(counts))
    num_tokens, num_reqs, vocab_size = sum(counts), len(counts), 7
    target_probs = sparse_probs(rng, num_tokens, vocab_size)
    draft_probs = sparse_probs(rng, num_tokens, vocab_size)
    draft = rng.integers(-1, vocab_size, num_tokens)  # -1: rejected, any token recovers
    noise = 1 / rng.exponential(size=(num_reqs, vocab_size))
    output = torch.full((num_tokens,), UNTOUCHED, dtype=torch.int32)
    rejection_sampler._sample_recovered_tokens(
        output,
        cumulative(counts),
        int32(draft),
        None if one_hot else torch.tensor(draft_probs),
        torch.tensor(target_probs),
        torch.tensor(noise, dtype=noise_dtype),
        max_spec_len=max(counts),
    )
    residual = np.maximum(target_probs - draft_probs, 0)
    if one_hot:
        residual = target_probs * (np.arange(vocab_size) != draft[:, None])
    scores = residual * np.repeat(noise, counts, axis=0).astype(np.float32)
    np.testing.assert_array_equal(output.numpy(), scores.argmax(1))


@pytest.mark.parametrize(
    ("target", "recovered"),
    [([0, 0, 1], 2), ([0.5, 0.25, 0.25], 0)],
    ids=["last-token", "no-residual"],
)
def test_recovered_token_stays_in_the_vocabulary(
    target: list[float], recovered: int
) -> None:
    output = torch.full((1,), UNTOUCHED, dtype=torch.int32)
    rejection_sampler._sample_recovered_tokens(
        output,
        cumulative([1]),
        int32([0]),
        torch.tensor([[0.5, 0.25, 0.25]]),
        torch.tensor([target], dtype=torch.float32),
        torch.ones(1, 3),
        max_spec_len=1,
    )
    assert output.tolist() == [recovered]


# ----- rejection_sample end to end: the law of what comes out -----

NUM_SAMPLES = 100_000  # a request group
FALSE_ALARM = 1e-9  # a comparison; with about 20 of them, 2e-8 a run
BONUS = 5  # marks "all drafts accepted"; the sampler proper draws bonus tokens
TARGET_LOGITS = np.array([[1.5, 0.2, -1.0, 0.9, -0.3], [-0.7, 1.1, 0.4, -2.0, 1.6]])
DRAFT_PROBS = np.array([[8, 1, 2, 3, 2], [2, 4, 8, 1, 1]], np.float32) / 16


@dataclass(frozen=True)
class Request:
    """What many alike requests of a batch ask for."""

    temperature: float
    top_k: int = TARGET_LOGITS.shape[1]
    top_p: float = 1.0
    num_drafts: int = 2


UNCONSTRAINED = [Request(0.3), Request(0.8), Request(1.0), Request(1.7, num_drafts=1)]
CONSTRAINED = [
    Request(0.0),
    Request(0.8, top_k=2),
    Request(1.3, top_p=0.7),
    Request(1.0, top_k=4, top_p=0.8, num_drafts=1),
    Request(0.6, num_drafts=0),
]


def target_law(logits: np.ndarray, request: Request) -> np.ndarray:
    """Temperature, then top-k, then top-p, from their definitions."""
    if request.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    order = np.argsort(-logits)
    weights = np.exp(logits[order] / request.temperature)
    weights[request.top_k :] = 0
    probs = weights / weights.sum()
    probs[np.cumsum(probs) - probs >= request.top_p] = 0
    law = np.zeros(len(logits))
    law[order] = probs / probs.sum()
    return law


def output_law(request: Request, one_hot: bool) -> dict[tuple[int, ...], float]:
    """Exact probability of every output row: its rejection ends it, else `BONUS`."""
    law: Counter[tuple[int, ...]] = Counter()
    alive = {(): 1.0}  # all drafts accepted so far
    for pos in range(request.num_drafts):
        target, draft = target_law(TARGET_LOGITS[pos], request), DRAFT_PROBS[pos]
        certain = one_hot or request.temperature == 0
        accepted = target * draft if certain else np.minimum(target, draft)
        grown = {}
        for prefix, prob in alive.items():
            for token in range(len(target)):
                law[(*prefix, token)] += prob * (target - accepted)[token]
                grown[(*prefix, token)] = prob * accepted[token]
        alive = grown
    for prefix, prob in alive.items():
        law[(*prefix, BONUS)] += prob
    return law


def sampling_metadata(
    requests: Sequence[Request], generators: dict[int, torch.Generator] | None = None
) -> SamplingMetadata:
    """What the runner's input batch would build for these requests."""
    temperature = torch.tensor([r.temperature for r in requests])
    top_k, top_p = int32([r.top_k for r in requests]), [r.top_p for r in requests]
    constrained = any(p < 1 for p in top_p) or any(top_k < TARGET_LOGITS.shape[1])
    penalties = torch.empty(0)
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()),
        top_p=torch.tensor(top_p) if constrained else None,
        top_k=top_k if constrained else None,
        generators=generators or {},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=penalties,
        presence_penalties=penalties,
        repetition_penalties=penalties,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def speculate(
    requests: Sequence[Request],
    one_hot: bool,
    draft: torch.Tensor | None = None,
    generators: dict[int, torch.Generator] | None = None,
) -> np.ndarray:
    """Output rows of one verification step; drafts come from `DRAFT_PROBS`."""
    counts = [request.num_drafts for request in requests]
    positions = np.concatenate([np.arange(count) for count in counts])
    draft_probs = torch.tensor(DRAFT_PROBS[positions])
    if draft is None:
        draft = torch.multinomial(draft_probs, 1)[:, 0].int()
    metadata = sampling_metadata(requests, generators)
    logits = torch.tensor(TARGET_LOGITS[positions], dtype=torch.float32)
    return rejection_sampler.rejection_sample(
        draft,
        counts,
        max(counts),
        cumulative(counts),
        None if one_hot else draft_probs,
        rejection_sampler.apply_sampling_constraints(
            logits, cumulative(counts), metadata
        ),
        torch.full((len(counts), 1), BONUS, dtype=torch.int32),
        metadata,
    ).numpy()


def total_variation(rows: np.ndarray, law: dict[tuple[int, ...], float]) -> float:
    """Distance of the rows' empirical law from `law`; 1 if a row is impossible."""
    outputs, counts = np.unique(rows, axis=0, return_counts=True)
    observed = {
        tuple(output[output != PLACEHOLDER].tolist()): count / len(rows)
        for output, count in zip(outputs, counts, strict=True)
    }
    if any(law.get(output, 0) == 0 for output in observed):
        return 1.0
    return sum(abs(observed.get(output, 0) - p) for output, p in law.items()) / 2


def largest_likely_variation(num_outputs: int) -> float:
    """Exceeded by a right sampler with probability below `FALSE_ALARM`.

    Weissman et al. 2003: P(2 TV >= eps) <= 2**num_outputs * exp(-n eps**2 / 2).
    """
    exponent = num_outputs * np.log(2) - np.log(FALSE_ALARM)
    return float(np.sqrt(exponent / (2 * NUM_SAMPLES)))


@pytest.mark.usefixtures("_cpu_fixes")
@pytest.mark.parametrize("one_hot", [False, True], ids=["draft-probs", "one-hot"])
@pytest.mark.parametrize(
    "requests", [UNCONSTRAINED, CONSTRAINED], ids=["temperatures", "mixed"]
)
def test_output_has_the_target_law(requests: list[Request], one_hot: bool) -> None:
    torch.manual_seed(0)
    rows = speculate(requests * NUM_SAMPLES, one_hot)
    for i, request in enumerate(requests):
        law = output_law(request, one_hot)
        num_outputs = sum(p > 0 for p in law.values())
        variation = total_variation(rows[i :: len(requests)], law)
        assert variation < largest_likely_variation(num_outputs), request


@pytest.mark.usefixtures("_cpu_fixes")
@pytest.mark.parametrize("one_hot", [False, True], ids=["draft-probs", "one-hot"])
def test_first_token_has_the_target_law(one_hot: bool) -> None:
    """Accepted or recovered: the marginal that a user sees, with a tighter bound."""
    torch.manual_seed(1)
    request = Request(0.8)
    first = speculate([request] * NUM_SAMPLES, one_hot)[:, :1]
    law = {(i,): p for i, p in enumerate(target_law(TARGET_LOGITS[0], request))}
    assert total_variation(first, law) < largest_likely_variation(len(law))


@pytest.mark.usefixtures("_cpu_fixes")
def test_the_law_test_notices_a_wrong_temperature() -> None:
    torch.manual_seed(2)
    rows = speculate([Request(0.9)] * NUM_SAMPLES, one_hot=False)
    law = output_law(Request(0.8), one_hot=False)
    assert total_variation(rows, law) > largest_likely_variation(len(law))


@pytest.mark.usefixtures("_cpu_fixes")
@pytest.mark.parametrize("one_hot", [False, True], ids=["draft-probs", "one-hot"])
def test_seeded_request_does_not_depend_on_its_batch(one_hot: bool) -> None:
    request, draft = Request(1.0), int32([0, 2])
    for seed in range(50):
        alone = {0: torch.Generator().manual_seed(seed)}
        third = {2: torch.Generator().manual_seed(seed)}
        batch = [Request(0.5), Request(0.0, num_drafts=1), request]
        batch_draft = torch.cat([int32([1, 1, 0]), draft])
        np.testing.assert_array_equal(
            speculate([request], one_hot, draft, alone)[0],
            speculate(batch, one_hot, batch_draft, third)[2],
        )


# ----- kernels that prepare a drafter's inputs -----


@ragged
def test_prepare_inputs_padded(counts: list[int]) -> None:
    rng = np.random.default_rng(sum(counts))
    num_reqs = len(counts)
    valid = np.array([rng.integers(0, count + 2) for count in counts])
    query_start_loc = starts([count + 1 for count in counts])
    indices, rejected = (int32([UNTOUCHED] * num_reqs) for _ in range(2))
    spec_decode._eagle_prepare_inputs_padded(
        cumulative(counts),
        int32(valid),
        int32(query_start_loc),
        indices,
        rejected,
        num_reqs,
    )
    expected = np.where(np.array(counts) > 0, np.array(counts) + 1 - valid, 0)
    np.testing.assert_array_equal(rejected.numpy(), expected)
    last = np.array(query_start_loc[1:]) - 1
    np.testing.assert_array_equal(indices.numpy(), last - expected)


@pytest.mark.parametrize("num_reqs", [1, 6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_prepare_next_token_padded(
    num_reqs: int, dtype: torch.dtype, strided: bool
) -> None:
    rng = np.random.default_rng(num_reqs)
    vocab_size, width = 4, 3
    sampled = rng.integers(-1, vocab_size + 2, (num_reqs, width + 2))  # ids too large
    sampled[:, 0] = [PLACEHOLDER, *[vocab_size - 1] * (num_reqs - 1)]
    sampled[0] = PLACEHOLDER  # nothing valid: falls back
    discarded = np.arange(num_reqs) == 2
    backup = rng.integers(0, vocab_size, num_reqs + 3)  # a buffer of the largest batch
    view = torch.tensor(sampled, dtype=dtype)[:, :width]
    next_ids, valid = (int32([UNTOUCHED] * num_reqs) for _ in range(2))
    spec_decode._eagle_prepare_next_token_padded(
        view if strided else view.contiguous(),
        torch.tensor(discarded),
        int32(backup),
        next_ids,
        valid,
        vocab_size,
        width,
        num_reqs,
        view.stride(0) if strided else width,
        BLOCK_SIZE_TOKENS=4,
    )
    for i, row in enumerate(sampled[:, :width]):
        kept = [] if discarded[i] else [t for t in row if t != -1 and t < vocab_size]
        assert int(valid[i]) == len(kept)
        assert int(next_ids[i]) == (kept[-1] if kept else backup[i])


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("num_padding", [0, 2])
def test_step_slot_mapping(batch_size: int, num_padding: int) -> None:
    rng = np.random.default_rng(batch_size)
    block_size, max_model_len, n_blocks = 4, 14, 3  # one block short: clamped
    positions = np.array([13, 0, 3, 12, 11])[:batch_size]  # 13 + 1 is too long
    # A slice of a wider table, and slots beyond int32.
    table = rng.integers(2**29, 2**30, (batch_size, n_blocks + 2)).astype(np.int32)
    seq_lens = positions + 1
    lens, positions_out = int32(seq_lens), int64([UNTOUCHED] * batch_size)
    slots = int64([UNTOUCHED] * (batch_size + num_padding))
    spec_decode.eagle_step_update_slot_mapping_and_metadata(
        int64(positions),
        torch.tensor(table)[:, :n_blocks],
        lens,
        block_size,
        max_model_len,
        positions_out,
        slots,
        batch_size + num_padding,
    )
    too_long = positions + 1 >= max_model_len
    clamped = np.where(too_long, 0, positions + 1)
    columns = np.minimum(clamped // block_size, n_blocks - 1)
    blocks = table[np.arange(batch_size), columns].astype(np.int64)
    expected = np.where(too_long, -1, blocks * block_size + clamped % block_size)
    np.testing.assert_array_equal(slots.numpy(), [*expected, *[-1] * num_padding])
    np.testing.assert_array_equal(positions_out.numpy(), clamped)
    expected_lens = np.where(too_long, 1, np.minimum(seq_lens + 1, max_model_len))
    np.testing.assert_array_equal(lens.numpy(), expected_lens)


@dataclass
class ExpandedRows:
    """Buffers that `copy_and_expand_eagle_inputs_kernel` fills."""

    input_ids: np.ndarray
    positions: np.ndarray
    is_rejected: np.ndarray
    is_masked: np.ndarray
    new_token_indices: np.ndarray
    hidden_state_mapping: np.ndarray


def expand_rows(
    target_ids: np.ndarray,
    target_positions: np.ndarray,
    next_ids: np.ndarray,
    lens: Sequence[int],
    rejected: Sequence[int],
    num_slots: int,
    shift: bool,
    buffers: ExpandedRows,
) -> None:
    """Each request: its valid tokens, the next, mask tokens (7), its rejected (0)."""
    for req, start in enumerate(starts(lens)[:-1]):
        end = start + lens[req] - rejected[req]
        ids = target_ids[start + shift : end].tolist()
        out = start + req * (num_slots - shift)
        new = out + len(ids) + np.arange(num_slots)
        row = [*ids, next_ids[req], *[7] * (num_slots - 1)]
        rows = slice(out, out + len(row) + rejected[req])
        buffers.input_ids[rows] = [*row, *[0] * rejected[req]]
        positions = target_positions[start] + np.arange(len(row))
        buffers.positions[rows] = [*positions, *[0] * rejected[req]]
        buffers.is_rejected[rows] = [*[False] * len(row), *[True] * rejected[req]]
        buffers.is_masked[rows] = False
        buffers.is_masked[new[1:]] = True
        buffers.new_token_indices[req * num_slots : (req + 1) * num_slots] = new
        if shift:
            source = slice(start, start + lens[req])
            buffers.hidden_state_mapping[source] = out + np.arange(lens[req])


def untouched_rows(num_rows: int, num_new: int, num_tokens: int) -> ExpandedRows:
    def full(length: int, dtype: type) -> np.ndarray:
        return np.full(length, UNTOUCHED, dtype)

    return ExpandedRows(
        input_ids=full(num_rows, np.int32),
        positions=full(num_rows, np.int64),
        is_rejected=np.ones(num_rows, bool),
        is_masked=np.ones(num_rows, bool),
        new_token_indices=full(num_new, np.int32),
        hidden_state_mapping=full(num_tokens, np.int32),
    )


@pytest.mark.parametrize(
    ("shift", "num_slots"), [(False, 1), (False, 3), (True, 3), (True, 1)]
)
@pytest.mark.parametrize(
    ("lens", "rejected"), [([4, 1, 6, 3], [2, 0, 0, 1]), ([5], [0]), ([1], [0])]
)
def test_copy_and_expand_eagle_inputs(
    lens: list[int], rejected: list[int], shift: bool, num_slots: int
) -> None:
    rng = np.random.default_rng(0)
    num_tokens, num_reqs = sum(lens), len(lens)
    ids, next_ids = rng.integers(8, 99, num_tokens), rng.integers(8, 99, num_reqs)
    positions = np.concatenate([i * 10 + np.arange(n) for i, n in enumerate(lens)])
    num_rows = num_tokens + (num_slots - shift) * num_reqs + 2  # 2: never written
    found, expected = (
        untouched_rows(num_rows, num_slots * num_reqs, num_tokens) for _ in range(2)
    )
    query_start_loc = starts(lens)
    spec_decode._copy_and_expand_eagle_inputs(
        target_token_ids_ptr=int32(ids),
        target_positions_ptr=int64(positions),
        next_token_ids_ptr=int32(next_ids),
        out_input_ids_ptr=torch.from_numpy(found.input_ids),
        out_positions_ptr=torch.from_numpy(found.positions),
        out_is_rejected_token_mask_ptr=torch.from_numpy(found.is_rejected),
        out_is_masked_token_mask_ptr=torch.from_numpy(found.is_masked),
        out_new_token_indices_ptr=torch.from_numpy(found.new_token_indices),
        out_hidden_state_mapping_ptr=torch.from_numpy(found.hidden_state_mapping),
        query_start_loc_ptr=int32(query_start_loc),
        query_end_loc_ptr=int32(query_start_loc[1:]) - 1 - int32(rejected),
        padding_token_id=0,
        parallel_drafting_token_id=7,
        total_input_tokens=num_tokens,
        num_padding_slots_per_request=num_slots,
        shift_input_ids=shift,
        BLOCK_SIZE_TOKENS=16,
        batch_size=num_reqs,
        num_blocks=1,
    )
    expand_rows(ids, positions, next_ids, lens, rejected, num_slots, shift, expected)
    for name, array in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


@pytest.mark.parametrize("has_rejected", [False, True])
@pytest.mark.parametrize(
    ("lens", "rejected"), [([4, 1, 6, 3], [2, 0, 0, 1]), ([5], [3])]
)
def test_copy_and_expand_dflash_inputs(
    lens: list[int], rejected: list[int], has_rejected: bool
) -> None:
    rng = np.random.default_rng(0)
    num_tokens, num_reqs, num_spec, block_size = sum(lens), len(lens), 2, 4
    num_query = 1 + num_spec
    next_ids = rng.integers(8, 99, num_reqs)
    positions = np.concatenate([i + np.arange(n) for i, n in enumerate(lens)])
    table = rng.integers(2**29, 2**30, (num_reqs, 2)).astype(np.int32)
    out_ids = int32([UNTOUCHED] * (num_reqs * num_query))
    context, context_slots = (int64([UNTOUCHED] * num_tokens) for _ in range(2))
    query, query_slots = (int64([UNTOUCHED] * len(out_ids)) for _ in range(2))
    indices = int32([UNTOUCHED] * (num_reqs * num_spec))
    spec_decode._copy_and_expand_dflash_inputs(
        next_token_ids_ptr=int32(next_ids),
        target_positions_ptr=int64(positions),
        out_input_ids_ptr=out_ids,
        out_context_positions_ptr=context,
        out_query_positions_ptr=query,
        out_context_slot_mapping_ptr=context_slots,
        out_query_slot_mapping_ptr=query_slots,
        out_token_indices_ptr=indices,
        block_table_ptr=torch.tensor(table),
        query_start_loc_ptr=int32(starts(lens)),
        num_rejected_tokens_ptr=int32(rejected) if has_rejected else 0,
        block_table_stride=table.shape[1],
        parallel_drafting_token_id=7,
        block_size=block_size,
        num_query_per_req=num_query,
        num_speculative_tokens=num_spec,
        total_input_tokens=num_tokens,
        max_tokens_per_req=16,
        triton_block_size=16,
        has_num_rejected=has_rejected,
    )

    def slots(position: np.ndarray, repeats: Any) -> np.ndarray:
        req = np.repeat(np.arange(num_reqs), repeats)
        blocks = table[req, np.minimum(position // block_size, 1)].astype(np.int64)
        return blocks * block_size + position % block_size

    last = np.array(starts(lens)[1:]) - 1 - np.array(rejected) * has_rejected
    rows = np.arange(len(out_ids)).reshape(num_reqs, num_query)
    asked = (positions[last][:, None] + 1 + np.arange(num_query)).ravel()
    np.testing.assert_array_equal(context.numpy(), positions)
    np.testing.assert_array_equal(context_slots.numpy(), slots(positions, lens))
    np.testing.assert_array_equal(query.numpy(), asked)
    np.testing.assert_array_equal(query_slots.numpy(), slots(asked, num_query))
    np.testing.assert_array_equal(indices.numpy(), rows[:, 1:].ravel())
    expected_ids = np.where(rows == rows[:, :1], next_ids[:, None], 7)
    np.testing.assert_array_equal(out_ids.numpy(), expected_ids.ravel())


# ----- the target's slots, and copies of recurrent state -----


def launch_slot_mapping(lens: Sequence[int], num_padding: int) -> Any:
    """Slots of a batch whose requests start at odd positions: found and expected."""
    rng = np.random.default_rng(0)
    block_size, num_tokens = 4, sum(lens)
    positions = np.concatenate([3 * i + np.arange(n) for i, n in enumerate(lens)])
    table = rng.integers(2**29, 2**30, (len(lens) + 1, 8)).astype(np.int32)
    slots = int64([UNTOUCHED] * (num_tokens + num_padding))
    block_table._COMPUTE_SLOT_MAPPING_KERNEL(
        len(lens),
        num_tokens,
        num_tokens + num_padding,
        int32(starts(lens)),
        int64(positions),
        torch.tensor(table),
        table.shape[1],
        slots,
        block_size,
        1,
        0,
        1,
    )
    req = np.repeat(np.arange(len(lens)), lens)
    blocks = table[req, positions // block_size].astype(np.int64)
    return slots.numpy(), blocks * block_size + positions % block_size


@pytest.mark.parametrize("lens", [[3, 1, 0, 9], [1], [17]], ids=str)
def test_slot_mapping(lens: list[int]) -> None:
    found, expected = launch_slot_mapping(lens, num_padding=2)
    np.testing.assert_array_equal(found[: len(expected)], expected)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason=(
        "compute_slot_mapping_kernel_impl leaves the slots of the last step beyond "
        "num_tokens; harmless while GPUModelRunner._get_slot_mappings fills them"
    ),
)
def test_stock_slot_mapping_pads() -> None:
    found, expected = launch_slot_mapping([3, 1], num_padding=3)
    np.testing.assert_array_equal(found[len(expected) :], [PAD_SLOT_ID] * 3)


@pytest.mark.parametrize("sizes", [[5], [7, 0, 16, 1]], ids=str)
def test_batch_memcpy(sizes: list[int]) -> None:
    source = torch.arange(64, dtype=torch.uint8)
    target = torch.full((64,), 255, dtype=torch.uint8)
    offsets = torch.tensor(starts(sizes)[:-1])
    mamba_utils.batch_memcpy(
        (source.data_ptr() + offsets).to(torch.uint64),
        (target.data_ptr() + 3 + offsets).to(torch.uint64),
        int32(sizes),
    )
    expected = np.full(64, 255)
    expected[3 : 3 + sum(sizes)] = np.arange(sum(sizes))
    np.testing.assert_array_equal(target.numpy(), expected)


def test_batch_memcpy_within_a_buffer() -> None:
    """A state moves a column to the left over part of itself."""
    state = torch.arange(10, dtype=torch.uint8)
    pointers = [torch.tensor([state.data_ptr() + i]).to(torch.uint64) for i in (2, 0)]
    mamba_utils.batch_memcpy(*pointers, int32([8]))
    assert state.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 8, 9]
