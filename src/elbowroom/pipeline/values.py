"""What layers hand to each other: a tensor, or tensors in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Value:
    """How one layer's output is made of tensors, as seen with the batch that was traced.

    Args:
        names: of its tensors: the layer's own name, or ``name[0]``, ``name[1]`` and so on.
        spec: what the tensors stand in.
        leaves: of that, in order; None where a tensor stands, else what was there.
        needs_grad: of each tensor.
        num_bytes: of all tensors.

    """

    names: tuple[str, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    needs_grad: tuple[bool, ...]
    num_bytes: int

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
    is_plain = spec.is_leaf()
    return Value(
        names=(name,) if is_plain else tuple(f"{name}[{i}]" for i in range(len(tensors))),
        spec=spec,
        leaves=tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        is_tensor=tuple(isinstance(leaf, torch.Tensor) for leaf in leaves),
        needs_grad=tuple(tensor.requires_grad for tensor in tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """In the order in which they stand."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def copy_of(value: Any) -> Any:
    """The same in tensors of its own."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, value)
