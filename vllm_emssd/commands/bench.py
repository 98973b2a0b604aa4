"""`vllm-emssd bench`: methods side by side on one workload."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_emssd.bench import methods, over_http, workloads
from vllm_emssd.bench.comparison import PADDED, compare_all, geometric_means
from vllm_emssd.bench.engine_process import EngineError, EngineOptions
from vllm_emssd.bench.harness import Measurement, Plan, measure
from vllm_emssd.bench.methods import (
    Method,
    MethodOptions,
    fixed_length,
    host_of,
    parse_method,
    setting_of,
)
from vllm_emssd.bench.over_http import measure_over_http
from vllm_emssd.bench.proposer_time import proposer_times
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import (
    print_http_results,
    print_proposer_times,
    print_results,
    write_result,
)
from vllm_emssd.bench.workloads import (
    SHIPPED_MODELS,
    Workload,
    WorkloadOptions,
    load_workload,
)

LENGTH_STEP = 128  # --max-model-len, where it follows from the workload
PROPOSER_STEPS = 60
GPU_SHARE = 0.9  # of its memory, for all engines together
QUICK = {"batches": [1, 4], "rounds": 3, "max_tokens": 32}
DEFAULTS = {"batches": [1, 8, 24], "rounds": 7, "max_tokens": 96}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"methods:\n{_listing(methods.DESCRIPTIONS)}\n\n"
        f"workloads:\n{_listing(workloads.DESCRIPTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument(
        "--output", type=Path, help="JSON file: medians, intervals, where from"
    )
    parser.add_argument(
        "--save-rounds",
        type=Path,
        metavar="FILE",
        help="JSON file for every single round, which is large",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--http",
        action="store_true",
        help="start `vllm serve` of each method and load it with `vllm bench serve`; "
        "--batches are concurrencies",
    )
    mode.add_argument(
        "--proposer-time",
        action="store_true",
        help="only the copy proposers' own time a step, at contexts of 512, 4k, 32k",
    )
    _add_what_runs(parser)
    _add_workload(parser)
    _add_engine(parser)


def _listing(descriptions: dict[str, str]) -> str:
    width = max(map(len, descriptions))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in descriptions.items())


def _add_what_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what runs")
    group.add_argument(
        "--methods", nargs="+", default=["plain", "stock", "ngram", "emssd", "llma"]
    )
    group.add_argument("--batches", type=int, nargs="+", help="concurrent requests")
    group.add_argument("--rounds", type=int, help="kept, after those that warm up")
    group.add_argument(
        "--warm-up",
        type=int,
        default=1,
        help="rounds of each batch size before: they fill the prefix cache, and on a "
        "CPU kernels are made for each row count when it is first met",
    )
    group.add_argument(
        "--continuous",
        action="store_true",
        help="a request starts as soon as another has ended, as in a server; a round "
        "ends when none is left to start; default: batches one after the other, as in "
        "the paper",
    )
    group.add_argument(
        "--starts",
        type=int,
        default=1,
        help="of all engines, each with so many rounds: evens out what a process has "
        "of good or bad luck for as long as it lives",
    )
    group.add_argument(
        "--one-engine",
        action="store_true",
        help="auto and kN (k0: no drafts), or mixed-auto, auto and llma-auto, take "
        "turns in one engine, so that lengths or proposers are all that differs; fixed "
        "lengths then pay for confidences they do not use",
    )
    group.add_argument(
        "--start-together",
        action="store_true",
        help="start all engines at once: for machines with several cores an engine",
    )
    group.add_argument(
        "--min-requests",
        type=int,
        default=1,
        help="requests in a round, at least: small batches run several, one by one",
    )
    group.add_argument(
        "--price-kv-padding",
        action="store_true",
        help="estimate the paper's vanilla: needs llma and llma-padded, or emssd and "
        "padded, which then also run over short and long contexts",
    )
    group.add_argument("--num-speculative-tokens", type=int, default=5, metavar="K")
    group.add_argument("--auto-tokens", type=int, default=16, help="most of auto")
    group.add_argument("--check-length", type=int, default=2, help="llma, ngram")
    group.add_argument("--copy-length", type=int, default=7, help="llma, ngram")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload", default="completion", metavar="NAME|FILE.jsonl", help="prompts"
    )
    group.add_argument("--max-tokens", type=int, help="output of a request")
    group.add_argument("--max-prompt-tokens", type=int, default=512)
    group.add_argument(
        "--temperature", type=float, default=0.0, help="for lines that give none"
    )
    group.add_argument(
        "--arrival-interval-ms", type=float, default=0.0, help="0: all at once"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine, alike for every method")
    group.add_argument(
        "--model",
        default=str(SHIPPED_MODELS / "target"),
        help="default: the one of the repository's models/",
    )
    group.add_argument(
        "--draft-model", help="default: the one of models/, beside its target"
    )
    group.add_argument("--tokenizer")
    group.add_argument(
        "--max-model-len", type=int, help="default: what the workload needs"
    )
    group.add_argument("--dtype", default="bfloat16")
    group.add_argument("--kv-cache-mib", type=int, default=512)
    group.add_argument(
        "--block-size", type=int, help="in tokens; prompts are cached by block"
    )
    group.add_argument(
        "--compile", action="store_true", help="as vLLM does; default: enforce eager"
    )
    group.add_argument(
        "--cached-prompts",
        action="store_true",
        help="prefix caching on: the warm-up fills it, the rounds measure decoding",
    )


def run(args: argparse.Namespace) -> int:
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        _check_model(args.model)
        with _sigterm_ends_as_ctrl_c():
            measured = _time_proposers(args) if args.proposer_time else _compare(args)
    except (ValueError, EngineError) as error:
        print(f"vllm-emssd bench: {error}", file=sys.stderr)
        return 1
    rounds = measured.pop("raw", {})
    said = {"provenance": provenance(), "arguments": arguments_of(args)}
    if args.output:
        write_result(args.output, said | measured)
    if args.save_rounds:
        write_result(args.save_rounds, said | rounds)
    return 0


def _check_model(model: str) -> None:
    if model == str(SHIPPED_MODELS / "target") and not Path(model).is_dir():
        raise ValueError(
            "the default models are in the repository only, and this is an installed "
            "package; name others with --model and --draft-model"
        )


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given or have a default."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None and value is not False
    }


@contextmanager
def _sigterm_ends_as_ctrl_c() -> Iterator[None]:
    """So that the servers and engines that were started end too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _time_proposers(args: argparse.Namespace) -> dict[str, Any]:
    times = proposer_times(
        _tokenizer(args), max(args.batches), PROPOSER_STEPS, method_options(args)
    )
    print_proposer_times(times)
    return {"proposer_times": times}


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    plan, tokenizer = plan_of(args), _tokenizer(args)
    workload = load_workload(
        args.workload, tokenizer, workload_options(args), plan.most_requests()
    )
    options = engine_options_of(args, workload)
    said = {"max_model_len": options.max_model_len, "workload": workload.summary()}
    if args.http:
        rounds = measure_over_http(plan, options, workload.requests, tokenizer)
        results = over_http.summaries(rounds)
        print_http_results(results)
        raw = {"workload": workload.as_dict(), "rounds": rounds}
        return said | {"results": results, "raw": raw}
    measured = measure(plan, options, workload.requests)
    found = result_of(args, workload, measured)
    print_results(found["results"])
    raw = {"workload": workload.as_dict(), "rounds": measured.as_dict()}
    return said | found | {"raw": raw}


