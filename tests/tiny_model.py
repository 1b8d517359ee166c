"""Tiny model folders written by hand, for tests that only read facts."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, VOCAB, LAYERS = 8, 24, 50, 3

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}

Shapes = dict[str, tuple[int, ...]]


def llama_shapes() -> Shapes:
    """Names and shapes of a Llama of three layers."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def safetensors_bytes(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of zeros in bfloat16: the length, a JSON header, the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    return with_header(json.dumps(header).encode(), end)


def with_header(header: bytes, num_bytes: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def write_model(folder: Path, shapes: Shapes | None = None, **config: Any) -> Path:
    """A model folder with one shard. ``config`` replaces or adds keys of ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    data = safetensors_bytes(llama_shapes() if shapes is None else shapes)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "tokenizer_config.json").write_text("{}")  # enough to be started with
    return folder
