"""`vllm-emssd bench`: methods side by side on the same requests."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_emssd.bench import methods, over_http, smollm2, workloads
from vllm_emssd.bench.comparison import compare_all, padding
from vllm_emssd.bench.engine_process import (
    EngineError,
    EngineOptions,
    same_graphs,
    shared_gpu,
)
from vllm_emssd.bench.harness import Plan, measure
from vllm_emssd.bench.methods import Method, in_one_engine, parse_method
from vllm_emssd.bench.provenance import provenance
from vllm_emssd.bench.report import print_results, write_result
from vllm_emssd.bench.round import Round
from vllm_emssd.bench.workloads import (
    SHIPPED_MODELS,
    Workload,
    WorkloadOptions,
    load_workload,
)

LENGTH_STEP = 128  # --max-model-len, where it follows from the requests
OPTIONAL = ("block_size", "load_format", "attention_backend")  # vLLM has defaults
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

VERBS = {
    "throughput": "an engine for each method, always full: a request starts when "
    "another has ended",
    "latency": "an engine for each method, whole batches from start to end, as in the "
    "paper",
    "serve": "a 'vllm serve' for each method, loaded by 'vllm bench serve'",
    "lengths": "one engine whose draft lengths or proposers take turns, always full",
}
DEFAULT_METHODS = {  # all of which run on a GPU too
    "throughput": ["plain", "stock", "ngram", "auto", "llma"],
    "latency": ["plain", "ngram", "llma", "llma-padded"],
    "serve": ["plain", "stock", "auto"],
    "lengths": ["k0", "auto", "k3", "k5", "k8"],
}
COPYING_METHODS = ["plain", "ngram", "llma"]  # where there is no draft model


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
        _add_methods(verb, _default_methods(name))
        _add_requests(
            verb, "--batch-size" if name == "latency" else "--max-concurrency"
        )
        _add_engine(verb)
        _add_rounds(verb, has_engines=name in ("throughput", "latency"))


def _is_checkout() -> bool:
    """Else the package is alone: its defaults are a chat model that is fetched, asked
    chats, and methods that copy."""
    return (SHIPPED_MODELS / "target").is_dir()


def _default_methods(verb: str) -> list[str]:
    needs_draft_model = verb in ("throughput", "serve")
    if needs_draft_model and not _is_checkout():
        return COPYING_METHODS
    return DEFAULT_METHODS[verb]


def _listing(descriptions: dict[str, str]) -> str:
    width = max(map(len, descriptions))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in descriptions.items())


def _options(
    parser: argparse.ArgumentParser, title: str, text: str | None = None
) -> tuple[Any, Callable[..., None]]:
    """A group of options, and what adds one that takes values to it."""
    group = parser.add_argument_group(title, text)

    def add(flag: str, kind: Any, default: Any, text: str, **more: Any) -> None:
        if default is not None:
            values = default if isinstance(default, list) else [default]
            text += f" (default: {' '.join(map(str, values))})"
        group.add_argument(flag, type=kind, default=default, help=text, **more)

    return group, add


def _add_methods(parser: argparse.ArgumentParser, default: list[str]) -> None:
    _, add = _options(parser, "what is compared")
    add("--methods", str, default, "below", nargs="+")
    drafts = "drafts of the methods that have K"
    add("--num-speculative-tokens", int, 5, drafts, metavar="K")
    model = SHIPPED_MODELS / "target" if _is_checkout() else smollm2.cache_folder()
    add("--model", str, str(model), "target")
    add("--draft-model", str, None, "default: the repository's own, with its target")


def _add_requests(parser: argparse.ArgumentParser, at_once: str) -> None:
    _, add = _options(parser, "requests")
    several = "requests at once, one number or several"
    add(at_once, int, [1, 8, 24], several, dest="batches", nargs="+", metavar="N")
    add("--dataset-name", str, "completion" if _is_checkout() else "chats", "below")
    add("--dataset-path", Path, None, "JSON lines, of --dataset-name custom")
    add("--num-prompts", int, 1, "of a round, at least; a multiple of those at once")
    # 512 tokens of a cached prompt are whole K/V blocks: one is left to compute.
    add("--input-len", int, 513, "tokens of a prompt, at most")
    add("--output-len", int, 96, "tokens of an answer")
    add("--temperature", float, 0.0, "where the dataset sets none")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    text = "vLLM's own options, alike for every method"
    group, add = _options(parser, "engine", text)
    add("--tokenizer", str, None, "default: --model")
    add("--dtype", str, "bfloat16", "of the models")
    add("--load-format", str, None, "of both; dummy: shapes without weights")
    add("--attention-backend", str, None, "default: what vLLM chooses")
    add("--max-model-len", int, None, "default: what the requests need")
    add("--kv-cache-memory-bytes", _bytes, "512M", "of each engine")
    add("--block-size", int, None, "tokens of a K/V block; prompts are cached by it")
    group.add_argument("--enforce-eager", action="store_true", help="do not compile")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="so that rounds after the warm-up time decoding (default)",
    )


def _add_rounds(parser: argparse.ArgumentParser, has_engines: bool) -> None:
    group, add = _options(parser, "rounds and result")
    add("--num-iters", int, 5, "rounds of each method that count")
    before = "rounds before them: they fill the prefix cache"
    add("--num-iters-warmup", int, 1, before)
    starts = "of everything, each with so many rounds: one process may be slow for good"
    add("--starts", int, 1, starts)
    if has_engines:
        group.add_argument(
            "--start-together",
            action="store_true",
            help="for several cores an engine; those that measure costs start alone",
        )
    said = "for medians and intervals, with command, commit, versions and machine"
    add("--output-json", Path, None, said)


def _bytes(text: str) -> int:
    """`512M` as vLLM reads it: K, M and G are binary."""
    if text[-1:] in SUFFIXES:
        return int(text[:-1]) * SUFFIXES[text[-1]]
    return int(text)


def run(args: argparse.Namespace) -> int:
    try:
        if args.model == str(smollm2.cache_folder()):
            smollm2.fetch()
        with _sigterm_ends_as_ctrl_c():
            results = _compare(args)
    except (ValueError, EngineError, smollm2.FetchError) as error:
        print(f"vllm-emssd bench {args.verb}: {error}", file=sys.stderr)
        return 1
    print_results(results)
    return 0


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


def _compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results, each written to `--output-json` as soon as it is there."""
    plan, tokenizer = plan_of(args), _tokenizer(args)
    sampling = {"temperature": args.temperature}
    options = WorkloadOptions(
        args.output_len, args.input_len, sampling, args.dataset_path
    )
    workload = load_workload(args.dataset_name, tokenizer, options, plan.max_requests())
    engine = engine_options(args, workload, plan)
    found: dict[str, Any] = {
        "provenance": provenance(),
        "arguments": _arguments_of(args),
        "is_compiled": not args.enforce_eager,
        "max_model_len": engine.engine_args["max_model_len"],
        "workload": workload.summary(),
        "results": [],
    }
    if args.output_json and args.output_json.is_file():
        found |= _kept(json.loads(args.output_json.read_text()), found)
    measured = {result["batch"] for result in found["results"]}
    plan = replace(plan, batches=[n for n in plan.batches if n not in measured])

    def keep(result: dict[str, Any], costs: dict[str, Any]) -> None:
        found["results"].append(result)
        found["costs"] = costs
        if args.output_json:
            write_result(args.output_json, found)

    if not plan.batches:
        print(f"{args.output_json} is of this command and commit; remove it to repeat")
    elif args.verb == "serve":
        over_http.measure_over_http(
            plan,
            engine,
            workload.requests,
            tokenizer,
            lambda batch, rounds: keep(over_http.summaries({batch: rounds})[0], {}),
        )
    else:
        measure(
            plan,
            engine,
            workload.requests,
            lambda batch, rounds: keep(*_result_of(args.verb, workload, batch, rounds)),
        )
    return found["results"]


