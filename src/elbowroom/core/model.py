"""Facts about a model, read from its directory without touching a weight."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError, UnsupportedModelError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_CORRUPT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)
_EXPERT_NAME = re.compile(r"\.experts?\.")
_FFN_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:mlp|feed_forward|ffn)\.")


@dataclass(frozen=True)
class ModelFacts:
    """Shapes of a decoder, as element counts, so that any dtype can be asked about.

    ffn_elements[l] counts the feed-forward matrices of layer l, which the pool holds once;
    ``replicated_elements`` counts everything else (attention, embeddings, head, norms, biases).
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

    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def ffn_bytes(self) -> tuple[int, ...]:
        return tuple(count * self.dtype_bytes() for count in self.ffn_elements)

    def replicated_bytes(self) -> int:
        return self.replicated_elements * self.dtype_bytes()

    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes()


def read_model(model_dir: Path, dtype: str = "auto") -> ModelFacts:
    """Facts of a Hugging Face model directory, from ``config.json`` and safetensors headers.

    ``dtype`` "auto" takes the model's own, and bfloat16 for a float32 model, as vLLM does.
    Raises InputError when a file is missing, corrupt or unsafe, and UnsupportedModelError when
    no feed-forward matrices are found.
    """
    config = _read_config(model_dir)
    shapes = dict(_tensor_shapes(model_dir))
    num_layers = _config_int(config, "num_hidden_layers")
    num_heads = _config_int(config, "num_attention_heads")
    hidden_size = _config_int(config, "hidden_size")
    ffn_elements, replicated_elements = _count_elements(shapes, num_layers, config)
    if not all(ffn_elements):
        empty = [layer for layer, count in enumerate(ffn_elements) if not count]
        raise UnsupportedModelError(
            f"{model_dir}: layers {empty[:5]} of {num_layers} have no dense feed-forward matrices "
            f"(model type {config.get('model_type')}): use a dense model, or run it with vLLM"
        )
    return ModelFacts(
        name=model_dir.resolve().name,
        model_type=str(config.get("model_type", "unknown")),
        dtype=_resolve_dtype(config, dtype),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_config_int(config, "intermediate_size", 4 * hidden_size),
        vocab_size=_config_int(config, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=_config_int(config, "num_key_value_heads", num_heads),
        head_dim=_config_int(config, "head_dim", hidden_size // num_heads),
        max_position_embeddings=_config_int(config, "max_position_embeddings", 2048),
        ffn_elements=ffn_elements,
        replicated_elements=replicated_elements,
    )


def _count_elements(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, config: Mapping[str, Any]
) -> tuple[tuple[int, ...], int]:
    """Elements of each layer's feed-forward matrices, and of everything else."""
    ffn_elements = [0] * num_layers
    replicated_elements = 0
    for name, shape in shapes.items():
        if name.startswith("lm_head.") and config.get("tie_word_embeddings", False):
            continue  # one tensor serves as embedding and head
        match = None if _EXPERT_NAME.search(name) else _FFN_NAME.search(name)
        if match and len(shape) == 2 and int(match.group(1)) < num_layers:
            ffn_elements[int(match.group(1))] += prod(shape)
        else:
            replicated_elements += prod(shape)
    return tuple(ffn_elements), replicated_elements


def _read_config(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise InputError(f"{model_dir} is not a directory: give --model a Hugging Face folder")
    config = _read_json(model_dir / "config.json")
    if "auto_map" in config:
        raise InputError(f"{model_dir} wants to run its own Python code (auto_map): refused")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def _config_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: '{key}' must be a positive integer, not {value!r}")
    return value


def _resolve_dtype(config: Mapping[str, Any], asked: str) -> str:
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = asked if asked != "auto" else ("bfloat16" if own == "float32" else own)
    if dtype not in DTYPE_BYTES:
        raise InputError(f"dtype '{dtype}' is not one of {', '.join(DTYPE_BYTES)}: set --dtype")
    return dtype


def _tensor_shapes(model_dir: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for shard in _shards(model_dir):
        for name, entry in _read_header(shard).items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def _shards(model_dir: Path) -> list[Path]:
    """Weight files of a directory. The index is untrusted: only plain file names are followed."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map: download the model again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if name != Path(name).name or name in ("", ".", ".."):
                raise InputError(f"{index} points outside the model folder ('{name}'): refused")
        return [model_dir / name for name in names]
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{model_dir} has no .safetensors files: convert the weights first")
    return shards


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's size."""
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
            if not all(isinstance(size, int) for shape in shapes for size in shape):
                raise ValueError("a shape is not a list of integers")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except _CORRUPT as error:
        raise InputError(f"{path} is corrupt: {error}: download the model again") from error
    assert isinstance(header, dict)
    return header
