"""Names, shapes and bytes of a model's tensors, from safetensors headers or from its config."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.files import read_json
from elbowroom.core.model_config import config_int

Shapes = dict[str, tuple[int, ...]]


class Stored(NamedTuple):
    """A tensor as a file stores it. ``dtype`` is None where no file says, else safetensors' name.

    Plain numbers are converted to the model's dtype when they are loaded; others are kept.
    """

    shape: tuple[int, ...]
    dtype: str | None
    num_bytes: int = 0

    @property
    def is_plain(self) -> bool:
        return self.dtype is None or self.dtype in PLAIN_DTYPES

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


PLAIN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Safetensors' names of the dtypes in which models are computed, and PyTorch's."""

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Model types whose shapes ``config_shapes`` can derive."""

_NOT_WEIGHTS = ("consolidated", "adapter_model")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_CORRUPT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


def weight_files(model_dir: Path) -> list[Path]:
    """Weight files of a model folder, by its index if it has one.

    Without one, weights in another form (``consolidated``) and adapters beside the model's own are
    left out. The index is untrusted: InputError is raised for names that point outside the folder.
    """
    index = model_dir / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(model_dir.glob("*.safetensors"))
        return [file for file in files if not file.name.startswith(_NOT_WEIGHTS)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: download the model again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            raise InputError(f"{index} points outside the model folder ('{name}'): refused")
    return [model_dir / name for name in names]


def file_tensors(files: list[Path]) -> dict[str, Stored]:
    """Tensors in the headers of safetensors files. Raises InputError if one is corrupt."""
    return {
        name: Stored(tuple(entry["shape"]), str(entry["dtype"]), _num_bytes(entry))
        for path in files
        for name, entry in _read_header(path).items()
        if name != "__metadata__"
    }


def config_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensor names and [out, in] shapes that Hugging Face's code builds from a config.

    Only for model types in ``KNOWN_TYPES``. Experts of mixtures have no biases and no norms.
    """
    hidden = config_int(config, "hidden_size")
    vocab = config_int(config, "vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config_int(config, "num_hidden_layers")):
        for part in (_attention_shapes(config), _ffn_shapes(config, layer)):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part}
    return shapes


def _attention_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config_int(config, "hidden_size")
    num_heads = config_int(config, "num_attention_heads")
    head_dim = config_int(config, "head_dim", hidden // num_heads)
    queries = num_heads * head_dim
    keys = config_int(config, "num_key_value_heads", num_heads) * head_dim
    model_type = str(config.get("model_type"))
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.get("attention_bias", model_type in ("qwen2", "qwen2_moe")):
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"self_attn.{name}_proj.bias", (size,)
    if model_type in ("qwen3", "qwen3_moe"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)


def _ffn_shapes(config: Mapping[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config_int(config, "hidden_size")
    model_type = str(config.get("model_type"))
    if model_type == "mixtral":
        experts, size = config_int(config, "num_local_experts"), "intermediate_size"
        yield "block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts):
            yield from _gated(f"block_sparse_moe.experts.{expert}.", hidden, config, size, "w")
        return
    if not model_type.endswith("_moe") or not _is_sparse(config, layer):
        yield from _gated("mlp.", hidden, config, "intermediate_size")
        return
    experts = config_int(config, "num_experts")
    yield "mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _gated(f"mlp.experts.{expert}.", hidden, config, "moe_intermediate_size")
    if model_type == "qwen2_moe":
        yield from _gated("mlp.shared_expert.", hidden, config, "shared_expert_intermediate_size")
        yield "mlp.shared_expert_gate.weight", (1, hidden)


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    step = config_int(config, "decoder_sparse_step", 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _gated(
    prefix: str, hidden: int, config: Mapping[str, Any], size: str, names: str = ""
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of a gated network: gate and up widen, down narrows. Mixtral calls them w1, w3, w2."""
    width = config_int(config, size)
    gate, up, down = ("w1", "w3", "w2") if names else ("gate_proj", "up_proj", "down_proj")
    yield f"{prefix}{gate}.weight", (width, hidden)
    yield f"{prefix}{up}.weight", (width, hidden)
    yield f"{prefix}{down}.weight", (hidden, width)


def _num_bytes(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's size.

    Raises InputError if the file cannot be read or is corrupt.
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ValueError(f"header of {length} bytes in a file of {file_bytes}")
            header = json.loads(file.read(length))
            end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"))
            if 8 + length + end != file_bytes:
                raise ValueError(f"{8 + length + end} bytes announced, {file_bytes} there")
            shapes = (e["shape"] for n, e in header.items() if n != "__metadata__")
            if not all(type(size) is int and size >= 0 for shape in shapes for size in shape):
                raise ValueError("a shape is not a list of sizes")
            for name, entry in header.items():
                if name != "__metadata__" and not isinstance(entry["dtype"], str):
                    raise ValueError(f"{name} has no dtype")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except _CORRUPT as error:
        raise InputError(f"{path} is corrupt: {error}: download the model again") from error
    assert isinstance(header, dict)
    return header
