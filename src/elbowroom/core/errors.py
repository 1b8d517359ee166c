"""Typed errors. Each message carries the numbers and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class ElbowroomError(Exception):
    """Base of every error that a user can cause or mend."""


class InputError(ElbowroomError):
    """The batch file, the model directory or a flag cannot be used as given."""


class OutputError(ElbowroomError):
    """Results cannot be written where they were asked for."""


class MemoryPlanError(ElbowroomError):
    """The layout does not fit in the memory of one replica."""


class MeasuringError(ElbowroomError):
    """Measuring a machine failed, or took longer than it may."""


class UntraceableModelError(InputError):
    """A model whose forward cannot be written down as layers that follow each other."""


class SplitError(InputError):
    """A plan that cannot be applied to this model: of another model, or between tied weights."""


class UnsupportedModelError(ElbowroomError):
    """No feed-forward network that we recognise, or one that the pool cannot hold."""


class PoolError(ElbowroomError):
    """The pool cannot go on: a lease was misused or a slot does not fit."""


class PeerLostError(PoolError):
    """A peer never appeared in time, or died before it published its weights."""


class ReplicaError(ElbowroomError):
    """A replica failed to start, or died while it held rows."""


class JobStoppedError(ElbowroomError):
    """A job ended before its last row. What is finished is kept; the same command resumes it."""


class ScheduleError(ElbowroomError):
    """A schedule of a pipeline cannot be carried out, or would not train what it should.

    ``worker`` and ``action`` (its text form) say where, as far as it is one place.
    """

    def __init__(self, problem: str, worker: int | None = None, action: str | None = None) -> None:
        places = ([] if worker is None else [f"worker {worker}"]) + ([action] if action else [])
        super().__init__(": ".join([", ".join(places), problem] if places else [problem]))
        self.worker = worker
        self.action = action


@contextmanager
def optional(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """What a job can do without: a failure inside is said in one line, and the job goes on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        with suppress(Exception):  # the screen may be what fails
            say(f"no {what}: {text}")
