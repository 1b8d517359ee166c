"""Tiny random models of the transformers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}


def make_model(name: str = "llama", num_layers: int = 5, **config: Any) -> nn.Module:
    """A model in eval mode; the same arguments give the same weights."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "num_hidden_layers": num_layers,
    }
    model: nn.Module = AutoModelForCausalLM.from_config(
        CONFIGS[name](**{**sizes, **config}), dtype=torch.float32
    )
    return model.eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())
