"""Simulation of a swapped step: compute, and the link's copies in the order of the plan.

The main thread computes, waits for a copy out before it drops a storage, and for a copy in before
it uses one. The link makes the plan's transfers one after the other, in one queue (a disk), or in
one for each direction (a duplex link such as PCIe or NVLink). Recomputing is compute, at the use,
after what it reads is there. ``clock`` has the same times, faster.

Where replicas average their gradients, that goes on beside both, and may cross the link as well:
copies and all-reduce then pass as many bytes per second each, unless one has no use for its share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.trace import Count, Span
from elbowroom.core.units import format_bytes
from elbowroom.planning.events import Task, Timeline, simulate
from elbowroom.planning.swap.reduction import Bucket, GradientReduction
from elbowroom.plans.swap import Direction, Recomputed, Swapped, SwapPlan, Transfer

_COMPUTE, _OUT, _IN, _NETWORK, _LINK = range(5)
_RESOURCES = ("compute", "out", "in", "reduce", "link")
"""Names of their tracks. ``link`` is what both directions share, unless the link is duplex."""

_REDUCE = 3
"""Stream of the all-reduces, after those of the queues."""


@dataclass(frozen=True)
class SwapLink:
    """The way to the slow tier and back.

    Args:
        out_bandwidth: bytes per second to the slow tier.
        in_bandwidth: bytes per second back.
        is_duplex: whether both directions work at once, each with its own queue.
        latency_seconds: seconds of one transfer before its first byte moves.

    Raises InputError for rates that are not above 0.

    """

    out_bandwidth: float
    in_bandwidth: float
    is_duplex: bool = False
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.out_bandwidth > 0 and self.in_bandwidth > 0 and self.latency_seconds >= 0):
            raise InputError(
                f"a link with {self.out_bandwidth:g} and {self.in_bandwidth:g} bytes/s and "
                f"{self.latency_seconds:g} s of latency: rates must be above 0, latency not below"
            )

    def seconds(self, direction: Direction, num_bytes: int) -> float:
        """Seconds of one transfer that meets no other."""
        return self.latency_seconds + num_bytes / self.bandwidth(direction)

    def bandwidth(self, direction: Direction) -> float:
        """Bytes per second in one direction."""
        return self.out_bandwidth if direction == "out" else self.in_bandwidth


DISK_LINK = SwapLink(out_bandwidth=1.07e9, in_bandwidth=0.93e9)
"""A disk written and read past the page cache: 1.0 and 0.87 GiB/s, found with blocks of 11 MiB."""


class Wait(NamedTuple):
    """Seconds in which the main thread waited for a transfer, at a drop (out) or a use (in)."""

    transfer: Transfer
    seconds: float


@dataclass(frozen=True)
class SwapTimeline:
    """A simulated step.

    Args:
        timeline: its tasks.
        waits: one entry for each transfer, in order of waiting.
        reduction_wait_seconds: seconds from the end of the backward until all gradients are
            reduced.
        tick_seconds: when the compute after each tick begins.

    """

    timeline: Timeline
    waits: tuple[Wait, ...]
    reduction_wait_seconds: float = 0.0
    tick_seconds: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.timeline.seconds

    def waited_seconds(self, storage: int) -> float:
        """Seconds that the step waited for a storage's copies; 0 if both are hidden."""
        return sum(wait.seconds for wait in self.waits if wait.transfer.storage == storage)

    def busy_seconds(self, direction: Direction) -> float:
        """Seconds of the link's full bandwidth in one direction that all who crossed it took."""
        return self.timeline.busy_seconds[_RESOURCES.index(direction)]

    def spans(self) -> Iterator[Span]:
        """Compute, copies and all-reduces, for a trace."""
        timeline = self.timeline
        for task, start, end in zip(timeline.tasks, timeline.starts, timeline.ends, strict=True):
            if end > start:
                yield Span("step", _RESOURCES[task.uses[0][0]], task.name, start, end)

    def memory(self, plan: SwapPlan) -> Iterator[Count]:
        """Most bytes held in each interval between ticks, by the plan that was simulated."""
        for at, peak in zip((0.0, *self.tick_seconds), plan.tick_peaks, strict=True):
            yield Count("step", "predicted bytes", at, plan.static_bytes + peak)


