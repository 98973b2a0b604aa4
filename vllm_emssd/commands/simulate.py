"""`vllm-emssd simulate`: predict tokens/s from a recorded trace and a cost table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_emssd import __version__
from vllm_emssd.bench.workloads import WorkloadOptions, load_workload
from vllm_emssd.simulate.bounds import Bounds, find_bounds
from vllm_emssd.simulate.costs import CostFile, load_costs, shipped_costs
from vllm_emssd.simulate.reliability import AT_TRIM
from vllm_emssd.simulate.simulator import (
    Decoding,
    Outcome,
    Setting,
    check_method,
    simulate,
)
from vllm_emssd.simulate.traces import SHIPPED_TRACE, Trace, load_trace, save_trace

if TYPE_CHECKING:
    from rich.console import Console

Results = dict[int, dict[Decoding, Outcome]]  # by requests at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_predict(verbs)
    _add_record(verbs)


def _add_predict(verbs: Any) -> None:
    text = "predict speeds from a trace and a cost table, without vLLM"
    add = verbs.add_parser("predict", help=text, description=text).add_argument
    add("--trace", type=Path, default=SHIPPED_TRACE, help="default: the shipped pair's")
    add(
        "--costs",
        default="cpu-2core-epyc",
        help=f"a file or one of {', '.join(shipped_costs())} (default: %(default)s)",
    )
    for name, default, means in (
        ("--max-concurrency", [1, 2, 4, 8, 16, 24, 32], "requests at once"),
        ("--fixed", [1, 2, 3, 5, 8], "K of fixed lengths"),
        ("--padded", [5], "K of vLLM's own draft_model"),
    ):
        shown = f"{means} (default: {' '.join(map(str, default))})"
        add(name, type=_positive, nargs="+", default=default, metavar="N", help=shown)
    add(
        "--num-speculative-tokens",
        type=_positive,
        metavar="K",
        help="most drafts of automatic lengths (default: all that were recorded)",
    )
    add(
        "--output-len", type=_positive, default=128, help="tokens of an answer, at most"
    )
    add(
        "--num-prompts",
        type=_positive,
        help="at least, as in 'vllm-emssd bench' (default: the whole trace)",
    )
    add("--max-num-batched-tokens", type=_positive, default=4096)
    add(
        "--block-size",
        type=_positive,
        default=0,
        help="prompts are cached by whole blocks of so many tokens (default: not)",
    )
    add("--async-scheduling", action="store_true", help="of tables with host_ms")
    text = "draft_model (default), or copies from the trace's own text, which have no "
    add(
        "--proposer",
        choices=["draft_model", "llma"],
        default="draft_model",
        help=f"{text}--padded and no thresholds",
    )
    text = "and what any lengths can gain over the best fixed one; takes minutes"
    add("--bounds", action="store_true", help=text)
    add("--output-json", type=Path, metavar="FILE")


def _add_record(verbs: Any) -> None:
    text = "record a trace from a pair of models, with transformers"
    add = verbs.add_parser("record", help=text, description=text).add_argument
    add("trace", type=Path, metavar="TRACE.jsonl[.gz]", help="written")
    add("--model", required=True, help="target: folder or name")
    add("--draft-model", required=True)
    add("--dataset-name", default="completion", help="as in 'vllm-emssd bench'")
    add("--dataset-path", type=Path, metavar="FILE.jsonl", help="of custom")
    add("--num-prompts", type=_positive, default=32)
    add("--input-len", type=_positive, default=512, help="tokens of a prompt, at most")
    add("--output-len", type=_positive, default=128, help="tokens of an answer")
    add("--num-speculative-tokens", type=_positive, default=8, help="most to replay")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def run(args: argparse.Namespace) -> int:
    try:
        _record(args) if args.verb == "record" else _predict(args)
    except (OSError, ValueError) as error:
        print(f"vllm-emssd simulate {args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def _record(args: argparse.Namespace) -> None:
    from vllm_emssd.simulate.recorder import TraceRecorder, record_trace

    recorder = TraceRecorder(
        args.model,
        args.draft_model,
        args.num_speculative_tokens,
        args.dtype,
        shlex.join(["vllm-emssd", *sys.argv[1:]]),
    )
    options = WorkloadOptions(args.output_len, args.input_len, path=args.dataset_path)
    workload = load_workload(
        args.dataset_name, recorder.tokenizer, options, args.num_prompts
    )
    trace = record_trace(recorder, workload.requests)
    save_trace(trace, args.trace)
    accepted = [a for r in trace.requests for a in r.accepted[1:]]
    mean = sum(accepted) / max(len(accepted), 1)
    print(
        f"{len(trace.requests)} requests in {args.trace}; {mean:.2f} of "
        f"{trace.header.k} drafts accepted, on average over positions"
    )


def _predict(args: argparse.Namespace) -> None:
    trace, costs = load_trace(args.trace), load_costs(args.costs)
    most = args.num_speculative_tokens or trace.header.k
    copies = args.proposer == "llma"
    methods = [
        Decoding("plain"),
        *(Decoding("fixed", k, copies=copies) for k in args.fixed),
        *(Decoding("padded", k) for k in args.padded if not copies),
        Decoding("auto", most, copies=copies),
    ]
    for method in methods:
        check_method(method, trace)
    num_prompts = args.num_prompts or len(trace.requests)
    results: Results = {}
    bounds: dict[int, Bounds] = {}
    for batch in args.max_concurrency:
        num_rows = max(args.max_num_batched_tokens, batch)
        setting = Setting(batch, num_rows, args.block_size, args.async_scheduling)
        outcome = partial(
            simulate,
            trace,
            costs,
            setting=setting,
            max_tokens=args.output_len,
            num_prompts=num_prompts,
        )
        results[batch] = {method: outcome(method) for method in methods}
        if args.bounds:
            bounds[batch] = find_bounds(outcome, most, copies)
    _print(results, bounds, trace, costs)
    if args.output_json is not None:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        args.output_json.write_text(
            json.dumps(_as_json(results, trace, costs), indent=1)
        )


def _as_json(results: Results, trace: Trace, costs: CostFile) -> dict[str, Any]:
    return {
        "command": shlex.join(["vllm-emssd", *sys.argv[1:]]),
        "vllm_emssd": __version__,
        "trace": trace.header.model_dump(),
        "costs": costs.model_dump(),
        "results": [
            {
                "batch": batch,
                "method": str(method),
                "tokens_per_s": outcome.tokens_per_s,
                "accepted_per_request_step": outcome.accepted_per_request_step,
                "drafts_per_request_step": outcome.drafts_per_request_step,
                "ms": outcome.ms,
                "draft_ms": outcome.draft_ms,
                "policy_ms_per_step": outcome.policy_ms_per_step,
                "num_tokens": outcome.num_tokens,
                "counters": outcome.counters.as_dict(),
            }
            for batch, by_method in results.items()
            for method, outcome in by_method.items()
        ],
    }


def _print(
    results: Results, bounds: dict[int, Bounds], trace: Trace, costs: CostFile
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    machine = costs.provenance.get("machine", "machine unknown")
    console.print(
        f"trace: {len(trace.requests)} requests of {trace.header.target}, drafts by "
        f"{trace.header.draft}; costs: {costs.target.model} and {costs.draft.model} on "
        f"{machine}"
    )
    methods = list(next(iter(results.values())))
    for title, cells in (
        ("predicted tokens/s (x plain)", _speeds),
        ("accepted drafts per request and step", _accepted),
        ("ms that deciding the lengths took a step, on this machine", _deciding),
    ):
        table = Table(title=title)
        for column in ("at once", *map(str, methods)):
            table.add_column(column, justify="right")
        for batch, by_method in results.items():
            table.add_row(str(batch), *cells(by_method))
        console.print(table)
    _print_reliability(console, results)
    _print_bounds(console, results, bounds)


def _print_bounds(
    console: Console, results: Results, bounds: dict[int, Bounds]
) -> None:
    if not bounds:
        return
    from rich.table import Table

    table = Table(
        title="over the best fixed length",
        caption="threshold: the best on perfectly calibrated survival; oracle: just "
        "the drafts that will be accepted",
    )
    names = "at once", "best K", "x plain", "auto", "threshold", "and trimming"
    for column in (*names, "oracle"):
        table.add_column(column, justify="right")
    for batch, bound in bounds.items():
        *_, auto = results[batch].values()
        others = auto.tokens_per_s, bound.threshold, bound.trimming, bound.oracle
        plain = results[batch][Decoding("plain")].tokens_per_s
        best = bound.best_fixed
        table.add_row(
            str(batch),
            str(bound.k),
            f"{best / plain:.2f}",
            *(f"{speed / best:.3f}" if speed else "" for speed in others),
        )
    console.print(table)


def _speeds(by_method: dict[Decoding, Outcome]) -> Iterator[str]:
    plain = by_method[Decoding("plain")].tokens_per_s
    for outcome in by_method.values():
        ratio = outcome.tokens_per_s / plain
        yield f"{outcome.tokens_per_s:.0f} ({ratio:.2f})"


def _accepted(by_method: dict[Decoding, Outcome]) -> Iterator[str]:
    for outcome in by_method.values():
        yield f"{outcome.accepted_per_request_step:.2f}"


def _deciding(by_method: dict[Decoding, Outcome]) -> Iterator[str]:
    for outcome in by_method.values():
        yield f"{outcome.policy_ms_per_step:.2f}"


def _print_reliability(console: Console, results: Results) -> None:
    """Of automatic lengths' drafts, what was predicted beside what came."""
    from rich.table import Table

    found = {
        batch: outcome.reliability
        for batch, by_method in results.items()
        for outcome in by_method.values()
        if outcome.reliability is not None
    }
    if not found:
        return
    table = Table(
        title="chance of being accepted, auto: predicted, observed (drafts made)",
        caption="at the stop: drafts that, before they were made, seemed to bring what "
        "making and verifying them costs, within a quarter; at the trim: once made, "
        "what verifying costs. The cost stands behind the bar.",
    )
    for column in ("predicted", *map(str, found)):
        table.add_column(column, justify="right")
    lines = [f"{line / 10:.1f} to {(line + 1) / 10:.1f}" for line in range(AT_TRIM)]
    for line, name in enumerate((*lines, "at the trim", "at the stop")):
        cells = [
            _reliability(sums[:, line], line >= AT_TRIM) for sums in found.values()
        ]
        table.add_row(name, *cells)
    console.print(table)


def _reliability(sums: np.ndarray, has_cost: bool) -> str:
    """`sums`: a line of `CountedDraftLength.reliability`."""
    num_drafts = int(sums[0])
    if not num_drafts:
        return ""
    predicted, observed, cost = sums[1:] / num_drafts
    text = f"{predicted:.2f}, {observed:.2f} ({num_drafts})"
    return f"{text} | {cost:.2f}" if has_cost else text
