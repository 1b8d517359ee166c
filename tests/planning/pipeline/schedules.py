"""Schedules for tests, and a toy runtime that shows what a schedule really trains.

It carries tensors of one symbol each over untagged channels, as a network does, and knows nothing
of the validator. What it refuses is an outcome: wrong data, gradients lost or used twice, replicas
whose weights differ, workers that never end.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import strategies as st

from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    PipelineAction,
    RecvActivation,
    RecvGradient,
    Reduce,
    Schedule,
    SendActivation,
    SendGradient,
    Update,
)
from elbowroom.plans.pipeline_schedule import KINDS

REPLICAS = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def schedules(draw: st.DrawFn, most_minibatches: int = 14) -> Schedule:
    kind = draw(st.sampled_from(KINDS))
    flush_every = None if kind == "1f1b" else draw(st.integers(1, 6))
    num_minibatches = draw(st.integers(1, most_minibatches))
    depth = 1 if kind == "gpipe" else draw(st.integers(1, 3))
    return plan_schedule(draw(REPLICAS), num_minibatches, kind, flush_every, depth)


class Refused(Exception):  # noqa: N818
    """The lists cannot be carried out, or do not train each minibatch once."""


@dataclass
class _Toy:
    """One worker: tensors by minibatch, as far as it has them."""

    inputs: dict[int, str] = field(default_factory=dict)
    saved: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    output_grads: dict[int, str] = field(default_factory=dict)
    input_grads: dict[int, str] = field(default_factory=dict)
    grads: list[int] = field(default_factory=list)
    in_reduce: Reduce | None = None
    history: list[tuple[int, ...]] = field(default_factory=list)

    def is_clean(self) -> bool:
        return not any(
            (self.inputs, self.saved, self.outputs, self.output_grads, self.input_grads, self.grads)
        )


class ToyRuntime:
    """Carries a schedule out; ``run`` raises Refused."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.toys = [_Toy() for _ in schedule.actions]
        self.channels: dict[tuple[int, int], deque[str]] = defaultdict(deque)
        self.computed: Counter[PipelineAction] = Counter()

    def run(self) -> None:
        last = self.schedule.num_stages - 1
        running = {number: self._worker(number, last) for number in range(len(self.toys))}
        idle_turns = 0
        while running:
            # The last worker first: another order than the validator's.
            before = len(running)
            moved = 0
            for number in sorted(running, reverse=True):
                try:
                    moved += next(running[number])
                except StopIteration:
                    del running[number]
                except KeyError as error:
                    raise Refused(f"worker {number} lacks {error}") from error
            idle_turns = 0 if moved or len(running) < before else idle_turns + 1
            if idle_turns > 1:
                raise Refused("deadlock")
        self._judge()

    def _worker(self, number: int, last: int) -> Iterator[bool]:
        """Yields True after each action, False while it waits."""
        toy, own = self.toys[number], self.schedule.stages[number]
        for action in self.schedule.actions[number]:
            stage, i = action.stage, action.minibatch
            if stage != own:
                raise Refused("another stage's action")
            match action:
                case Forward():
                    self.computed[action] += 1
                    x = toy.inputs.pop(i) if stage else f"x{i}"
                    toy.saved[i] = x
                    toy.outputs[i] = f"{x},{stage}"
                    if stage == last:
                        toy.output_grads[i] = f"d({toy.outputs.pop(i)})"
                case Backward():
                    self.computed[action] += 1
                    grad = toy.output_grads.pop(i)
                    whole = ",".join([f"x{i}", *map(str, range(last + 1))])
                    behind = "".join(f",{s}" for s in range(last, stage, -1))
                    if grad != f"d({whole}){behind}":
                        raise Refused("wrong gradient")
                    if toy.saved.pop(i) != ",".join([f"x{i}", *map(str, range(stage))]):
                        raise Refused("wrong input")
                    toy.grads.append(i)
                    if stage:
                        toy.input_grads[i] = f"{grad},{stage}"
                case SendActivation():
                    self._check_peer(action.worker, stage + 1)
                    self.channels[number, action.worker].append(toy.outputs.pop(i))
                case SendGradient():
                    self._check_peer(action.worker, stage - 1)
                    self.channels[number, action.worker].append(toy.input_grads.pop(i))
                case RecvActivation() | RecvGradient():
                    is_activation = isinstance(action, RecvActivation)
                    self._check_peer(action.worker, stage + (-1 if is_activation else 1))
                    while not self.channels[action.worker, number]:
                        yield False
                    store = toy.inputs if is_activation else toy.output_grads
                    if i in store:
                        raise Refused("overwritten")
                    store[i] = self.channels[action.worker, number].popleft()
                case Reduce():
                    toy.in_reduce = action
                    yield True
                    while toy.in_reduce is not None and not self._try_reduce(stage):
                        yield False
                case Update():
                    toy.history.append(tuple(sorted(toy.grads)))
                    if not toy.grads or max(toy.grads) != i:
                        raise Refused("an update with other gradients than it says")
                    toy.grads.clear()
            yield True

    def _check_peer(self, worker: int, stage: int) -> None:
        if worker not in self.schedule.workers(stage):
            raise Refused("no such peer")

    def _try_reduce(self, stage: int) -> bool:
        toys = [self.toys[worker] for worker in self.schedule.workers(stage)]
        if len(toys) == 1:
            raise Refused("a reduce of one")
        if any(toy.in_reduce is None for toy in toys):
            return False
        if len({toy.in_reduce for toy in toys}) > 1:
            raise Refused("different reduces")
        joined = [i for toy in toys for i in toy.grads]
        for toy in toys:
            toy.grads, toy.in_reduce = list(joined), None
        return True

    def _judge(self) -> None:
        stages, everything = range(self.schedule.num_stages), range(self.schedule.num_minibatches)
        once = [kind(s, i) for kind in (Forward, Backward) for s in stages for i in everything]
        if self.computed != Counter(once):
            raise Refused("a minibatch was computed more or less than once")
        if not all(toy.is_clean() for toy in self.toys) or any(self.channels.values()):
            raise Refused("something is left over")
        for stage in stages:
            first, *others = (self.toys[worker].history for worker in self.schedule.workers(stage))
            if any(other != first for other in others):
                raise Refused("replicas have different weights")
            if [i for chunk in first for i in chunk] != list(everything):
                raise Refused("a gradient was lost, doubled or late")
