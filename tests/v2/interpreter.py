"""Lets vLLM's V2 model runner run on a CPU, under Triton's interpreter. For tests only.

Call `install` before anything imports vLLM or decorates a Triton kernel.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


def install() -> None:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    pretend_cpu_backend()
    _patch_language_once()
    _mend_comparisons()
    _skip_overflow_checks()
    _add_log1p()


def pretend_cpu_backend() -> None:
    """vLLM asks for a "cpu" backend of Triton and looks no further than its name."""
    import triton.backends
    from triton.backends.driver import DriverBase

    def nothing(self: Any, *args: Any) -> None: ...

    names = set(DriverBase.__abstractmethods__) - {"is_active"}
    members = dict.fromkeys(names, nothing) | {
        "__init__": nothing,
        "is_active": classmethod(lambda cls: False),
    }
    driver = type("InterpretedCpu", (DriverBase,), members)
    triton.backends.backends["cpu"] = triton.backends.Backend(
        compiler=None, driver=driver
    )


def _patch_language_once() -> None:
    """For good: the interpreter does it at each call of a kernel, and of each function
    in it, which takes most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    kernel = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(kernel)
    kept = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: kept


def _skip_overflow_checks() -> None:
    """Of each sum and product, which a GPU does not make either."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


def _mend_comparisons() -> None:
    """The interpreter types a comparison's result as its operands, so that splatting a
    scalar condition makes an integer mask of it."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary_op = InterpreterBuilder.binary_op

    def with_bool_type(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return result

    InterpreterBuilder.binary_op = with_bool_type


def _add_log1p() -> None:
    """Device functions return None under the interpreter."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any, _semantic: Any = None) -> Any:
        handle = TensorHandle(np.log1p(x.handle.data), x.handle.dtype)
        return tl.core.tensor(handle, x.type)

    libdevice.log1p = log1p


def schedule_asynchronously(wanted: bool) -> None:
    """Whether engines started from now on may. vLLM's CPU platform never does, for want
    of a device to wait for; but nothing else is in the way of it."""
    from vllm.platforms.cpu import CpuPlatform

    stock = vars(CpuPlatform).get("_stock_check", CpuPlatform.check_and_update_config)

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        scheduler_config = vllm_config.scheduler_config
        was_async = scheduler_config.async_scheduling
        stock(vllm_config)
        scheduler_config.async_scheduling = wanted and was_async

    CpuPlatform._stock_check = staticmethod(stock)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def filter_by_torch() -> None:
    """`top_k` and `top_p` by vLLM's own code without Triton, whose interpreter lacks
    what the kernel uses. Call it once vLLM is imported."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = (
        topk_topp_sampler.apply_top_k_top_p_pytorch
    )
