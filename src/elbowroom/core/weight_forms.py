"""Forms of quantised weights, told from a config: each needs kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple


class WeightForm(Enum):
    """A kind of quantised weights, in words for people."""

    INT4 = "4-bit integers"
    INT4_ORDERED = "4-bit integers in the order of their activations (desc_act)"
    INT4_UNEVEN = "4-bit integers of GPTQ that are not symmetric"
    INT8 = "8-bit integers with 8-bit activations"
    INT8_ALONE = "8-bit integers with 16-bit activations"
    INT_OTHER = "integers of neither 4 nor 8 bits"
    FP8_MATRIX = "FP8 with one scale for a whole matrix"
    FP8_ROW = "FP8 with a scale for each row"
    FP8_ROW_FIXED = "FP8 with a scale for each row and fixed ones for activations"
    FP8_BLOCK = "FP8 with a scale for each block"
    FP8_ALONE = "FP8 with 16-bit activations"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"


class QuantisedWeights(NamedTuple):
    """How a model's weights are quantised: the forms of matrices outside and inside experts.

    ``is_told`` is False where the config does not tell a form in a way that is known here.
    """

    method: str
    matrices: tuple[WeightForm, ...] = ()
    experts: tuple[WeightForm, ...] = ()
    is_told: bool = True

    @property
    def stays_in_tensors(self) -> bool:
        """Whether vLLM, on CPUs too, computes from tensors that others can hold for it.

        Of the forms that run on CPUs only one does; weights of others go into kernels' handles.
        """
        return self.is_told and {*self.matrices, *self.experts} == {WeightForm.FP8_ROW}

    @property
    def takes_float32(self) -> bool:
        """Whether vLLM computes in float32 with such weights."""
        return self.method in _TAKE_FLOAT32


_TAKE_FLOAT32 = ("compressed-tensors", "torchao")
_AWQ = ("awq", "auto_awq", "awq_marlin")
_GPTQ = ("gptq", "auto_gptq", "gptq_marlin")
_FLOATS = ("fp8", "modelopt", "modelopt_fp8", "modelopt_fp4")
_ALGORITHMS = {"FP8": WeightForm.FP8_MATRIX, "NVFP4": WeightForm.NVFP4}
_FP8_SCALES = {
    "tensor": WeightForm.FP8_MATRIX,
    "channel": WeightForm.FP8_ROW,
    "block": WeightForm.FP8_BLOCK,
}
_ORDERED = (True, "group", "dynamic")
_FP4_GROUPS = {16: WeightForm.NVFP4, 32: WeightForm.MXFP4}


def quantised_weights(
    quantization: Mapping[str, Any], *, has_matrices: bool, has_experts: bool
) -> QuantisedWeights:
    """What a ``quantization_config`` says of weights that lie outside experts, and in experts."""
    method = quantization.get("quant_method")
    method = method.lower() if isinstance(method, str) else "in an unknown way"
    forms = list(_forms(method, quantization))
    return QuantisedWeights(
        method,
        tuple(form for form, of_experts in forms if has_matrices and not of_experts),
        tuple(form for form, _ in forms if has_experts),
        bool(forms),
    )


def _forms(method: str, config: Mapping[str, Any]) -> Iterator[tuple[WeightForm, bool]]:
    """Each form, and whether it is that of experts alone."""
    if method in _AWQ:
        yield _integers(config.get("bits", config.get("w_bit", 4)), WeightForm.INT8_ALONE), False
    elif method in _GPTQ:
        yield _gptq(config), False
    elif method in _FLOATS:
        algorithm = "FP8" if method == "fp8" else str(config.get("quant_algo", "")).upper()
        if config.get("weight_block_size"):
            yield WeightForm.FP8_BLOCK, False
        elif algorithm in _ALGORITHMS:
            yield _ALGORITHMS[algorithm], False
    elif method == "quark" and _is_fp8_of_quark(config):
        yield WeightForm.FP8_MATRIX, False
    elif method == "mxfp4":
        yield WeightForm.MXFP4, True
    elif method == "compressed-tensors":
        groups = config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and (form := _compressed(group)) is not None:
                targets = str(group.get("targets") or "Linear").split(",")
                yield form, all("expert" in name for name in targets)


def _is_fp8_of_quark(config: Mapping[str, Any]) -> bool:
    overall = config.get("global_quant_config")
    weight = overall.get("weight") if isinstance(overall, dict) else None
    found = (weight.get("dtype"), weight.get("qscheme")) if isinstance(weight, dict) else None
    return found == ("fp8_e4m3", "per_tensor")


def _integers(bits: Any, of_eight: WeightForm) -> WeightForm:
    return {4: WeightForm.INT4, 8: of_eight}.get(_int(bits), WeightForm.INT_OTHER)


def _int(value: Any) -> int:
    """A whole number; 0 for what is none, as in a config that vLLM will refuse."""
    return value if type(value) is int else 0


def _gptq(config: Mapping[str, Any]) -> WeightForm:
    form = _integers(config.get("bits", 4), WeightForm.INT8_ALONE)
    if form is WeightForm.INT4 and config.get("sym") is False:
        return WeightForm.INT4_UNEVEN
    if form is WeightForm.INT4 and config.get("desc_act") and config.get("group_size") != -1:
        return WeightForm.INT4_ORDERED
    return form


def _compressed(group: Mapping[str, Any]) -> WeightForm | None:
    """The form of a group of modules in the format ``compressed-tensors``."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        return None
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    if kind == "int":
        form = _integers(bits, WeightForm.INT8 if activations else WeightForm.INT8_ALONE)
        is_ordered = form is WeightForm.INT4 and weights.get("actorder") in _ORDERED
        return WeightForm.INT4_ORDERED if is_ordered else form
    if bits == 4:
        return _FP4_GROUPS.get(_int(weights.get("group_size")))
    scales = _FP8_SCALES.get(str(weights.get("strategy"))) if bits == 8 else None
    if scales is None or not isinstance(activations, dict):
        return scales and WeightForm.FP8_ALONE
    is_fixed = scales is WeightForm.FP8_ROW and activations.get("dynamic") is False
    return WeightForm.FP8_ROW_FIXED if is_fixed else scales
