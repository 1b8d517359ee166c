"""A discrete-event simulator: tasks on in-order streams that share resources fairly.

It knows nothing of layers or links. A task has a duration for when it is alone, and uses a fraction
of some resources while it runs. Tasks that meet on a resource get max-min fair rates, like flows on
a network link or threads on a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_EPSILON = 1e-12


class Task(NamedTuple):
    """A piece of work with a duration, and what it waits for and uses.

    Args:
        name: label in traces.
        stream: tasks of one stream run one after the other, in the order they are listed; a task
            with None starts as soon as ``after`` is done.
        seconds: duration when alone.
        uses: resources, each with the fraction of it that the task takes when alone.
        after: numbers of earlier tasks that must have ended.
        latency: seconds that pass before the work begins, on no resource.
        weight: how fast its rate grows beside that of others where they share a resource. Flows of
            different speeds share a link byte by byte if each has 1 / its bytes per second.

    """

    name: str
    stream: int | None
    seconds: float
    uses: tuple[tuple[int, float], ...] = ()
    after: tuple[int, ...] = ()
    latency: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Timeline:
    """Start and end of each task, in seconds.

    A task starts when its work, or its latency, begins. ``busy_seconds[r]`` integrates over time
    the fraction of resource r that was in use.
    """

    tasks: Sequence[Task]
    starts: list[float]
    ends: list[float]
    busy_seconds: list[float]

    @property
    def seconds(self) -> float:
        return max(self.ends, default=0.0)


@dataclass
class _State:
    """Mutable state of the simulation loop."""

    remaining: list[float]
    missing: list[int]
    starts: list[float]
    ends: list[float]
    busy: list[float]
    now: float = 0.0
    working: list[int] = field(default_factory=list)
    instant: list[int] = field(default_factory=list)
    delayed: list[tuple[float, int]] = field(default_factory=list)


def simulate(tasks: Sequence[Task], num_resources: int) -> Timeline:
    """Run tasks to their end. Deterministic: ties go to the task listed first.

    Raises ValueError when tasks wait for each other, or for one listed later.
    """
    predecessors = _predecessors(tasks)
    followers = _followers(predecessors)
    state = _State(
        remaining=[task.seconds for task in tasks],
        missing=[len(before) for before in predecessors],
        starts=[0.0] * len(tasks),
        ends=[-1.0] * len(tasks),
        busy=[0.0] * num_resources,
    )
    _begin([number for number, missing in enumerate(state.missing) if not missing], tasks, state)
    num_done = 0
    while state.working or state.delayed or state.instant:
        done = _end_instant(state) if state.instant else _advance(tasks, state)
        num_done += len(done)
        ready = []
        for number in done:
            for follower in followers[number]:
                state.missing[follower] -= 1
                if not state.missing[follower]:
                    ready.append(follower)
        _begin(sorted(ready), tasks, state)
    if num_done < len(tasks):
        stuck = next(task.name for task, end in zip(tasks, state.ends, strict=True) if end < 0)
        raise ValueError(f"task {stuck} can never start: tasks wait for each other")
    return Timeline(tasks, state.starts, state.ends, state.busy)


def critical_path_seconds(tasks: Sequence[Task]) -> float:
    """Length of the longest chain of tasks, each alone: a lower bound for every schedule."""
    ends: list[float] = []
    for task, before in zip(tasks, _predecessors(tasks), strict=True):
        start = max((ends[number] for number in before), default=0.0)
        ends.append(start + task.latency + task.seconds)
    return max(ends, default=0.0)


def _predecessors(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """Predecessors of each task: ``after``, and the previous task of the same stream.

    Raises ValueError for a task that waits for one listed later.
    """
    last: dict[int, int] = {}
    result = []
    for number, task in enumerate(tasks):
        before = set(task.after)
        if any(other >= number for other in before):
            raise ValueError(f"task {task.name} waits for one that is listed later")
        if task.stream is not None:
            before |= {last[task.stream]} if task.stream in last else set()
            last[task.stream] = number
        result.append(tuple(sorted(before)))
    return result


def _followers(predecessors: Sequence[tuple[int, ...]]) -> list[list[int]]:
    followers: list[list[int]] = [[] for _ in predecessors]
    for number, before in enumerate(predecessors):
        for other in before:
            followers[other].append(number)
    return followers


def _begin(ready: Sequence[int], tasks: Sequence[Task], state: _State) -> None:
    for number in ready:
        state.starts[number] = state.now
        if tasks[number].latency:
            state.delayed.append((state.now + tasks[number].latency, number))
        elif tasks[number].seconds:
            state.working.append(number)
        else:
            state.instant.append(number)


def _end_instant(state: _State) -> list[int]:
    """End the tasks that take no time, at once, and return them."""
    done, state.instant = state.instant, []
    for number in done:
        state.ends[number] = state.now
    return done


def _advance(tasks: Sequence[Task], state: _State) -> list[int]:
    """Let time pass until a task or a latency ends. Returns the tasks that ended."""
    rates = fair_rates(
        [tasks[number].uses for number in state.working],
        [tasks[number].weight for number in state.working],
    )
    step = min((at - state.now for at, _ in state.delayed), default=float("inf"))
    for number, rate in zip(state.working, rates, strict=True):
        step = min(step, state.remaining[number] / rate)
    state.now += step
    done, working = [], []
    for number, rate in zip(state.working, rates, strict=True):
        for resource, part in tasks[number].uses:
            state.busy[resource] += part * rate * step
        state.remaining[number] -= rate * step
        if state.remaining[number] <= _EPSILON:
            state.ends[number] = state.now
            done.append(number)
        else:
            working.append(number)
    over = [number for at, number in state.delayed if at <= state.now + _EPSILON]
    state.delayed = [item for item in state.delayed if item[0] > state.now + _EPSILON]
    state.working = working + over
    return done


def fair_rates(
    uses: Sequence[tuple[tuple[int, float], ...]], weights: Sequence[float] | None = None
) -> list[float]:
    """Max-min fair rates, each at most 1, by progressive filling (Bertsekas and Gallager).

    All rates grow together, or in the ratio of their weights; when a resource is full, the tasks
    that use it keep their rate.
    """
    weights = [1.0] * len(uses) if weights is None else weights
    rates = [1.0] * len(uses)
    demand = _demand(uses, [1.0] * len(uses))
    room = {resource: 1.0 for resource in sorted(demand) if demand[resource] > 1 + _EPSILON}
    """Capacity left of resources that are too small for all tasks; other resources limit nobody."""
    free = [n for n, used in enumerate(uses) if any(resource in room for resource, _ in used)]
    while free:
        demand = _demand([uses[number] for number in free], [weights[number] for number in free])
        most = min(1 / weights[number] for number in free)
        level, tightest = most, -1
        for resource, left in room.items():
            wanted = demand.get(resource, 0.0)
            if wanted * most > left + _EPSILON and left / wanted < level:
                level, tightest = left / wanted, resource
        if tightest < 0:  # those that grow fastest are at full speed
            held = [number for number in free if 1 / weights[number] <= level]
        else:
            held = [n for n in free if any(resource == tightest for resource, _ in uses[n])]
        for number in held:
            if tightest >= 0:
                rates[number] = min(1.0, level * weights[number])
            for resource, part in uses[number]:
                if resource in room:
                    room[resource] = max(0.0, room[resource] - part * rates[number])
        done = set(held)
        free = [number for number in free if number not in done]
    return rates


def _demand(
    uses: Sequence[tuple[tuple[int, float], ...]], rates: Sequence[float]
) -> dict[int, float]:
    """Total demand for each resource, if every task ran at its rate."""
    demand: dict[int, float] = {}
    for used, rate in zip(uses, rates, strict=True):
        for resource, part in used:
            demand[resource] = demand.get(resource, 0.0) + part * rate
    return demand
