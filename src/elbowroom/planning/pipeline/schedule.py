"""Schedules of training pipelines: 1F1B, also with replicated stages, and the flushed ones.

Papers: arXiv 1806.03377 and SOSP 2019 (1F1B, 1F1B-RR); GPipe: arXiv 1811.06965; synchronous 1F1B:
PipeDream-Flush, arXiv 2006.09503.

Minibatch i goes to replica i mod r of a stage of r replicas, forward and backward. A worker begins
with W = floor((workers - 1 - replicas before its stage) / r) forwards, which is ceil(workers behind
its stage / r), and then alternates one forward, one backward until no forward is left. Neither
ratios of replicas nor the number of minibatches need be even.

``depth`` multiplies W. At 1, the papers' number, stage k of n straight ones has n-k minibatches in
flight, and there is no slack: the time of transfers between two stages is added to their loop. At 2
transfers hide behind compute. It costs memory, as nearly twice as many weights and activations are
kept, and weights are older by the same factor. Stages with none behind them, and so data-parallel
training, are the same at any depth.

Rounds: ``1f1b`` updates a straight stage after each backward, and a stage of r replicas after each
r consecutive minibatches, one for each replica, which then average their gradients (``Reduce``). A
last round of fewer minibatches is averaged over those that exist: replicas without one enter the
``Reduce`` after all else they do, so all have the same weights at every number of updates. The
flushed schedules do the same once for each ``flush_every`` minibatches; the last flush may have
fewer too.

None of these schedules deadlocks if a send does not wait for its receive. A backward of minibatch y
at stage s follows the forward of y + W(s) r(s) there, and that of x at s follows, over all updates
between, backwards below x - W(s) r(s) only. With b workers behind s, W(s) r(s) is at least depth b
and less than depth (b + r), so it decreases from stage to stage; so whatever a backward waits for,
it is backwards of earlier minibatches, or of the same one at later stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline_actions import (
    Backward,
    Compute,
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
from elbowroom.plans.pipeline_shape import Pipe

Kind = Literal["1f1b", "gpipe", "1f1b-flush"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def plan_schedule(
    replicas: tuple[int, ...],
    num_minibatches: int,
    kind: Kind = "1f1b",
    flush_every: int | None = None,
    depth: int = 1,
) -> Schedule:
    """Actions of every worker, for stages with ``replicas`` workers each.

    ``flush_every`` is the number of minibatches between two flushes; ``gpipe`` and ``1f1b-flush``
    need it, ``1f1b`` has none. ``gpipe`` has no ``depth``. Raises InputError for other
    combinations, and for numbers that give no schedule.
    """
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
    pipe = Pipe(replicas)
    workers = (_Worker(pipe, number, num_minibatches, depth) for number in range(pipe.num_workers))
    return Schedule(
        replicas, num_minibatches, tuple(tuple(w.actions(kind, flush_every)) for w in workers)
    )


@dataclass(frozen=True)
class _Worker:
    """Generator of one worker's action list."""

    pipe: Pipe
    number: int
    num_minibatches: int
    depth: int

    @property
    def stage(self) -> int:
        return self.pipe.stages[self.number]

    @property
    def warmup(self) -> int:
        return self.pipe.warmup_forwards(self.stage, self.depth)

    def actions(self, kind: Kind, flush_every: int | None) -> Iterator[PipelineAction]:
        last = self.num_minibatches
        if flush_every is None:
            yield from self._rounds(last)
            return
        warmup = flush_every if kind == "gpipe" else self.warmup
        for start in range(0, last, flush_every):
            stop = min(start + flush_every, last)
            for step in self._alternate(start, stop, warmup):
                yield from self._with_transfers(step)
            yield from self._update(stop - 1)

    def _rounds(self, last: int) -> Iterator[PipelineAction]:
        """1F1B actions: an update after each round, which has one minibatch for each replica."""
        replicas = self.pipe.replicas[self.stage]
        ends = iter([*range(replicas - 1, last - 1, replicas), last - 1])
        for step in self._alternate(0, last, self.warmup):
            yield from self._with_transfers(step)
            if isinstance(step, Backward):
                yield from self._update(next(ends))
        for end in ends:
            yield from self._update(end)

    def _alternate(self, start: int, stop: int, warmup: int) -> Iterator[Compute]:
        """Passes of this worker's own minibatches: ``warmup`` forwards, then 1F1B, then drain.

        The backward of a minibatch follows the forward of the ``warmup``-th after it.
        """
        own = [i for i in range(start, stop) if self.pipe.worker(self.stage, i) == self.number]
        for position, minibatch in enumerate(own):
            yield Forward(self.stage, minibatch)
            if position >= warmup:
                yield Backward(self.stage, own[position - warmup])
        for minibatch in own[max(0, len(own) - warmup) :]:
            yield Backward(self.stage, minibatch)

    def _with_transfers(self, step: Compute) -> Iterator[PipelineAction]:
        """A pass with the receive that it needs before it, and the send of its result after it."""
        stage, minibatch = step.stage, step.minibatch
        before = self.pipe.worker(stage - 1, minibatch) if stage > 0 else None
        behind = (
            self.pipe.worker(stage + 1, minibatch) if stage + 1 < self.pipe.num_stages else None
        )
        if isinstance(step, Forward):
            if before is not None:
                yield RecvActivation(stage, minibatch, before)
            yield step
            if behind is not None:
                yield SendActivation(stage, minibatch, behind)
        else:
            if behind is not None:
                yield RecvGradient(stage, minibatch, behind)
            yield step
            if before is not None:
                yield SendGradient(stage, minibatch, before)

    def _update(self, minibatch: int) -> Iterator[PipelineAction]:
        if self.pipe.replicas[self.stage] > 1:
            yield Reduce(self.stage, minibatch)
        yield Update(self.stage, minibatch)
