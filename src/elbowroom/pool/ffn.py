"""Feed-forward networks of transformer blocks, and where their matrices lie in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import UnsupportedModelError
from elbowroom.pool.store import tensor_in

FFN_NAMES = ("mlp", "feed_forward", "ffn")
"""Attribute names of the feed-forward submodule: Llama, Qwen, Mistral, GPT-2, Falcon, Phi ..."""

Forward = Callable[..., torch.Tensor]
"""A feed-forward module's ``forward``: rows [..., columns] to rows [..., columns]."""

_ALIGN_BYTES = 64  # a cache line, and the widest vector register


class WeightSpan(NamedTuple):
    """The place of one matrix in its layer's buffer, and the linear layer that uses it."""

    linear: nn.Module
    shape: torch.Size
    dtype: torch.dtype
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The matrix inside ``buffer`` (uint8, the layer's bytes), without a copy."""
        return tensor_in(buffer, self.offset_bytes, self.shape, self.dtype)


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of one block, and the layout of its matrices in one buffer.

    ``forward`` is the module's own, as it was when the network was found. Biases are not part of
    the buffer: they are small and stay with every replica.
    """

    module: nn.Module
    forward: Forward
    spans: tuple[WeightSpan, ...]
    num_bytes: int

    def weights_in(self, buffer: torch.Tensor) -> list[nn.Parameter]:
        """One frozen parameter for each span: a view of ``buffer`` (uint8, ``num_bytes``)."""
        return [frozen(span.view(buffer)) for span in self.spans]

    def bind(self, weights: Sequence[nn.Parameter]) -> None:
        """Have the linear layers compute with ``weights``, one for each span."""
        for span, weight in zip(self.spans, weights, strict=True):
            span.linear.weight = weight


def find_ffn(block: nn.Module) -> Ffn:
    """Find the feed-forward network of ``block``: gated (three or two matrices) or plain (two).

    Works on shapes alone, so it serves Hugging Face and vLLM modules, also on the meta device.
    Raises UnsupportedModelError, naming the module types seen, when there is none or when it
    holds matrices that are not those of linear layers (mixtures of experts).
    """
    module = next((m for name in FFN_NAMES if (m := getattr(block, name, None))), None)
    if not isinstance(module, nn.Module):
        raise _unsupported(block, f"no submodule named {', '.join(FFN_NAMES)}")
    linears = [m for m in module.modules() if _is_matrix(getattr(m, "weight", None))]
    matrices = [p for p in module.parameters() if p.dim() > 1]
    if len(linears) < 2 or len(linears) != len(matrices):
        raise _unsupported(block, f"{len(matrices)} matrices in {len(linears)} linear layers")
    return _lay_out(module, linears)


def frozen(weight: torch.Tensor) -> nn.Parameter:
    """A parameter on the memory of ``weight`` that takes no gradient."""
    return nn.Parameter(weight, requires_grad=False)


def _lay_out(module: nn.Module, linears: list[nn.Module]) -> Ffn:
    spans = []
    offset = 0
    for linear in linears:
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        spans.append(WeightSpan(linear, weight.shape, weight.dtype, offset))
        offset += -(-spans[-1].num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return Ffn(module, module.forward, tuple(spans), offset)


def _is_matrix(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def _unsupported(block: nn.Module, found: str) -> UnsupportedModelError:
    types = sorted({type(module).__name__ for module in block.modules()})
    return UnsupportedModelError(
        f"no dense feed-forward network recognised in {type(block).__name__} ({found}); "
        f"modules seen: {', '.join(types)}. Use --pool none, or a dense model"
    )
