"""Typed errors. Each message carries the numbers and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_MAX_SHOWN_CHARS = 80


class ElbowroomError(Exception):
    """Base class of every error that a user can cause or fix."""


class InputError(ElbowroomError):
    """The batch file, the model directory or a flag cannot be used as given."""


class OutputError(ElbowroomError):
    """Results cannot be written where they were asked for."""


class MemoryPlanError(ElbowroomError):
    """The layout or plan does not fit in the memory of one replica or worker."""


class MeasuringError(ElbowroomError):
    """Measuring a machine failed, or took longer than it may."""


class UntraceableModelError(InputError):
    """The model's forward cannot be written down as layers that follow each other."""


class SplitError(InputError):
    """A plan cannot be applied to this model: it is of another, or cuts between tied weights."""


class UnsupportedModelError(ElbowroomError):
    """The model has no feed-forward network that the pool can hold, or weights without a kernel."""


class PoolError(ElbowroomError):
    """The pool cannot continue: a lease was misused or a slot does not fit."""


class PeerLostError(PoolError):
    """A peer did not appear in time, or died before it published its weights."""


class ReplicaError(ElbowroomError):
    """A replica failed to start, or died while it held rows."""


class JobStoppedError(ElbowroomError):
    """A job ended before its last row. Finished rows are kept; the same command resumes the job."""


class ScheduleError(ElbowroomError):
    """A pipeline schedule cannot be carried out, or would not train what it should.

    ``worker`` and ``action`` (its text form) say where, when the problem has one location.
    """

    def __init__(self, problem: str, worker: int | None = None, action: str | None = None) -> None:
        places = ([] if worker is None else [f"worker {worker}"]) + ([action] if action else [])
        super().__init__(": ".join([", ".join(places), problem] if places else [problem]))
        self.worker = worker
        self.action = action


class SwapError(ElbowroomError):
    """A swapped step cannot continue: its link failed, or data came back changed."""


class TierFullError(SwapError):
    """The slow tier has no room for what leaves the device."""


class StepChangedError(SwapError):
    """A training step does not do what its swap plan was made for."""


class RecomputeError(StepChangedError):
    """A saved storage was not recomputed to the bytes that were saved."""


class MeterUnavailableError(ElbowroomError):
    """Memory cannot be metered here: no compiler, or headers that do not fit."""


def shown(value: object) -> str:
    """A value that came from outside, shortened for a message."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


@contextmanager
def optional(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Run a part that a job can do without: report a failure inside in one line, and continue."""
    try:
        yield
    except Exception as error:
        with suppress(Exception):  # the screen may be what fails
            say(f"no {what}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says: libraries put advice of their own below it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
