"""Microbatches that a user cuts, of whatever shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Microbatch(NamedTuple):
    """One of the parts that a minibatch is cut into.

    ``inputs`` and ``targets`` are as those of a minibatch. ``size`` says how much of the
    minibatch's mean it stands for: what the loss is a mean over, rows or target tokens, say. None
    is the rows of its first input.
    """

    inputs: Any
    targets: Any
    size: float | None = None


Minibatch = tuple[Any, Any] | Sequence[Microbatch]
"""Inputs and targets, or the microbatches that they are cut into."""
