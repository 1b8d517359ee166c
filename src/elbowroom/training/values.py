"""Values passed between layers: a tensor, or tensors in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

MOST_DIMENSIONS = 6
"""Most dimensions of a tensor that goes from stage to stage."""


class TensorFacts(NamedTuple):
    """Facts about a tensor that goes from layer to layer, as seen with the traced batch.

    ``name`` is the layer's own, or ``layer[0]``, ``layer[1]`` and so on where there may be several.
    ``needs_grad`` says whether a gradient comes back for it.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    needs_grad: bool
    num_bytes: int


@dataclass(frozen=True, eq=False)
class Value:
    """Structure of one layer's output, and the tensors in it, as seen with the traced batch.

    Args:
        tensors: facts of the tensors, in their order in the structure.
        spec: the structure of containers (a pytree).
        leaves: the structure's leaves, in order; None where a tensor stands, else what was there.
        is_tensor: for each leaf, whether it is a tensor.

    """

    tensors: tuple[TensorFacts, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def is_unsendable(self) -> bool:
        """Whether it has a tensor that no message between stages can describe."""
        return any(
            tensor.dtype.is_complex or len(tensor.shape) > MOST_DIMENSIONS
            for tensor in self.tensors
        )

    @property
    def is_plain(self) -> bool:
        """Whether the value is a single tensor, in no container."""
        return self.spec.is_leaf()

    @property
    def constants(self) -> tuple[Any, ...]:
        """Leaves that are no tensors, and may differ for another batch."""
        pairs = zip(self.leaves, self.is_tensor, strict=True)
        return tuple(leaf for leaf, is_tensor in pairs if not is_tensor and leaf is not None)

    def flatten(self, value: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_in(value))

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        given = iter(tensors)
        pairs = zip(self.leaves, self.is_tensor, strict=True)
        leaves = [next(given) if is_tensor else leaf for leaf, is_tensor in pairs]
        return pytree.tree_unflatten(leaves, self.spec)


def value_of(name: str, value: Any) -> Value:
    """Describe the output of a layer; keeps none of its tensors."""
    leaves, spec = pytree.tree_flatten(value)
    tensors = tensors_in(value)
    names = [name] if spec.is_leaf() else [f"{name}[{k}]" for k in range(len(tensors))]
    return Value(
        tensors=tuple(
            TensorFacts(called, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.nbytes)
            for called, tensor in zip(names, tensors, strict=True)
        ),
        spec=spec,
        leaves=tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        is_tensor=tuple(isinstance(leaf, torch.Tensor) for leaf in leaves),
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in a value, in their order in its structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_same_constant(one: Any, other: Any) -> bool:
    """Whether two values that are no tensors are the same; numbers of numpy's arrays, all."""
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(np.array_equal(one, other))
    except Exception:  # of a kind that cannot be compared
        return False


def copy_of(value: Any) -> Any:
    """The same value with its tensors cloned."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, value)
