"""Teaches vLLM's front end the method "emssd".

`EngineArgs.create_speculative_config` is the one place where a user's
`--speculative-config` becomes vLLM's. Asked for "emssd", the hook there validates the
options, hands vLLM the part it knows, puts ours in `additional_config` (which reaches
every process and the config hash), and picks our worker and scheduler classes through
vLLM's own options. Asked for anything else it does nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_emssd import __version__
from vllm_emssd.config import (
    ADAPTIVE,
    ADDITIONAL_CONFIG_KEY,
    MAX_FIXED_DRAFTS,
    METHOD,
    EmssdConfig,
    parse_speculative_config,
)
from vllm_emssd.integration.frontend.capture_sizes import widen_capture_sizes
from vllm_emssd.integration.frontend.draft_checks import (
    check_draft_tokenizer,
    check_draft_weights,
    is_eagle3_head,
)
from vllm_emssd.integration.frontend.serving import attach_tag, install_serving_hooks
from vllm_emssd.integration.hooks.hook import Hook
from vllm_emssd.integration.metrics import LOG_STATS_KEY
from vllm_emssd.integration.runners import (
    ADAPTIVE_NEEDS_V2,
    AUTO_NEEDS_V2,
    may_run_on_v2,
    prefers_v2,
    refuse_options,
)
from vllm_emssd.integration.unsupported import (
    METHOD_NAME,
    refuse_drafter,
    refuse_target,
    refuse_wrong_verification,
)

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.emssd")  # below "vllm", so that its handlers apply

CPU_WORKER = "vllm_emssd.integration.cpu.worker.UnpadCPUWorker"
FIXED_CPU_WORKER = "vllm_emssd.integration.cpu.worker.FixedCPUWorker"
CPU_FIXES_SWITCH = "EMSSD_CPU_FIXES"
GPU_WORKER = "vllm_emssd.integration.worker.UnpadGPUWorker"
SCHEDULER = "vllm_emssd.integration.scheduler.make_scheduler"
COPY_DRAFTER = "vllm_emssd.integration.v1.copy_drafter.CopyDrafter"

# Words of vLLM's errors, and what to say instead.
_WRONG_DRAFTERS = {
    "same vocabulary size": (
        "--speculative-config: 'model' has a vocabulary of another size than the "
        'target. "method": "emssd" needs a draft model with the target\'s tokenizer: '
        "choose another 'model', or remove it to copy from the text (llma)."
    ),
    "--runner draft": (
        "--speculative-config: 'model' does not generate text. Choose another "
        "'model', or remove it to copy from the text (llma)."
    ),
}

Create = Callable[..., SpeculativeConfig | None]


def _make_hook(stock: Create) -> Create:
    def create_speculative_config(
        self: EngineArgs,
        target_model_config: ModelConfig,
        target_parallel_config: ParallelConfig,
    ) -> SpeculativeConfig | None:
        asked, configs = _asked(self), (target_model_config, target_parallel_config)
        if asked.get("method") == METHOD:
            return _create_ours(stock, self, asked, *configs)
        if asked and os.environ.get(CPU_FIXES_SWITCH) == "1":
            use_fixed_cpu_worker(*configs)
        return stock(self, *configs)

    return create_speculative_config


FRONTEND_HOOK = Hook(
    target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    why="vLLM's speculative methods are a closed list",
    signature="self, target_model_config, target_parallel_config",
    remove_when="a plugin's custom_class brings its options, worker and scheduler",
    make=_make_hook,
    when="always; passes every other method through",
    patch="0002-custom-class-options",
)


def use_fixed_cpu_worker(
    model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    """Make stock speculation on a CPU exact, for users who set EMSSD_CPU_FIXES=1.
    Raises ValueError for a target that it cannot be exact for."""
    if current_platform.is_cpu() and parallel_config.worker_cls == "auto":
        refuse_wrong_verification(model_config, "Speculation")
        parallel_config.worker_cls = FIXED_CPU_WORKER


def _asked(args: EngineArgs) -> dict[str, Any]:
    """The user's options, --spec-* flags merged in as vLLM does."""
    given = args.speculative_config
    asked = {k.replace("-", "_"): v for k, v in (given or {}).items()}
    for flag, key, value in (
        ("--spec-method", "method", args.spec_method),
        ("--spec-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if key in asked:
            raise ValueError(
                f"{flag} and --speculative-config['{key}'] are mutually exclusive"
            )
        asked[key] = value
    return asked


def _create_ours(
    stock: Create,
    args: EngineArgs,
    asked: dict[str, Any],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> SpeculativeConfig:
    config, stock_part = parse_speculative_config(
        asked, SpeculativeConfig.__dataclass_fields__, _gain_was_measured()
    )
    _refuse_unsupported(args, stock_part, model_config, parallel_config)
    if stock_part.get(ADAPTIVE) and not may_run_on_v2(config):
        raise ValueError(ADAPTIVE_NEEDS_V2)
    config = _settle_draft_length(config, asked)
    may_be_async = _settle_async_scheduling(args, config)
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        refuse_options(config)
    model = stock_part.get("model")
    has_head = False
    if model:
        check_draft_weights(model, args.load_format)
        has_head = is_eagle3_head(model, stock_part.get("revision"), model_config)

    stock_args = _stock_args(args, config, stock_part, has_head)
    try:
        spec_config = stock(stock_args, model_config, parallel_config)
    except ValueError as error:
        for words, message in _WRONG_DRAFTERS.items():
            if words in str(error):
                raise ValueError(message) from error
        raise
    assert spec_config is not None
    if model:
        refuse_drafter(spec_config)
        if not has_head:  # which has none
            check_draft_tokenizer(model, stock_part.get("revision"), model_config)
    attach_tag(spec_config)
    install_serving_hooks()
    parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
    args.scheduler_cls = SCHEDULER
    if not current_platform.is_cpu():
        widen_capture_sizes(args, 1 + config.max_draft_tokens)
    if not may_be_async:
        args.async_scheduling = False  # vLLM 0.33 leaves it on for its V2 runner
    args.additional_config = {
        **args.additional_config,
        ADDITIONAL_CONFIG_KEY: config.model_dump(),
        LOG_STATS_KEY: not args.disable_log_stats,
    }
    logger.info("vllm-emssd %s is on: %s", __version__, config)
    return spec_config


def _stock_args(
    args: EngineArgs, config: EmssdConfig, stock_part: dict[str, Any], has_head: bool
) -> EngineArgs:
    """A copy of `args` that asks for a method that vLLM knows."""
    stock_args = copy.copy(args)
    stock_args.spec_method = stock_args.spec_model = stock_args.spec_tokens = None
    if has_head:
        # vLLM computes a cached prompt's last block again for its own heads, as theirs
        # need the hidden states; ours goes on with the K/V that it has, or begins anew.
        method = {"method": "eagle3", "disable_eagle_block_drop": True}
    elif config.uses_draft_model:
        method = {"method": "draft_model"}
    elif may_run_on_v2(config):
        method = {"method": "ngram_gpu"}  # has texts on the device, for us to look at
    else:
        method = {"method": "custom_class", "model": COPY_DRAFTER}
    num_drafts = {"num_speculative_tokens": config.max_draft_tokens}
    stock_args.speculative_config = stock_part | method | num_drafts
    return stock_args


def _refuse_unsupported(
    args: EngineArgs,
    stock_part: dict[str, Any],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> None:
    parallel, num_ranks = parallel_config, parallel_config.tensor_parallel_size
    draft_ranks = stock_part.get("draft_tensor_parallel_size")
    for is_asked_for, what in (
        (
            parallel.pipeline_parallel_size > 1,
            "does not support pipeline parallelism: vLLM's V1 runner has the drafter "
            "on the last rank only. Set --pipeline-parallel-size 1 (use "
            "--tensor-parallel-size instead).",
        ),
        (
            parallel.worker_cls not in {"auto", CPU_WORKER, GPU_WORKER},
            f"brings its own worker class; remove --worker-cls {parallel.worker_cls}.",
        ),
        (
            args.scheduler_cls not in {None, SCHEDULER},
            "brings its own scheduler class; remove --scheduler-cls "
            f"{args.scheduler_cls}.",
        ),
        (
            not isinstance(args.additional_config, dict),
            "keeps its options in --additional-config, which must be a dictionary, "
            f"got {type(args.additional_config).__name__}.",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "does not support decode context parallelism; set "
            "--decode-context-parallel-size 1.",
        ),
        (
            parallel.data_parallel_size > 1 and model_config.is_moe,
            "does not support data parallelism with a mixture-of-experts target, "
            "whose ranks must run drafters in step; set --data-parallel-size 1.",
        ),
        (
            draft_ranks not in (None, num_ranks),
            f"splits the draft model over all workers of the target, but "
            f"'draft_tensor_parallel_size' {draft_ranks} differs from "
            f"--tensor-parallel-size {num_ranks}. Remove it, or make both the same.",
        ),
    ):
        if is_asked_for:
            raise ValueError(f"{METHOD_NAME} {what}")
    refuse_target(model_config)


def _gain_was_measured() -> bool:
    """Of automatic lengths, and of copies beside a draft model's drafts."""
    return current_platform.is_cpu() and not prefers_v2()


def _settle_draft_length(config: EmssdConfig, asked: dict[str, Any]) -> EmssdConfig:
    """Automatic lengths by default where their gain was measured. Elsewhere only if
    asked for; raises ValueError where costs are not measured."""
    if config.draft_length != "auto" or _gain_was_measured():
        return config
    if asked.get("draft_length") != "auto":
        logger.warning(
            "draft_length is fixed here: automatic lengths are the default on CPUs "
            "with vLLM's V1 model runner only, where their gain was measured. At high "
            "load fixed lengths can be slower than no speculation."
        )
        fixed: dict[str, Any] = {"draft_length": "fixed"}
        if config.uses_draft_model and asked.get("num_speculative_tokens") is None:
            fixed["num_speculative_tokens"] = MAX_FIXED_DRAFTS
        return config.model_copy(update=fixed)
    if not (config.uses_draft_model and may_run_on_v2(config)):
        raise ValueError(AUTO_NEEDS_V2)
    return config  # if vLLM chooses V1 after all, our runner refuses


def _settle_async_scheduling(args: EngineArgs, config: EmssdConfig) -> bool:
    """Whether vLLM may schedule a step before the last one's tokens are known: on its
    V2 runner. Raises ValueError where it was asked for and cannot be. On CPUs vLLM
    itself turns it off again.
    """
    is_possible = may_run_on_v2(config)
    if args.async_scheduling and not is_possible:
        raise ValueError(
            '"method": "emssd" knows how many drafts a step has before its tokens are '
            "sampled only with its own proposers on vLLM's V2 model runner; use that, "
            "or remove --async-scheduling."
        )
    return is_possible and args.async_scheduling is not False
