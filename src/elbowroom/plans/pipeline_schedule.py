"""The order of actions on one worker of a pipe, minibatch after minibatch, without an end.

Planners list it for a known number of minibatches, and workers carry it out as minibatches come.
Papers: arXiv 1806.03377 and SOSP 2019 (1F1B, 1F1B-RR); GPipe: arXiv 1811.06965; synchronous 1F1B:
PipeDream-Flush, arXiv 2006.09503.

Minibatch i goes to replica i mod r of a stage of r replicas, forward and backward. A worker begins
with W = floor((workers - 1 - replicas before its stage) / r) forwards, which is ceil(workers behind
its stage / r), and then alternates one forward, one backward until it is drained. With ``gpipe`` W
is all forwards between two flushes. Neither ratios of replicas nor the number of minibatches need
be even.

Rounds: ``1f1b`` updates a straight stage after each backward, and a stage of r replicas after each
r consecutive minibatches, one for each replica, which then average their gradients (``Reduce``). A
round that a drain cuts short is averaged over the minibatches that there are: replicas without one
enter the ``Reduce`` after all else they do, so all have the same weights at every number of
updates. The flushed schedules do the same once for each ``flush_every`` minibatches, of which the
last may be fewer too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    PipelineAction,
    RecvActivation,
    RecvGradient,
    Reduce,
    SendActivation,
    SendGradient,
    Update,
)
from elbowroom.plans.pipeline_shape import Pipe

Kind = Literal["1f1b", "gpipe", "1f1b-flush"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ScheduleRule:
    """A kind of schedule and its numbers.

    Args:
        kind: one of ``KINDS``.
        flush_every: minibatches between two flushes. ``gpipe`` and ``1f1b-flush`` must have it,
            ``1f1b`` must not.
        depth: warm-up forwards, as a multiple of the papers'; 1 for ``gpipe``.

    Raises InputError for what is no schedule.

    """

    kind: Kind = "1f1b"
    flush_every: int | None = None
    depth: int = 1

    def __post_init__(self) -> None:
        kind, flush_every, depth = self.kind, self.flush_every, self.depth
        if kind not in KINDS:
            raise InputError(f"schedule '{kind}' is not one of {', '.join(KINDS)}")
        if (flush_every is None) != (kind == "1f1b"):
            raise InputError(
                f"schedule '{kind}' with flush_every {flush_every}: gpipe and 1f1b-flush need it, "
                "1f1b has no flush"
            )
        if flush_every is not None and flush_every < 1:
            raise InputError(f"a flush after {flush_every} minibatches: give at least 1")
        if depth < 1 or (depth > 1 and kind == "gpipe"):
            raise InputError(f"schedule '{kind}' of depth {depth}: give 1, or more to 1f1b kinds")

    def warmup_forwards(self, pipe: Pipe, stage: int) -> int:
        """Forwards of each replica of a stage before its first backward."""
        if self.kind == "gpipe" and self.flush_every is not None:
            return -(-self.flush_every // pipe.replicas[stage])
        return pipe.warmup_forwards(stage, self.depth)


class ActionStream:
    """The actions of one worker, given out as minibatches are fed.

    ``feed`` and ``drain`` yield what the worker does next, in its order; each must be read to its
    end before the other is called. All workers of a pipe are fed the same minibatches and drained
    between the same two. Minibatches are numbered from ``first_minibatch``, or the next number at
    which all stages begin a round.
    """

    def __init__(
        self, pipe: Pipe, worker: int, rule: ScheduleRule, first_minibatch: int = 0
    ) -> None:
        self.stage = pipe.stages[worker]
        self.warmup_forwards = rule.warmup_forwards(pipe, self.stage)
        self.next_minibatch = first_minibatch
        self._pipe = pipe
        self._worker = worker
        self._replicas = pipe.replicas[self.stage]
        self._is_flushed = rule.flush_every is not None
        self._round = rule.flush_every or self._replicas
        self._input_warmup = rule.warmup_forwards(pipe, 0)
        self._in_flight: deque[int] = deque()
        self._num_updates = 0
        self._begin_fill()

    @property
    def next_own_minibatch(self) -> int:
        """The next minibatch to be fed that is this worker's."""
        replica = self._worker - self._pipe.workers(self.stage)[0]
        return self.next_minibatch + (replica - self.next_minibatch) % self._replicas

    def is_own(self, minibatch: int) -> bool:
        """Whether this worker runs the minibatch."""
        return self._pipe.worker(self.stage, minibatch) == self._worker

    def feed(self) -> Iterator[PipelineAction]:
        """What the worker does when the next minibatch enters the pipe.

        An update waits for all minibatches of its round to be fed.
        """
        minibatch = self.next_minibatch
        self.next_minibatch += 1
        if self.is_own(minibatch):
            yield from self._forward(minibatch)
            self._in_flight.append(minibatch)
            if len(self._in_flight) > self.warmup_forwards:
                yield from self._backward(self._in_flight.popleft())
        if self._is_flushed and self.next_minibatch == self._counted + self._round:
            while self._in_flight:
                yield from self._backward(self._in_flight.popleft())
        yield from self._updates(is_drain=False)

    def drain(self) -> Iterator[PipelineAction]:
        """What the worker does to end all that was fed; afterwards the pipe is empty."""
        while self._in_flight:
            yield from self._backward(self._in_flight.popleft())
            yield from self._updates(is_drain=True)
        yield from self._updates(is_drain=True)
        self._begin_fill()

    def input_version(self, minibatch: int) -> int:
        """Vertical sync: the version of this stage's weights that a forward of a minibatch takes.

        The newest that counts no minibatch which the input stage's newest does not count: a replica
        there has updated after each of its forwards but the first few.
        """
        input_replicas = self._pipe.replicas[0]
        rounds_begun = (minibatch - self._fill_minibatch) // input_replicas
        rounds = max(0, rounds_begun - self._input_warmup)
        return self._fill_version + rounds * input_replicas // self._replicas

    def _begin_fill(self) -> None:
        """Nothing is in flight: all stages begin their next rounds with the same minibatch."""
        whole = lcm(*self._pipe.replicas)
        self.next_minibatch = -(-self.next_minibatch // whole) * whole
        self._counted = self._fill_minibatch = self.next_minibatch
        self._fill_version = self._num_updates

    def _forward(self, minibatch: int) -> Iterator[PipelineAction]:
        stage, pipe = self.stage, self._pipe
        if stage > 0:
            yield RecvActivation(stage, minibatch, pipe.worker(stage - 1, minibatch))
        yield Forward(stage, minibatch)
        if stage + 1 < pipe.num_stages:
            yield SendActivation(stage, minibatch, pipe.worker(stage + 1, minibatch))

    def _backward(self, minibatch: int) -> Iterator[PipelineAction]:
        stage, pipe = self.stage, self._pipe
        if stage + 1 < pipe.num_stages:
            yield RecvGradient(stage, minibatch, pipe.worker(stage + 1, minibatch))
        yield Backward(stage, minibatch)
        if stage > 0:
            yield SendGradient(stage, minibatch, pipe.worker(stage - 1, minibatch))

    def _updates(self, is_drain: bool) -> Iterator[PipelineAction]:
        """Updates of rounds that are fed, and whose backwards here are done.

        Whole rounds only, unless it ``is_drain``. ``_counted`` is the minibatch after the last that
        an update counts.
        """
        while self._counted < self.next_minibatch:
            end = self._counted + self._round
            if end > self.next_minibatch:
                if not is_drain:
                    return
                end = self.next_minibatch
            if self._in_flight and self._in_flight[0] < end:
                return
            self._counted = end
            if self._replicas > 1:
                yield Reduce(self.stage, end - 1)
            self._num_updates += 1
            yield Update(self.stage, end - 1)
