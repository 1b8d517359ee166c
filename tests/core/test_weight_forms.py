"""Forms of quantised weights, told from the configs that the tools of quantisation write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elbowroom.core.model_config import parse_config
from elbowroom.core.weight_forms import QuantisedWeights, WeightForm, quantised_weights
from tests.planning.facts import CONFIGS

FORMS = {form.name: form for form in WeightForm}


def _compressed(kind: str, bits: int, strategy: str, activations: Any = None, **more: Any) -> Any:
    weights = {"type": kind, "num_bits": bits, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def _gptq(bits: int, **more: Any) -> Any:
    return {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": True, **more}


DYNAMIC, FIXED = {"num_bits": 8, "dynamic": True}, {"num_bits": 8, "dynamic": False}
QUARK = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"quant_method": "awq", "bits": 4}, "INT4"),
        ({"quant_method": "AWQ", "w_bit": 4}, "INT4"),
        (_gptq(4), "INT4"),
        (_gptq(4, desc_act=True), "INT4_ORDERED"),
        (_gptq(4, desc_act=True, group_size=-1), "INT4"),
        (_gptq(4, sym=False), "INT4_UNEVEN"),
        (_gptq(8), "INT8_ALONE"),
        (_gptq(3), "INT_OTHER"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8_MATRIX"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8_BLOCK"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8_MATRIX"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, None),
        ({"quant_method": "quark", "global_quant_config": {"weight": QUARK}}, "FP8_MATRIX"),
        ({"quant_method": "quark", "global_quant_config": {"weight": None}}, None),
        (_compressed("int", 4, "group", group_size=128), "INT4"),
        (_compressed("int", 4, "group", actorder="group"), "INT4_ORDERED"),
        (_compressed("int", 4, "group", actorder="weight"), "INT4"),
        (_compressed("int", 8, "channel", DYNAMIC), "INT8"),
        (_compressed("int", 8, "group"), "INT8_ALONE"),
        (_compressed("int", 2, "group"), "INT_OTHER"),
        (_compressed("float", 8, "channel", DYNAMIC), "FP8_ROW"),
        (_compressed("float", 8, "channel", FIXED), "FP8_ROW_FIXED"),
        (_compressed("float", 8, "tensor", FIXED), "FP8_MATRIX"),
        (_compressed("float", 8, "block", DYNAMIC), "FP8_BLOCK"),
        (_compressed("float", 8, "channel"), "FP8_ALONE"),
        (_compressed("float", 8, "group", DYNAMIC, group_size=32), None),
        (_compressed("float", 4, "tensor_group", group_size=16), "NVFP4"),
        (_compressed("float", 4, "group", group_size=32), "MXFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": 4}, None),
        ({"quant_method": "gptq", "bits": [4]}, "INT_OTHER"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, None),
        (_compressed("float", [8], "channel"), None),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value),
)
def test_the_form_of_a_config(config: dict[str, Any], form: str | None) -> None:
    found = quantised_weights(config, has_matrices=True, has_experts=False)
    assert found.matrices == ((FORMS[form],) if form else ())
    assert (found.experts, found.is_told) == ((), form is not None)


def test_experts_have_forms_of_their_own() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}},
        "b": {
            "targets": ["re:.*experts.*"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16},
        },
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    both = quantised_weights(config, has_matrices=True, has_experts=True)
    assert both.matrices == (WeightForm.INT8_ALONE,)
    assert both.experts == (WeightForm.INT8_ALONE, WeightForm.NVFP4)
    only = quantised_weights(config, has_matrices=False, has_experts=True)
    assert (only.matrices, only.experts) == ((), both.experts)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("deepseek-v3", "FP8_BLOCK"),
        ("gpt-oss-20b", "MXFP4"),
        ("llama-3.1-70b-awq", "INT4"),
        ("llama-3.1-70b-fp8", "FP8_MATRIX"),
        ("qwen3-235b-a22b-fp8", "FP8_BLOCK"),
    ],
)
def test_public_configs(name: str, form: str) -> None:
    quantization = parse_config(json.loads((CONFIGS / f"{name}.json").read_text())).quantization
    assert quantization is not None
    assert quantised_weights(quantization, has_matrices=True, has_experts=True).experts == (
        FORMS[form],
    )


@pytest.mark.parametrize(
    ("method", "takes"), [("compressed-tensors", True), ("awq", False), ("gptq", False)]
)
def test_float32(method: str, takes: bool) -> None:
    assert QuantisedWeights(method).takes_float32 == takes
