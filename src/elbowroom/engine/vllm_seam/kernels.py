"""The kernel that vLLM's CPU engine multiplies with, without vLLM: from its library alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.nn import functional

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Pack = Callable[[torch.Tensor], torch.Tensor]


def find_kernel(dtype: torch.dtype = torch.bfloat16) -> tuple[Pack, Linear]:
    """What brings a matrix [out, in] of ``dtype`` into a kernel's form, and that kernel.

    vLLM's own, which the engine runs, from its library; PyTorch's where it has none for this dtype
    or this CPU. Of few rows they differ by a factor of two.
    """
    if dtype == torch.bfloat16 and _load_vllm_kernels():
        return torch.ops._C.convert_weight_packed, _packed_linear
    return lambda weight: weight, functional.linear


def _load_vllm_kernels() -> bool:
    """Whether vLLM's packed kernel for bf16 can be had on this CPU."""
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        library = Path(folder) / "_C.abi3.so"
        if library.exists() and torch.cpu._is_avx512_bf16_supported():
            with suppress(OSError):  # of another PyTorch, or without a library that it needs
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return hasattr(torch.ops._C, "weight_packed_linear")


def _packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
    torch.ops._C.weight_packed_linear(out, x, packed, None, True)
    return out
