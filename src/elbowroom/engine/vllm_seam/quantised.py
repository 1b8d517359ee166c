"""Which quantised weights vLLM's engine for CPUs has kernels for, of 0.31 and 0.32.

vLLM finds out while it builds or loads a model, or at its first row. What a kernel needs was seen
in its sources, and by running tiny models of every form on a CPU with AVX-512, and with AVX2 alone;
none with AMX was there. What a machine has is asked of the library itself.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from elbowroom.core.weight_forms import QuantisedWeights, WeightForm

_VERSIONS = re.compile(r" 0\.3[12]\.")
_SECONDS = 180.0
"""Longest time for vLLM's answer: it needs eight seconds on an idle machine."""

_PLAIN = "bfloat16, float16 or float32"
_ASK = """
import json, sys
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
try:
    ModelConfig(model=sys.argv[1])
    answer = ""
except Exception as error:
    answer = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
print(json.dumps(answer))
"""
_REFUSED = re.compile(r"(?:Value error, )?(.*quantization method.*)")


class CpuKernels(Protocol):
    """What a CPU and vLLM's library for it have."""

    @property
    def has_amx(self) -> bool:
        """Whether the CPU multiplies tiles (AMX)."""
        ...

    def has_operator(self, name: str) -> bool:
        """Whether the library has an operator ``name`` that can be called."""
        ...


class Needs(NamedTuple):
    """An operator of vLLM's library, and whether its kernel is for AMX alone. None: PyTorch's."""

    operator: str | None = None
    amx: bool = False

    def are_met(self, kernels: CpuKernels) -> bool:
        has_operator = self.operator is None or kernels.has_operator(self.operator)
        return has_operator and (kernels.has_amx or not self.amx)


_EXPERTS = Needs("fused_experts_cpu", amx=True)
_OF_MATRICES = {
    WeightForm.INT4: Needs("cpu_gemm_wna16"),
    WeightForm.INT8: Needs("onednn_scaled_mm"),
    WeightForm.FP8_ROW: Needs(),
    # Matrices that vLLM joins are brought to one scale when they are loaded, by this operator.
    WeightForm.FP8_MATRIX: Needs("static_scaled_fp8_quant"),
    WeightForm.FP8_BLOCK: Needs("fp8_scaled_mm_cpu", amx=True),
}
_OF_EXPERTS = {
    WeightForm.INT4: _EXPERTS,
    WeightForm.INT8: _EXPERTS,
    WeightForm.FP8_BLOCK: _EXPERTS,
    WeightForm.MXFP4: _EXPERTS,
}
"""What each form needs. Forms that are not here have no kernel on any CPU."""


def is_known_engine(version: str) -> bool:
    """Whether an engine, as ``jobs.identity.engine_version`` names it, has the kernels above.

    On other CPUs than x86-64, and with AMD's own kernels (zentorch), vLLM has others.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and _VERSIONS.search(version) is not None and find_spec("zentorch") is None


def why_no_kernel(weights: QuantisedWeights, kernels: CpuKernels) -> str | None:
    """Why an engine cannot run such weights, and which it can; None where it can."""
    for what, forms, needs in (
        ("weights", weights.matrices, _OF_MATRICES),
        ("experts", weights.experts, _OF_EXPERTS),
    ):
        for form in forms:
            need = needs.get(form)
            if need is None or not need.are_met(kernels):
                runs = "; ".join([_PLAIN, *_that_run(needs, kernels)])
                return (
                    f"its {what} are {form.value} ({weights.method}), for which vLLM has "
                    f"{_lack(need)}. What runs here as {what}: {runs}"
                )
    return None


def _lack(need: Needs | None) -> str:
    if need is None:
        return "no kernel for CPUs"
    return "a kernel for CPUs with AMX alone" if need.amx else "no kernel on this CPU"


def _that_run(needs: dict[WeightForm, Needs], kernels: CpuKernels) -> Iterator[str]:
    return (form.value for form, need in needs.items() if need.are_met(kernels))


def why_not_known(model_dir: Path) -> str | None:
    """What vLLM says of a model whose way of quantisation it does not know; None where it does.

    Asked in a process of its own, as vLLM takes seconds to import; None, too, where that fails.
    """
    command = [sys.executable, "-c", _ASK, str(model_dir)]
    with suppress(OSError, subprocess.SubprocessError, ValueError, LookupError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        ).stdout
        refused = _REFUSED.search(json.loads(answer.strip().splitlines()[-1]))
        return refused and refused.group(1).strip()
    return None
