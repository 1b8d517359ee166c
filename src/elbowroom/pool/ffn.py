"""Feed-forward networks of transformer blocks, and where their weights lie in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import UnsupportedModelError
from elbowroom.pool.store import tensor_in

FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Attribute names of the feed-forward submodule: Llama, Qwen, Mistral, Falcon, Phi, Mixtral ..."""

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Attribute names of what chooses experts and weighs them: small, and joined by engines as they
like, so every replica keeps its own."""

Forward = Callable[..., torch.Tensor]
"""A feed-forward module's ``forward``: rows [..., columns] to rows [..., columns]."""

_ALIGN_BYTES = 64  # a cache line, and the widest vector register


class WeightSpan(NamedTuple):
    """The place of one weight in its layer's buffer, and the module that uses it as ``leaf``."""

    module: nn.Module
    leaf: str
    shape: torch.Size
    dtype: torch.dtype
    offset_bytes: int

    @property
    def holds_experts(self) -> bool:
        """Whether this is one matrix for each expert, not that of a linear layer."""
        return len(self.shape) == 3

    @property
    def weight(self) -> nn.Parameter:
        """What the module computes with now."""
        return self.module.get_parameter(self.leaf)

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight inside ``buffer`` (uint8, the layer's bytes), without a copy."""
        return tensor_in(buffer, self.offset_bytes, self.shape, self.dtype)


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of one block, and the layout of its weights in one buffer.

    ``forward`` is the module's own, as it was when the network was found. Biases and routers are
    not part of the buffer: they are small and stay with every replica.
    """

    module: nn.Module
    forward: Forward
    spans: tuple[WeightSpan, ...]
    num_bytes: int

    def weights_in(self, buffer: torch.Tensor) -> list[nn.Parameter]:
        """One frozen parameter for each span: a view of ``buffer`` (uint8, ``num_bytes``)."""
        return [frozen(span.view(buffer)) for span in self.spans]

    def bind(self, weights: Sequence[nn.Parameter]) -> None:
        """Have the modules compute with ``weights``, one for each span."""
        for span, weight in zip(self.spans, weights, strict=True):
            setattr(span.module, span.leaf, weight)


def find_ffn(block: nn.Module) -> Ffn:
    """Find the feed-forward network of ``block``: gated (three or two matrices), plain (two), or a
    mixture of experts, whose matrices stand in parameters [experts, out, in].

    Works on shapes alone, so it serves Hugging Face and vLLM modules, also on the meta device.
    Raises UnsupportedModelError, naming the module types seen, when there is none or when it holds
    matrices that are neither those of linear layers nor of experts.
    """
    module = next((m for name in FFN_NAMES if (m := getattr(block, name, None))), None)
    if not isinstance(module, nn.Module):
        raise _unsupported(block, f"no submodule named {', '.join(FFN_NAMES)}")
    weights = [
        (owner, leaf, weight)
        for owner in _without_routers(module, set())
        for leaf, weight in owner.named_parameters(recurse=False)
    ]
    of_linears = [one for one in weights if one[1] == "weight" and one[2].dim() == 2]
    of_experts = [one for one in weights if one[2].dim() == 3]
    if len(of_experts) < 2:
        num_matrices = sum(weight.dim() > 1 for weight in module.parameters())
        if len(of_linears) < 2 or len(of_linears) != num_matrices:
            raise _unsupported(block, f"{num_matrices} matrices in {len(of_linears)} linear layers")
        return _lay_out(module, of_linears)
    found = of_experts + of_linears
    if len({id(weight) for *_, weight in found}) < len(found):
        raise _unsupported(block, "weights that several modules share")
    return _lay_out(module, found)


def _without_routers(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules in ``module``, itself included and each once, but for routers."""
    if module in seen:
        return
    seen.add(module)
    yield module
    for name, child in module.named_children():
        if name not in _ROUTERS:
            yield from _without_routers(child, seen)


def frozen(weight: torch.Tensor) -> nn.Parameter:
    """A parameter on the memory of ``weight`` that takes no gradient."""
    return nn.Parameter(weight, requires_grad=False)


def _lay_out(module: nn.Module, found: list[tuple[nn.Module, str, nn.Parameter]]) -> Ffn:
    spans = []
    offset = 0
    for owner, leaf, weight in found:
        spans.append(WeightSpan(owner, leaf, weight.shape, weight.dtype, offset))
        offset += -(-spans[-1].num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return Ffn(module, module.forward, tuple(spans), offset)


def _unsupported(block: nn.Module, found: str) -> UnsupportedModelError:
    types = sorted({type(module).__name__ for module in block.modules()})
    return UnsupportedModelError(
        f"no feed-forward network recognised in {type(block).__name__} ({found}); "
        f"modules seen: {', '.join(types)}. Use --pool none"
    )
