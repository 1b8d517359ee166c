"""Replays the schedule of a pipeline on the costs of its stages: time, bubbles, bytes and memory.

Every worker has a stream for compute; transfers have one for each direction between two workers,
and begin when what they send is computed. Each action has one handler; ``planning.pipeline_costs``
has what it costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import linear_regression

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.pipeline_action import (
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
)
from elbowroom.core.pipeline_plan import PipelinePlan
from elbowroom.core.trace import Span
from elbowroom.planning.events import Task, Timeline, simulate
from elbowroom.planning.pipeline_costs import LinkModel, PipelineCosts, plan_costs
from elbowroom.planning.schedule_check import execution_order
from elbowroom.planning.weight_versions import VersionRule, held_over_time

_RESOURCES = ("compute", "out", "in")
"""Of each worker; a cut behind a stage has one, after those of all workers."""


@dataclass(frozen=True, eq=False)
class PipelineTimeline:
    """A simulated run.

    Args:
        workers: of each task of the timeline: who computes or sends, or the first of who reduce.
        full_updates: minibatches of the updates of the input stage that forwards still follow, and
            when the last replica did each.
        link_bytes: activations and gradients by (sender, receiver), of all minibatches.
        cut_bytes: the same over the cut behind each stage.
        sync_bytes: that replicas of each stage moved to agree.
        peak_bytes: of each worker: weight versions and what minibatches in flight keep.

    """

    schedule: Schedule
    timeline: Timeline
    workers: tuple[int, ...]
    full_updates: tuple[tuple[int, float], ...]
    link_bytes: dict[tuple[int, int], int]
    cut_bytes: tuple[int, ...]
    sync_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def steady_seconds(self) -> float:
        """Per minibatch, while the pipe is full.

        The slope of when the input stage does its updates, in the latter half of those that come
        before the pipe drains. In a run too short to tell, the mean of all minibatches.
        """
        last = max((minibatch for minibatch, _ in self.full_updates), default=0)
        late = [update for update in self.full_updates if 2 * update[0] >= last]
        if len(late) < 2:
            return self.seconds / self.schedule.num_minibatches
        return linear_regression(*zip(*late, strict=True)).slope

    @property
    def bubbles(self) -> tuple[float, ...]:
        """The part of the run in which each worker computes nothing."""
        busy = [0.0] * self.schedule.num_workers
        for task in self.timeline.tasks:
            if task.stream is not None and task.stream < len(busy):
                busy[task.stream] += task.seconds
        return tuple(1 - seconds / self.seconds if self.seconds else 0.0 for seconds in busy)

    def spans(self) -> Iterator[Span]:
        """Compute, sends and reduces of every worker, for a trace."""
        timeline, num_workers = self.timeline, self.schedule.num_workers
        for number, task in enumerate(timeline.tasks):
            start, end = timeline.starts[number], timeline.ends[number]
            if end <= start:
                continue
            track = "reduce" if task.stream is None else "send"
            if task.stream is not None and task.stream < num_workers:
                track = "compute"
            yield Span(f"pipeline, worker {self.workers[number]}", track, task.name, start, end)


def simulate_pipeline(
    schedule: Schedule, costs: PipelineCosts, rule: VersionRule = "stash"
) -> PipelineTimeline:
    """Time the schedule; ``rule`` says how many versions of weights are kept.

    Raises ScheduleError for lists that do not fit together, InputError for costs of another number
    of stages.
    """
    if len(costs.stages) != schedule.num_stages:
        raise InputError(f"costs of {len(costs.stages)} stages for {schedule.num_stages}")
    lowering = _Lowering(schedule, costs)
    for worker, action in execution_order(schedule):
        lowering.add(worker, action)
    num_resources = len(_RESOURCES) * schedule.num_workers + schedule.num_stages
    timeline = simulate(lowering.tasks, num_resources)
    stages = range(schedule.num_stages)
    return PipelineTimeline(
        schedule=schedule,
        timeline=timeline,
        workers=tuple(lowering.workers),
        full_updates=_full_updates(schedule, timeline, lowering.updates),
        link_bytes=dict(lowering.link_bytes),
        cut_bytes=tuple(lowering.cut_bytes[stage] for stage in stages),
        sync_bytes=tuple(lowering.sync_bytes[stage] for stage in stages),
        peak_bytes=tuple(
            _peak_bytes(schedule, worker, costs, rule) for worker in range(schedule.num_workers)
        ),
    )


def simulate_plan(
    plan: PipelinePlan,
    graph: LayerGraph,
    schedule: Schedule,
    links: LinkModel = "worker",
    overlap_compute: bool = True,
) -> PipelineTimeline:
    """Time a schedule with the stages of a plan, whose ``replicas`` it must have.

    Raises InputError if it has others, and as ``plan_costs`` does.
    """
    if schedule.replicas != tuple(stage.replicas for stage in plan.stages):
        raise InputError(f"the schedule is for {schedule.replicas} replicas, the plan is {plan}")
    costs = plan_costs(plan, graph, links, overlap_compute)
    return simulate_pipeline(schedule, costs)


@dataclass
class _Lowering:
    """Turns actions into tasks, in an order in which each follows those that it waits for.

    ``last`` is the newest task of each compute stream, ``before_backward`` the one that the newest
    backward follows.
    """

    schedule: Schedule
    costs: PipelineCosts
    tasks: list[Task] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    updates: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    link_bytes: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    cut_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    sync_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
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
        uses = ((self._resource(worker, "compute"), 1.0),)
        self._last[worker] = self._add(worker, str(action), worker, seconds, uses, after)

    def _send(self, worker: int, action: Send) -> None:
        """On the stream of the pair, as soon as what was listed before is computed."""
        message = message_of(worker, action)
        cut = min(action.stage, self.schedule.stages[action.worker])
        num_bytes = self.costs.stages[cut].crossing_bytes
        pair = (worker, action.worker)
        self.link_bytes[pair] += num_bytes
        self.cut_bytes[cut] += num_bytes
        stream = self._streams.setdefault(pair, self.schedule.num_workers + len(self._streams))
        used = [self._resource(worker, "out"), self._resource(action.worker, "in")]
        if self.costs.links == "cut":
            used = [len(_RESOURCES) * self.schedule.num_workers + cut]
        if not self.costs.overlap_compute:
            used += [self._resource(end, "compute") for end in pair]
        uses = tuple((resource, 1.0) for resource in used)
        seconds = num_bytes / self.costs.bandwidth
        after = self._newest(worker)
        self._sent[message] = self._add(worker, str(action), stream, seconds, uses, after)

    def _reduce(self, worker: int, action: Reduce) -> None:
        """One task for all replicas, listed with the first of them; then each waits for it."""
        if action not in self._reduces:
            replicas = self.schedule.workers(action.stage)
            after = tuple(task for replica in replicas for task in self._gradients(replica))
            num_bytes = self.costs.sync_bytes(action.stage, len(replicas))
            self.sync_bytes[action.stage] += num_bytes
            names = list(_RESOURCES if not self.costs.overlap_compute else _RESOURCES[1:])
            uses = tuple((self._resource(r, name), 1.0) for r in replicas for name in names)
            if self.costs.links == "cut" and self.costs.overlap_compute:
                uses = ()
            seconds = num_bytes / len(replicas) / self.costs.bandwidth
            self._reduces[action] = self._add(worker, str(action), None, seconds, uses, after)
        self._compute(worker, action, 0.0, (self._reduces[action],))

    def _gradients(self, worker: int) -> tuple[int, ...]:
        """What a worker's part of a reduce waits for: see the head of the file."""
        newest = self._newest(worker)
        begun = self._before_backward.pop(worker, newest)
        return begun if self.costs.options.overlap == "max" else newest

    def _newest(self, worker: int) -> tuple[int, ...]:
        return (self._last[worker],) if worker in self._last else ()

    def _add(
        self,
        worker: int,
        name: str,
        stream: int | None,
        seconds: float,
        uses: tuple[tuple[int, float], ...],
        after: tuple[int, ...],
    ) -> int:
        self.tasks.append(Task(name, stream, seconds, uses, after))
        self.workers.append(worker)
        return len(self.tasks) - 1

    @staticmethod
    def _resource(worker: int, name: str) -> int:
        return len(_RESOURCES) * worker + _RESOURCES.index(name)


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


def _peak_bytes(schedule: Schedule, worker: int, costs: PipelineCosts, rule: VersionRule) -> int:
    stage = costs.stages[schedule.stages[worker]]
    held = held_over_time(schedule, worker, rule)
    return max(x.versions * stage.parameter_bytes + x.in_flight * stage.kept_bytes for x in held)