def method_options(args: argparse.Namespace) -> MethodOptions:
    draft_model = args.draft_model
    if draft_model is None and Path(args.model) == SHIPPED_MODELS / "target":
        draft_model = str(SHIPPED_MODELS / "draft")
    return MethodOptions(
        draft_model=draft_model,
        num_speculative_tokens=args.num_speculative_tokens,
        auto_tokens=args.auto_tokens,
        check_length=args.check_length,
        copy_length=args.copy_length,
    )


def plan_of(args: argparse.Namespace) -> Plan:
    options = method_options(args)
    chosen = [parse_method(text, options) for text in args.methods]
    priced = set(PADDED.values()) if args.price_kv_padding else ()
    if args.http and (args.continuous or args.starts > 1 or args.start_together):
        raise ValueError(
            "--http: servers start once, one after the other, and always run "
            "continuously; leave out --starts, --start-together and --continuous"
        )
    check_one_engine(chosen, args)
    if args.continuous and {method.name for method in chosen} & set(PADDED.values()):
        raise ValueError(
            "--continuous: the paper's vanilla, which padded inputs are compared with, "
            "runs whole batches; leave out one or the other"
        )
    return Plan(
        chosen,
        args.batches,
        args.rounds,
        args.min_requests,
        priced=tuple(priced),
        warm_up=args.warm_up,
        starts=args.starts,
        is_continuous=args.continuous,
        starts_together=args.start_together,
        in_one_engine=args.one_engine,
    )


