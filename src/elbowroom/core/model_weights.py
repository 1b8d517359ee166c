"""How much of a model's weights lies where: feed-forward layers, attention, everything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.model_config import ModelConfig
from elbowroom.core.model_shapes import Stored
from elbowroom.core.weight_forms import QuantisedWeights, quantised_weights

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_FFN = re.compile(
    r"(?:^|\.)(?:layers|h|blocks)\.\d+\."
    r"(?:(?:mlp|feed_forward|ffn|block_sparse_moe|block_sparse_mlp|moe|shared_mlp)\.|fc[12]\."
    r"|mixer\.(?:up_proj|down_proj|experts|shared_experts)\.)"  # Nemotron-H calls all layers so
)
_LOOSE = re.compile(r"\.\d+\.fc[12]\.")
_OTHER_PARTS = re.compile(
    r"(?:^|\.)(?:vision|visual|vit|vpm|apm|audio|image|speech|multi_modal|mm_|talker|token2wav"
    r"|code2wav|mtp)|^(?:model\.)?encoder\."
)
"""Parts that read or make pictures or sound, or predict further tokens: they have own blocks."""

_HEAD = re.compile(r"(?:^|\.)lm_head\.")
_NOT_LOADED = re.compile(r"\.attn\.(?:masked_)?bias$|rotary_emb\.inv_freq$|(?:^|\.)mtp\.")
_SCALE = re.compile(r"(?:scale|scales|scale_inv|scale_2|qzeros|zeros|zero_point|g_idx|absmax)$")
"""Numbers by which a quantised matrix is scaled, and no elements of it."""

_GATE = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate)\.")

_LEFT_OUT_KEYS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
_TEXT_MODULE = re.compile(r"(?:^|(?<=\.))(?:language_model|model)\.")
"""What stands before a text model's layers: in a checkpoint, and in the class, in another order."""

_COMPUTES_IN_FP8 = ("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp8")


class Weights(NamedTuple):
    """Some weights: how many elements, of which ``packed`` are kept as stored, in so many bytes."""

    elements: int = 0
    packed: int = 0
    packed_bytes: int = 0

    def plus(self, elements: int, packed: int = 0, packed_bytes: int = 0) -> Weights:
        return Weights(
            self.elements + elements, self.packed + packed, self.packed_bytes + packed_bytes
        )

    def num_bytes(self, element_bytes: int) -> int:
        """Bytes where every other element takes ``element_bytes``."""
        return self.packed_bytes + (self.elements - self.packed) * element_bytes


@dataclass
class CountedWeights:
    """Weights of a decoder: ``ffn[l]`` are layer l's, of which ``experts[l]`` are routed experts.

    ``others[l]`` are its other matrices: attention, routers, and networks that are not recognised.
    ``rest`` is everything outside ``ffn``, of which ``outside`` elements are of parts that text
    does not pass, such as a vision tower. ``is_loose`` says that feed-forward matrices lie in their
    layer without a module of their own (OPT).
    """

    ffn: list[Weights]
    experts: list[Weights]
    others: list[Weights]
    rest: Weights = field(default_factory=Weights)
    outside: int = 0
    is_loose: bool = False


def count_weights(tensors: Mapping[str, Stored], config: ModelConfig) -> CountedWeights:
    """Count the weights that an engine loads.

    Layers beyond the model's last, which predict further tokens, are not loaded, nor is a head that
    is tied to the embedding.
    """
    ffn, experts, others = ([Weights()] * config.num_layers for _ in range(3))
    counted = CountedWeights(ffn, experts, others)
    bits = stored_bits(config.quantization)
    for name, tensor in tensors.items():
        of_text = not _OTHER_PARTS.search(name)
        match = _LAYER.search(name) if of_text else None
        layer = int(match.group(1)) if match else None
        if _NOT_LOADED.search(name) or (_HEAD.search(name) and config.ties_embeddings):
            continue
        if layer is not None and layer >= config.num_layers:
            continue
        size = _size(name, tensor, bits)
        is_matrix = len(tensor.shape) >= 2
        is_router = config.num_experts > 0 and _GATE.search(name) is not None
        is_ffn = _FFN.search(name) is not None and not is_router
        if layer is not None and is_ffn and (is_matrix or size.packed_bytes):
            counted.ffn[layer] = counted.ffn[layer].plus(*size)
            counted.is_loose = counted.is_loose or bool(_LOOSE.search(name))
            if _is_expert(name, tensor, config):
                counted.experts[layer] = counted.experts[layer].plus(*size)
            continue
        counted.rest = counted.rest.plus(*size)
        counted.outside += 0 if of_text else size.elements
        if layer is not None and is_matrix:
            counted.others[layer] = counted.others[layer].plus(*size)
    return counted


