"""Plans of a swapped training step: frozen, printable, with a JSON round trip.

Whatever a run needs to know is in its plan: which saved storages leave the device, at which tick
each is dropped and brought back, in which order the link moves them, and how those that are not
moved are made again. Ticks are those of ``core.step_profile``: autograd's packs and unpacks,
counted from the begin of the step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from elbowroom.core.errors import InputError
from elbowroom.core.files import is_of_format, read_as, unversioned, versioned, write_json
from elbowroom.core.recipe import Recipe
from elbowroom.core.units import format_bytes
from elbowroom.plans.swap_check import check_choices, check_numbers, check_transfers

Direction = Literal["out", "in"]

_WHAT, _VERSION = "swap plan", 1
_LETTERS: dict[Direction, str] = {"out": "O", "in": "I"}


@dataclass(frozen=True)
class Transfer:
    """Copy one storage to the slow tier (out), or back (in). Text form: ``O12``, ``I12``."""

    direction: Direction
    storage: int

    def __str__(self) -> str:
        return f"{_LETTERS[self.direction]}{self.storage}"

    @staticmethod
    def parse(text: str) -> Transfer:
        """Parse a transfer, the inverse of ``str``. Raises ValueError for any other text."""
        match = re.fullmatch(r"([OI])(\d+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not a transfer such as O12 or I12")
        return Transfer("out" if match[1] == "O" else "in", int(match[2]))


@dataclass(frozen=True)
class PlannedStorage:
    """What the plan expects of one saved storage, so that a step that differs is noticed.

    ``pack_ticks`` are the ticks at which it is saved; ``use_tick`` is the first at which it is
    asked for, None if it never is.
    """

    num_bytes: int
    pack_ticks: tuple[int, ...]
    use_tick: int | None

    @property
    def pack_tick(self) -> int:
        """Tick at which it is first saved."""
        return self.pack_ticks[0]


@dataclass(frozen=True)
class Swapped:
    """Choice to copy a storage away and back.

    Its copy out is asked for at its first pack. At tick ``drop`` the main thread waits for that
    copy and drops the storage: at the first pack ("at once"), or later. At tick ``bring`` the main
    thread allocates memory and asks for the copy back: at the first unpack ("on demand"), or
    earlier; None if the storage is never asked for. Within a tick, drops come before brings, and
    brings before the pack or unpack itself; only a drop at the first pack follows that pack.
    """

    storage: int
    drop: int
    bring: int | None


@dataclass(frozen=True)
class Recomputed:
    """Choice to drop a storage at its first pack, and to make it again at its first unpack.

    The storages that its recipe reads are kept, or swapped and back by then.
    """

    storage: int
    recipe: Recipe


Choice = Swapped | Recomputed
"""What becomes of a storage that is not kept."""


@dataclass(frozen=True)
class SwapPlan:
    """Choices for the storages of one training step, and what they are predicted to cost.

    Args:
        num_ticks: packs and unpacks of the step.
        smallest_bytes: storages below this size are not counted, and kept.
        storages: all that the step saves, by number.
        choices: what becomes of those that are not kept, ascending by storage.
        transfers: copies in the order in which the link makes them.
        budget_bytes: most that may be held, ``static_bytes`` included; None if nothing limits it.
        static_bytes: bytes held when the step begins.
        tick_peaks: most bytes predicted to be held before the first tick, between it and the
            second, and so on; without the static bytes.
        compute_seconds: seconds of the step if it never waits for a copy.
        seconds: predicted seconds of the step.
        num_threads: PyTorch's threads in the step that was measured.
        tier: folder of the slow tier whose speed was planned with; empty if that was given.
        held_gradient_bytes: gradients among ``static_bytes``.
        swaps_optimizer: whether it was made for an optimizer whose gradients and state are away.

    Raises InputError for a plan that could not be carried out.

    """

    num_ticks: int
    smallest_bytes: int
    storages: tuple[PlannedStorage, ...]
    choices: tuple[Choice, ...]
    transfers: tuple[Transfer, ...]
    budget_bytes: int | None
    static_bytes: int
    tick_peaks: tuple[int, ...]
    compute_seconds: float
    seconds: float
    num_threads: int = 1
    tier: str = ""
    held_gradient_bytes: int = 0
    swaps_optimizer: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if len(self.tick_peaks) != self.num_ticks + 1:
            raise InputError(
                f"the plan has peaks of {len(self.tick_peaks)} intervals, its {self.num_ticks} "
                f"ticks divide the step into {self.num_ticks + 1}"
            )
        check_choices(self)
        check_transfers(self, default_order(self.storages, self.choices))

    @cached_property
    def choice_of(self) -> dict[int, Choice]:
        """Choice by storage number; a storage that is kept is missing."""
        return {choice.storage: choice for choice in self.choices}

    @cached_property
    def swapped(self) -> tuple[Swapped, ...]:
        """Choices of the storages that are copied away and back."""
        return tuple(choice for choice in self.choices if isinstance(choice, Swapped))

    @cached_property
    def recomputed(self) -> tuple[Recomputed, ...]:
        """Choices of the storages that are made again."""
        return tuple(choice for choice in self.choices if isinstance(choice, Recomputed))

    @cached_property
    def sources(self) -> frozenset[int]:
        """Storages from which others are made."""
        return frozenset(number for each in self.recomputed for number in each.recipe.sources)

    @cached_property
    def storage_of_tick(self) -> dict[int, int]:
        """Storage that is saved at a tick; a tick that saves none that could leave is missing."""
        return {
            tick: number
            for number, storage in enumerate(self.storages)
            for tick in storage.pack_ticks
        }

    @cached_property
    def brings(self) -> dict[int, tuple[int, ...]]:
        """Storages that are brought at a tick, in the order of their transfers."""
        bring_of = {choice.storage: choice.bring for choice in self.swapped}
        brings: dict[int, tuple[int, ...]] = {}
        for transfer in self.transfers:
            tick = bring_of[transfer.storage]
            if transfer.direction == "in" and tick is not None:
                brings[tick] = (*brings.get(tick, ()), transfer.storage)
        return brings

    @cached_property
    def need_ticks(self) -> dict[int, int]:
        """Tick at which a storage that is swapped is first needed, by a recipe or the backward."""
        return _need_ticks(self.storages, self.choices)

    @property
    def recomputed_bytes(self) -> int:
        """Bytes that are made again in one step."""
        return sum(self.storages[choice.storage].num_bytes for choice in self.recomputed)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak, ``static_bytes`` included."""
        return self.peak_bytes_with(self.static_bytes)

    @property
    def out_bytes(self) -> int:
        """Bytes copied to the slow tier in one step."""
        return self._moved("out")

    @property
    def in_bytes(self) -> int:
        """Bytes copied back in one step."""
        return self._moved("in")

    def peak_bytes_with(self, static_bytes: int, gradient_bytes: int | None = None) -> int:
        """Predicted peak of a step that begins with so many bytes held, of these gradients.

        With fewer gradients than the plan's own (None: as many) it is an upper bound: the step
        makes those that are missing.
        """
        missing = 0 if gradient_bytes is None else self.held_gradient_bytes - gradient_bytes
        return static_bytes + max(0, missing) + max(self.tick_peaks)

    def _moved(self, direction: Direction) -> int:
        return sum(
            self.storages[transfer.storage].num_bytes
            for transfer in self.transfers
            if transfer.direction == direction
        )

    def __str__(self) -> str:
        recomputed = f", {len(self.recomputed)} recomputed" if self.recomputed else ""
        return (
            f"{len(self.swapped)} of {len(self.storages)} saved storages swapped{recomputed}, "
            f"{format_bytes(self.out_bytes)} out and {format_bytes(self.in_bytes)} in, "
            f"peak {format_bytes(self.peak_bytes)}, {self.seconds:.3g} s"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **versioned(_WHAT, _VERSION),
            **asdict(self),
            "transfers": [str(transfer) for transfer in self.transfers],
        }

    @staticmethod
    def from_json(data: Any) -> SwapPlan:
        """Build a plan from its JSON form. Raises InputError for what ``to_json`` never writes."""
        rest = unversioned(data, _WHAT, _VERSION)
        try:
            rest["storages"] = tuple(
                PlannedStorage(**{**storage, "pack_ticks": tuple(storage["pack_ticks"])})
                for storage in rest["storages"]
            )
            rest["tick_peaks"] = tuple(rest["tick_peaks"])
            rest["choices"] = tuple(_choice(choice) for choice in rest["choices"])
            rest["transfers"] = tuple(Transfer.parse(text) for text in rest["transfers"])
            return SwapPlan(**rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"no swap plan: {error}") from error


