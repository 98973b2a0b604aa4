"""`vllm-emssd bench`: methods side by side on the same requests."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_emssd.bench import methods, over_http, workloads
from vllm_emssd.bench.comparison import compare_all, padding
from vllm_emssd.bench.engine_process import (
    EngineError,
    EngineOptions,
    same_graphs,
    shared_gpu,
)
from vllm_emssd.bench.harness import Plan, Rounds, measure
from vllm_emssd.bench.methods import Method, in_one_engine, parse_method
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import print_results, write_result
from vllm_emssd.bench.workloads import (
    SHIPPED_MODELS,
    Workload,
    WorkloadOptions,
    load_workload,
)

LENGTH_STEP = 128  # --max-model-len, where it follows from the requests
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

VERBS = {
    "throughput": "an engine for each method, always full: a request starts when "
    "another has ended",
    "latency": "an engine for each method, whole batches from start to end, as in the "
    "paper",
    "serve": "a 'vllm serve' for each method, loaded by 'vllm bench serve'",
    "lengths": "one engine whose draft lengths or proposers take turns, always full",
}
DEFAULT_METHODS = {
    "throughput": ["plain", "stock", "ngram", "auto", "llma-auto"],
    "latency": ["plain", "ngram", "llma", "llma-padded"],
    "serve": ["plain", "stock", "auto"],
    "lengths": ["k0", "auto", "k3", "k5", "k8"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times methods of speculative decoding side by side: all stay up, take turns, "
        "and get the same requests, so that what disturbs one disturbs all."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text,
            usage="%(prog)s [options]",
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"methods:\n{_listing(methods.DESCRIPTIONS)}\n\n"
            f"datasets:\n{_listing(workloads.DESCRIPTIONS)}",
        )
        _add_methods(verb, DEFAULT_METHODS[name])
        _add_requests(
            verb, "--batch-size" if name == "latency" else "--max-concurrency"
        )
        _add_engine(verb)
        _add_rounds(verb, has_engines=name in ("throughput", "latency"))


def _listing(descriptions: dict[str, str]) -> str:
    width = max(map(len, descriptions))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in descriptions.items())


def _add_methods(parser: argparse.ArgumentParser, default: list[str]) -> None:
    add = parser.add_argument_group("what is compared").add_argument
    shown = " ".join(default)
    add("--methods", nargs="+", default=default, help=f"below (default: {shown})")
    add(
        "--num-speculative-tokens",
        type=int,
        default=5,
        metavar="K",
        help="drafts of the methods that have K (default: %(default)s)",
    )
    target = SHIPPED_MODELS / "target"
    add("--model", default=str(target), help="target (default: the repository's own)")
    add(
        "--draft-model",
        metavar="MODEL",
        help="default: the repository's own, with its target",
    )


def _add_requests(parser: argparse.ArgumentParser, at_once: str) -> None:
    add = parser.add_argument_group("requests").add_argument
    add(
        at_once,
        dest="batches",
        type=int,
        nargs="+",
        default=[1, 8, 24],
        metavar="N",
        help="requests at once, one number or several (default: 1 8 24)",
    )
    add(
        "--dataset-name",
        default="completion",
        metavar="NAME",
        help="below (default: %(default)s)",
    )
    add(
        "--dataset-path",
        type=Path,
        metavar="FILE.jsonl",
        help="of --dataset-name custom",
    )
    add(
        "--num-prompts",
        type=int,
        metavar="N",
        default=1,
        help="requests in a round, at least; always a multiple of those at once",
    )
    add(
        "--input-len",
        type=int,
        metavar="N",
        default=512,
        help="tokens of a prompt, at most (default: %(default)s)",
    )
    add(
        "--output-len",
        type=int,
        metavar="N",
        default=96,
        help="tokens of an answer (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="where the dataset sets none",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "engine", "vLLM's own options, alike for every method"
    ).add_argument
    add("--tokenizer", metavar="MODEL", help="default: --model")
    add("--dtype", default="bfloat16", help="default: %(default)s")
    add(
        "--max-model-len", type=int, metavar="N", help="default: what the requests need"
    )
    add(
        "--kv-cache-memory-bytes",
        type=_bytes,
        default="512M",
        metavar="SIZE",
        help="default: 512M",
    )
    add(
        "--block-size",
        type=int,
        metavar="N",
        help="tokens of a K/V block; prompts are cached by it",
    )
    add("--enforce-eager", action="store_true", help="do not compile, which is default")
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="so that rounds after the warm-up time decoding (default)",
    )


def _add_rounds(parser: argparse.ArgumentParser, has_engines: bool) -> None:
    add = parser.add_argument_group("rounds and result").add_argument
    add(
        "--num-iters",
        type=int,
        metavar="N",
        default=5,
        help="rounds of each method that count (default: %(default)s)",
    )
    add(
        "--num-iters-warmup",
        type=int,
        metavar="N",
        default=1,
        help="rounds before them: they fill the prefix cache (default: %(default)s)",
    )
    add(
        "--starts",
        type=int,
        metavar="N",
        default=1,
        help="of everything, each with so many rounds: evens out what a process has of "
        "good or bad luck for as long as it lives (default: %(default)s)",
    )
    if has_engines:
        add(
            "--start-together",
            action="store_true",
            help="start all engines at once: for several cores an engine",
        )
    add(
        "--output-json",
        type=Path,
        metavar="FILE",
        help="medians and intervals, with command, commit, versions and machine",
    )


def _bytes(text: str) -> int:
    """`512M` as vLLM reads it: K, M and G are binary."""
    if text[-1:] in SUFFIXES:
        return int(text[:-1]) * SUFFIXES[text[-1]]
    return int(text)


def run(args: argparse.Namespace) -> int:
    try:
        _check_model(args.model)
        with _sigterm_ends_as_ctrl_c():
            result = _compare(args)
    except (ValueError, EngineError) as error:
        print(f"vllm-emssd bench {args.verb}: {error}", file=sys.stderr)
        return 1
    if args.output_json:
        said = {"provenance": provenance(), "arguments": _arguments_of(args)}
        write_result(args.output_json, said | result)
    return 0


def _check_model(model: str) -> None:
    if model == str(SHIPPED_MODELS / "target") and not Path(model).is_dir():
        raise ValueError(
            "the default models are in the repository only, and this is an installed "
            "package; name others with --model and --draft-model"
        )


def _arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given or have a default."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None
    }


@contextmanager
def _sigterm_ends_as_ctrl_c() -> Iterator[None]:
    """So that the servers and engines that were started end too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    plan, tokenizer = plan_of(args), _tokenizer(args)
    sampling = {"temperature": args.temperature}
    options = WorkloadOptions(
        args.output_len, args.input_len, sampling, args.dataset_path
    )
    workload = load_workload(args.dataset_name, tokenizer, options, plan.max_requests())
    engine = engine_options(args, workload, plan)
    found: dict[str, Any] = {
        "is_compiled": not args.enforce_eager,
        "max_model_len": engine.engine_args["max_model_len"],
        "workload": workload.summary(),
    }
    if args.verb == "serve":
        rounds = over_http.measure_over_http(plan, engine, workload.requests, tokenizer)
        found["results"] = over_http.summaries(rounds)
    else:
        found |= _results_of(
            args.verb, workload, measure(plan, engine, workload.requests)
        )
    print_results(found["results"])
    return found


