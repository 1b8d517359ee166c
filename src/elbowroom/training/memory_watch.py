"""Peak memory of PyTorch's allocator, section by section of a process's work.

On a CUDA device these are the allocator's own statistics, of all threads. On a CPU PyTorch keeps
none: they are added up from the events of its profiler, which sees only the thread that entered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "elbowroom section "
_QUIET = "6"
"""Log level at which Kineto, behind the profiler, does not report its begin and end."""


class Section(NamedTuple):
    """A section of work; ``peak_bytes`` is the most held at once above what was held at the start.

    The start is when the watch was entered.
    """

    name: str
    peak_bytes: int


@dataclass
class MemoryWatch:
    """Context manager that watches the allocator; ``sections`` are complete when it is left.

    On a CPU, memory allocated before entering is unknown, and its release is not seen: enter first.
    The profiler costs time, and memory for its record: not for long runs.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sections: list[Section] = field(default_factory=list)
    _names: list[str] = field(default_factory=lambda: [""])
    _profile: profile | None = None
    _begin_bytes: int = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            self._begin_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        return self

    def mark(self, name: str) -> None:
        """Begin a section, and end the one before."""
        if self._profile is not None:
            with record_function(f"{_MARK}{len(self._names)}"):
                pass
        else:
            self._end_section()
        self._names.append(name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profile is None:
            self._end_section()
            return
        self._profile.stop()
        if kind is None:
            self._read(self._profile)
        self._profile = None

    def peak_bytes(self, name: str) -> int:
        """Peak over all sections with this name. Raises ValueError if there is none."""
        return max(section.peak_bytes for section in self.sections if section.name == name)

    def _end_section(self) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) - self._begin_bytes
        self.sections.append(Section(self._names[-1], peak))
        torch.cuda.reset_peak_memory_stats(self.device)

    def _read(self, ended: profile) -> None:
        """Add up the profiler's events; a section's peak counts what is there when it begins."""
        changes: list[list[int]] = [[0]]
        for event in _events(ended):
            if event.name.startswith(_MARK):
                changes.append([0])
            elif isinstance(event.extra_fields, _ExtraFields_Allocation):
                changes[-1].append(event.extra_fields.alloc_size)
        held = 0
        for name, of_section in zip(self._names, changes, strict=True):
            self.sections.append(Section(name, max(accumulate(of_section, initial=held))))
            held += sum(of_section)


def _events(ended: profile) -> list[_ProfilerEvent]:
    """Events of one thread, in the order in which they began."""
    assert ended.profiler is not None and ended.profiler.kineto_results is not None
    queue = list(ended.profiler.kineto_results.experimental_event_tree())
    found = []
    while queue:
        event = queue.pop()
        found.append(event)
        queue += event.children
    return sorted(found, key=lambda event: event.start_time_ns)
