"""Cost tables computed from public figures, not measured: a roofline.

    python -m vllm_emssd.simulate.roofline    # writes the shipped tables

A forward takes as long as reading the weights or doing the arithmetic, whichever is
longer, plus what launching and communicating cost. Each request's K/V is read once a
target forward, however many rows it verifies; once a row by the drafter, whose requests
have one row but for the first forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_emssd.simulate.costs import CostFile, ModelCosts, Point

BYTES = 2  # bfloat16
BANDWIDTH_EFFICIENCY = 0.8  # of the peak, reached by good kernels
FLOPS_EFFICIENCY = 0.6
LINK_BYTES_PER_S = 450e9  # NVLink 4, each way
ALL_REDUCE_S = 10e-6  # latency of one, two a layer
TARGET_LAUNCH_MS = 0.2
DRAFT_LAUNCH_MS = 0.3  # metadata, launch and sampling of one draft forward
STEP_MS = 1.5  # synchronous scheduling and sampling,
REQUEST_MS = 0.01  # and for each request
SPECULATION_MS = 0.5  # proposer and rejection sampler
CONTEXT = 1024  # tokens of K/V a request reads
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    bandwidth: float  # bytes/s
    flops: float  # dense bfloat16


@dataclass(frozen=True, slots=True)
class Model:
    """Public figures. `num_read` counts parameters read in a forward: all but an input
    embedding of its own."""

    name: str
    num_read: float
    num_layers: int
    hidden_size: int
    kv_size: int  # key-value heads times their size


H100 = Gpu("NVIDIA H100 SXM 80GB", 3.35e12, 989e12)
H200 = Gpu("NVIDIA H200 SXM 141GB", 4.8e12, 989e12)
OPT_6_7B = Model("facebook/opt-6.7b", 6.66e9, 32, 4096, 4096)
OPT_125M = Model("facebook/opt-125m", 0.125e9, 12, 768, 768)
LLAMA_70B = Model("meta-llama/Llama-3.1-70B", 69.5e9, 80, 8192, 1024)
LLAMA_1B = Model("meta-llama/Llama-3.2-1B", 1.24e9, 16, 2048, 512)

# name -> GPU, target, drafter, GPUs (tensor parallel, both models alike, as vLLM asks)
TABLES: dict[str, tuple[Gpu, Model, Model, int]] = {
    "h100-opt-6.7b-125m": (H100, OPT_6_7B, OPT_125M, 1),
    "h200-opt-6.7b-125m": (H200, OPT_6_7B, OPT_125M, 1),
    "h100-llama-70b-1b": (H100, LLAMA_70B, LLAMA_1B, 4),
    "h200-llama-70b-1b": (H200, LLAMA_70B, LLAMA_1B, 2),
}


def forward_ms(gpu: Gpu, model: Model, num_gpus: int, rows: int) -> float:
    """Weights or arithmetic, and communication; no K/V, no launch."""
    read_s = BYTES * model.num_read / (gpu.bandwidth * BANDWIDTH_EFFICIENCY)
    compute_s = 2 * model.num_read * rows / (gpu.flops * FLOPS_EFFICIENCY)
    forward_s = max(read_s, compute_s) / num_gpus
    if num_gpus > 1:
        sent = 2 * (num_gpus - 1) / num_gpus * BYTES * model.hidden_size * rows
        all_reduce_s = ALL_REDUCE_S + sent / LINK_BYTES_PER_S
        forward_s += 2 * model.num_layers * all_reduce_s
    return forward_s * 1e3


def context_ms(gpu: Gpu, model: Model, num_gpus: int) -> float:
    """Reading the K/V of one request."""
    size = CONTEXT * 2 * model.num_layers * model.kv_size * BYTES
    return size / (gpu.bandwidth * BANDWIDTH_EFFICIENCY) / num_gpus * 1e3


def _points(per_row_ms: float, gpu: Gpu, model: Model, num_gpus: int) -> list[Point]:
    return [
        (rows, round(forward_ms(gpu, model, num_gpus, rows) + per_row_ms * rows, 4))
        for rows in ROWS
    ]


def roofline(gpu: Gpu, target: Model, draft: Model, num_gpus: int) -> CostFile:
    target_points = _points(0.0, gpu, target, num_gpus)
    draft_points = _points(context_ms(gpu, draft, num_gpus), gpu, draft, num_gpus)
    request_ms = REQUEST_MS + context_ms(gpu, target, num_gpus)
    return CostFile(
        kind="computed",
        target=ModelCosts(
            model=target.name,
            points=[(r, round(ms + TARGET_LAUNCH_MS, 4)) for r, ms in target_points],
        ),
        draft=ModelCosts(
            model=draft.name,
            points=[(r, round(ms + DRAFT_LAUNCH_MS, 4)) for r, ms in draft_points],
        ),
        fixed=[(n, round(STEP_MS + request_ms * n, 4)) for n in (1, 1024)],
        speculation_ms=SPECULATION_MS,
        provenance={
            "note": "a roofline computed from public figures; nothing was measured",
            "command": "python -m vllm_emssd.simulate.roofline",
            "machine": f"{num_gpus} x {gpu.name} (tensor parallel), "
            f"{gpu.bandwidth / 1e12} TB/s and {gpu.flops / 1e12:.0f} TFLOP/s dense "
            "bfloat16 each",
            "assumed": f"bfloat16; {BANDWIDTH_EFFICIENCY} of the bandwidth and "
            f"{FLOPS_EFFICIENCY} of the FLOP/s are reached; K/V of {CONTEXT} tokens a "
            f"request, in 'fixed' for the target and in its table for the drafter; "
            f"launch {TARGET_LAUNCH_MS} ms (target) and {DRAFT_LAUNCH_MS} ms (each "
            f"draft forward); a step {STEP_MS} ms and {REQUEST_MS} ms a request, "
            f"{SPECULATION_MS} ms more with speculation; all-reduce "
            f"{ALL_REDUCE_S * 1e6:.0f} us and {LINK_BYTES_PER_S / 1e9:.0f} GB/s",
        },
    )


def write_tables(folder: Path) -> None:
    for name, setting in TABLES.items():
        text = roofline(*setting).model_dump_json(indent=1)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    write_tables(Path(__file__).parent / "data")
