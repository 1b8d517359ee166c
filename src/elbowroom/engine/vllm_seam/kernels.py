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
    if torch.cpu._is_avx512_bf16_supported():
        _load_library("_C.abi3.so")
    return hasattr(torch.ops._C, "weight_packed_linear")


def _load_library(name: str) -> bool:
    """Load a library of vLLM's without vLLM. False where it cannot be."""
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        with suppress(OSError):  # not there, of another PyTorch, or without what it needs
            torch.ops.load_library(Path(folder) / name)  # type: ignore[no-untyped-call]
            return True
    return False


def _packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
    torch.ops._C.weight_packed_linear(out, x, packed, None, True)
    return out


class OwnKernels:
    """What this CPU has, and vLLM's library, which is loaded."""

    @property
    def has_amx(self) -> bool:
        return bool(torch.cpu._is_amx_tile_supported())

    def has_operator(self, name: str) -> bool:
        """Whether there is such an operator; one that takes nothing stands for a missing one."""
        operator = getattr(torch.ops._C, name, None)
        return operator is not None and bool(operator.default._schema.arguments)


def own_kernels() -> OwnKernels | None:
    """What vLLM has for this CPU: of its libraries for x86-64, the one that it would load here.

    None where it cannot be loaded, and on CPUs that multiply FP8, for which it has further kernels.
    """
    library = "_C_AVX2.abi3.so"
    if torch.cpu._is_avx512_supported():
        library = "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"
    if not _load_library(library) or torch.ops._C.cpu_has_amx_fp8():
        return None
    return OwnKernels()
