"""`vllm-emssd simulate`: predict tokens/s from a recorded trace and a cost table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_emssd import __version__
from vllm_emssd.bench.workloads import WorkloadOptions, load_workload
from vllm_emssd.draft_length.acceptance import MARGINAL
from vllm_emssd.simulate.costs import CostFile, load_costs, shipped_costs
from vllm_emssd.simulate.learned_costs import costs_of_result
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

Results = dict[int, dict[Decoding, Outcome]]  # by batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=Path, default=SHIPPED_TRACE, help="default: the shipped pair's"
    )
    parser.add_argument(
        "--costs",
        default="cpu-2core-epyc",
        help=f"a file or one of {', '.join(shipped_costs())} (default: %(default)s)",
    )
    _add_numbers(parser, "--batches", [1, 2, 4, 8, 16, 24, 32], "requests at once")
    _add_numbers(parser, "--fixed", [1, 2, 3, 5, 8], "K of fixed lengths")
    _add_numbers(parser, "--padded", [5], "K of vLLM's own draft_model")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also lengths by what will be accepted, which no policy can know: a bound",
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=_positive,
        metavar="K",
        help="most drafts of automatic lengths (default: all that were recorded)",
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, help="output length, at most"
    )
    parser.add_argument("--max-num-batched-tokens", type=_positive, default=4096)
    parser.add_argument(
        "--cached-prompts",
        type=_positive,
        default=0,
        metavar="BLOCK",
        help="prompts are cached by whole blocks of so many tokens (default: not)",
    )
    parser.add_argument(
        "--min-requests",
        type=_positive,
        help="at each batch size, as in 'vllm-emssd bench' (default: the whole trace)",
    )
    parser.add_argument(
        "--continuous",
        action="store_true",
        help="a request starts as soon as another has ended, as in 'vllm-emssd bench'",
    )
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument(
        "--learn-costs",
        type=Path,
        metavar="RESULT",
        help="write to --output the costs that a result of 'vllm-emssd bench' shows, "
        "with the methods plain and auto in it",
    )
    _add_recording(parser)


def _add_numbers(
    parser: argparse.ArgumentParser, name: str, default: list[int], text: str
) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(
        name,
        type=_positive,
        nargs="+",
        default=default,
        metavar="N",
        help=f"{text} (default: {shown})",
    )


def _add_recording(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "recording", "make a trace instead of simulating (needs transformers)"
    )
    group.add_argument("--record", type=Path, metavar="TRACE", help=".jsonl[.gz]")
    group.add_argument("--model", help="target: folder or name")
    group.add_argument("--draft-model", help="without it the trace is for llma")
    group.add_argument(
        "--workload",
        default="completion",
        metavar="NAME|FILE.jsonl",
        help="prompts, as in 'vllm-emssd bench' (default: %(default)s)",
    )
    group.add_argument("--num-requests", type=_positive, default=32)
    group.add_argument("--max-prompt-tokens", type=_positive, default=512)
    group.add_argument("--k", type=_positive, default=8, help="most drafts to replay")
    group.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def run(args: argparse.Namespace) -> int:
    try:
        if args.record is not None:
            _record(args)
        elif args.learn_costs is not None:
            _learn_costs(args)
        else:
            _simulate(args)
    except (OSError, ValueError) as error:
        print(f"vllm-emssd simulate: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- simulating


def _simulate(args: argparse.Namespace) -> None:
    trace, costs = load_trace(args.trace), load_costs(args.costs)
    methods = _methods(args, trace)
    for method in methods:
        check_method(method, trace)
    min_requests = args.min_requests or len(trace.requests)
    results: Results = {}
    for batch in args.batches:
        setting = Setting(
            batch,
            max(args.max_num_batched_tokens, batch),
            cached_block=args.cached_prompts,
        )
        results[batch] = {
            method: simulate(
                trace,
                costs,
                method,
                setting,
                args.max_tokens,
                min_requests,
                args.continuous,
            )
            for method in methods
        }
    _print(results, trace, costs)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(_as_json(results, trace, costs), indent=1))


def _methods(args: argparse.Namespace, trace: Trace) -> list[Decoding]:
    most = trace.header.k
    methods = [Decoding("plain"), *(Decoding("fixed", k) for k in args.fixed)]
    if trace.header.kind == "draft_model":
        methods += [Decoding("padded", k) for k in args.padded]
    longest = args.num_speculative_tokens or most
    methods += [Decoding("auto", longest)]
    return [*methods, Decoding("oracle", longest)] if args.oracle else methods


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


def _print(results: Results, trace: Trace, costs: CostFile) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"trace: {_pair(trace)}; costs: {costs.kind}, {_machine(costs)}")
    methods = list(next(iter(results.values())))
    for title, cells in (
        ("predicted tokens/s (x plain)", _speeds),
        ("accepted drafts per request and step", _accepted),
        ("ms that deciding the lengths took a step, on this machine", _deciding),
    ):
        table = Table(title=title)
        for column in ("batch", *map(str, methods)):
            table.add_column(column, justify="right")
        for batch, by_method in results.items():
            table.add_row(str(batch), *cells(by_method))
        console.print(table)
    _print_reliability(console, results)


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
    """Of automatic lengths' verified drafts, what was predicted beside what came."""
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
        title="chance of being accepted, auto: predicted, observed (verified drafts)",
        caption="marginal: drafts predicted to bring what verifying them costs, which "
        "stands behind the bar, within a quarter",
    )
    for column in ("predicted", *map(str, found)):
        table.add_column(column, justify="right")
    for line in range(MARGINAL + 1):
        name = f"{line / 10:.1f} to {(line + 1) / 10:.1f}"
        table.add_row(
            "marginal" if line == MARGINAL else name,
            *(_reliability(sums[:, line], line == MARGINAL) for sums in found.values()),
        )
    console.print(table)


