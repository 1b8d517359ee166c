"""What vLLM has kernels for on CPUs, by our table, by its library and by its own words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.platforms import PlatformEnum, current_platform

from elbowroom.core.weight_forms import QuantisedWeights, WeightForm
from elbowroom.engine.vllm_seam.kernels import own_kernels
from elbowroom.engine.vllm_seam.quantised import is_known_engine, why_no_kernel, why_not_known
from elbowroom.jobs.identity import engine_version
from tests.tiny_model import write_model

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu() or not is_known_engine(engine_version()),
    reason="the table is of vLLM 0.31 and 0.32 on x86-64",
)

WeightForms = tuple[WeightForm, ...]
INT4, INT8, ROW, MATRIX, BLOCK = (
    *(WeightForm.INT4, WeightForm.INT8, WeightForm.FP8_ROW),
    *(WeightForm.FP8_MATRIX, WeightForm.FP8_BLOCK),
)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A CPU and its library, as they were seen to be."""

    operators: frozenset[str]
    has_amx: bool = False

    def has_operator(self, name: str) -> bool:
        return name in self.operators


_AVX2 = frozenset({"onednn_scaled_mm"})
_AVX512 = _AVX2 | {"cpu_gemm_wna16"}
_NEWEST = _AVX512 | {"fp8_scaled_mm_cpu", "fused_experts_cpu"}


@pytest.mark.parametrize(
    ("kernels", "matrices", "experts"),
    [
        (Kernels(_AVX2), {INT8, ROW}, set()),
        (Kernels(_AVX512), {INT4, INT8, ROW}, set()),
        (Kernels(_NEWEST), {INT4, INT8, ROW}, set()),
        (
            Kernels(_NEWEST, has_amx=True),
            {INT4, INT8, ROW, BLOCK},
            {INT4, INT8, BLOCK, WeightForm.MXFP4},
        ),
    ],
    ids=["AVX2", "AVX512", "AVX512_BF16", "AMX"],
)
def test_forms_that_run(
    kernels: Kernels, matrices: set[WeightForm], experts: set[WeightForm]
) -> None:
    def runs(weights: QuantisedWeights) -> bool:
        return why_no_kernel(weights, kernels) is None

    assert {f for f in WeightForm if runs(QuantisedWeights("x", (f,)))} == matrices
    assert {f for f in WeightForm if runs(QuantisedWeights("x", (), (f,)))} == experts
    assert runs(QuantisedWeights("x"))


def test_the_reason_names_what_would_run() -> None:
    why = why_no_kernel(QuantisedWeights("gptq", (INT4,)), Kernels(_AVX2))
    assert why is not None
    for words in (f"{INT4.value} (gptq)", "no kernel on this CPU", "bfloat16", INT8.value):
        assert words in why
    assert why.count(INT4.value) == 1, "what does not run is not among what does"
    why = why_no_kernel(QuantisedWeights("fp8", (INT8,), (BLOCK,)), Kernels(_NEWEST))
    assert why is not None
    assert "its experts are FP8" in why
    assert "AMX" in why


def test_the_library_is_asked() -> None:
    kernels = own_kernels()
    assert kernels is not None
    assert kernels.has_amx == torch.cpu._is_amx_tile_supported()
    assert kernels.has_operator("onednn_scaled_mm")
    assert kernels.has_operator("cpu_gemm_wna16") == torch.cpu._is_avx512_supported()
    assert not kernels.has_operator("static_scaled_fp8_quant"), "it is there, and takes nothing"
    assert not kernels.has_operator("no_such_operator")


def test_vllm_says_the_same() -> None:
    """Its classes of kernels tell what they are for, and its tables of platforms what there is."""
    own = own_kernels()
    assert own is not None

    def runs(form: WeightForm, *, of_experts: bool = False) -> bool:
        forms = ((), (form,)) if of_experts else ((form,), ())
        return why_no_kernel(QuantisedWeights("x", *forms), own) is None

    cpu = PlatformEnum.CPU
    blocks = linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu]
    assert runs(BLOCK) == any(kernel.is_supported()[0] for kernel in blocks)
    assert runs(INT8) == any(k.is_supported()[0] for k in linear._POSSIBLE_INT8_KERNELS[cpu])
    for form, kernels in (
        (WeightForm.FP8_ALONE, linear._POSSIBLE_WFP8A16_KERNELS),
        (WeightForm.NVFP4, linear._POSSIBLE_NVFP4_KERNELS),
        (WeightForm.MXFP4, linear._POSSIBLE_MXFP4_KERNELS),
    ):
        assert runs(form) == bool(kernels.get(cpu)), form
    for form, experts in (
        (BLOCK, cpu_moe.CPUExpertsFp8),
        (INT4, cpu_moe.CPUExpertsInt4),
        (INT8, cpu_moe.CPUExpertsInt8),
        (WeightForm.MXFP4, cpu_moe.CPUExpertsMxfp4),
    ):
        assert runs(form, of_experts=True) == experts._supports_current_device(), form


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        (
            {
                "quant_method": "auto-round",
                **{"bits": 4, "group_size": 128, "sym": True},
                "packing_format": "auto_round:auto_gptq",
            },
            None,
        ),
    ],
    ids=["bitsandbytes", "auto-round"],
)
def test_vllm_is_asked_what_it_knows(
    tmp_path: Path, quantization: dict[str, object], said: str | None
) -> None:
    architectures = ["LlamaForCausalLM"]
    write_model(tmp_path, architectures=architectures, quantization_config=quantization)
    why = why_not_known(tmp_path)
    assert (why is None) if said is None else (why is not None and said in why)


@pytest.mark.vllm
def test_a_folder_that_vllm_cannot_read_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    assert why_not_known(tmp_path) is None
