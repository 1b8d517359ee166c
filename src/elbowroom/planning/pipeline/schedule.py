"""Schedules of training pipelines for a known number of minibatches, all workers' lists.

What each worker does in which order is ``plans.pipeline_schedule``: 1F1B, replicated stages too,
and the flushed schedules.

``depth`` multiplies W, the warm-up forwards. At 1, the papers' number, stage k of n straight ones
has n-k minibatches in flight, and there is no time to spare: what transfers take between two stages
is added to their loop. At 2 transfers hide behind compute. It costs memory, as nearly twice as many
weights and activations are kept, and the weights are older by as much. Stages with none behind
them, and so data parallel training, are the same at any depth.

None of these schedules deadlocks if a send does not wait for its receive. A backward of minibatch y
at stage s follows the forward of y + W(s) r(s) there, and that of x at s follows, over all updates
between, backwards below x - W(s) r(s) only. With b workers behind s, W(s) r(s) is at least depth b
and less than depth (b + r), so it decreases from stage to stage; so whatever a backward waits for,
it is backwards of earlier minibatches, or of the same one at later stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from elbowroom.plans.pipeline_actions import PipelineAction, Schedule
from elbowroom.plans.pipeline_schedule import ActionStream, Kind, ScheduleRule
from elbowroom.plans.pipeline_shape import Pipe


def plan_schedule(
    replicas: tuple[int, ...],
    num_minibatches: int,
    kind: Kind = "1f1b",
    flush_every: int | None = None,
    depth: int = 1,
) -> Schedule:
    """Actions of every worker, for a number of ``replicas`` of each stage.

    ``kind``, ``flush_every`` and ``depth`` are those of a ``ScheduleRule``. Raises InputError for
    what is no schedule.
    """
    pipe, rule = Pipe(replicas), ScheduleRule(kind, flush_every, depth)
    streams = (ActionStream(pipe, worker, rule) for worker in range(pipe.num_workers))
    return Schedule(
        replicas,
        num_minibatches,
        tuple(tuple(_whole(stream, num_minibatches)) for stream in streams),
    )


def _whole(stream: ActionStream, num_minibatches: int) -> Iterator[PipelineAction]:
    for _ in range(num_minibatches):
        yield from stream.feed()
    yield from stream.drain()
