"""Tensors away: placeholders for what is in the slow tier, and the ways there and back.

A tensor leaves its place, which is an entry of a dictionary or the gradient of a parameter, in two
phases: its copy is asked for, and waited for later; only then does a placeholder take its place. It
comes back in two phases, too. Memory is allocated and released in the calling thread alone. What
fails in between leaves the place as it was.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from elbowroom.core.errors import SwapError
from elbowroom.core.units import format_bytes
from elbowroom.swap.candidates import SMALLEST_BYTES, is_as_stored
from elbowroom.swap.link import Copy, Link
from elbowroom.swap.tier import Slot


class StoredBytes:
    """Bytes in the tier of a link; their slot is given back when this goes."""

    def __init__(self, link: Link, num_bytes: int) -> None:
        """Take a slot. Raises TierFullError."""
        self.link = link
        self.num_bytes = num_bytes
        self.slot: Slot = link.tier.take(num_bytes)
        weakref.finalize(self, link.tier.give, self.slot).atexit = False


class AwayTensor(torch.Tensor):
    """Placeholder for a tensor whose bytes are in a tier: its shape and type, and no memory.

    Whatever reads or writes it raises SwapError. (An emptied storage in its stead would end the
    process, or give random numbers.) It may be assigned, replaced and forgotten as any tensor.

    ``taken_norm`` is that of a gradient, if it was taken; ``clips`` are limits and total norms by
    which a gradient is to be scaled as it comes back, in this order.
    """

    what: str
    stored: StoredBytes
    taken_norm: torch.Tensor | None
    clips: tuple[tuple[float, torch.Tensor], ...]

    @staticmethod
    def of(tensor: torch.Tensor, stored: StoredBytes, what: str) -> AwayTensor:
        """The placeholder of a tensor whose bytes were copied."""
        away: AwayTensor = torch.Tensor._make_wrapper_subclass(
            AwayTensor,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        away.what, away.stored, away.taken_norm, away.clips = what, stored, None, ()
        return away

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        given = (*args, *(kwargs or {}).values())
        lists = [arg if isinstance(arg, list | tuple) else [arg] for arg in given]
        away = next(each for some in lists for each in some if isinstance(each, AwayTensor))
        away.refuse()

    def refuse(self, *_: Any) -> NoReturn:
        """Raise SwapError that says how to read it."""
        size = format_bytes(self.stored.num_bytes)
        if self.what == "gradient":
            raise SwapError(
                f"this gradient of {size} is in the slow tier: use it inside of 'with "
                "optimizer.gradients():', or have it clipped by SwappedOptimizer(clip_norm=...)"
            )
        raise SwapError(
            f"this optimizer state of {size} is in the slow tier: ask for optimizer.state_dict() "
            "now, which brings all of it back"
        )

    # What would not be dispatched: it would write a shell without bytes, or end the process.
    __reduce_ex__ = __deepcopy__ = share_memory_ = data_ptr = refuse
    data = property(refuse, refuse)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AwayTensor({self.what}, {tuple(self.shape)}, {self.dtype})"

    def allocated(self) -> torch.Tensor:
        """A tensor of the same form, whose bytes are not yet filled."""
        # Not UntypedStorage(n): that takes PyTorch's default allocator, which no meter sees.
        storage = torch.empty(self.stored.num_bytes, dtype=torch.uint8).untyped_storage()
        return _tensor_in(storage, self)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is held: under a key of a parameter's state, or as its gradient."""

    owner: dict[Any, Any] | nn.Parameter
    key: Any = "grad"

    @property
    def what(self) -> str:
        return "state" if isinstance(self.owner, dict) else "gradient"

    def get(self) -> Any:
        return self.owner[self.key] if isinstance(self.owner, dict) else self.owner.grad

    def put(self, tensor: torch.Tensor) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.key] = tensor
        else:
            self.owner.grad = tensor

    def let_go(self, away: AwayTensor) -> bool:
        """Put a placeholder in the place of its tensor. Returns whether that freed its memory.

        A tensor that somebody else holds stays: it would free nothing, and what they write would
        be lost.
        """
        tensor = self.get()
        same, storage = weakref.ref(tensor), StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        del tensor
        self.put(away)
        held = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        if held is None:
            return True
        still = same()
        self.put(_tensor_in(held, away) if still is None else still)
        return False

    def leave(self, link: Link) -> Leaving | None:
        """Ask for the copy of its tensor into a link's tier; None for what stays here.

        Raises TierFullError, and SwapError if the link failed.
        """
        tensor = self.get()
        if not _may_leave(tensor):
            return None
        storage = tensor.untyped_storage()
        stored = StoredBytes(link, storage.nbytes())
        link.ask(copy := Copy("out", storage, stored.slot))
        return Leaving(self, stored, copy, weakref.ref(tensor), tensor._version)

    def come_back(self) -> Coming | None:
        """Allocate memory for what is away, and ask for its copy; None if it is here.

        Raises SwapError if the link failed.
        """
        away = self.get()
        if not isinstance(away, AwayTensor):
            return None
        tensor = away.allocated()
        away.stored.link.ask(copy := Copy("in", tensor.untyped_storage(), away.stored.slot))
        return Coming(self, away, copy, tensor)

    def bring(self) -> None:
        """Bring back what is away, by the calling thread if the link failed. Raises SwapError."""
        away = self.get()
        if isinstance(away, AwayTensor):
            tensor = away.allocated()
            copy = Copy("in", tensor.untyped_storage(), away.stored.slot)
            away.stored.link.fetch(copy)
            Coming(self, away, copy, tensor).arrive()


