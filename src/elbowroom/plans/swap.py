"""Plans of a swapped training step: frozen, printable, with a JSON round trip.

Whatever a run needs to know is in its plan: which saved storages leave the device, at which tick
each is dropped and brought back, and in which order the link moves them. Ticks are those of
``core.step_profile``: autograd's packs and unpacks, counted from the begin of the step.
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
from elbowroom.core.units import format_bytes

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


Choice = Swapped
"""What becomes of a storage that is not kept. Recomputed storages will join here."""


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
        if len(self.tick_peaks) != self.num_ticks + 1:
            raise InputError(
                f"the plan has peaks of {len(self.tick_peaks)} intervals, its {self.num_ticks} "
                f"ticks divide the step into {self.num_ticks + 1}"
            )
        if not isinstance(self.swaps_optimizer, bool):
            raise InputError(f"swaps_optimizer is {self.swaps_optimizer!r}: give true or false")
        _check_choices(self)
        _check_transfers(self)

    @cached_property
    def choice_of(self) -> dict[int, Choice]:
        """Choice by storage number; a storage that is kept is missing."""
        return {choice.storage: choice for choice in self.choices}

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
        return (
            f"{len(self.choices)} of {len(self.storages)} saved storages swapped, "
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
            rest["choices"] = tuple(Swapped(**choice) for choice in rest["choices"])
            rest["tick_peaks"] = tuple(rest["tick_peaks"])
            rest["transfers"] = tuple(Transfer.parse(text) for text in rest["transfers"])
            return SwapPlan(**rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"no swap plan: {error}") from error


def default_order(
    storages: Sequence[PlannedStorage], choices: Sequence[Choice]
) -> tuple[Transfer, ...]:
    """Transfers in the order in which they are asked for: outs at packs, ins at brings."""
    asked: list[tuple[int, int, int, Transfer]] = []
    for choice in choices:
        storage = storages[choice.storage]
        # At one tick, brings are asked for before the pack; of several, the earliest needed first.
        out = Transfer("out", choice.storage)
        asked.append((storage.pack_tick, 1, choice.storage, out))
        if choice.bring is not None:
            use = storage.use_tick if storage.use_tick is not None else choice.bring
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


def _check_choices(plan: SwapPlan) -> None:
    """Raise InputError unless each choice drops after the pack and brings before the use."""
    numbers = [choice.storage for choice in plan.choices]
    if numbers != sorted(set(numbers)):
        raise InputError("the plan's choices must ascend by storage, one for each")
    for choice in plan.choices:
        if not 0 <= choice.storage < len(plan.storages):
            raise InputError(f"the plan swaps storage {choice.storage} of {len(plan.storages)}")
        storage = plan.storages[choice.storage]
        last = storage.use_tick if storage.use_tick is not None else plan.num_ticks
        if not storage.pack_tick <= choice.drop <= last:
            raise InputError(
                f"storage {choice.storage} is dropped at tick {choice.drop}: it is saved at "
                f"{storage.pack_tick} and used at {last}"
            )
        if (choice.bring is None) != (storage.use_tick is None):
            raise InputError(
                f"storage {choice.storage} is brought at {choice.bring}, used at {storage.use_tick}"
            )
        if choice.bring is not None and not choice.drop <= choice.bring <= last:
            raise InputError(
                f"storage {choice.storage} is brought at tick {choice.bring}: it is dropped at "
                f"{choice.drop} and used at {last}"
            )


def _check_transfers(plan: SwapPlan) -> None:
    """Raise InputError for a transfer too many or too few, or in an order that cannot be kept.

    The link must never wait for a transfer that the main thread has yet to ask for, while the main
    thread waits for one that stands behind it.
    """
    wanted = set(default_order(plan.storages, plan.choices))
    if len(plan.transfers) != len(wanted) or set(plan.transfers) != wanted:
        odd = wanted.symmetric_difference(plan.transfers)
        names = ", ".join(sorted(map(str, odd))[:6]) or "one is listed twice"
        raise InputError(f"the plan's transfers do not fit its choices: {names}")
    latest, behind = (-1, -1), ""
    for transfer in plan.transfers:
        choice, storage = plan.choice_of[transfer.storage], plan.storages[transfer.storage]
        if transfer.direction == "out":
            asked = (storage.pack_tick, 2)
            at_once = choice.drop == storage.pack_tick
            awaited = (choice.drop, 3 if at_once else 0)
        else:
            assert choice.bring is not None and storage.use_tick is not None
            asked, awaited = (choice.bring, 1), (storage.use_tick, 3)
        if asked > latest:
            latest, behind = asked, str(transfer)
        if latest > awaited:
            raise InputError(
                f"{transfer} stands behind {behind}, which is asked for at tick {latest[0]}, but "
                f"it is waited for at tick {awaited[0]}: list it earlier"
            )
