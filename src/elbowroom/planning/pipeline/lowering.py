"""Lowering of a pipeline's actions to tasks of the simulator.

Every worker has a stream for compute, and one for what it swaps; transfers have one for each
direction between two workers, and begin when what they send is computed. Each action has one
handler; ``planning.pipeline.action_cost`` has its costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from elbowroom.planning.events import Task
from elbowroom.planning.pipeline.action_cost import PipelineCosts, StageCosts
from elbowroom.planning.pipeline.placement import Placement
from elbowroom.plans.pipeline_actions import (
    Backward,
    Compute,
    Forward,
    Message,
    PipelineAction,
    Recv,
    Reduce,
    Schedule,
    Send,
    Update,
    message_of,
)

COMPUTE = "compute"
"""Trace track of a worker's compute."""


class Track(NamedTuple):
    """The worker that computes, sends or swaps, or the first that reduces, and its trace track."""

    worker: int
    name: str


class _Leaving(NamedTuple):
    """The minibatch of a worker's last forward, and the task that copies out what it saved."""

    minibatch: int
    task: int


@dataclass
class Lowering:
    """Translation of actions into tasks; actions come after those that they wait for.

    ``_last`` is the newest task of each compute stream, ``_before_backward`` the one before the
    newest backward, ``_leaving`` the newest copy out. ``resources`` numbers compute by worker, and
    links by level and unit.
    """

    schedule: Schedule
    costs: PipelineCosts
    level_replicas: tuple[tuple[int, ...], ...]
    placement: Placement
    resources: dict[tuple[str, int, int], int] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    tracks: list[Track] = field(default_factory=list)
    updates: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    link_bytes: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    cut_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    sync_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    level_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _last: dict[int, int] = field(default_factory=dict)
    _before_backward: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _sent: dict[Message, int] = field(default_factory=dict)
    _reduces: dict[Reduce, int] = field(default_factory=dict)
    _streams: dict[Track, int] = field(default_factory=dict)
    _leaving: dict[int, _Leaving] = field(default_factory=dict)

    def add(self, worker: int, action: PipelineAction) -> None:
        stage = self.costs.stages[action.stage]
        if isinstance(action, Forward):
            self._forward(worker, action, stage)
        elif isinstance(action, Backward):
            self._before_backward[worker] = self._newest(worker)
            self._backward(worker, action, stage)
        elif isinstance(action, Update):
            self._compute(worker, action, stage.update_seconds)
            if action.stage == 0:
                self.updates[action.minibatch].append(self._last[worker])
        elif isinstance(action, Reduce):
            self._reduce(worker, action)
        elif isinstance(action, Recv):
            self._compute(worker, action, 0.0, (self._sent[message_of(worker, action)],))
        else:
            self._send(worker, action)

    def _forward(self, worker: int, action: Forward, stage: StageCosts) -> None:
        """Add a forward, and beside it the copy out of what it saves."""
        before = self._newest(worker)
        if worker in self._leaving:
            before = (*before, self._leaving[worker].task)
        self._compute(worker, action, stage.forward_seconds, before)
        if stage.swapped_bytes:
            copy = self._swap(worker, "O", action, stage, before)
            self._leaving[worker] = _Leaving(action.minibatch, copy)

    def _backward(self, worker: int, action: Backward, stage: StageCosts) -> None:
        """Add a backward, and beside it the copy in of what it uses; its end waits for both.

        If no forward followed the minibatch's own, nothing of it was dropped.
        """
        before = self._newest(worker)
        self._compute(worker, action, stage.backward_seconds)
        if stage.swapped_bytes and self._leaving[worker].minibatch != action.minibatch:
            copy = self._swap(worker, "I", action, stage, before)
            self._compute(worker, action, 0.0, (copy,))

    def _swap(
        self, worker: int, letter: str, action: Compute, stage: StageCosts, after: tuple[int, ...]
    ) -> int:
        bandwidth = self.costs.options.swap_bandwidth
        assert bandwidth is not None, "costs without it are refused"
        uses = () if self.costs.overlap_compute else self._uses([("compute", 0, worker)])
        track = Track(worker, "swap")
        name = f"{letter}{action.stage}.{action.minibatch}"
        seconds = stage.swapped_bytes / bandwidth
        return self._add(track, name, self._stream(track), seconds, uses, after)

    def _compute(
        self, worker: int, action: PipelineAction, seconds: float, after: tuple[int, ...] = ()
    ) -> None:
        uses = self._uses([("compute", 0, worker)])
        track = Track(worker, COMPUTE)
        self._last[worker] = self._add(track, str(action), worker, seconds, uses, after)

    def _send(self, worker: int, action: Send) -> None:
        """Add a send to the pair's stream; it starts when what was listed before is computed."""
        message = message_of(worker, action)
        cut = min(action.stage, self.schedule.stages[action.worker])
        crossed = self.costs.stages[cut]
        is_forward = cut == action.stage
        num_bytes = crossed.crossing_bytes if is_forward else crossed.gradient_bytes
        pair = (worker, action.worker)
        level = self.placement.level_between(*pair)
        self.link_bytes[pair] += num_bytes
        self.cut_bytes[cut] += num_bytes
        self.level_bytes[level] += num_bytes
        used = self._ways(pair[:1], level, "out") + self._ways(pair[1:], level, "in")
        if self.costs.links == "cut":
            used = [(f"cut {cut}", level, self.placement.unit(worker, level + 1))]
        if not self.costs.overlap_compute:
            used += [("compute", 0, end) for end in pair]
        seconds = num_bytes / self.costs.levels[level].bandwidth
        uses, after = self._uses(used), self._newest(worker)
        track = Track(worker, f"to worker {action.worker}")
        sent = self._add(track, str(action), self._stream(track), seconds, uses, after)
        self._sent[message] = sent

    def _reduce(self, worker: int, action: Reduce) -> None:
        """Add one task per level for all replicas, with the first of them; each waits for these."""
        if action not in self._reduces:
            replicas = self.schedule.workers(action.stage)
            after = tuple(task for replica in replicas for task in self._gradients(replica))
            for level, count in enumerate(reversed(self.level_replicas[action.stage])):
                if count > 1:
                    after = (self._reduce_gradients(worker, action, level, count, after),)
            (self._reduces[action],) = after
        self._compute(worker, action, 0.0, (self._reduces[action],))

    def _reduce_gradients(
        self, worker: int, action: Reduce, level: int, count: int, after: tuple[int, ...]
    ) -> int:
        """Average gradients in groups of ``count`` units of a level, all groups at once.

        Workers of one unit share its link, and each brings all of the stage's gradients.
        """
        replicas = self.schedule.workers(action.stage)
        weights, factor = self.costs.stages[action.stage], self.costs.options.sync_factor
        num_bytes = factor * (count - 1) * weights.parameter_bytes * (len(replicas) // count)
        self.sync_bytes[action.stage] += num_bytes
        self.level_bytes[level] += num_bytes
        outgoing = self._ways(replicas, level, "out")
        seconds = num_bytes / len(outgoing) / self.costs.levels[level].bandwidth
        used = outgoing + self._ways(replicas, level, "in")
        if self.costs.links == "cut":
            used = self._ways(replicas, level, "weights")
        if not self.costs.overlap_compute:
            used += [("compute", 0, replica) for replica in replicas]
        return self._add(
            Track(worker, "reduce"), str(action), None, seconds, self._uses(used), after
        )

    def _ways(self, workers: Sequence[int], level: int, way: str) -> list[tuple[str, int, int]]:
        """Links out of or into the units of a level that workers are in, each once."""
        units = sorted({self.placement.unit(worker, level) for worker in workers})
        return [(way, level, unit) for unit in units]

    def _uses(self, used: Sequence[tuple[str, int, int]]) -> tuple[tuple[int, float], ...]:
        numbers = (self.resources.setdefault(name, len(self.resources)) for name in used)
        return tuple((number, 1.0) for number in numbers)

    def _stream(self, track: Track) -> int:
        """Stream of a link, which is none of the workers' compute streams."""
        return self._streams.setdefault(track, self.schedule.num_workers + len(self._streams))

    def _gradients(self, worker: int) -> tuple[int, ...]:
        """Tasks that a worker's part of a reduce waits for: see ``action_cost`` on overlap."""
        newest = self._newest(worker)
        begun = self._before_backward.pop(worker, newest)
        return begun if self.costs.options.overlap == "max" else newest

    def _newest(self, worker: int) -> tuple[int, ...]:
        return (self._last[worker],) if worker in self._last else ()

    def _add(
        self,
        track: Track,
        name: str,
        stream: int | None,
        seconds: float,
        uses: tuple[tuple[int, float], ...],
        after: tuple[int, ...],
    ) -> int:
        self.tasks.append(Task(name, stream, seconds, uses, after))
        self.tracks.append(track)
        return len(self.tasks) - 1
