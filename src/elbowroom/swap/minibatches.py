"""Saved tensors of minibatches in flight: away from a forward to its backward.

Of the minibatches in flight, at most two have their saved tensors on the device: the one that is
computed, and one that leaves or comes back. What a forward saved is dropped when the next forward
begins; until then its copies may go on. It is brought back when its backward is the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from elbowroom.swap.candidates import SMALLEST_BYTES, Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link


class SwappedMinibatches:
    """A ``training.keeping.Keeper`` that swaps. It owns the link, and closes it.

    Weights and inputs must be named by ``stays``: those of the versions that minibatches use are
    not the module's own.
    """

    def __init__(self, link: Link, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.out_bytes = 0
        self.in_bytes = 0
        self.wait_seconds = 0.0
        self._link = link
        self._smallest_bytes = smallest_bytes
        self._steps: dict[int, SwappedStep] = {}
        self._leaving: SwappedStep | None = None

    @contextmanager
    def forward(self, minibatch: int) -> Iterator[None]:
        """See ``Keeper``. Raises SwapError if the link failed."""
        if self._leaving is not None:
            self._leaving.drop_all()
        candidates = Candidates(nn.Module(), self._smallest_bytes)
        step = SwappedStep(None, self._link, candidates, drops_later=True)
        self._steps[minibatch] = self._leaving = step
        with step.hooks():
            yield

    def stays(self, minibatch: int, tensors: Iterable[torch.Tensor]) -> None:
        self._steps[minibatch].keep(tensors)

    def returns(self, minibatch: int) -> None:
        """See ``Keeper``. What has not been dropped yet stays."""
        step = self._steps[minibatch]
        if step is not self._leaving:
            step.bring_all()

    def end(self, minibatch: int) -> None:
        """See ``Keeper``. Raises SwapError if the link failed."""
        step = self._steps.pop(minibatch)
        if step is self._leaving:
            self._leaving = None
        step.end()
        self.out_bytes += step.counts.out_bytes
        self.in_bytes += step.counts.in_bytes
        self.wait_seconds += step.counts.wait_seconds

    def close(self) -> None:
        self._link.close()
