"""Where a minibatch's saved tensors are while it waits for its backward: the seam to swapping."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Keeper(Protocol):
    """Keeps what autograd saves in a minibatch's forward, until its backward.

    Several minibatches may be in flight. For each, in this order: ``forward`` around its forward,
    ``stays`` inside of that as often as needed, ``returns`` once its backward is the next to be
    computed, and ``end`` after that.
    """

    def forward(self, minibatch: int) -> AbstractContextManager[None]:
        """The context in which autograd saves for this minibatch."""

    def stays(self, minibatch: int, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these tensors where they are: somebody else holds or reuses their memory."""

    def returns(self, minibatch: int) -> None:
        """Begin to bring back what is away."""

    def end(self, minibatch: int) -> None:
        """Let go of what is left."""

    def close(self) -> None:
        """End: nothing will be kept, or brought back, any more."""
