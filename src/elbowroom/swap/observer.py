"""What a step tells whoever measures it."""

from __future__ import annotations

import torch

from elbowroom.plans.swap import Transfer
from elbowroom.swap.handles import SavedItem
from elbowroom.swap.link import Copy, CopyLink


class StepObserver:
    """Whoever measures a step: is told what happens, and changes nothing. This one does nothing."""

    def ticked(self) -> None:
        """A tick begins, before anything is dropped, brought, packed or unpacked."""

    def tick_ended(self) -> None:
        """The hook of this tick is about to return to PyTorch."""

    def packed(self, item: SavedItem, tick: int, storage: torch.UntypedStorage) -> None:
        """A tensor of a candidate storage was saved."""

    def unpacked(self, item: SavedItem | None, tick: int) -> None:
        """A saved tensor was asked for; None for one whose storage is no candidate."""

    def bringing(self, item: SavedItem, link: CopyLink) -> None:
        """Memory is about to be allocated for a storage that comes back over the link."""

    def brought(self, item: SavedItem) -> None:
        """That memory was allocated."""

    def asked(self, transfer: Transfer, copy: Copy) -> None:
        """A copy was asked for."""

    def waited(self, transfer: Transfer, begin: float, end: float) -> None:
        """The main thread waited for a copy, by ``time.perf_counter``."""