def _reliability(sums: np.ndarray, has_cost: bool) -> str:
    """`sums`: a line of `AcceptanceEstimator.reliability`."""
    num_drafts = int(sums[0])
    if not num_drafts:
        return ""
    predicted, observed, cost = sums[1:] / num_drafts
    text = f"{predicted:.2f}, {observed:.2f} ({num_drafts})"
    return f"{text} | {cost:.2f}" if has_cost else text


def _pair(trace: Trace) -> str:
    header = trace.header
    drafts = header.draft if header.kind == "draft_model" else "llma"
    return f"{len(trace.requests)} requests of {header.target}, drafts by {drafts}"


def _machine(costs: CostFile) -> str:
    machine = costs.provenance.get("machine", "machine unknown")
    return f"{costs.target.model} and {costs.draft.model} on {machine}"


# ---------------------------------------------------------------- learning costs


def _learn_costs(args: argparse.Namespace) -> None:
    if args.output is None:
        raise ValueError("--learn-costs needs --output, the cost table to write")
    costs = costs_of_result(json.loads(args.learn_costs.read_text()))
    args.output.write_text(costs.model_dump_json(indent=1) + "\n")


# ---------------------------------------------------------------- recording


def _record(args: argparse.Namespace) -> None:
    from vllm_emssd.simulate.recorder import TraceRecorder, record_trace

    if not args.model:
        raise ValueError("--record needs --model, the target")
    command = shlex.join(["vllm-emssd", *sys.argv[1:]])
    recorder = TraceRecorder(args.model, args.draft_model, args.k, args.dtype, command)
    options = WorkloadOptions(args.max_tokens, args.max_prompt_tokens)
    workload = load_workload(
        args.workload, recorder.tokenizer, options, args.num_requests
    )
    trace = record_trace(recorder, workload.requests)
    save_trace(trace, args.record)
    print(f"{len(trace.requests)} requests in {args.record}")
    accepted = [a for r in trace.requests for a in r.accepted[1:]]
    if accepted:
        mean = sum(accepted) / len(accepted)
        print(f"{mean:.2f} of {args.k} drafts accepted, on average over positions")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
