"""A stand-in for a device's runtime on a CPU, whose streams run in any order that events allow.

What is issued to a stream waits in its queue. It runs when the host waits for a stream: then a
scheduler takes a piece of work from one stream after the other, at random among those whose next
piece waits for no event. Nothing depends on time, so a seed gives the same order anywhere. Copies
are torn in two pieces. A stream's pace says how often it is taken: where copies are much slower
than compute, or much faster, a missing wait shows in nearly every pass.

Events mean what CUDA's do: a wait is for the last record issued before it. Captures keep CUDA's
rules, and a replay runs no Python of the code that was captured.

The project's code gets a ``FakeDevice`` from ``torch.get_device_module``; what it computes goes to
the current stream inside ``fake_operations.Issuing``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class CaptureError(RuntimeError):
    """A call that CUDA refuses because of a capture."""


class IsolationError(CaptureError):
    """A wait between a capture and what is outside of it (cudaErrorStreamCaptureIsolation)."""


class UnjoinedError(CaptureError):
    """Work of a capture that its first stream never waits for (cudaErrorStreamCaptureUnjoined)."""


class UnsupportedError(CaptureError):
    """A wait of the host during a capture (cudaErrorStreamCaptureUnsupported)."""


class HangError(RuntimeError):
    """All streams wait for events, and no work is left that would record them."""


@dataclass(eq=False)
class Mark:
    """One record of an event: what a wait waits for. ``graph`` is the capture it belongs to."""

    graph: Graph | None = None
    is_reached: bool = False


@dataclass(frozen=True)
class Work:
    """A piece of work: waits for a mark, runs, reaches a mark; each of them if there is one."""

    run: Callable[[], object] | None = None
    waits_for: Mark | None = None
    reaches: Mark | None = None

    @property
    def is_ready(self) -> bool:
        return self.waits_for is None or self.waits_for.is_reached


class FakeDevice:
    """The device module: streams, events and what the host asks of them.

    ``copy_pace`` is the pace of streams that the program makes; that of the default stream is 1.
    ``is_running`` while a stream runs a piece of work.
    """

    def __init__(self, seed: int = 0, copy_pace: float = 1.0) -> None:
        self._random = random.Random(seed)
        self._copy_pace = copy_pace
        self.is_running = False
        self.default = FakeStream(self, 1.0)
        self._current = self.default
        self.streams = [self.default]
        self.capture: Graph | None = None

    def Stream(self) -> FakeStream:  # noqa: N802 (a device module's name for it)
        self.streams.append(FakeStream(self, self._copy_pace))
        return self.streams[-1]

    def Event(self) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def current_stream(self) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def is_current_stream_capturing(self) -> bool:
        return self._current.is_capturing

    def synchronize(self, device: object = None) -> None:
        """Run everything. There is one ``device``."""
        if self.capture is not None:
            raise UnsupportedError("the host waits for a device during a capture")
        for stream in list(self.streams):
            self.run_until_empty(stream)

    def run_until_empty(self, stream: FakeStream) -> None:
        """Run what ``stream`` has been given, and of the others what the scheduler picks."""
        while stream.work:
            ready = [other for other in self.streams if other.work and other.work[0].is_ready]
            if not ready:
                raise HangError("every stream waits for an event that nobody will record")
            picked = self._random.choices(ready, [other.pace for other in ready])[0]
            self._run(picked.work.popleft())
        self.streams = [other for other in self.streams if other.work or not other.is_branch]

    def _run(self, work: Work) -> None:
        if work.run is not None:
            self.is_running = True
            try:
                work.run()
            finally:
                self.is_running = False
        if work.reaches is not None:
            work.reaches.is_reached = True


class FakeStream:
    """A queue of work. ``is_branch`` is that of one stream's part in one replay of a graph."""

    def __init__(self, device: FakeDevice, pace: float, is_branch: bool = False) -> None:
        self._device = device
        self.pace = pace
        self.is_branch = is_branch
        self.work: deque[Work] = deque()

    @property
    def is_capturing(self) -> bool:
        return self._device.capture is not None and self in self._device.capture.streams

    def put(self, work: Work) -> None:
        capture = self._device.capture
        if capture is not None and self in capture.streams:
            capture.add(self, work)
        else:
            self.work.append(work)

    def synchronize(self) -> None:
        if self.is_capturing:
            raise UnsupportedError("the host waits for a stream that is in a capture")
        self._device.run_until_empty(self)

    def wait_event(self, event: FakeEvent) -> None:
        event.wait(self)

    def wait_stream(self, other: FakeStream) -> None:
        event = self._device.Event()
        event.record(other)
        event.wait(self)

    def mark(self) -> Mark:
        """Put a new mark behind what the stream has been given."""
        mark = Mark(self._device.capture if self.is_capturing else None)
        self.put(Work(reaches=mark))
        return mark