def default_order(
    storages: Sequence[PlannedStorage], choices: Sequence[Choice]
) -> tuple[Transfer, ...]:
    """Transfers in the order in which they are asked for: outs at packs, ins at brings."""
    asked: list[tuple[int, int, int, Transfer]] = []
    needs = _need_ticks(storages, choices)
    for choice in choices:
        if not isinstance(choice, Swapped):
            continue
        storage = storages[choice.storage]
        # At one tick, brings are asked for before the pack; of several, the earliest needed first.
        out = Transfer("out", choice.storage)
        asked.append((storage.pack_tick, 1, choice.storage, out))
        if choice.bring is not None:
            use = needs.get(choice.storage, choice.bring)
            asked.append((choice.bring, 0, use, Transfer("in", choice.storage)))
    return tuple(each[-1] for each in sorted(asked, key=lambda each: each[:3]))


def is_swap_plan(path: Path) -> bool:
    """Whether a file says that it is a swap plan. Raises InputError if it cannot be read."""
    return is_of_format(path, _WHAT)


def read_swap_plan(path: Path) -> SwapPlan:
    """Read a plan. Raises InputError that names the file and what is wrong with it."""
    return read_as(path, SwapPlan.from_json)


def write_swap_plan(path: Path, plan: SwapPlan) -> None:
    """Write a plan as JSON, atomically. Raises OutputError."""
    write_json(path, plan.to_json())


def _choice(data: dict[str, Any]) -> Choice:
    if "recipe" in data:
        return Recomputed(**{**data, "recipe": Recipe.from_json(data["recipe"])})
    return Swapped(**data)


def _need_ticks(storages: Sequence[PlannedStorage], choices: Sequence[Choice]) -> dict[int, int]:
    needs: dict[int, int] = {}
    for choice in choices:
        use = storages[choice.storage].use_tick
        if use is None:
            continue
        read = (choice.storage,) if isinstance(choice, Swapped) else choice.recipe.sources
        for number in read:
            needs[number] = min(use, needs.get(number, use))
    return needs
