"""What a pool asks of vLLM's compilation and CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool import PoolShare

_GRAPHS = "-cc.mode=none -cc.cudagraph_mode=FULL_DECODE_ONLY"
_WHOLE = (CUDAGraphMode.NONE, CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY)
"""Graphs of whole forward passes: a streamed pass cannot be cut into several."""


def check_compilation(wanted: Mapping[str, Any], compilation: CompilationConfig) -> None:
    """Raise PoolError if the pool of ``additional_config`` cannot run as it would be compiled."""
    share = PoolShare.from_json(wanted["share"])
    if share.mode == "none" or current_platform.is_cpu():
        return
    if compilation.mode != CompilationMode.NONE or compilation.cudagraph_mode not in _WHOLE:
        raise PoolError(
            f"a pool cannot be compiled, nor captured in parts: add {_GRAPHS} behind --, or leave "
            f"out --no-enforce-eager"
        )
    if share.ship_bytes and compilation.cudagraph_mode != CUDAGraphMode.NONE:
        raise PoolError(
            "rows cannot be shipped from CUDA graphs: use --pool streamed, or leave out "
            "--no-enforce-eager"
        )