class FakeEvent:
    """An event, which waits know by its last record. One never recorded holds nobody up."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._last: Mark | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self._last = (stream or self._device.current_stream()).mark()

    def wait(self, stream: FakeStream | None = None) -> None:
        stream = stream or self._device.current_stream()
        capture, mark = self._device.capture, self._last
        if mark is None:
            return
        if mark.graph is None and stream.is_capturing:
            raise IsolationError("a capture waits for an event recorded outside of it")
        if mark.graph is not None and mark.graph is not capture:
            raise IsolationError("an event recorded in another capture is waited for")
        if mark.graph is not None:
            mark.graph.join(stream)
        stream.put(Work(waits_for=mark))


@dataclass(eq=False)
class Graph:
    """The work captured on one stream and on those that waited for events of it."""

    device: FakeDevice
    streams: list[FakeStream] = field(default_factory=list)
    nodes: list[tuple[FakeStream, Work]] = field(default_factory=list)

    @contextmanager
    def capturing(self, stream: FakeStream) -> Iterator[None]:
        """Capture what is issued to ``stream``, the current one, instead of running it.

        Raises UnjoinedError at the end if the stream does not wait for all that was captured.
        """
        assert self.device.capture is None
        self.streams.append(stream)
        self.device.capture = self
        try:
            with self.device.stream(stream):
                yield
        finally:
            self.device.capture = None
        self._check_joined()

    def join(self, stream: FakeStream) -> None:
        """Make ``stream`` part of the capture: it waits for an event of it."""
        if stream not in self.streams:
            self.streams.append(stream)

    def add(self, stream: FakeStream, work: Work) -> None:
        self.nodes.append((stream, work))

    def replay(self) -> None:
        """Issue the graph to the current stream: after what is there, before what will come."""
        launching = self.device.current_stream()
        begin = launching.mark()
        marks = {work.reaches: Mark() for _, work in self.nodes if work.reaches is not None}
        for captured in self.streams:
            pace = 1.0 if captured is self.streams[0] else captured.pace
            branch = FakeStream(self.device, pace, is_branch=True)
            self.device.streams.append(branch)
            branch.put(Work(waits_for=begin))
            for stream, work in self.nodes:
                if stream is captured:
                    waits_for = work.waits_for and marks[work.waits_for]
                    branch.put(Work(work.run, waits_for, work.reaches and marks[work.reaches]))
            launching.put(Work(waits_for=branch.mark()))

    def _check_joined(self) -> None:
        """Walk back from the end of the first stream, over its waits."""
        reached = {self.streams[0]: len(self.nodes)}  # of each stream, the nodes before this one
        recorded = {work.reaches: n for n, (_, work) in enumerate(self.nodes) if work.reaches}
        for n in reversed(range(len(self.nodes))):
            stream, work = self.nodes[n]
            if n >= reached.get(stream, 0):
                if work.run is not None:
                    raise UnjoinedError("a capture ends, and its first stream has not waited")
            elif work.waits_for is not None:
                at = recorded[work.waits_for]
                other = self.nodes[at][0]
                reached[other] = max(reached.get(other, 0), at)