@dataclass(eq=False)
class Leaving:
    """A tensor whose copy out was asked for, and which is still in its place."""

    place: Place
    stored: StoredBytes
    copy: Copy
    tensor: weakref.ref[torch.Tensor]
    version: int

    def finish(self) -> AwayTensor | None:
        """Wait for the copy and let the tensor go; None for one that stays after all.

        That is one which was replaced meanwhile, as DDP puts views of its buckets, or which
        somebody else holds. Raises SwapError; the tensor is still there then.
        """
        link = self.stored.link
        link.wait(self.copy)
        tensor = self.tensor()
        if tensor is None or self.place.get() is not tensor:
            return None
        if tensor._version != self.version:  # written meanwhile
            link.ask(again := Copy("out", tensor.untyped_storage(), self.stored.slot))
            link.wait(again)
        away = AwayTensor.of(tensor, self.stored, self.place.what)
        del tensor
        return away if self.place.let_go(away) else None


@dataclass(eq=False)
class Coming:
    """A tensor for which memory was allocated; its bytes arrive, or have arrived."""

    place: Place
    away: AwayTensor
    copy: Copy
    tensor: torch.Tensor | None
    version: int = 0

    def arrive(self) -> None:
        """Wait for the copy, scale what was clipped, and put it in its place. Raises SwapError."""
        link, tensor = self.away.stored.link, self.tensor
        assert tensor is not None
        if not self.copy.done.is_set():
            link.wait(self.copy)
        self.place.put(tensor)
        for most, norm in self.away.clips:
            assert isinstance(self.place.owner, nn.Parameter)
            nn.utils.clip_grads_with_norm_([self.place.owner], most, norm)
        self.version = tensor._version

    def leave(self, link: Link) -> Leaving | None:
        """Let it go at once if it was only read; else ask for its copy, as ``Place.leave``."""
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        is_unchanged = self.place.get() is tensor and tensor._version == self.version
        del tensor
        if is_unchanged:
            self.place.let_go(self.away)
            return None
        return self.place.leave(link)


def _may_leave(tensor: Any) -> bool:
    """Whether it is a plain tensor on the CPU, all of its storage, and worth moving."""
    if type(tensor) is not torch.Tensor or not is_as_stored(tensor):
        return False
    if tensor.requires_grad or tensor._base is not None:
        return False
    num_bytes = tensor.untyped_storage().nbytes()
    return num_bytes >= SMALLEST_BYTES and num_bytes == tensor.nbytes


def _tensor_in(storage: torch.UntypedStorage, form: torch.Tensor) -> torch.Tensor:
    """A tensor, no view of another, of some form in a storage."""
    empty = torch.empty(0, dtype=form.dtype)
    with torch.no_grad():
        return empty.set_(storage, form.storage_offset(), form.shape, form.stride())
