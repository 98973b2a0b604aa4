"""A `vllm serve` process of one method of `vllm-emssd bench --http`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_emssd.bench.engine_process import CPU_FIXES_SWITCH, EngineOptions
from vllm_emssd.bench.methods import Method
from vllm_emssd.bench.server_process import free_port, server_process, vllm_command


@dataclass(frozen=True, slots=True)
class Server:
    method: Method
    base_url: str
    log: Path


@contextmanager
def serving(method: Method, options: EngineOptions, folder: Path) -> Iterator[Server]:
    """A healthy server. Raises EngineError with the end of its log if it fails."""
    port, log = free_port(), folder / f"{method.name}.log"
    command = serve_command(method, options, port)
    environment = _environment(options)
    with server_process(method.name, command, port, log, environment) as process:
        yield Server(method, process.base_url, log)


def serve_command(method: Method, options: EngineOptions, port: int) -> Sequence[str]:
    command = [vllm_command(), "serve", options.model, "--port", str(port)]
    command += ["--tokenizer", options.tokenizer, "--dtype", options.dtype]
    command += ["--max-model-len", str(options.max_model_len)]
    command += ["--max-num-seqs", str(options.max_num_seqs)]
    command += ["--kv-cache-memory-bytes", str(options.kv_cache_mib << 20)]
    if options.options.get("enforce_eager", True):
        command += ["--enforce-eager"]
    if "block_size" in options.options:
        command += ["--block-size", str(options.options["block_size"])]
    if "gpu_memory_utilization" in options.options:
        share = options.options["gpu_memory_utilization"]
        command += ["--gpu-memory-utilization", str(share)]
    if not options.options.get("enable_prefix_caching"):
        command += ["--no-enable-prefix-caching"]
    if method.speculative_config is not None:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    return command


def _environment(options: EngineOptions) -> dict[str, str]:
    fixes = {CPU_FIXES_SWITCH: "1"} if options.fix_cpu_sampling else {}
    return os.environ | {"VLLM_NO_USAGE_STATS": "1"} | fixes
