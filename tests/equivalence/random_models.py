"""Tiny models of any architecture, whose answers depend on their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tools.make_model import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig


def write_random_model(folder: Path, config: PretrainedConfig) -> Path:
    """A folder with weights of bfloat16 and a tokenizer whose words are tokens."""
    torch.manual_seed(7)
    text = config.get_text_config()
    auto = AutoModelForCausalLM if text is config else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer(text.vocab_size).save_pretrained(folder)
    return folder


def quantise(folder: Path, form: Literal["fp8", "int8"]) -> None:
    """Weights of 8 bits with a scale for each row, as compressed-tensors stores them."""
    path = folder / "model.safetensors"
    most, dtype = (448, torch.float8_e4m3fn) if form == "fp8" else (127, torch.int8)
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors[name] = tensor
        if tensor.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / most
            scaled = tensor.float() / scale
            tensors[name] = (scaled if form == "fp8" else scaled.round()).to(dtype)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    save_file(tensors, path, {"format": "pt"})
    number = {"num_bits": 8, "type": "float" if form == "fp8" else "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if form == "fp8" else "int-quantized",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    edit_config(folder, quantization_config=method)


def edit_config(folder: Path, **keys: object) -> None:
    """Replace keys of a model's config, or add them; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **keys}
    left_out = {key for key, value in keys.items() if value is None}
    path.write_text(json.dumps({key: config[key] for key in config if key not in left_out}))
