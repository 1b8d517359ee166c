"""Simulation of a pipeline's schedule on its stages' costs: time, bubbles, bytes and memory.

Every worker has a stream for compute; transfers have one for each direction between two workers,
and begin when what they send is computed. Each action has one handler;
``planning.pipeline.action_cost`` has its costs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.trace import Span
from elbowroom.planning.events import Task, Timeline, simulate
from elbowroom.planning.pipeline.action_cost import LinkModel, PipelineCosts, plan_costs
from elbowroom.planning.pipeline.placement import Placement, place_workers
from elbowroom.planning.pipeline.schedule_check import execution_order
from elbowroom.planning.pipeline.weight_versions import (
    VersionRule,
    Versions,
    forward_versions,
    held_over_time,
)
from elbowroom.plans.pipeline import PipelinePlan
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    Message,
    PipelineAction,
    Recv,
    Reduce,
    Schedule,
    Send,
    Update,
    message_of,
    parse_action,
)
from elbowroom.plans.pipeline_pace import steady_seconds

_WORDS: dict[type[PipelineAction], str] = {Forward: "forward", Backward: "backward"}


class Track(NamedTuple):
    """The worker that computes or sends, or the first that reduces, and its track in a trace."""

    worker: int
    name: str


@dataclass(frozen=True, eq=False)
class PipelineTimeline:
    """A simulated run of a pipeline.

    Args:
        schedule: the schedule that was simulated.
        timeline: start and end of every task.
        tracks: worker and trace track of each task of the timeline.
        full_updates: updates of the input stage that are followed by forwards: the minibatch, and
            when the last replica did the update.
        link_bytes: activations and gradients by (sender, receiver), of all minibatches.
        cut_bytes: activations and gradients over the cut behind each stage, of all minibatches.
        sync_bytes: moved to synchronise the replicas of each stage.
        level_bytes: all of these over links of each level, the lowest first.
        peak_bytes: peak memory of each worker: weight versions, what minibatches in flight keep,
            and the plan's fixed bytes.

    """

    schedule: Schedule
    timeline: Timeline
    tracks: tuple[Track, ...]
    full_updates: tuple[tuple[int, float], ...]
    link_bytes: dict[tuple[int, int], int]
    cut_bytes: tuple[int, ...]
    sync_bytes: tuple[int, ...]
    level_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def steady_seconds(self) -> float:
        """Seconds per minibatch while the pipe is full.

        As ``plans.pipeline_pace`` defines it; in a run too short to tell, the mean of all
        minibatches.
        """
        pace = steady_seconds(self.full_updates)
        return self.seconds / self.schedule.num_minibatches if pace is None else pace

    @property
    def bubbles(self) -> tuple[float, ...]:
        """The fraction of the run in which each worker computes nothing."""
        busy = [0.0] * self.schedule.num_workers
        for task in self.timeline.tasks:
            if task.stream is not None and task.stream < len(busy):
                busy[task.stream] += task.seconds
        return tuple(1 - seconds / self.seconds if self.seconds else 0.0 for seconds in busy)

    def spans(self) -> Iterator[Span]:
        """Compute, sends and reduces of every worker, for a trace; passes are named as in a run."""
        timeline = self.timeline
        for number, (worker, track) in enumerate(self.tracks):
            start, end = timeline.starts[number], timeline.ends[number]
            if end > start:
                name = _shown(timeline.tasks[number].name)
                yield Span(f"worker {worker}", track, name, start, end)


def simulate_pipeline(
    schedule: Schedule, costs: PipelineCosts, rule: VersionRule = "stash"
) -> PipelineTimeline:
    """Time a schedule; ``rule`` says how many versions of weights are kept.

    Raises ScheduleError for lists that do not fit together, InputError for costs of other stages or
    replicas.
    """
    if len(costs.stages) != schedule.num_stages:
        raise InputError(f"costs of {len(costs.stages)} stages for {schedule.num_stages}")
    level_replicas = costs.level_replicas or tuple((count,) for count in schedule.replicas)
    if schedule.replicas != tuple(prod(counts) for counts in level_replicas):
        raise InputError(f"costs of {level_replicas} replicas for {schedule.replicas}")
    placement = place_workers(costs.levels, level_replicas)
    lowering = _Lowering(schedule, costs, level_replicas, placement)
    for worker, action in execution_order(schedule):
        lowering.add(worker, action)
    timeline = simulate(lowering.tasks, len(lowering.resources))
    used = forward_versions(schedule, rule)
    stages = range(schedule.num_stages)
    return PipelineTimeline(
        schedule=schedule,
        timeline=timeline,
        tracks=tuple(lowering.tracks),
        full_updates=_full_updates(schedule, timeline, lowering.updates),
        link_bytes=dict(lowering.link_bytes),
        cut_bytes=tuple(lowering.cut_bytes[stage] for stage in stages),
        sync_bytes=tuple(lowering.sync_bytes[stage] for stage in stages),
        level_bytes=tuple(lowering.level_bytes[level] for level in range(len(costs.levels))),
        peak_bytes=tuple(
            _peak_bytes(schedule, worker, costs, rule, used)
            for worker in range(schedule.num_workers)
        ),
    )


def simulate_pipeline_plan(
    plan: PipelinePlan,
    graph: LayerGraph,
    schedule: Schedule,
    links: LinkModel = "worker",
    overlap_compute: bool = True,
    rule: VersionRule = "stash",
) -> PipelineTimeline:
    """Time a schedule with the stages and links of a plan.

    Raises as ``plan_costs`` and ``simulate_pipeline`` do.
    """
    return simulate_pipeline(schedule, plan_costs(plan, graph, links, overlap_compute), rule)


@dataclass
class _Lowering:
    """Translation of actions into tasks; actions come after those that they wait for.

    ``_last`` is the newest task of each compute stream, ``_before_backward`` the one before the
    newest backward. ``resources`` numbers compute by worker, and links by level and unit.
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
    _streams: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, worker: int, action: PipelineAction) -> None:
        stage = self.costs.stages[action.stage]
        if isinstance(action, Forward):
            self._compute(worker, action, stage.forward_seconds)
        elif isinstance(action, Backward):
            self._before_backward[worker] = self._newest(worker)
            self._compute(worker, action, stage.backward_seconds)
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

    def _compute(
        self, worker: int, action: PipelineAction, seconds: float, after: tuple[int, ...] = ()
    ) -> None:
        uses = self._uses([("compute", 0, worker)])
        track = Track(worker, "compute")
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
        stream = self._streams.setdefault(pair, self.schedule.num_workers + len(self._streams))
        used = self._ways(pair[:1], level, "out") + self._ways(pair[1:], level, "in")
        if self.costs.links == "cut":
            used = [(f"cut {cut}", level, self.placement.unit(worker, level + 1))]
        if not self.costs.overlap_compute:
            used += [("compute", 0, end) for end in pair]
        seconds = num_bytes / self.costs.levels[level].bandwidth
        uses, after = self._uses(used), self._newest(worker)
        track = Track(worker, f"to worker {action.worker}")
        self._sent[message] = self._add(track, str(action), stream, seconds, uses, after)

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


