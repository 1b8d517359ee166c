"""Tiny models of any architecture, whose answers depend on their weights."""

from __future__ import annotations

from pathlib import Path

import torch
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
