"""What layers hand to each other: a tensor, or tensors in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree


class TensorFacts(NamedTuple):
    """A tensor that goes from layer to layer, as it was with the batch that was traced.

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
    """How one layer's output is made of tensors, as seen with the batch that was traced.

    Args:
        tensors: in the order in which they stand.
        spec: what they stand in.
        leaves: of that, in order; None where a tensor stands, else what was there.
        is_tensor: of each leaf.

    """

    tensors: tuple[TensorFacts, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def is_plain(self) -> bool:
        """One tensor, in nothing."""
        return self.spec.is_leaf()

    @property
    def constants(self) -> tuple[Any, ...]:
        """What stands between the tensors and need not be the same for another batch."""
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
    """Describes the output of a layer; keeps none of its tensors."""
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
    """In the order in which they stand."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def copy_of(value: Any) -> Any:
    """The same in tensors of its own."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, value)
