"""Actions: what planners emit, mechanisms carry out and traces show."""

from __future__ import annotations

import re
from typing import NamedTuple


class Fetch(NamedTuple):
    """Copy one piece of a layer's feed-forward weights from its owner into a slot.

    A layer is fetched whole (``num_pieces`` 1) or in equal slices. Text form: ``F12.0/1`` is
    layer 12, piece 0 of 1.
    """

    layer: int
    piece: int
    num_pieces: int

    def __str__(self) -> str:
        return f"F{self.layer}.{self.piece}/{self.num_pieces}"

    @staticmethod
    def parse(text: str) -> Fetch:
        """The inverse of ``str``. Raises ValueError for any other text."""
        match = re.fullmatch(r"F(\d+)\.(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not a fetch action such as F12.0/1")
        layer, piece, num_pieces = (int(group) for group in match.groups())
        return Fetch(layer, piece, num_pieces)
