"""Operation of a traced layer: facts for a planner, and what runs a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.training.traced import TracedLayer


@dataclass(frozen=True)
class Source:
    """An argument that is the output of ``LayerShape.sources[index]``."""

    index: int


@dataclass(frozen=True)
class Stored:
    """An argument that is a parameter or a buffer, by its name in the model."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument that is neither."""

    value: Any


Argument = Source | Stored | Constant


@dataclass(frozen=True)
class Conv:
    """A convolution, transposed or not; its padding is in the windows."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Pool:
    """A pooling over windows; ``divisor_override`` is of averages, None for none.

    Padding counts as zeros in an average if ``count_include_pad``, and else not at all.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    count_include_pad: bool = True
    divisor_override: int | None = None


@dataclass(frozen=True)
class Norm:
    """A norm over the batch, over groups of channels, or over the last dimension.

    Args:
        eps: added to the variance.
        momentum: of running statistics; None for the mean of all batches.
        uses_batch: whether the statistics are those of the batch, not the running ones.
        num_dims: the last dimensions that a ``layer_norm`` is over; one, as others have no rule.

    Running statistics are updated where ``uses_batch``, and there are some by role.

    """

    eps: float
    momentum: float | None = None
    uses_batch: bool = True
    num_dims: int = 1


@dataclass(frozen=True)
class Dropout:
    """A dropout that is active, with the probability of a zero."""

    p: float


@dataclass(frozen=True)
class Cat:
    """A concatenation along one dimension, that of the features."""

    dim: int


@dataclass(frozen=True)
class Embedding:
    """A lookup in a table; the row ``padding_idx`` gets no gradient."""

    padding_idx: int | None


@dataclass(frozen=True)
class Attention:
    """Self-attention as in ``nn.MultiheadAttention`` with the batch first and without dropout.

    The layer's output is the attended tensor; ``getitem(..., 0)`` of it is an identity. A mask of
    the scores is a buffer with the role ``attn_mask``.
    """

    heads: int
    is_causal: bool = False


@dataclass(frozen=True)
class DotAttention:
    """``scaled_dot_product_attention`` of (batch, heads, tokens, width), without mask or dropout.

    Keys and values may have fewer heads than queries, each for several of theirs. ``scale`` is None
    for torch's own.
    """

    is_causal: bool = False
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A function of elements, which are those of several tensors where their shapes broadcast.

    It makes a new tensor, also where the model writes into an old one.
    """

    function: Callable[..., torch.Tensor]
    arguments: tuple[Argument, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def value(
        self, sources: Sequence[torch.Tensor], stored: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        """Its value for the outputs of the sources, in order, and parameters by name."""
        found = []
        for argument in self.arguments:
            if isinstance(argument, Source):
                found.append(sources[argument.index])
            elif isinstance(argument, Stored):
                found.append(stored(argument.name))
            else:
                found.append(argument.value)
        return self.function(*found, **self.keywords)


Settings = (
    Conv | Pool | Norm | Dropout | Cat | Embedding | Attention | DotAttention | Pointwise | None
)


@dataclass(frozen=True, eq=False)
class Operation:
    """What one traced layer does.

    Args:
        layer: as traced.
        shape: facts for a planner; its kind tells which ``settings`` there are.
        parameters: the model's own names of its parameters and buffers, by role: ``weight``,
            ``bias``, ``running_mean``, ``in_proj_weight`` and so on; by their own names where
            there is no rule.
        settings: what the shape does not say; None where there is nothing more.

    """

    layer: TracedLayer
    shape: LayerShape
    parameters: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = None
