"""The choice, made in every iteration, between streaming borrowed layers and shipping rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch

from elbowroom.pool.leases import Leases, ShippedLeases, SlottedLeases, TimedLeases

HYSTERESIS = 1.25
"""Factor by which a batch must be beyond the threshold to change the mode."""

LEAST_ITERATIONS = 20
"""Iterations between two changes of the mode, at least."""

MOST_CORRECTION = 4.0
"""Factor by which measurements may move the plan's threshold, at most."""

_LEARNING_RATE = 0.1

BatchMode = Literal["streamed", "shipped"]
"""The pool mode of the borrowed layers in one iteration."""


class Chooser:
    """A policy that chooses the mode of one replica's iterations by the rows in them.

    The plan gives B_th, the smallest batch that streams no slower than it ships. What streaming
    really costs (the seconds that compute waited for weights) and what a shipped row does (round
    trips, less what the layers would take here) corrects it: the threshold moves to where both
    cost the same, at most by ``MOST_CORRECTION``. Replicas choose independently of each other.

    Args:
        threshold_rows: B_th of the plan; 0 never ships.
        most_rows: the largest batch that can be shipped.

    """

    def __init__(self, threshold_rows: int, most_rows: int) -> None:
        self._planned = threshold_rows
        self._most_rows = most_rows
        self._mode: BatchMode | None = None
        self._since = 0
        self._wait_seconds: float | None = None
        self._row_seconds: float | None = None

    @property
    def threshold_rows(self) -> float:
        """B_th as corrected; never so high that a batch that just fits alternates between modes."""
        threshold = float(self._planned)
        if self._wait_seconds and self._row_seconds is not None:
            measured = self._wait_seconds / max(self._row_seconds, 1e-9)
            least, most = threshold / MOST_CORRECTION, threshold * MOST_CORRECTION
            threshold = (threshold * min(max(measured, least), most)) ** 0.5
        return min(threshold, self._most_rows / HYSTERESIS)

    def choose(self, num_rows: int) -> BatchMode:
        """Choose the next iteration's mode. A batch that cannot be shipped streams at once."""
        threshold = self.threshold_rows
        wanted = self._mode or ("shipped" if num_rows < threshold else "streamed")
        if num_rows > self._most_rows:
            wanted = "streamed"
        elif self._since >= LEAST_ITERATIONS:
            if num_rows < threshold / HYSTERESIS:
                wanted = "shipped"
            elif num_rows > threshold * HYSTERESIS:
                wanted = "streamed"
        self._since = 1 if wanted != self._mode else self._since + 1
        self._mode = wanted
        return wanted

    def streamed(self, wait_seconds: float) -> None:
        """Learn from an iteration that streamed: compute waited ``wait_seconds`` for weights."""
        self._wait_seconds = _moved(self._wait_seconds, wait_seconds)

    def shipped(self, num_rows: int, extra_seconds: float) -> None:
        """Learn from an iteration that shipped ``num_rows`` rows.

        It took ``extra_seconds`` longer than it would have with all layers here.
        """
        self._row_seconds = _moved(self._row_seconds, max(0.0, extra_seconds) / num_rows)


class LeaseChoice(Protocol):
    """A rule that chooses in every iteration by which leases each layer is used."""

    @property
    def leases(self) -> Sequence[Leases]:
        """The leases of the iteration under way (before the first, of the usual mode), by layer."""
        ...

    @property
    def residencies(self) -> Sequence[Leases]:
        """All leases that can be chosen, each once."""
        ...

    def begin_iteration(self, x: torch.Tensor) -> None:
        """Choose for the forward pass that begins with ``x`` [..., columns]."""
        ...


class OneMode:
    """The same leases in every iteration: ``leases`` has one entry for each layer."""

    def __init__(self, leases: Sequence[Leases]) -> None:
        self.leases = leases
        self.residencies = tuple(dict.fromkeys(leases))

    def begin_iteration(self, x: torch.Tensor) -> None:
        for residency in self.residencies:
            residency.begin_iteration()


class StreamedOrShipped:
    """A choice between streaming and shipping borrowed layers, made by a ``Chooser``.

    It is told after every iteration what that one cost.
    ``owned`` are the leases on this replica's own layers; ``borrowed`` says for each layer whether
    it is a peer's. Batches of at most ``ship_bytes`` bytes can be shipped.
    """

    def __init__(
        self,
        owned: Leases,
        slotted: SlottedLeases,
        shipped: ShippedLeases,
        borrowed: Sequence[bool],
        threshold_rows: int,
        ship_bytes: int,
    ) -> None:
        own_layers = [layer for layer, is_borrowed in enumerate(borrowed) if not is_borrowed]
        self._timed = TimedLeases(owned, own_layers)
        self._slotted = slotted
        self._shipped = shipped
        self.residencies: Sequence[Leases] = (owned, slotted, shipped)
        self._by_mode: dict[BatchMode, Sequence[Leases]] = {
            "streamed": [slotted if is_borrowed else owned for is_borrowed in borrowed],
            "shipped": [shipped if is_borrowed else self._timed for is_borrowed in borrowed],
        }
        self._mode: BatchMode = "streamed"
        self._threshold_rows = threshold_rows
        self._ship_bytes = ship_bytes
        self._chooser: Chooser | None = None  # until the first batch shows how large a row is
        self._num_rows = 0
        self._before = self._spent()
        self.leases = self._by_mode[self._mode]

    def begin_iteration(self, x: torch.Tensor) -> None:
        num_rows, row_bytes = x.numel() // x.shape[-1], x.shape[-1] * x.element_size()
        if self._chooser is None:
            self._chooser = Chooser(self._threshold_rows, self._ship_bytes // row_bytes)
        else:
            self._report(self._chooser)
        mode = self._chooser.choose(num_rows)
        if mode != self._mode:
            self._slotted.pause() if mode == "shipped" else self._slotted.resume()
            self._mode, self.leases = mode, self._by_mode[mode]
        self._num_rows = num_rows
        self._before = self._spent()
        (self._shipped if mode == "shipped" else self._slotted).begin_iteration()

    def _report(self, chooser: Chooser) -> None:
        """Tell ``chooser`` how the last iteration went."""
        before, now = self._before, self._spent()
        if self._mode == "streamed":
            chooser.streamed(now.stream_wait_seconds - before.stream_wait_seconds)
            return
        # What as many layers would have taken here: as long as this replica's own.
        num_own = max(1, now.num_own - before.num_own)
        layer_seconds = (now.own_seconds - before.own_seconds) / num_own
        here = (now.num_shipped - before.num_shipped) * layer_seconds
        chooser.shipped(self._num_rows, now.ship_wait_seconds - before.ship_wait_seconds - here)

    def _spent(self) -> _Spent:
        return _Spent(
            self._slotted.wait_seconds,
            self._shipped.wait_seconds,
            self._shipped.num_layers_shipped,
            self._timed.run_seconds,
            self._timed.num_layers_run,
        )


class _Spent(NamedTuple):
    """Time spent since the start, and the layers that it was spent on."""

    stream_wait_seconds: float
    ship_wait_seconds: float
    num_shipped: int
    own_seconds: float
    num_own: int


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + _LEARNING_RATE * (value - average)
