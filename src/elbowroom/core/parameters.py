"""Parameters of a model: how many there are, and how many of them one token uses."""

from __future__ import annotations

from typing import NamedTuple

from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes, format_count


class Parameters(NamedTuple):
    """Parameter counts. ``active`` are those of the language model without idle experts.

    They include the input embedding, of which a token reads one row. Some model cards count it
    (Mixtral, Qwen3, Llama 4), and some do not (gpt-oss, DeepSeek-V3): ``multiplied`` leaves it out.
    """

    total: int
    active: int
    multiplied: int


def count_parameters(model: ModelFacts) -> Parameters:
    """Count the parameters that an engine loads: none that predict further tokens."""
    ffn = sum(model.ffn_elements)
    active_ffn = round(sum(model.active_ffn_elements(layer) for layer in range(model.num_layers)))
    active = model.rest.elements - model.outside + active_ffn
    embedding = 0 if model.ties_embeddings else model.vocab_size * model.hidden_size
    return Parameters(model.rest.elements + ffn, active, active - embedding)


def describe_parameters(model: ModelFacts) -> str:
    """A line about a model's size, such as ``30.53B parameters, 56.87 GiB; 3.353B active``."""
    counts = count_parameters(model)
    num_bytes = sum(model.ffn_bytes()) + model.replicated_bytes()
    text = f"{format_count(counts.total)} parameters, {format_bytes(num_bytes)}"
    if not model.experts:
        return text
    text += f"; {format_count(counts.active)} active"
    if counts.multiplied == counts.active:
        return text
    return f"{text}, {format_count(counts.multiplied)} without the embedding"
