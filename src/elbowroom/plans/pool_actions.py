"""Actions of a weight pool: planned, carried out, simulated, and shown in traces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["A", "F"]
"""Part of a decoder layer: "A" is attention and all else that is replicated, "F" the FFN."""


@dataclass(frozen=True)
class Fetch:
    """Copy one chunk of a layer's feed-forward weights from its owner into a slot.

    A layer is fetched whole (``num_chunks`` 1) or in equal slices. Text form: ``F12.0/1`` is
    layer 12, chunk 0 of 1.
    """

    layer: int
    chunk: int
    num_chunks: int

    def __str__(self) -> str:
        return f"F{self.layer}.{self.chunk}/{self.num_chunks}"

    @staticmethod
    def parse(text: str) -> Fetch:
        """Parse a fetch, the inverse of ``str``. Raises ValueError for any other text."""
        match = re.fullmatch(r"F(\d+)\.(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not a fetch action such as F12.0/1")
        layer, chunk, num_chunks = (int(group) for group in match.groups())
        return Fetch(layer, chunk, num_chunks)


@dataclass(frozen=True)
class Run:
    """Compute one part of a layer whose weights are present. Text form: ``R12A``, ``R12F``."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"R{self.layer}{self.part}"


@dataclass(frozen=True)
class Wait:
    """Wait until every chunk of a layer lies in its slot. Text form: ``W12``."""

    layer: int

    def __str__(self) -> str:
        return f"W{self.layer}"


@dataclass(frozen=True)
class Release:
    """Return the slot of a layer. Text form: ``X12``."""

    layer: int

    def __str__(self) -> str:
        return f"X{self.layer}"


@dataclass(frozen=True)
class Ship:
    """Let the owner run a layer's feed-forward network on this replica's rows. Text: ``S12``."""

    layer: int

    def __str__(self) -> str:
        return f"S{self.layer}"


Action = Fetch | Run | Wait | Release | Ship
