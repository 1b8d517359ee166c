"""Facts about the memory of one training step, measured while everything it saves is swapped.

A step is seen as a sequence of *ticks*: each time autograd saves a tensor for the backward (a pack)
or asks for a saved one (an unpack). Memory is seen as a *log*: the allocator's allocations and
releases in order, in which each tick has an entry of its own that changes nothing. All positions
are indices of entries of the log. Between the entries are *states*: state p is what is held after p
entries, so a log of n entries has the states 0 to n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError
from elbowroom.core.files import read_as, unversioned, versioned, write_text
from elbowroom.core.recipe import Recipe
from elbowroom.core.values import check_flag, check_whole, is_whole

MAX_ENTRIES = 10_000_000
MAX_TOTAL_BYTES = 10**15
"""Limit on what a step holds: sums stay exact in 64 bits."""

_WHAT, _VERSION = "step profile", 1


@dataclass(frozen=True)
class SavedStorage:
    """Memory of one or several tensors that autograd saves: what is kept, swapped or recomputed.

    In the measured step it was copied away and dropped at its first pack, allocated again and
    copied back at its first unpack.

    Args:
        number: place in the order of first packs, from 0.
        num_bytes: size of the storage, of which a saved tensor may be a part.
        made_by: name of the module in whose forward it was first saved; empty outside modules.
        pack_ticks: ticks at which a tensor in it was saved, ascending.
        unpack_ticks: ticks at which one was asked for, ascending; none if the backward never did.
        free: position at which it went when nobody else needed it; None if somebody held it to the
            end of the step, as a caller holds its input.
        bring: position at which memory was allocated to bring it back; None if it never was.
        release: position at which autograd needed it no longer: the copy that was brought back
            went, or would have gone; None if that was after the step.
        recipe: how to make it again from what is there at its first unpack; None if it cannot be.

    Raises InputError for facts that contradict each other.

    """

    number: int
    num_bytes: int
    made_by: str
    pack_ticks: tuple[int, ...]
    unpack_ticks: tuple[int, ...]
    free: int | None
    bring: int | None
    release: int | None
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        what = f"storage {self.number}"
        check_whole(f"{what}: num_bytes", self.num_bytes, MAX_TOTAL_BYTES)
        if not isinstance(self.made_by, str):
            raise InputError(f"{what}: made_by is {self.made_by!r}: give a module's name")
        if not self.pack_ticks:
            raise InputError(f"{what} was never saved: give the ticks of its packs")
        for key in ("pack_ticks", "unpack_ticks"):
            _check_ascending(f"{what}: {key}", getattr(self, key))
        if self.unpack_ticks and self.unpack_ticks[0] <= self.pack_ticks[0]:
            raise InputError(f"{what} is asked for before it is saved: profile the step again")
        if (self.bring is None) != (not self.unpack_ticks):
            raise InputError(f"{what}: bring is {self.bring}, unpacks are {self.unpack_ticks}")

    @property
    def pack_tick(self) -> int:
        """Tick at which it is first saved."""
        return self.pack_ticks[0]

    @property
    def use_tick(self) -> int | None:
        """Tick at which it is first asked for; None if it never is."""
        return self.unpack_ticks[0] if self.unpack_ticks else None

    @property
    def is_held_elsewhere(self) -> bool:
        """Whether swapping it frees nothing: somebody else holds it until it comes back."""
        return self.free is None or (self.bring is not None and self.free >= self.bring)


@dataclass(frozen=True)
class ReadyGradient:
    """Gradient of one parameter, complete during the compute that follows ``tick``.

    Raises InputError for a number of bytes that cannot be.

    """

    tick: int
    num_bytes: int

    def __post_init__(self) -> None:
        check_whole("a gradient: num_bytes", self.num_bytes, MAX_TOTAL_BYTES)


@dataclass(frozen=True)
class StepProfile:
    """One step's ticks, its memory with everything swapped at once, and the storages it saves.

    Args:
        seconds_before: compute before the first tick.
        seconds: compute after each tick until the next; hooks and copies are not counted.
        num_forward_ticks: ticks before the first unpack; all of them are packs.
        tick_positions: position of each tick's own entry in the log, ascending.
        deltas: the log: bytes that each entry adds to what is held; negative for a release, 0 for
            a tick.
        static_bytes: bytes held when the step began: weights, optimizer state, batch.
        smallest_bytes: storages below this size are no storages of the profile: they are kept.
        storages: saved storages, by number.
        num_threads: PyTorch's threads in the measured step, on which workspaces depend.
        held_gradient_bytes: gradients among ``static_bytes``: a step that begins without them makes
            them, which this one did not.
        swaps_optimizer: whether gradients left while they were made, and optimizer state was away.
        gradients: of plain parameters, in the order in which they were complete; empty in
            profiles of before, which do not know.

    Raises InputError for facts that contradict each other.

    """

    seconds_before: float
    seconds: tuple[float, ...]
    num_forward_ticks: int
    tick_positions: tuple[int, ...]
    deltas: tuple[int, ...]
    static_bytes: int
    smallest_bytes: int
    storages: tuple[SavedStorage, ...]
    num_threads: int = 1
    held_gradient_bytes: int = 0
    swaps_optimizer: bool = False
    gradients: tuple[ReadyGradient, ...] = ()

    def __post_init__(self) -> None:
        check_flag("swaps_optimizer", self.swaps_optimizer)
        _check_seconds((self.seconds_before, *self.seconds))
        check_whole("static_bytes", self.static_bytes, MAX_TOTAL_BYTES)
        check_whole("smallest_bytes", self.smallest_bytes, MAX_TOTAL_BYTES)
        check_whole("held_gradient_bytes", self.held_gradient_bytes, self.static_bytes)
        check_whole("num_threads", self.num_threads, MAX_ENTRIES)
        check_whole("num_forward_ticks", self.num_forward_ticks, self.num_ticks)
        _check_log(self)
        for number, storage in enumerate(self.storages):
            if storage.number != number:
                raise InputError(f"storage {storage.number} stands in place {number}: sort them")
            _check_places(storage, self.num_ticks, len(self.deltas))
        for storage in self.storages:
            _check_recipe(storage, self.storages)
        _check_gradients(self)

    @property
    def num_ticks(self) -> int:
        return len(self.seconds)

    @property
    def num_states(self) -> int:
        """Number of states: one more than entries in the log."""
        return len(self.deltas) + 1

    @property
    def compute_seconds(self) -> float:
        """Seconds of a step that never waits for a copy."""
        return self.seconds_before + math.fsum(self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {**versioned(_WHAT, _VERSION), **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> StepProfile:
        """Build one from its JSON form. Raises InputError for what ``to_json`` never writes."""
        rest = unversioned(data, _WHAT, _VERSION)
        try:
            for key in ("seconds", "tick_positions", "deltas"):
                rest[key] = tuple(rest[key])
            rest["storages"] = tuple(_storage(storage) for storage in rest["storages"])
            gradients = rest.pop("gradients", ())
            rest["gradients"] = tuple(ReadyGradient(**gradient) for gradient in gradients)
            return StepProfile(**rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"no step profile: {error}") from error


def read_step_profile(path: Path) -> StepProfile:
    """Read a profile. Raises InputError that names the file and what is wrong with it."""
    return read_as(path, StepProfile.from_json)


def write_step_profile(path: Path, profile: StepProfile) -> None:
    """Write a profile as JSON in one line, atomically. Raises OutputError."""
    write_text(path, json.dumps(profile.to_json()) + "\n")


def _storage(data: dict[str, Any]) -> SavedStorage:
    ticks = {key: tuple(data[key]) for key in ("pack_ticks", "unpack_ticks")}
    recipe = data.get("recipe")
    recipe = None if recipe is None else Recipe.from_json(recipe)
    return SavedStorage(**{**data, **ticks, "recipe": recipe})


def _check_ascending(what: str, values: Sequence[Any]) -> None:
    numbers = all(is_whole(value) and value >= 0 for value in values)
    if not numbers or any(one >= other for one, other in pairwise(values)):
        raise InputError(f"{what} must be whole numbers that ascend, not {str(values)[:60]}")


def _check_seconds(seconds: Sequence[Any]) -> None:
    for value in seconds:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise InputError(f"seconds of a tick are {value!r}: give a number that is not negative")


def _check_log(profile: StepProfile) -> None:
    if len(profile.deltas) > MAX_ENTRIES:
        raise InputError(
            f"{len(profile.deltas)} entries in the log, at most {MAX_ENTRIES} are read"
        )
    if len(profile.tick_positions) != profile.num_ticks:
        raise InputError(
            f"{profile.num_ticks} ticks have seconds, {len(profile.tick_positions)} have positions"
        )
    _check_ascending("tick_positions", profile.tick_positions)
    total = 0
    for delta in profile.deltas:
        if not is_whole(delta):
            raise InputError(f"the log has {delta!r}: give whole numbers of bytes")
        total += abs(delta)
    if total > MAX_TOTAL_BYTES:
        raise InputError(f"the log moves {total:g} bytes, more than {MAX_TOTAL_BYTES:g}")
    for position in profile.tick_positions:
        if position >= len(profile.deltas) or profile.deltas[position]:
            raise InputError(f"entry {position} of the log must be a tick's, which adds 0 bytes")


def _check_places(storage: SavedStorage, num_ticks: int, num_entries: int) -> None:
    """Raise InputError if a storage points outside of the ticks or the log."""
    for tick in (*storage.pack_ticks, *storage.unpack_ticks):
        check_whole(f"storage {storage.number}: a tick", tick, num_ticks - 1)
    for key in ("free", "bring", "release"):
        position = getattr(storage, key)
        if position is not None:
            check_whole(f"storage {storage.number}: {key}", position, num_entries)


def _check_recipe(storage: SavedStorage, storages: Sequence[SavedStorage]) -> None:
    """Raise InputError for a recipe that reads what is not there when it is replayed."""
    if storage.recipe is None:
        return
    for number in storage.recipe.sources:
        if not 0 <= number < len(storages):
            raise InputError(
                f"storage {storage.number} is made from storage {number} of {len(storages)}"
            )
        if not can_read(storage, storages[number]):
            raise InputError(
                f"storage {storage.number} is made from storage {number}, which is not there from "
                "its save to its first use: profile the step again"
            )


def can_read(storage: SavedStorage, source: SavedStorage) -> bool:
    """Whether a storage's recipe may read a source: saved before it, and there when it is used."""
    if storage.bring is None or source.bring is None or source.pack_tick >= storage.pack_tick:
        return False
    return source.release is None or source.release > storage.bring


def _check_gradients(profile: StepProfile) -> None:
    """Raise InputError unless gradients are of the step's ticks, in their order."""
    for gradient in profile.gradients:
        check_whole("a gradient: tick", gradient.tick, profile.num_ticks - 1)
    if any(one.tick > other.tick for one, other in pairwise(profile.gradients)):
        raise InputError("gradients must be listed in the order in which they are complete")
