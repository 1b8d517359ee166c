"""Parts of a tensor before and after a reshape: which dimensions can be split in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.plans.grid_layout import Layout


def check_reshape(name: str, source: Sequence[int], target: Sequence[int], layout: Layout) -> None:
    """Raise InputError for sizes with which the parts of a source are no parts of its reshape.

    ``layout`` was made for a minibatch of another size.
    """
    for dim, other in leading_dims(source, target):
        count = layout.parts[dim]
        if count > 1 and not is_aligned(source[dim], target[other], count):
            raise InputError(
                f"layer '{name}' cannot reshape {[*source]} to {[*target]} in {count} parts: give "
                f"minibatches of a multiple of {count} samples"
            )


class LeadingDims(NamedTuple):
    """Two dimensions, of a source and of what it is reshaped to, whose leading parts are alike."""

    source: int
    target: int


def leading_dims(source: Sequence[int], target: Sequence[int]) -> tuple[LeadingDims, ...]:
    """The first dimensions of each two smallest groups of dimensions with the same product.

    Dimensions of size 1 are passed over; empty tensors have no pairs.
    """
    if 0 in (*source, *target):
        return ()
    ones = [dim for dim, size in enumerate(source) if size > 1]
    others = [dim for dim, size in enumerate(target) if size > 1]
    pairs = []
    i = j = 0
    while i < len(ones) and j < len(others):
        pairs.append(LeadingDims(ones[i], others[j]))
        one, other = source[ones[i]], target[others[j]]
        i, j = i + 1, j + 1
        while one != other:
            if one < other:
                one, i = one * source[ones[i]], i + 1
            else:
                other, j = other * target[others[j]], j + 1
    return tuple(pairs)


def is_aligned(size: int, other: int, parts: int) -> bool:
    """Whether parts of a leading dimension are the same elements after a reshape."""
    return parts > 1 and (size == other or (size % parts == 0 and other % parts == 0))


def before_reshape(
    source: Sequence[int], target: Sequence[int], wish: Sequence[int]
) -> tuple[int, ...]:
    """Parts of a source that give the wished parts of its reshape, as far as they can."""
    parts = [1] * len(source)
    for dim, other in leading_dims(source, target):
        if is_aligned(source[dim], target[other], wish[other]):
            parts[dim] = wish[other]
    return tuple(parts)