def _results_of(verb: str, workload: Workload, rounds: Rounds) -> dict[str, Any]:
    results = compare_all(rounds)
    if verb == "latency":
        lens = [len(request.prompt_token_ids) for request in workload.requests]
        for result in results:
            batch = result["batch"]
            result["padding"] = padding(batch, rounds[batch], lens)
    every = [
        r for by_method in rounds.values() for done in by_method.values() for r in done
    ]
    costs = [r.emssd_costs for r in every if r.emssd_costs]
    return {"results": results, "costs": costs[-1] if costs else {}}


def plan_of(args: argparse.Namespace) -> Plan:
    chosen = _methods_of(args)
    host = None
    if args.verb == "lengths":
        host, chosen = in_one_engine(chosen)
    elif any(method.name == "k0" for method in chosen):
        raise ValueError("'k0' is of 'lengths' only; 'plain' drafts nothing")
    return Plan(
        chosen,
        args.batches,
        rounds=args.num_iters,
        num_prompts=args.num_prompts,
        warm_up=args.num_iters_warmup,
        starts=args.starts,
        is_continuous=args.verb in ("throughput", "lengths"),
        starts_together=getattr(args, "start_together", False),
        host=host,
    )


def _methods_of(args: argparse.Namespace) -> list[Method]:
    draft_model = args.draft_model
    if draft_model is None and Path(args.model) == SHIPPED_MODELS / "target":
        draft_model = str(SHIPPED_MODELS / "draft")
    return [
        parse_method(text, draft_model, args.num_speculative_tokens)
        for text in args.methods
    ]


def engine_options(
    args: argparse.Namespace, workload: Workload, plan: Plan
) -> EngineOptions:
    needed = max(request.num_tokens for request in workload.requests) + 1
    is_sampled = any(request.sampling["temperature"] for request in workload.requests)
    engine_args = {
        "model": args.model,
        "tokenizer": args.tokenizer or args.model,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len or -(-needed // LENGTH_STEP) * LENGTH_STEP,
        "max_num_seqs": max(args.batches),
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": args.enable_prefix_caching,
    }
    block_size = {"block_size": args.block_size} if args.block_size else {}
    graphs = {}
    if not args.enforce_eager:
        graphs = same_graphs(plan.methods, max(args.batches))
    num_engines = 1 if plan.host else len(plan.methods)
    return EngineOptions(
        engine_args | block_size | graphs | shared_gpu(num_engines),
        fix_cpu_sampling=is_sampled,
    )


def _tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    name = args.tokenizer or args.model
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name}: no tokenizer there ({error})") from None
