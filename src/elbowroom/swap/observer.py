"""What a step tells whoever measures it."""

from __future__ import annotations

from typing import Protocol

import torch

from elbowroom.swap.handles import SavedItem
from elbowroom.swap.link import Link


class StepObserver(Protocol):
    """Whoever measures a step: is told what happens, and changes nothing."""

    def ticked(self) -> None:
        """A tick begins, before anything is dropped, brought, packed or unpacked."""

    def tick_ended(self) -> None:
        """The hook of this tick is about to return to PyTorch."""

    def packed(self, item: SavedItem, tick: int, storage: torch.UntypedStorage) -> None:
        """A tensor of a candidate storage was saved."""

    def unpacked(self, item: SavedItem | None, tick: int) -> None:
        """A saved tensor was asked for; None for one whose storage is no candidate."""

    def bringing(self, item: SavedItem, link: Link) -> None:
        """Memory is about to be allocated for a storage that comes back over the link."""

    def brought(self, item: SavedItem) -> None:
        """That memory was allocated."""