def _kept(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What the same command found before it was cut off. Results that are in the
    checkout make it differ, which is no change."""
    made, makes = before.get("provenance", {}), now["provenance"]
    commits = {p.get("commit", "").removesuffix("-dirty") for p in (made, makes)}
    is_same = len(commits) == 1 and "" not in commits
    is_same &= all(made.get(key) == makes[key] for key in ("vllm", "machine", "gpus"))
    is_same &= before.get("arguments") == now["arguments"]
    return {k: before[k] for k in ("results", "costs") if is_same and k in before}


def _result_of(
    verb: str, workload: Workload, batch: int, rounds: dict[str, list[Round]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a number of requests at once; and the engine's own costs."""
    (result,) = compare_all({batch: rounds})
    if verb == "latency":
        lens = [len(request.prompt_token_ids) for request in workload.requests]
        result["padding"] = padding(batch, rounds, lens)
    costs = [r.emssd_costs for done in rounds.values() for r in done if r.emssd_costs]
    return result, costs[-1] if costs else {}


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
    given = {name: getattr(args, name) for name in OPTIONAL}
    given = {name: value for name, value in given.items() if value is not None}
    graphs = {}
    if not args.enforce_eager:
        graphs = same_graphs(plan.methods, max(args.batches))
    num_engines = 1 if plan.host else len(plan.methods)
    return EngineOptions(
        engine_args | given | graphs | shared_gpu(num_engines),
        fix_cpu_sampling=is_sampled,
    )


def _tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    name = args.tokenizer or args.model
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name}: no tokenizer there ({error})") from None
