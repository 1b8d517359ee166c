"""Checker of schedules: proves that action lists fit together, or says where they do not.

Workers exchange messages over one first-in, first-out channel for each direction between two of
them, wait only in receives and reduces, and never choose what to wait for: a Kahn process network.
Whatever one order of execution shows holds in all of them. So the lists are carried out once, each
worker as far as it can get, and every action is checked in its place:

- each send has one receive, and both sides of a channel have the same order;
- a forward follows the arrival of its input, a backward follows its forward on the same worker and
  the arrival of its gradient;
- every minibatch passes each stage once forward and once backward;
- all replicas of a stage enter the same reduces in the same order, each followed by its update;
- the minibatches that an update claims to count, those since the previous update up to its own, are
  exactly those whose backwards went into the gradients.

Sends are buffered: they do not wait for their receive, like ``isend`` with receives that are posted
early. With ``rendezvous`` a send waits until its receive is reached. Flushed GPipe passes that,
1F1B does not: one stage sends an activation while the next sends a gradient, and both wait. With
``gradients`` only sends of gradients wait, and all schedules pass. Workers of ``pipeline`` wait for
fewer of them, so they finish as well.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from elbowroom.core.errors import ScheduleError
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    Message,
    PipelineAction,
    Recv,
    Reduce,
    Schedule,
    Send,
    SendActivation,
    SendGradient,
    Update,
    message_of,
)

Sends = Literal["buffered", "rendezvous", "gradients"]

_WAITING: dict[Sends, tuple[type[Send], ...]] = {
    "buffered": (),
    "rendezvous": (SendActivation, SendGradient),
    "gradients": (SendGradient,),
}


class Step(NamedTuple):
    """One action of one worker."""

    worker: int
    action: PipelineAction


def check_schedule(schedule: Schedule, sends: Sends = "buffered") -> None:
    """Check a schedule. Raises ScheduleError with the worker, the action and the problem."""
    for _ in execution_order(schedule, sends):
        pass


def execution_order(schedule: Schedule, sends: Sends = "buffered") -> Iterator[Step]:
    """All actions, each after those that it waits for; raises as ``check_schedule`` does.

    The reduces of all replicas of a stage come together, a receive some time after its send.
    """
    _check_places(schedule)
    _check_messages(schedule)
    yield from _Execution(schedule, sends).steps()


def _check_places(schedule: Schedule) -> None:
    """Check that stages, minibatches and peers exist, and that no pass is missing or repeated.

    Each stage has each minibatch once in each direction.
    """
    times: Counter[PipelineAction] = Counter()
    for worker, actions in enumerate(schedule.actions):
        for action in actions:
            if action.stage != schedule.stages[worker]:
                own = schedule.stages[worker]
                raise _error(worker, action, f"the worker belongs to stage {own}")
            if not 0 <= action.minibatch < schedule.num_minibatches:
                raise _error(worker, action, f"there are {schedule.num_minibatches} minibatches")
            if isinstance(action, Send | Recv):
                behind = isinstance(action, Send) == message_of(worker, action).is_activation
                peers = schedule.workers(action.stage + (1 if behind else -1))
                if action.worker not in peers:
                    side = "behind" if behind else "before"
                    raise _error(worker, action, f"its peer is none of the workers {side} it")
            if isinstance(action, Forward | Backward):
                times[action] += 1
                if times[action] > 1:
                    raise _error(worker, action, "the stage has done that already")
    for stage in range(schedule.num_stages):
        for minibatch in range(schedule.num_minibatches):
            for wanted in (Forward(stage, minibatch), Backward(stage, minibatch)):
                if not times[wanted]:
                    raise ScheduleError(f"no worker of stage {stage} does {wanted}")


def _check_messages(schedule: Schedule) -> None:
    """Check that each message is sent and received once, in the same order at both ends."""
    sent: dict[tuple[int, int], list[Message]] = {}
    received: dict[tuple[int, int], list[Message]] = {}
    for worker, actions in enumerate(schedule.actions):
        for action in actions:
            if isinstance(action, Send | Recv):
                message = message_of(worker, action)
                ends = sent if isinstance(action, Send) else received
                ends.setdefault((message.source, message.target), []).append(message)
    for source, target in sorted(sent.keys() | received.keys()):
        sends, receives = sent.get((source, target), []), received.get((source, target), [])
        for message, count in (Counter(sends) - Counter(receives)).items():
            problem = f"{count} more sent than worker {target} receives"
            raise _error(source, message.send, problem)
        for message, count in (Counter(receives) - Counter(sends)).items():
            problem = f"{count} more received than worker {source} sends"
            raise _error(target, message.recv, problem)
        for wanted, coming in zip(receives, sends, strict=True):
            if wanted != coming:
                problem = f"{coming.send} of worker {source} comes before it"
                raise _error(target, wanted.recv, problem)


@dataclass
class _Worker:
    """State of one worker while its list is carried out.

    ``ready`` are messages that arrived and are not used yet. ``counted`` is the last minibatch that
    an update counted, ``gathered`` those whose backwards came since, and ``reduced`` the minibatch
    of a reduce whose update is still to come.
    """

    left: deque[PipelineAction]
    ready: set[Message] = field(default_factory=set)
    done: set[PipelineAction] = field(default_factory=set)
    gathered: set[int] = field(default_factory=set)
    counted: int = -1
    reduced: int | None = None


class _Execution:
    """Execution of lists whose places and messages are right; one check per kind of action."""

    def __init__(self, schedule: Schedule, sends: Sends) -> None:
        self._schedule = schedule
        self._waiting = _WAITING[sends]
        self._workers = [_Worker(deque(actions)) for actions in schedule.actions]
        self._channels: dict[tuple[int, int], deque[Message]] = {}

    def steps(self) -> Iterator[Step]:
        goes_on = True
        while goes_on:
            goes_on = False
            for worker in range(len(self._workers)):
                for step in self._as_far_as_it_comes(worker):
                    goes_on = True
                    yield step
        self._check_all_done()

    def _as_far_as_it_comes(self, worker: int) -> Iterator[Step]:
        left = self._workers[worker].left
        while left:
            action = left[0]
            if self._waits_for(worker, action) is not None:
                return
            if isinstance(action, Reduce):
                yield from self._reduce(action)
                continue
            left.popleft()
            self._carry_out(worker, action)
            self._workers[worker].done.add(action)
            yield Step(worker, action)

    def _waits_for(self, worker: int, action: PipelineAction) -> str | None:
        """Description of what must come first; None if the action can begin."""
        if isinstance(action, Recv):
            message = message_of(worker, action)
            if not self._channels.get((message.source, message.target)):
                return f"{message.send} of worker {message.source}"
        elif isinstance(action, self._waiting):
            message = message_of(worker, action)
            ahead = self._workers[message.target].left
            head = ahead[0] if ahead else None
            if not isinstance(head, Recv) or message_of(message.target, head) != message:
                return f"{message.recv} of worker {message.target}"
        elif isinstance(action, Reduce):
            for replica in self._schedule.workers(action.stage):
                others = self._workers[replica].left
                if not others or not isinstance(others[0], Reduce):
                    return f"worker {replica} to enter the reduce"
        return None

    def _carry_out(self, worker: int, action: PipelineAction) -> None:
        state = self._workers[worker]
        if isinstance(action, Send):
            message = message_of(worker, action)
            made = Forward if message.is_activation else Backward
            if made(action.stage, action.minibatch) not in state.done:
                raise _error(worker, action, "the worker has not computed what it sends")
            self._channels.setdefault((worker, action.worker), deque()).append(message)
        elif isinstance(action, Recv):
            state.ready.add(self._channels[action.worker, worker].popleft())
        elif isinstance(action, Forward):
            self._use(worker, action, action.stage - 1)
        elif isinstance(action, Backward):
            if Forward(action.stage, action.minibatch) not in state.done:
                raise _error(worker, action, "its forward has not run on this worker")
            if state.reduced is not None:
                raise _error(
                    worker, action, f"it comes between a reduce of {state.reduced} and its update"
                )
            self._use(worker, action, action.stage + 1)
            state.gathered.add(action.minibatch)
        elif isinstance(action, Update):
            self._update(worker, action)

    def _use(self, worker: int, action: Forward | Backward, stage: int) -> None:
        """Use up the message from the stage before or behind; the outer stages need none."""
        if not 0 <= stage < self._schedule.num_stages:
            return
        ready = self._workers[worker].ready
        place = (stage, action.minibatch)
        fitting = {message for message in ready if (message.stage, message.minibatch) == place}
        if not fitting:
            what = "input" if isinstance(action, Forward) else "gradient"
            raise _error(worker, action, f"its {what} has not arrived")
        ready -= fitting

    def _reduce(self, action: Reduce) -> Iterator[Step]:
        """Reduce on all replicas at once: each must be at a reduce of the same minibatch."""
        replicas = self._schedule.workers(action.stage)
        gathered: set[int] = set()
        for worker in replicas:
            state = self._workers[worker]
            if state.left[0] != action or len(replicas) == 1:
                problem = f"other replicas are at {action}" if len(replicas) > 1 else "no replicas"
                raise _error(worker, state.left[0], problem)
            if state.reduced is not None:
                raise _error(worker, action, f"the update of {state.reduced} is missing")
            gathered |= state.gathered
        self._check_counted(replicas[0], action, gathered)
        for worker in replicas:
            state = self._workers[worker]
            state.left.popleft()
            state.gathered, state.reduced = set(), action.minibatch
            yield Step(worker, action)

    def _update(self, worker: int, action: Update) -> None:
        state = self._workers[worker]
        if self._schedule.replicas[action.stage] == 1:
            self._check_counted(worker, action, state.gathered)
        elif state.reduced != action.minibatch:
            raise _error(worker, action, "it does not follow its reduce")
        state.gathered, state.reduced, state.counted = set(), None, action.minibatch

    def _check_counted(self, worker: int, action: Reduce | Update, gathered: set[int]) -> None:
        wanted = set(range(self._workers[worker].counted + 1, action.minibatch + 1))
        if gathered != wanted or not wanted:
            problem = f"it counts minibatches {sorted(wanted)}, gradients are of {sorted(gathered)}"
            raise _error(worker, action, problem)

    def _check_all_done(self) -> None:
        last = self._schedule.num_minibatches - 1
        for worker, state in enumerate(self._workers):
            if state.left:
                waits_for = self._waits_for(worker, state.left[0])
                raise _error(worker, state.left[0], f"deadlock: it waits for {waits_for}")
        for worker, state in enumerate(self._workers):
            for message in state.ready:
                raise _error(worker, message.recv, "nothing uses what it received")
            if state.counted != last:
                problem = f"gradients of minibatches {state.counted + 1} to {last} update nothing"
                raise ScheduleError(problem, worker)


def _error(worker: int, action: PipelineAction, problem: str) -> ScheduleError:
    return ScheduleError(problem, worker, str(action))
