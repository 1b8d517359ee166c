"""Facts about a model, read from its directory without touching a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError, UnsupportedModelError
from elbowroom.core.files import read_json
from elbowroom.core.model_shapes import (
    KNOWN_TYPES,
    config_int,
    config_shapes,
    file_shapes,
    weight_files,
)

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STORAGE_BYTES = {**DTYPE_BYTES, "fp8": 1}
"""Bytes per element of stored tensors: weights and KV cache may be smaller than activations."""

_EXPERT_NAME = re.compile(r"\.experts\.")
_FFN_NAME = re.compile(
    r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:mlp|feed_forward|ffn|block_sparse_moe)\."
)


@dataclass(frozen=True)
class ModelFacts:
    """Shapes of a decoder, as element counts, so that sizes can be computed for any dtype.

    ``ffn_elements[l]`` counts the feed-forward matrices of layer l, which the pool holds once;
    ``replicated_elements`` counts everything else (attention, embeddings, head, norms, biases). In
    a mixture of experts, ``expert_elements[l]`` is the part of ``ffn_elements[l]`` that lies in
    routed experts, of which a token takes ``experts_per_token``. ``has_weights`` is False when only
    the config was there. ``dtype`` is what the model computes in; weights and KV cache are stored
    in it too unless ``weight_dtype`` and ``kv_dtype`` say otherwise.
    """

    name: str
    model_type: str
    dtype: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    ffn_elements: tuple[int, ...]
    replicated_elements: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_elements: tuple[int, ...] = ()
    has_weights: bool = True
    weight_dtype: str | None = None
    kv_dtype: str | None = None

    @property
    def is_known_type(self) -> bool:
        """Whether the model type is known; otherwise names and shapes alone tell what is FFN."""
        return self.model_type in KNOWN_TYPES

    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def weight_element_bytes(self) -> int:
        return STORAGE_BYTES[self.weight_dtype or self.dtype]

    def ffn_bytes(self) -> tuple[int, ...]:
        return tuple(count * self.weight_element_bytes() for count in self.ffn_elements)

    def replicated_bytes(self) -> int:
        """Bytes of all weights outside the FFNs; embeddings and head are never quantised."""
        unquantised = min(self.replicated_elements, 2 * self.vocab_size * self.hidden_size)
        rest = self.replicated_elements - unquantised
        return unquantised * self.dtype_bytes() + rest * self.weight_element_bytes()

    def attention_elements(self) -> int:
        """Elements of the four attention matrices of one layer."""
        return 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim

    def head_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    def active_ffn_elements(self, layer: int) -> float:
        """Elements of layer ``layer``'s feed-forward network that one token is multiplied with."""
        if not self.expert_elements:
            return self.ffn_elements[layer]
        share = self.experts_per_token / self.num_experts
        return self.ffn_elements[layer] - self.expert_elements[layer] * (1 - share)

    def touched_ffn_elements(self, layer: int, num_tokens: float) -> float:
        """Elements of layer ``layer``'s feed-forward network that ``num_tokens`` tokens read.

        With even routing: no token takes a given expert with probability (1 - k/E)^n.
        """
        if not self.expert_elements:
            return self.ffn_elements[layer]
        left_out = float((1 - self.experts_per_token / self.num_experts) ** num_tokens)
        return self.ffn_elements[layer] - self.expert_elements[layer] * left_out

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> int:
        """Bytes of a token's keys and values in all layers, on one device of a replica."""
        heads = -(-self.num_kv_heads // tensor_parallel)
        element_bytes = STORAGE_BYTES[self.kv_dtype or self.dtype]
        return 2 * self.num_layers * heads * self.head_dim * element_bytes


def model_name(model_dir: Path) -> str:
    """The name of a model: its repository's on the hub, or its folder's."""
    folder = model_dir.resolve()
    return repository_of(folder) or folder.name


def read_model(model_dir: Path, dtype: str = "auto") -> ModelFacts:
    """Facts of a Hugging Face model directory, from ``config.json`` and safetensors headers.

    Without weight files the config alone is enough for the types in ``KNOWN_TYPES``. ``dtype``
    "auto" takes the model's own, and bfloat16 for a float32 model, as vLLM does.

    Raises InputError when a file is missing, corrupt or unsafe, and UnsupportedModelError when a
    layer has no feed-forward matrices.
    """
    config = _read_config(model_dir)
    files = weight_files(model_dir)
    model_type = str(config.get("model_type", "unknown"))
    if not files and model_type not in KNOWN_TYPES:
        raise InputError(
            f"{model_dir} has no .safetensors files, and the shapes of model type '{model_type}' "
            f"do not follow from its config: convert the weights first"
        )
    num_layers = config_int(config, "num_hidden_layers")
    num_heads = config_int(config, "num_attention_heads")
    hidden_size = config_int(config, "hidden_size")
    elements = _count_elements(
        file_shapes(files) if files else config_shapes(config), num_layers, config
    )
    if not all(elements.ffn):
        empty = [layer for layer, count in enumerate(elements.ffn) if not count]
        raise UnsupportedModelError(
            f"{model_dir}: layers {empty[:5]} of {num_layers} have no feed-forward matrices "
            f"(model type {model_type}): use a dense model, or run it with vLLM"
        )
    has_experts = any(elements.experts)
    return ModelFacts(
        name=model_name(model_dir),
        model_type=model_type,
        dtype=_resolve_dtype(config, dtype),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config_int(config, "intermediate_size", 4 * hidden_size),
        vocab_size=config_int(config, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=config_int(config, "num_key_value_heads", num_heads),
        head_dim=config_int(config, "head_dim", hidden_size // num_heads),
        max_position_embeddings=config_int(config, "max_position_embeddings", 2048),
        ffn_elements=elements.ffn,
        replicated_elements=elements.replicated,
        num_experts=_num_experts(config) if has_experts else 0,
        experts_per_token=config_int(config, "num_experts_per_tok", 1) if has_experts else 0,
        expert_elements=elements.experts if has_experts else (),
        has_weights=bool(files),
    )


def check_runnable(model: ModelFacts) -> None:
    """Check that the pool can run the model, not only plan it.

    Raises InputError for a model without weight files, UnsupportedModelError for a mixture of
    experts.
    """
    if not model.has_weights:
        raise InputError(f"{model.name} has no .safetensors files: convert the weights first")
    if model.num_experts:
        raise UnsupportedModelError(
            f"{model.name} is a mixture of {model.num_experts} experts, which can be planned and "
            f"not run yet: use a dense model, or run it with vLLM"
        )


@dataclass(frozen=True)
class _Elements:
    ffn: tuple[int, ...]
    experts: tuple[int, ...]
    replicated: int


def _count_elements(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, config: Mapping[str, Any]
) -> _Elements:
    """Count elements of each layer's feed-forward matrices, its experts, and everything else."""
    ffn = [0] * num_layers
    experts = [0] * num_layers
    replicated = 0
    for name, shape in shapes.items():
        if name.startswith("lm_head.") and config.get("tie_word_embeddings", False):
            continue  # one tensor serves as embedding and head
        match = _FFN_NAME.search(name)
        if match and len(shape) >= 2 and int(match.group(1)) < num_layers:
            ffn[int(match.group(1))] += prod(shape)
            if _EXPERT_NAME.search(name):
                experts[int(match.group(1))] += prod(shape)
        else:
            replicated += prod(shape)
    return _Elements(tuple(ffn), tuple(experts), replicated)


def _num_experts(config: Mapping[str, Any]) -> int:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in config:
            return config_int(config, key)
    raise InputError("config.json names no number of experts, but the weights hold experts")


def repository_of(folder: Path) -> str | None:
    """Hub name of a folder in the Hugging Face cache; None for any other folder."""
    snapshots, repository = folder.parent, folder.parent.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return None


def _read_config(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise InputError(f"{model_dir} is not a directory: give --model a Hugging Face folder")
    config = read_json(model_dir / "config.json")
    if "auto_map" in config:
        raise InputError(f"{model_dir} wants to run its own Python code (auto_map): refused")
    return config


def _resolve_dtype(config: Mapping[str, Any], asked: str) -> str:
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = asked if asked != "auto" else ("bfloat16" if own == "float32" else own)
    if dtype not in DTYPE_BYTES:
        raise InputError(f"dtype '{dtype}' is not one of {', '.join(DTYPE_BYTES)}: set --dtype")
    return dtype
