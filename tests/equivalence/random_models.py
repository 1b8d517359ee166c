"""Tiny models of any architecture, whose answers depend on their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tools.make_model import make_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig


def write_random_model(folder: Path, config: PretrainedConfig) -> Path:
    """A folder with weights of bfloat16 and a tokenizer whose words are tokens."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder
