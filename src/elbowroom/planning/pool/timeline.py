"""Simulation of a pool's iterations, layer by layer: action lists replayed on the cost model.

Compute and copies are streams of their own; a fetch takes its owner's outgoing and its reader's
incoming link, and compute too where copies do not overlap. Each action has one handler, which says
what it costs and what it waits for. ``planning/pool/job.py`` simulates whole jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from elbowroom.core.trace import Span
from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.events import Timeline, simulate
from elbowroom.planning.pool.lowering import RESOURCES, Lowering, RankActions
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import FetchOrder, PoolShare
from elbowroom.plans.pool_actions import Action, Release, Run, Ship, Wait

_LINK_CYCLES = 2


class Slot(NamedTuple):
    """A slot held by a layer from the first byte of its fetch to its release, in seconds."""

    rank: int
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class PoolTimeline:
    """Simulated iterations of a group.

    ``ends[i][r]`` is when replica r ended iteration i; ``waits[r]`` sums the seconds in which its
    compute waited, for weights or for an answer of an owner.
    """

    timeline: Timeline
    ends: tuple[tuple[float, ...], ...]
    waits: tuple[float, ...]
    slots: tuple[Slot, ...]
    copies_at_once: int = 1

    @property
    def iteration_seconds(self) -> float:
        """Mean seconds of an iteration over replicas; of several, the first is left out."""
        first, last = sum(self.ends[0]), sum(self.ends[-1])
        num_ranks = len(self.ends[0])
        if len(self.ends) == 1:
            return last / num_ranks
        return (last - first) / num_ranks / (len(self.ends) - 1)

    def busy_fractions(self) -> dict[str, float]:
        """Busy fraction of each resource until the last task ended, as a mean over replicas."""
        seconds = self.timeline.seconds * len(self.ends[0])
        busy = self.timeline.busy_seconds
        return {
            name: sum(busy[index :: len(RESOURCES)]) / seconds
            for index, name in enumerate(RESOURCES)
        }

    def spans(self, title: str = "iteration") -> Iterator[Span]:
        """Compute and copies of every replica, for a trace.

        Rows that are shipped, served and answered have a track for each peer: on one track, spans
        would overlap.
        """
        timeline, num_ranks = self.timeline, len(self.ends[0])
        for task, start, end in zip(timeline.tasks, timeline.starts, timeline.ends, strict=True):
            if end <= start:
                continue
            if task.stream is None:
                rank, *peer = (resource // len(RESOURCES) for resource, _ in task.uses)
                does = "answer" if task.name.endswith("back") else "ship to"
                served = task.name.rpartition(" for ")[2]
                track = f"{does} {peer[0]}" if peer else f"serve {served}"
            elif task.stream < num_ranks:
                rank, track = task.stream, "compute"
            else:
                rank, lane = divmod(task.stream - num_ranks, self.copies_at_once)
                track = f"copies {lane}"
            yield Span(f"{title}, replica {rank}", track, task.name, start, end)

    def most_slots(self, rank: int) -> int:
        """The most slots that a replica held at once."""
        changes = [(slot.start, 1) for slot in self.slots if slot.rank == rank]
        changes += [(slot.end, -1) for slot in self.slots if slot.rank == rank]
        held = most = 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        return most


def iteration_actions(share: PoolShare, shipped: frozenset[int] = frozenset()) -> RankActions:
    """Actions of one replica in one iteration; layers in ``shipped`` go to their owners."""
    compute: list[Action] = []
    fetched = {fetch.layer for fetch in share.fetches} - shipped
    for layer, owner in enumerate(share.owners):
        compute.append(Run(layer, "A"))
        if layer in shipped and owner != share.rank:
            compute.append(Ship(layer))
        elif layer in fetched:
            compute += [Wait(layer), Run(layer, "F"), Release(layer)]
        else:
            compute.append(Run(layer, "F"))
    copies = tuple(fetch for fetch in share.fetches if fetch.layer in fetched)
    return RankActions(tuple(compute), copies)


def simulate_pool(
    cost: CostModel,
    shares: Sequence[PoolShare],
    batches: Sequence[Batch],
    actions: Sequence[RankActions] | None = None,
    num_iterations: int = 3,
    joined: bool = False,
    copies_at_once: int | None = None,
) -> PoolTimeline:
    """Simulate iterations of a group whose replica r computes ``batches[r]`` over and over.

    With ``joined`` an owner waits for the rows of all replicas that ship a layer and runs them at
    once, as in the paper; otherwise it serves each as it comes, beside its own work.
    ``copies_at_once`` defaults to the number of slots, with each layer's copies on a stream of
    their own; the paper's housekeeper has 1.
    """
    if actions is None:
        actions = [iteration_actions(share) for share in shares]
    lowering = Lowering(cost, shares, batches, actions, joined, copies_at_once)
    for _ in range(num_iterations):
        lowering.add_iteration()
    timeline = simulate(lowering.tasks, len(RESOURCES) * len(shares))
    return PoolTimeline(
        timeline=timeline,
        ends=tuple(tuple(timeline.ends[task] for task in tasks) for tasks in lowering.last_tasks),
        waits=tuple(_waits(timeline, rank) for rank in range(len(shares))),
        slots=tuple(
            Slot(rank, layer, timeline.starts[first], timeline.ends[release])
            for rank, layer, first, release in lowering.held
        ),
        copies_at_once=lowering.copies_at_once,
    )


def link_share(
    cost: CostModel,
    num_ranks: int,
    num_slots: int,
    order: FetchOrder = "peak-shift",
    copies_at_once: int | None = None,
) -> float:
    """Share of its link that each of ``num_ranks`` readers gets when all do nothing but fetch.

    Readers that wait for one owner leave the others idle: with one copy at a time, about 0.6 as in
    an input-queued switch (Karol et al. 1987); with d-1 copies at once nearly 1.
    """
    model = replace(
        cost.model,
        num_layers=_LINK_CYCLES * num_ranks,
        ffn=cost.model.ffn[:1] * (_LINK_CYCLES * num_ranks),
        others=cost.model.others[:1] * (_LINK_CYCLES * num_ranks),
        experts=cost.model.experts[:1] * (_LINK_CYCLES * num_ranks),
    )
    one = replace(cost, model=model)
    shares = plan_shares(model.ffn_bytes(), num_ranks, "streamed", num_slots, order)
    idle = [Batch(0, 0)] * num_ranks
    timeline = simulate_pool(one, shares, idle, copies_at_once=copies_at_once)
    return min(1.0, one.fetch_seconds(num_ranks) / timeline.iteration_seconds)


def _waits(timeline: Timeline, rank: int) -> float:
    """Seconds between one compute task of a replica and the next, summed."""
    end = waited = 0.0
    for task, start, ended in zip(timeline.tasks, timeline.starts, timeline.ends, strict=True):
        if task.stream == rank:
            waited += start - end
            end = ended
    return waited