def simulate_swap(
    profile: StepProfile,
    plan: SwapPlan,
    link: SwapLink,
    reduction: GradientReduction | None = None,
) -> SwapTimeline:
    """Time a plan's step, until its gradients are averaged among replicas if there are any.

    Raises InputError for a plan of another step, and for a reduction of gradients that the profile
    does not have.
    """
    sizes = tuple(storage.num_bytes for storage in profile.storages)
    if (plan.num_ticks, tuple(storage.num_bytes for storage in plan.storages)) != (
        profile.num_ticks,
        sizes,
    ):
        raise InputError(
            f"the plan is of a step with {plan.num_ticks} ticks and {len(plan.storages)} storages, "
            f"the profile of one with {profile.num_ticks} and {len(sizes)}: plan again"
        )
    if reduction is not None and not profile.gradients:
        raise InputError(
            "the profile does not say when gradients are ready: profile the step again"
        )
    lowering = _Lowering(profile, plan, link, reduction)
    lowering.add_step()
    timeline = simulate(lowering.tasks, len(_RESOURCES))
    waits = tuple(
        Wait(transfer, timeline.starts[task] - timeline.ends[before])
        for task, before, transfer in lowering.waits
    )
    return SwapTimeline(
        timeline,
        waits,
        timeline.seconds - timeline.ends[lowering.last_compute],
        tuple(timeline.starts[task] for task in lowering.ticks),
    )


