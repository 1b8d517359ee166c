"""Saved storages and the handles that autograd holds instead of tensors.

A handle lives as long as autograd's saved variable. Handles hold their storage, nothing else does
for long: when the last handle of a storage goes, its memory and its slot in the tier go too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from elbowroom.core.errors import RecomputeError, SwapError
from elbowroom.plans.swap import Choice
from elbowroom.swap.checksum import checksum
from elbowroom.swap.link import Copy
from elbowroom.swap.recompute import Replay, viewed
from elbowroom.swap.tier import Slot, Tier


@dataclass(eq=False)
class Remaking:
    """How a storage that was dropped is made again: what it reads lasts until then.

    ``versions`` are those of the parameters and buffers, when the storage was saved.
    """

    replay: Replay
    sources: list[SavedItem]
    versions: list[int]

    def tensors(self) -> dict[int, torch.Tensor]:
        """A tensor of each storage that is read, all of which must be here."""
        here = {item.number: item.tensor for item in self.sources}
        return {number: tensor for number, tensor in here.items() if tensor is not None}

    def check(self, number: int) -> None:
        """Raise RuntimeError, in PyTorch's words, if what is read was written since the save."""
        if name := self.replay.changed(self.versions):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: '{name}', from which storage {number} is made again"
            )
        for source in self.sources:
            source.check()


@dataclass(eq=False)
class SavedItem:
    """A saved storage in one step, wherever its bytes are.

    Args:
        number: place in the order of first packs.
        num_bytes: size of the storage.
        choice: what becomes of it; None if it is kept: then its handles hold tensors.
        original: identity of the storage that was saved, which lasts as long as the item.
        root: what the saved tensor is a view of, or itself. Its views share one version counter;
            other tensors of the storage, such as those of ``unsafe_chunk``, have their own.
        version: of the tensor that was saved, when it was saved.
        tensor: a tensor with the storage that is here: the saved one until the drop, bytes from the
            bring on, and None while the storage is away. What autograd gets are views of it, which
            share its version counter. A kept storage has one if others are made from it.
        remaking: how it is made again, if it is to be.
        checksum: of what left, if it is to be verified; always of what is made again.
        problem: why it can be used no longer; empty if it can.

    """

    number: int
    num_bytes: int
    choice: Choice | None
    original: StorageWeakRef
    root: weakref.ref[torch.Tensor]
    version: int
    tensor: torch.Tensor | None = None
    slot: Slot | None = None
    out: Copy | None = None
    back: Copy | None = None
    remaking: Remaking | None = None
    is_back: bool = False
    checksum: int | None = None
    problem: str = ""

    @property
    def is_away(self) -> bool:
        """Whether its bytes are nowhere but in the tier, or are to be made again."""
        return self.tensor is None and self.choice is not None

    @property
    def is_in_tier(self) -> bool:
        """Whether its bytes are in the tier alone."""
        return self.is_away and self.remaking is None

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor, in its old or new storage, still has the bytes that were saved."""
        if tensor.untyped_storage()._cdata != self.original.cdata:
            return tensor._version == 0
        return tensor._version == self.version and self.root() is root_of(tensor)

    def leave(self, tier: Tier, saved: torch.Tensor) -> Copy:
        """Take a slot, which lasts as long as the item. Returns the copy to be asked for.

        Raises TierFullError.
        """
        self.slot = tier.take(self.num_bytes)
        weakref.finalize(self, tier.give, self.slot).atexit = False
        self.tensor = saved.detach()
        self.out = Copy("out", saved.untyped_storage(), self.slot)
        return self.out

    def drop(self) -> None:
        """Let go of the storage once it was copied out; note whether it was written meanwhile."""
        assert self.tensor is not None
        self.problem = changed_in_place(self.tensor, self.version)
        self.tensor = self.out = None

    def come_back(self) -> Copy:
        """Allocate memory to come back to. Returns the copy to be asked for."""
        assert self.slot is not None
        # Not UntypedStorage(n): that takes PyTorch's default allocator, which no meter sees.
        self.tensor = torch.empty(self.num_bytes, dtype=torch.uint8)
        self.is_back = True
        self.back = Copy("in", self.tensor.untyped_storage(), self.slot)
        return self.back

    def make_again(self) -> torch.UntypedStorage:
        """Replay the calls that wrote it, whose sources must be here. Returns the new storage.

        Raises RuntimeError, in PyTorch's words, if a source was written since, and RecomputeError
        if other bytes come out.
        """
        assert self.remaking is not None
        remaking = self.remaking
        try:
            made = remaking.replay.run(remaking.tensors())
        except (TypeError, IndexError) as error:
            raise RecomputeError(f"storage {self.number}: its recipe fails: {error}") from error
        remaking.check(self.number)  # afterwards: nor may the replay write into what it reads
        storage = made.untyped_storage()
        if storage.nbytes() != self.num_bytes or checksum(storage) != self.checksum:
            raise RecomputeError(
                f"storage {self.number} ({self.num_bytes} bytes) was recomputed to other bytes "
                "than were saved: the step computes something else than when it was profiled. "
                "Profile and plan it again, or with recompute=False if its constants change"
            )
        self.tensor, self.is_back, self.remaking = made, True, None
        return storage

    def check(self) -> None:
        """Raise RuntimeError, in PyTorch's words, if its bytes are no longer those saved."""
        assert self.tensor is not None
        now = changed_in_place(self.tensor, 0 if self.is_back else self.version)
        if problem := self.problem or now:
            raise RuntimeError(problem)

    def verify(self) -> None:
        """Compare what came back with what left. Raises SwapError if it is not the same."""
        if self.checksum is None or self.tensor is None:
            return
        found = checksum(self.tensor.untyped_storage())
        if found != self.checksum:
            raise SwapError(
                f"storage {self.number} ({self.num_bytes} bytes) came back changed: checksum "
                f"{found:016x}, it left with {self.checksum:016x}: check the slow tier's memory or "
                "disk, and report this if they are sound"
            )


@dataclass(eq=False, slots=True, weakref_slot=True)
class SwappedHandle:
    """Stands for a saved tensor of a storage that leaves: how to make the tensor again."""

    item: SavedItem
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made_again(self) -> torch.Tensor:
        """The saved tensor, as a view of what is here now."""
        here = self.item.tensor
        assert here is not None
        return viewed(here, self.dtype, self.shape, self.stride, self.offset)


@dataclass(eq=False, slots=True, weakref_slot=True)
class KeptHandle:
    """Stands for a saved tensor that stays: the tensor, cut off its graph, and its version.

    PyTorch checks versions only where no hooks are: kept tensors need this check of our own. The
    saved tensor itself, returned by a hook, would hold the graph that holds it. ``item`` is None
    for tensors that are no candidates.
    """

    item: SavedItem | None
    tensor: torch.Tensor
    version: int

    def checked(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError, as PyTorch does, if it was written in place."""
        problem = changed_in_place(self.tensor, self.version)
        if problem:
            raise RuntimeError(problem)
        return self.tensor


Handle = SwappedHandle | KeptHandle


def root_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this one is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def covers_storage(tensor: torch.Tensor) -> bool:
    """Whether writes into any part of a tensor's storage count in its version."""
    root = root_of(tensor)
    return root.numel() * root.element_size() >= root.untyped_storage().nbytes()


def changed_in_place(tensor: torch.Tensor, expected: int) -> str:
    """PyTorch's own words for a tensor written after it was saved; empty if it was not."""
    version = tensor._version
    if version == expected:
        return ""
    return (
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {version}; expected "
        f"version {expected} instead."
    )
