"""vLLM's own tests of speculative decoding, with emssd in the place of stock's methods.

    scripts/vllm_tests                    of the newest release that the plugin allows
    scripts/vllm_tests 0.33.0 [ARGS...]   of another one, with arguments of pytest's

They come from the release's source distribution and run on its Python files and the
CPU kernels that are installed (see `release.py`). Where they name a model of the
Hugging Face Hub, the shipped pair takes its place. `RUN` says which tests ask an engine
for `draft_model` or `ngram` and run here, `LEFT_OUT` why the others do not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.compat.release import (
    CACHE,
    PYTHON,
    REPOSITORY,
    asked_for,
    new_folder,
    pip,
)

# What vLLM's conftest.py imports and vLLM does not need.
PACKAGES = ("tblib", "pytest-asyncio")
MODELS = {
    "Qwen/Qwen3-1.7B": "target",
    "Qwen/Qwen3-0.6B": "draft",
    "facebook/opt-125m": "target",
    "hmellor/tiny-random-LlamaForCausalLM": "target",
    "meta-llama/Llama-3.2-1B-Instruct": "target",
}
LOGITSPROCS = "tests/v1/logits_processors/test_custom_offline.py"
DRAFT_MODEL = "tests/v1/e2e/spec_decode/draft_model/test_draft_model.py"
RUN = (
    f"{DRAFT_MODEL}::test_draft_model_moe_backend_override",
    f"{DRAFT_MODEL}::test_draft_model_moe_backend_inherits_target",
    f"{DRAFT_MODEL}::test_draft_model_moe_backend_default_auto",
    f"{DRAFT_MODEL}::test_draft_model_engine_args_rejects_invalid_tp_argname",
    "tests/v1/e2e/test_cpu_spec_decode.py::test_ngram_spec_decode_matches_baseline",
    "tests/v1/engine/test_llm_engine.py::test_engine_metrics",
    "tests/v1/sample/test_logprobs.py::test_spec_decode_logprobs",
    "tests/v1/spec_decode/test_max_len.py::test_ngram_max_len",
    "-k=not eagle",
)
# Where the shipped pair needs another setting than the model that it stands for.
EDITED = {
    # Its tokenizer is smaller: the prompt has more than 256 tokens.
    "tests/v1/sample/test_logprobs.py": ("max_model_len = 256", "max_model_len = 1024"),
}
GSM8K = "measures accuracy on GSM8K, fetched from GitHub, with a model of the Hub"
LEFT_OUT = {
    f"{DRAFT_MODEL}::test_draft_model_correctness": GSM8K,
    f"{DRAFT_MODEL}::test_draft_model_realistic_example": "needs a data set of the Hub",
    f"{DRAFT_MODEL}::test_draft_model_parallel_drafting": "emssd has none",
    f"{DRAFT_MODEL}::test_draft_model_quantization": "needs quantized models",
    f"{DRAFT_MODEL}::test_draft_model_transformers_backend": "needs a model of the Hub",
    f"{DRAFT_MODEL}::test_draft_model_tensor_parallelism": "needs two GPUs",
    f"{DRAFT_MODEL}::test_draft_model_engine_args_tensor_parallelism": (
        "sets draft_tensor_parallel_size apart from the target's, which emssd refuses"
    ),
    f"{DRAFT_MODEL}::test_draft_model_inherits_target_dcp_config": (
        "asks stock's proposer object for its config"
    ),
    "tests/v1/e2e/spec_decode/ngram_suffix/test_ngram_suffix.py": GSM8K,
    "tests/v1/e2e/test_replayssm_decode.py": "Mamba layers, on a GPU",
    "tests/v1/spec_decode/test_max_len.py::test_ngram_gpu_max_len": (
        "needs the V2 runner, which has no kernels on a CPU without Triton"
    ),
    f"{LOGITSPROCS}::test_rejects_custom_logitsprocs": (
        "expects custom logits processors to be refused; emssd takes them"
    ),
    "tests/entrypoints/llm/test_struct_output_generate.py": (
        "needs instruction-tuned models of the Hub, which finish their JSON"
    ),
    "tests/v1/spec_decode/test_ngram.py, test_eagle.py, test_llm_base_proposer.py": (
        "test stock's proposer objects; no engine asks for a method"
    ),
    "tests/test_config.py and others that make a SpeculativeConfig by hand": (
        "no engine argument is read, so nothing can take stock's place"
    ),
}


def test_packages() -> Path:
    """A folder of the packages that only vLLM's tests need."""
    folder = CACHE / f"test-packages-{PYTHON}"
    if not folder.is_dir():
        with new_folder(folder) as made:
            pip(f"--target={made}", *PACKAGES)
    return folder


def hub(folder: Path) -> Path:
    """A hub cache that has the shipped pair under the names that tests ask for."""
    for name, ours in MODELS.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        for part in ("refs", "snapshots"):
            (repository / part).mkdir(parents=True)
        (repository / "refs" / "main").write_text("shipped")
        shipped = repository / "snapshots" / "shipped"
        shipped.symlink_to(REPOSITORY / "models" / ours)
    return folder


def run(root: Path, *args: str, search: tuple[Path, ...]) -> int:
    """pytest in `root`, which holds vLLM's `tests/`. Returns its exit status.

    `search`: the folders where vLLM and its packages are looked for first.
    """
    path = [*search, REPOSITORY, test_packages()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_CACHE": str(hub(root / "hub")),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=root, env=environment).returncode


def edit(root: Path) -> None:
    """Change the tests in `root` as `EDITED` says; ends the command where it cannot."""
    for name, (old, new) in EDITED.items():
        text = (root / name).read_text()
        if text.count(old) != 1:
            sys.exit(f"{name} has no single {old!r} to change to {new!r}")
        (root / name).write_text(text.replace(old, new))


def main() -> int:
    which, *args = sys.argv[1:] or ["supported"]
    release = asked_for(which)
    print(release, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shutil.copytree(release.source / "tests", root / "tests")
        edit(root)
        shutil.copy(release.source / "pyproject.toml", root)
        plugin = ["-p", "scripts.compat.stand_in", "-q", "-rs"]
        status = run(root, *plugin, *(args or RUN), search=(release.folder,))
    if not args:
        print("Left out:")
        for test, why in LEFT_OUT.items():
            print(f"  {test}: {why}")
    return status


if __name__ == "__main__":
    sys.exit(main())