def _shown(text: str) -> str:
    action = parse_action(text)
    word = _WORDS.get(type(action))
    return f"{word} {action.minibatch}" if word else text


def _full_updates(
    schedule: Schedule, timeline: Timeline, updates: dict[int, list[int]]
) -> tuple[tuple[int, float], ...]:
    followed = set(updates)
    for worker in schedule.workers(0):
        actions = schedule.actions[worker]
        forwards = [index for index, action in enumerate(actions) if isinstance(action, Forward)]
        until = forwards[-1] if forwards else 0
        followed &= {action.minibatch for action in actions[:until] if isinstance(action, Update)}
    return tuple((m, max(timeline.ends[task] for task in updates[m])) for m in sorted(followed))


def _peak_bytes(
    schedule: Schedule, worker: int, costs: PipelineCosts, rule: VersionRule, used: Versions
) -> int:
    stage = costs.stages[schedule.stages[worker]]
    held = held_over_time(schedule, worker, rule, used)
    most = max(x.versions * stage.parameter_bytes + x.in_flight * stage.kept_bytes for x in held)
    done = Counter(type(action) for action in schedule.actions[worker])
    is_summed = costs.options.optimizer is not None and done[Backward] > done[Update]
    sums = stage.parameter_bytes if is_summed else 0  # of gradients, beside those of the newest
    return most + stage.fixed_bytes + sums
