"""vLLM's V2 model runner, interpreted: tokens, acceptance, rows and counters."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from tests.engine import LLMA, EngineConfig, running
from tests.v2.results import Engines, passes
from tests.v2.runs import (
    BOTH,
    CACHED,
    MAX_TOKENS,
    REGEX,
    SMALL,
    K,
    edited,
    one_pass,
    texts,
)

ENGINES = Engines(
    "tests.v2.runs",
    fast=(
        *("plain", "stock", "fixed", "async", "async cached", "async itself"),
        *("copying", "async auto", "async mixed auto", "async mixed tight"),
        "async trimmed",
    ),
    slow=(
        *("cached", "tight", "fitted", "async tight", "itself", "copying tight"),
        *("async copying", "async copying tight", "mixed", "mixed tight"),
        *("mixed auto", "async mixed", "async auto tight"),
        *("auto", "auto tight", "auto itself", "async trimmed itself"),
    ),
    timeout=1200,
)
cases = ENGINES.cases
OURS = ("fixed", "cached", "tight", "async", "async cached", "async tight")
CACHES = ("cached", "async cached")
AUTO = ("auto", "auto tight", "async auto", "async auto tight")
COPYING = ("copying", "copying tight", "async copying", "async copying tight")
MIXED = ("mixed", "mixed auto", "mixed tight")
MIXED += tuple(f"async {name}" for name in MIXED)
TIGHT = tuple(name for name in (*OURS, *AUTO, *COPYING, *MIXED) if "tight" in name)
GREEDY = (*OURS, *AUTO, *COPYING, *MIXED)
ITSELF = ("itself", "async itself", "auto itself")  # drafts of the target itself
COSTS_BY = ("free", "drawn", "measured")


@cache
def v1_tokens() -> list[list[int]]:
    """Of the same greedy requests without speculation, on the V1 runner."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in MAX_TOKENS
    ]
    with running(EngineConfig(**SMALL)) as llm:
        outputs = llm.generate(texts(), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def seen(name: str, what: str = "greedy") -> Any:
    return ENGINES.run(name)[what]


@pytest.mark.parametrize("name", cases("stock", *GREEDY))
def test_the_v2_runner_ran(name: str) -> None:
    if name == "stock":
        assert seen(name, "runner").startswith("vllm.v1.worker.cpu.model_runner.")
        return
    assert seen(name, "runner").endswith("v2.runner.UnpadCPUModelRunnerV2")
    is_async = name.startswith("async")
    wanted = "UnpadAsyncScheduler" if is_async else "UnpadScheduler"
    assert seen(name, "scheduler") == wanted


def test_plain_tokens_are_those_of_v1() -> None:
    assert seen("plain")["token_ids"] == v1_tokens()


@pytest.mark.parametrize("name", cases("stock", *GREEDY, "async trimmed"))
def test_tokens_are_plain_decoding(name: str) -> None:
    """In each pass, of greedy requests but for those that plain was asked for too."""
    found, plain = passes(ENGINES.run(name)), ENGINES.run("plain")
    assert found
    for what, run in found.items():
        kind = what.split(", ")[-1]
        if kind == "sampled":
            continue
        assert run["token_ids"] == plain.get(kind, plain["greedy"])["token_ids"], what
        counts = run.get("counts")
        if counts and kind not in ("measured", "structured"):
            assert counts["num_accepted_tokens"] > 0, what


@pytest.mark.parametrize("name", cases(*OURS))
def test_ragged_lengths_are_other_lengths(name: str) -> None:
    drafts_a_step = [
        s["counts"]["num_draft_tokens"] / s["counts"]["num_request_steps"]
        for s in (seen(name, "ragged"), seen(name))
    ]
    assert 0 < drafts_a_step[0] < drafts_a_step[1]


@pytest.mark.parametrize("name", cases("fixed", "auto", "async auto", *ITSELF[:2]))
def test_padding_of_recorded_draft_forwards_changes_nothing(name: str) -> None:
    assert min(seen(name, "num_replays")) > 0
    if name == "fixed":
        assert seen(name, "padded, greedy")["gained"] == seen("stock")["gained"]


@pytest.mark.parametrize("name", ["fixed", "async"])
def test_failing_proposer_costs_drafts_only(name: str) -> None:
    failing, healthy, healed = (
        seen(name, what) for what in ("failing", "healthy", "healed")
    )
    assert min(failing["num_failures"]) >= 2
    counts = failing["counts"]
    assert counts["num_failed_proposals"] == sum(failing["num_failures"])
    assert 0 < counts["num_accepted_tokens"] < healthy["counts"]["num_accepted_tokens"]
    assert healed["gained"] == healthy["gained"]


@pytest.mark.parametrize("name", ["fixed", "async"])
def test_the_log_tells_what_was_counted(name: str) -> None:
    healthy = seen(name, "healthy")
    drafted = [re.search(r"Drafted: (\d+) tokens", line) for line in healthy["lines"]]
    assert (
        sum(int(found[1]) for found in drafted)
        == (healthy["counts"]["num_draft_tokens"])
    )


@pytest.mark.parametrize("name", ["fixed", "async"])
def test_any_max_tokens_is_served(name: str) -> None:
    assert seen(name, "endless")["num_tokens"] == SMALL["max_model_len"]


@pytest.mark.slow
def test_drafts_stay_within_a_context_that_was_fitted_to_the_memory() -> None:
    assert seen("fitted", "limit") == seen("fitted", "endless")["num_tokens"] == 256


@pytest.mark.parametrize("name", cases(*CACHES))
def test_cached_prefixes(name: str) -> None:
    first, again = seen(name), seen(name, "again")
    assert again["gained"]["prefix_cache_hits"] > 0
    accepted = "spec_decode_num_accepted_tokens"
    assert again["gained"][accepted] == first["gained"][accepted]


@pytest.mark.parametrize("name", cases(*TIGHT))
def test_a_small_cache_preempts(name: str) -> None:
    runs = [
        seen(name, what)
        for what in ("greedy", "free", "edited")
        if what in ENGINES.run(name)
    ]
    assert sum(run["gained"]["num_preemptions"] for run in runs) > 0


@pytest.mark.parametrize("name", ["fixed", "async"])
def test_forced_length_accepts_exactly_what_stock_accepts(name: str) -> None:
    stock, ours = seen("stock")["gained"], seen(name)["gained"]
    assert stock["spec_decode_num_accepted_tokens"] > 0
    assert ours == stock


@pytest.mark.parametrize("name", cases(*OURS, *ITSELF, *AUTO, *MIXED))
def test_counters_agree_with_vllm_and_with_the_draft_model(name: str) -> None:
    for what, run in passes(ENGINES.run(name)).items():
        if what in ("stopped", "aborted", "sessions", "failing") or "padded" in what:
            continue
        counts, gained = run["counts"], run["gained"]
        assert counts["num_draft_rows"] == run["draft_rows"]
        assert counts["num_draft_rows"] > 0 or what in ("measured", "llma")
        drafts = gained["spec_decode_num_draft_tokens"]
        is_ragged = what.endswith(("ragged", "paused"))
        is_unknown = name.startswith("async auto") or name in MIXED
        if is_unknown or (is_ragged and name.startswith("async")):
            # vLLM counts the drafts it scheduled before it could know how many.
            assert counts["num_draft_tokens"] <= drafts
            assert not is_ragged or counts["num_draft_tokens"] < drafts
        else:
            assert counts["num_draft_tokens"] == drafts
        assert (
            counts["num_accepted_tokens"] == gained["spec_decode_num_accepted_tokens"]
        )
        assert counts["num_emitted_tokens"] == (
            counts["num_accepted_tokens"] + counts["num_request_steps"]
        )


@pytest.mark.parametrize("name", cases(*(n for n in OURS if n not in TIGHT)))
@pytest.mark.parametrize("what", ["greedy", "ragged"])
def test_decoding_request_costs_at_most_k_plus_one_rows_a_step(
    name: str, what: str
) -> None:
    """Not of the tight cache: who is preempted is fed its own output again. Scheduled
    asynchronously, a request may be in one step more, launched before its end is known.
    """
    counts = seen(name, what)["counts"]
    num_request_steps = counts["num_request_steps"]
    if name.startswith("async"):
        num_request_steps += len(MAX_TOKENS)
    assert 0 < counts["num_draft_rows_decode"] <= (K + 1) * num_request_steps


@cache
def v1_counts(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """What the V1 runner counts of the same requests: as they are, and with a reference
    that the answers are an edit of."""
    with running(EngineConfig(LLMA if name == "copying" else BOTH, **CACHED)) as llm:
        first = one_pass(llm)
        return first["counts"], one_pass(llm, **edited(first["token_ids"]))["counts"]


@pytest.mark.parametrize("name", cases("copying", "mixed"))
def test_as_much_is_made_and_accepted_as_on_v1(name: str) -> None:
    """Nearly so of drafts beside copies: V1 knows how they fared a step earlier."""
    for v1, what in zip(v1_counts(name), ("greedy", "edited"), strict=True):
        counts = seen(name, what)["counts"]
        assert v1["num_accepted_tokens"] > 0
        for count in ("num_draft_tokens", "num_accepted_tokens", "num_verify_rows"):
            wanted = pytest.approx(v1[count], rel=0 if name == "copying" else 0.05)
            assert counts[count] == wanted
        assert counts["num_draft_rows"] >= v1["num_draft_rows"]


@pytest.mark.parametrize("name", cases("fixed", "copying", "async copying"))
def test_requests_may_limit_their_drafts(name: str) -> None:
    """The first to none, the others to one."""
    counts = seen(name, "limited")["counts"]
    num_free_steps = counts["num_request_steps"] - MAX_TOKENS[0]
    assert 0 < counts["num_draft_tokens"] <= num_free_steps


@pytest.mark.slow
def test_asynchronous_copies_begin_a_step_later() -> None:
    late, ahead = (seen(name)["counts"] for name in ("copying", "async copying"))
    assert ahead["num_request_steps"] > late["num_request_steps"]
    assert 0 < ahead["num_accepted_tokens"] <= late["num_accepted_tokens"]


@pytest.mark.parametrize("name", cases(*MIXED))
def test_both_copies_and_drafts_are_accepted(name: str) -> None:
    assert min(seen(name, "accepted").values()) > 10


@pytest.mark.parametrize("name", cases("mixed", "async mixed", *AUTO))
def test_drafts_are_accepted_under_a_grammar(name: str) -> None:
    assert seen(name, "structured")["counts"]["num_accepted_tokens"] > 0


@pytest.mark.slow
def test_one_of_the_two_may_be_left_out() -> None:
    drafts, copies = (seen("mixed", what) for what in ("draft_model", "llma"))
    assert copies["draft_rows"] == 0 < drafts["draft_rows"]
    counts = drafts["counts"]
    assert counts["num_draft_tokens"] <= K * counts["num_request_steps"]


def test_copies_of_sampled_requests_are_certain() -> None:
    """Or they would be judged by a distribution that they did not come from."""
    certain = seen("async mixed auto", "certain")
    assert certain["yes"] > 0
    assert certain.get("no", 0) == 0


def test_drafts_that_the_device_left_out_do_not_count() -> None:
    run = seen("async trimmed")
    num_verified = run["counts"]["num_draft_tokens"]
    assert 0 < num_verified < run["gained"]["spec_decode_num_draft_tokens"]
    # A step in vain of each request, launched before its end is known.
    in_vain = K * len(MAX_TOKENS)
    assert num_verified <= run["num_verified"] <= num_verified + in_vain


def test_the_device_leaves_out_what_costs_more_by_our_costs() -> None:
    """Which are not those that vLLM started with: rows are free here."""
    costly, free, auto = (
        seen("async trimmed", what) for what in ("greedy", "free rows", "auto")
    )
    assert costly["num_verified"] < costly["num_made"]
    assert free["num_verified"] == free["num_made"]
    assert 0 < auto["num_verified"] <= auto["num_made"]


def test_asynchronous_scheduling_costs_a_step_in_vain_at_the_end_and_no_row_else() -> (
    None
):
    """Launched before a request's end is known."""
    late, ahead = seen("fixed")["counts"], seen("async")["counts"]
    for name in ("num_request_steps", "num_draft_tokens", "num_emitted_tokens"):
        assert ahead[name] == late[name]
    in_vain = ahead["num_draft_rows_decode"] - late["num_draft_rows_decode"]
    assert in_vain % (K + 1) == 0
    assert 0 < in_vain <= (K + 1) * len(MAX_TOKENS)


@pytest.mark.parametrize("name", cases("async", "async copying"))
@pytest.mark.parametrize("what", ["stopped", "aborted"])
def test_what_ends_a_request_ends_it_as_without_speculation(
    name: str, what: str
) -> None:
    """By a stop token or an abort, with the next step already launched."""
    lengths = [len(tokens) for tokens in seen(name, what)["token_ids"]]
    if what == "stopped":
        assert any(n < most for n, most in zip(lengths, MAX_TOKENS, strict=True))
    else:
        assert lengths == list(MAX_TOKENS)


def test_rows_of_a_decoding_request_against_stocks() -> None:
    """K+1 where stock feeds 2K+1. In the step that ends its prompt a request costs K
    rows beside it, on either side."""
    num_reqs = len(MAX_TOKENS)
    stock, counts = seen("stock"), seen("fixed")["counts"]
    num_decode_steps = counts["num_request_steps"] - num_reqs
    stock_rows = stock["draft_rows"] - stock["num_prompt_tokens"] - K * num_reqs
    assert stock_rows == (2 * K + 1) * num_decode_steps > 0
    assert counts["num_padded_draft_rows"] == stock["draft_rows"]
    rows = counts["num_draft_rows_decode"] - K * num_reqs
    assert rows == (K + 1) * num_decode_steps


@pytest.mark.parametrize("name", ["fixed", "async", "async trimmed"])
@pytest.mark.parametrize("what", ["logprobs", "structured"])
def test_sampling_parameters_do_what_they_do_without_speculation(
    name: str, what: str
) -> None:
    ours, plain = seen(name, what), seen("plain", what)
    assert ours["gained"]["spec_decode_num_draft_tokens"] > 0
    for ours_at, plain_at in zip(ours["logprobs"], plain["logprobs"], strict=True):
        assert len(ours_at) == len(plain_at)
        for a, b in zip(ours_at, plain_at, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *cases(*ITSELF[:2], args=("sampled", "ragged", "paused", "padded, sampled")),
        *cases("auto itself", args=COSTS_BY),
        *cases("async trimmed itself", args=("sampled",)),
    ],
)
def test_samples_of_the_target_itself_are_accepted(name: str, what: str) -> None:
    """Each draft is judged by the distribution it was sampled from, however many are
    made; and after steps without drafts the drafter has seen all of the text again."""
    counts, share = seen(name, what)["counts"], 0.98 if "padded" in name else 0.95
    assert counts["num_accepted_tokens"] >= share * counts["num_draft_tokens"]
    assert counts["num_draft_tokens"] > 0 or what == "measured"


def test_sampling_under_a_grammar_obeys_it() -> None:
    run = seen("async itself", "structured")
    assert run["gained"]["spec_decode_num_draft_tokens"] > 0
    for text, most in zip(run["texts"], MAX_TOKENS, strict=True):
        assert re.fullmatch(REGEX, text) or most < 12, text


@pytest.mark.slow
def test_free_drafts_are_made_and_none_beyond_the_end() -> None:
    free, fixed = (seen(*run)["counts"] for run in (("auto", "free"), ("cached",)))
    assert free["num_accepted_tokens"] > 0
    assert free["num_request_steps"] == fixed["num_request_steps"]
    assert 0 < free["num_draft_tokens"] < fixed["num_draft_tokens"]
    assert free["num_draft_rows_decode"] <= (K + 1) * free["num_request_steps"]


@pytest.mark.parametrize("name", cases(*AUTO, "auto itself"))
def test_automatic_lengths_follow_the_costs(name: str) -> None:
    """A step has one, but for requests near their end or still lacking text."""
    run = seen(name, "drawn")
    assert {0, K} <= {n for step in run["lengths"] for n in step}
    assert run["counts"]["num_accepted_tokens"] > 0


@pytest.mark.parametrize("name", cases(*AUTO, "auto itself"))
def test_steps_without_drafts_run_no_draft_forward(name: str) -> None:
    """But to feed prompts while drafts pay, in a pass of their own."""
    run = seen(name, "drawn")
    steps = list(zip(run["lengths"], run["num_forwards"], strict=True))
    idle = [n for lengths, n in steps if not any(lengths)]
    assert idle.count(0) > 0
    assert max(idle) <= 1
    assert all(n >= max(lengths) for lengths, n in steps)


@pytest.mark.parametrize("name", cases(*AUTO, "auto itself"))
def test_costs_are_told_which_steps_verify_drafts(name: str) -> None:
    """Those after a step that made some, unless their requests ended with it."""
    run = seen(name, "drawn")
    made = map(any, run["lengths"][:-1])
    after = list(zip(made, run["verifies"][1:], strict=True))
    assert {(False, False), (True, True)} <= set(after)
    assert (False, True) not in after


@pytest.mark.parametrize("name", cases(*AUTO, "auto itself"))
def test_steps_of_prompts_alone_are_told_apart(name: str) -> None:
    """They say nothing of what other steps cost."""
    num_reqs = seen(name, "drawn")["num_reqs"]
    assert num_reqs[0] == 0 < max(num_reqs) <= len(MAX_TOKENS)


@pytest.mark.parametrize("name", cases(*AUTO, "auto itself"))
def test_live_steps_move_the_costs(name: str) -> None:
    at_start, after = seen(name, "measured")["costs"]
    for costs in (at_start, after):
        for model in ("target", "draft"):
            rows, ms = zip(*costs[model], strict=True)
            assert rows[0] == 1
            assert list(ms) == sorted(ms)
            assert ms[0] > 0
    assert after["target"] != at_start["target"]


@pytest.mark.slow
def test_live_drafts_move_the_costs() -> None:
    """Few are made by measured costs: in one engine or another."""
    moved = [
        at_start["draft"] != after["draft"]
        for at_start, after in (seen(name, "measured")["costs"] for name in AUTO)
    ]
    assert any(moved)