def quantised(tensors: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Tensors that follow from a config, quantised where its ``quantization_config`` says so.

    Scales are counted with their matrix.
    """
    bits = stored_bits(config.quantization)
    if bits is None or config.quantization is None:
        return dict(tensors)
    bytes_each = bits / 8 + _scale_bytes(config.quantization, bits)
    left_out = _left_out(config.quantization)
    only_experts = config.quantization.get("quant_method") == "mxfp4"
    found = {}
    for name, tensor in tensors.items():
        takes = (
            tensor.dtype is None  # a file says what it stores
            and _is_layer_matrix(name, tensor)
            and ("experts" in name or not only_experts)
            and not (left_out and _is_left_out(name, left_out))
        )
        num_bytes = int(tensor.num_elements * bytes_each)
        found[name] = Stored(tensor.shape, "PACKED", num_bytes) if takes else tensor
    return found


def _is_layer_matrix(name: str, tensor: Stored) -> bool:
    """Whether a tensor is of the kind that is quantised: a layer's matrices, and no router."""
    if _LAYER.search(name) is None or _GATE.search(name):
        return False
    is_fused = "experts" in name and len(tensor.shape) == 3  # their biases have two dimensions
    return is_fused or (name.endswith(".weight") and len(tensor.shape) == 2)


def _left_out(quantization: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """Patterns of the modules that a config leaves unquantised.

    They are named in full or in part, part by part of their path; with ``*``; or by a regular
    expression after ``re:``. Raises ValueError for one that is none.
    """
    found = []
    for name in (name for key in _LEFT_OUT_KEYS for name in _names(quantization.get(key))):
        text = str(name)
        if text.startswith("re:"):
            pattern = text.removeprefix("re:")
        else:
            parts = re.escape(_module(text.strip("."))).replace(r"\*", ".*")
            pattern = rf"(?:^|\.){parts}(?:\.|$)"
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"'{text}' names no modules: {error}") from error
    return found


def _is_left_out(name: str, left_out: list[re.Pattern[str]]) -> bool:
    module = _module(name)
    return any(found.search(module) or found.search(f"model.{module}") for found in left_out)


def _module(name: str) -> str:
    """The module of a tensor, by a name that checkpoints and classes share."""
    return _TEXT_MODULE.sub("", name.removesuffix(".weight"))


def forms_of(counted: CountedWeights, config: ModelConfig) -> QuantisedWeights | None:
    """The forms of a model's quantised weights; None where the config says nothing of any."""
    if config.quantization is None:
        return None
    of_experts = sum(weights.packed for weights in counted.experts)
    in_all = counted.rest.packed + sum(weights.packed for weights in counted.ffn)
    return quantised_weights(
        config.quantization, has_matrices=in_all > of_experts, has_experts=of_experts > 0
    )


def stored_bits(quantization: Mapping[str, Any] | None) -> int | None:
    """Bits of a quantised weight; None where none is, or the config does not say.

    Raises InputError for a number of bits that no weight has.
    """
    bits = None if quantization is None else _bits(quantization)
    if bits is not None and not 1 <= bits <= 16:
        raise InputError(f"config.json: weights of {bits} bits are not known")
    return bits


def _bits(quantization: Mapping[str, Any]) -> int | None:
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors":
        num_bits = _compressed(quantization).get("num_bits")
        return int(num_bits) if num_bits else None
    if type(quantization.get("bits")) is int:
        return int(quantization["bits"])
    if quantization.get("load_in_8bit") or "fp8" in method or method == "modelopt":
        return 8
    if "fp4" in method or quantization.get("load_in_4bit") or method in ("awq", "gptq"):
        return 4
    return None


def computes_in_fp8(quantization: Mapping[str, Any] | None) -> bool:
    """Whether products are computed from 8-bit activations, at the device's rate for them."""
    if quantization is None:
        return False
    method = str(quantization.get("quant_method", "")).lower()
    if method in _COMPUTES_IN_FP8:
        return True
    groups = quantization.get("config_groups") or {}
    return any(
        (group.get("input_activations") or {}).get("num_bits") == 8
        for group in groups.values()
        if isinstance(group, dict)
    )


def _size(name: str, tensor: Stored, bits: int | None) -> Weights:
    """A tensor's elements and, where it is kept as stored, its bytes."""
    if _SCALE.search(name):
        return Weights(0, 0, tensor.num_bytes)
    if tensor.is_plain:
        return Weights(tensor.num_elements)
    if tensor.dtype == "PACKED":
        return Weights(tensor.num_elements, tensor.num_elements, tensor.num_bytes)
    elements = tensor.num_bytes * 8 // bits if bits else tensor.num_elements
    return Weights(elements, elements, tensor.num_bytes)


def _names(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())


def _is_expert(name: str, tensor: Stored, config: ModelConfig) -> bool:
    """Whether a tensor belongs to routed experts: by its name, or by its first dimension."""
    if ".experts." in name or name.endswith(".experts"):
        return True
    return len(tensor.shape) == 3 and tensor.shape[0] == config.num_experts > 0


def _scale_bytes(quantization: Mapping[str, Any], bits: int) -> float:
    """Bytes of scales, and of zeros beside them, for each element."""
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2:
        return 4 / float(block[0] * block[1])  # one float32 each
    method = str(quantization.get("quant_method", "")).lower()
    if "fp4" in method:
        return 1 / 32 if method == "mxfp4" else 1 / 16  # one byte each
    compressed = _compressed(quantization)
    group = quantization.get("group_size") or compressed.get("group_size")
    if type(group) is not int or group <= 0:
        return 0.0  # one each row or matrix: next to nothing
    if compressed.get("type") == "float":
        return 1 / group
    zero_bytes = 0.0 if compressed.get("symmetric") else bits / 8
    return (2 + zero_bytes) / group  # a float16 and a zero each


def _compressed(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """How compressed-tensors stores the weights of its first group; empty for other methods."""
    groups = quantization.get("config_groups") or {}
    parts = (group.get("weights") for group in groups.values() if isinstance(group, dict))
    return next((part for part in parts if isinstance(part, dict) and part.get("num_bits")), {})