class _Lowering:
    """Translation of a plan to tasks.

    Tasks must be listed after those they wait for: transfers are listed when the main thread waits
    for them, or for one behind them.
    """

    def __init__(
        self,
        profile: StepProfile,
        plan: SwapPlan,
        link: SwapLink,
        reduction: GradientReduction | None,
    ) -> None:
        self.tasks: list[Task] = []
        self.waits: list[tuple[int, int, Transfer]] = []
        """Task that waits, the main thread's task before it, and what it waits for."""
        self.ticks: list[int] = []
        """Tasks of the compute after each tick."""
        self._profile = profile
        self._plan = plan
        self._link = link
        self._reduction = reduction
        self._asked: dict[Transfer, int] = {}
        """Task of the main thread after which each transfer is asked for."""
        self._listed: dict[Transfer, int] = {}
        self._queues: dict[int, list[Transfer]] = defaultdict(list)
        for transfer in reversed(plan.transfers):
            self._queues[self._stream(transfer)].append(transfer)
        self.last_compute = -1
        """The main thread's last task so far."""

    def add_step(self) -> None:
        drops, brings, packs, uses = self._by_tick()
        recomputed = defaultdict[int | None, list[Recomputed]](list)
        for made in self._plan.recomputed:
            recomputed[self._plan.storages[made.storage].use_tick].append(made)
        buckets = self._buckets()
        self._compute("begin", self._profile.seconds_before)
        for tick in range(self._profile.num_ticks + 1):
            for choice in drops[tick]:
                if choice.drop > self._plan.storages[choice.storage].pack_tick:
                    self._wait(Transfer("out", choice.storage))
            for choice in brings[tick]:
                self._asked[Transfer("in", choice.storage)] = self.last_compute
            for choice in packs[tick]:
                self._asked[Transfer("out", choice.storage)] = self.last_compute
            for choice in drops[tick]:
                if choice.drop == self._plan.storages[choice.storage].pack_tick:
                    self._wait(Transfer("out", choice.storage))
            for choice in uses[tick]:
                self._wait(Transfer("in", choice.storage))
            for made in recomputed[tick]:
                self._compute(f"recompute {made.storage}", made.recipe.seconds)
            if tick < self._profile.num_ticks:
                self._compute(f"tick {tick}", self._profile.seconds[tick])
                self.ticks.append(self.last_compute)
            for bucket in buckets[tick]:
                self._reduce(bucket)

    def _by_tick(self) -> tuple[dict[int, list[Swapped]], ...]:
        """Choices by the tick of their drop, bring, pack and first need."""
        drops, brings, packs, uses = (defaultdict[int, list[Swapped]](list) for _ in range(4))
        for choice in self._plan.swapped:
            storage = self._plan.storages[choice.storage]
            drops[choice.drop].append(choice)
            packs[storage.pack_tick].append(choice)
            if choice.bring is not None:
                brings[choice.bring].append(choice)
                uses[self._plan.need_ticks[choice.storage]].append(choice)
        return drops, brings, packs, uses

    def _compute(self, name: str, seconds: float) -> None:
        self.last_compute = self._add(name, _COMPUTE, seconds, ((_COMPUTE, 1.0),))

    def _wait(self, transfer: Transfer) -> None:
        queue = self._queues[self._stream(transfer)]
        while transfer not in self._listed:
            self._list(queue.pop())
        before = self.last_compute
        after = (self._listed[transfer],)
        self.last_compute = self._add(
            f"wait for {transfer}", _COMPUTE, 0.0, ((_COMPUTE, 1.0),), after
        )
        self.waits.append((self.last_compute, before, transfer))

    def _list(self, transfer: Transfer) -> None:
        """Add a copy, which begins when it is asked for and its queue has come to it."""
        after = (self._asked[transfer],)
        bandwidth = self._link.bandwidth(transfer.direction)
        uses = [(_RESOURCES.index(transfer.direction), 1.0)]
        if not self._link.is_duplex:
            uses.append((_LINK, 1.0))
        self._listed[transfer] = self._add(
            str(transfer),
            self._stream(transfer),
            self._plan.storages[transfer.storage].num_bytes / bandwidth,
            tuple(uses),
            after,
            self._link.latency_seconds,
            weight=1 / bandwidth,
        )

    def _buckets(self) -> dict[int, list[Bucket]]:
        """Buckets of gradients by the tick after which they are full."""
        buckets = defaultdict[int, list[Bucket]](list)
        if self._reduction is not None:
            for bucket in self._reduction.buckets(self._profile.gradients):
                buckets[bucket.tick].append(bucket)
        return buckets

    def _reduce(self, bucket: Bucket) -> None:
        """Add an all-reduce: as fast, when alone, as network and link allow."""
        assert self._reduction is not None
        fullest = {_NETWORK: self._reduction.bandwidth}
        """Bytes per second, sent and as many received, that each resource has room for."""
        if self._reduction.shares_link:
            fullest[_OUT], fullest[_IN] = self._link.out_bandwidth, self._link.in_bandwidth
            if not self._link.is_duplex:
                fullest[_LINK] = 1 / (1 / fullest[_OUT] + 1 / fullest[_IN])
        rate = min(fullest.values())
        self._add(
            f"reduce {format_bytes(bucket.num_bytes)}",
            _REDUCE,
            self._reduction.sent_bytes(bucket.num_bytes) / rate,
            tuple((resource, rate / full) for resource, full in fullest.items()),
            (self.last_compute,),
            weight=1 / (2 * rate if _LINK in fullest else rate),
        )

    def _stream(self, transfer: Transfer) -> int:
        """Queue of a transfer: one for both directions, unless the link is duplex."""
        return 1 + (self._link.is_duplex and transfer.direction == "in")

    def _add(
        self,
        name: str,
        stream: int,
        seconds: float,
        uses: tuple[tuple[int, float], ...],
        after: tuple[int, ...] = (),
        latency: float = 0.0,
        weight: float = 1.0,
    ) -> int:
        self.tasks.append(Task(name, stream, seconds, uses, after, latency, weight))
        return len(self.tasks) - 1