def check_one_engine(chosen: Sequence[Method], args: argparse.Namespace) -> None:
    """Raises ValueError where the methods do not go with `--one-engine`."""
    lengths = {method.name: fixed_length(method) for method in chosen}
    if not args.one_engine:
        if "k0" in lengths:
            raise ValueError("method 'k0' needs --one-engine; else 'plain' is without")
        return
    host = host_of(chosen)
    if host is None or args.http:
        raise ValueError(
            "--one-engine is that of 'auto' or 'mixed-auto', not over HTTP; add one of "
            "them to --methods, or leave out --one-engine or --http"
        )
    others = [method.name for method in chosen if setting_of(method, host) is None]
    if others:
        raise ValueError(
            "--one-engine compares 'auto' with 'kN', or 'mixed-auto' with 'auto' and "
            f"'llma-auto'; leave out {', '.join(others)}"
        )
    if max(k or 0 for k in lengths.values()) > args.auto_tokens:
        raise ValueError("--one-engine: no kN above --auto-tokens, the engine's most")


def workload_options(args: argparse.Namespace) -> WorkloadOptions:
    return WorkloadOptions(
        max_tokens=args.max_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        sampling={"temperature": args.temperature},
        arrival_interval_ms=args.arrival_interval_ms,
    )


def engine_options_of(args: argparse.Namespace, workload: Workload) -> EngineOptions:
    needed = max(request.num_tokens for request in workload.requests) + 1
    is_sampled = any(request.sampling["temperature"] for request in workload.requests)
    return EngineOptions(
        model=args.model,
        tokenizer=args.tokenizer or args.model,
        max_model_len=args.max_model_len or -(-needed // LENGTH_STEP) * LENGTH_STEP,
        max_num_seqs=max(args.batches),
        dtype=args.dtype,
        kv_cache_mib=args.kv_cache_mib,
        fix_cpu_sampling=is_sampled,
        options={
            "enforce_eager": not args.compile,
            "enable_prefix_caching": args.cached_prompts,
        }
        | ({"block_size": args.block_size} if args.block_size else {})
        | shared_gpu(1 if args.one_engine else len(args.methods)),
    )


def shared_gpu(num_engines: int) -> dict[str, Any]:
    """What each engine may ask for of a GPU on which all run: K/V caches have a size of
    their own, and this is what vLLM wants to find free."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory_utilization": GPU_SHARE / num_engines}


def result_of(
    args: argparse.Namespace, workload: Workload, measured: Measurement
) -> dict[str, Any]:
    lens = [len(request.prompt_token_ids) for request in workload.requests]
    results = compare_all(measured, lens, args.num_speculative_tokens, args.one_engine)
    return {
        "results": results,
        "geometric_means": geometric_means(results),
        "costs": measured.last_costs(),
    }


def _tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    name = args.tokenizer or args.model
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name}: no tokenizer there ({error})") from None
