"""Simulation of a pipeline's schedule on its stages' costs: time, bubbles, bytes and memory.

``planning.pipeline.lowering`` makes tasks of the actions, and ``planning.pipeline.action_cost`` has
their costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.trace import Span
from elbowroom.planning.events import Timeline, simulate
from elbowroom.planning.pipeline.action_cost import LinkModel, PipelineCosts, plan_costs
from elbowroom.planning.pipeline.lowering import COMPUTE, Lowering, Track
from elbowroom.planning.pipeline.placement import place_workers
from elbowroom.planning.pipeline.schedule_check import execution_order
from elbowroom.planning.pipeline.weight_versions import (
    VersionRule,
    Versions,
    forward_versions,
    held_over_time,
)
from elbowroom.plans.pipeline import RESIDENT, PipelinePlan
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    PipelineAction,
    Schedule,
    Update,
    parse_action,
)
from elbowroom.plans.pipeline_pace import steady_seconds

_WORDS: dict[type[PipelineAction], str] = {Forward: "forward", Backward: "backward"}


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
        peak_bytes: peak memory of each worker: weight versions, what minibatches in flight keep
            and have not swapped, and the plan's fixed bytes.

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
        """Compute, sends, reduces and swapping of every worker, for a trace.

        Passes are named as in a run, copies as in a swapped step: ``O1.5`` out, ``I1.5`` in.
        """
        timeline = self.timeline
        for number, (worker, track) in enumerate(self.tracks):
            start, end = timeline.starts[number], timeline.ends[number]
            if end > start:
                name = timeline.tasks[number].name
                name = _shown(name) if track == COMPUTE else name
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
    lowering = Lowering(schedule, costs, level_replicas, placement)
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
    most = max(
        x.versions * stage.parameter_bytes
        + x.in_flight * stage.kept_bytes
        - max(0, x.in_flight - RESIDENT) * stage.swapped_bytes
        for x in held
    )
    done = Counter(type(action) for action in schedule.actions[worker])
    is_summed = costs.options.optimizer is not None and done[Backward] > done[Update]
    sums = stage.parameter_bytes if is_summed else 0  # of gradients, beside those of the newest
    return most + stage.fixed_bytes + sums
