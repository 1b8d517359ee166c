"""Reports of a training run: losses on the way, times and bytes of all workers at the end."""

from __future__ import annotations

import time
from collections import deque
from typing import get_args

import torch
from torch import distributed

from elbowroom.core.trace import Span
from elbowroom.core.units import format_bytes
from elbowroom.pipeline.microbatches import pairs_in
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.pipeline.stage_actions import DoneKind
from elbowroom.plans.pipeline_pace import steady_seconds
from elbowroom.training.loop import num_samples
from elbowroom.training.losses import LossLog
from elbowroom.training.microbatch import Minibatch

_MOST_PACED = 1000
_KINDS: tuple[DoneKind, ...] = get_args(DoneKind)


class Progress:
    """Progress of a run: prints the loss and samples per second now and then, where losses are.

    It also keeps, for the first worker, when each of its last minibatches was done.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._log = LossLog()
        self._steps = 0
        self._fed = 0
        self._paced: deque[tuple[int, float]] = deque(maxlen=_MOST_PACED)
        self._longest: tuple[tuple[int, float], ...] = ()

    def note(self, step: int, loss: float | None, batch: Minibatch) -> None:
        """Note that a minibatch was fed; ``loss`` is None where it is not known."""
        self._note_pace(time.perf_counter())
        num_fed = sum(num_samples(inputs) for inputs, _ in pairs_in(batch))
        if line := self._log.note(step + 1, loss, num_fed):
            print(line, flush=True)

    def drained(self) -> None:
        """Note that the pipe is empty, and fills again with the next minibatch."""
        self._longest = self._longest_fill()
        self._paced.clear()
        self._fed = 0

    @property
    def steady_seconds(self) -> float | None:
        """Seconds per minibatch, as the first worker saw them while the pipe was full.

        The last of them, up to 1,000, of the longest time without a drain. None if they are too few
        to tell.
        """
        return steady_seconds(self._longest_fill())

    @property
    def samples_per_step(self) -> float:
        return self._log.num_samples / max(1, self._steps)

    def _longest_fill(self) -> tuple[tuple[int, float], ...]:
        return max(self._longest, tuple(self._paced), key=len)

    def _note_pace(self, now: float) -> None:
        """Keep the time, if this minibatch is the first worker's own and brought one back."""
        self._steps += 1
        first = self._pipeline.plan.stages[0]
        is_own = self._fed % first.replicas == 0
        if is_own and self._fed >= first.warmup_forwards * first.replicas:
            self._paced.append((self._fed, now))
        self._fed += 1

    def end(self) -> None:
        """Print the first and the last losses, where losses are."""
        if line := self._log.ends:
            print(line, flush=True)


def summary(pipeline: Pipeline, progress: Progress, seconds: float, num_steps: int) -> list[str]:
    """A report of the pace beside the predicted one, and of each worker's bubble share and bytes.

    All workers must call it; only the first one has those of all.
    """
    sent = sum(pipeline.sent_bytes.values())
    mine = torch.tensor([[pipeline.busy_seconds, float(sent)]], dtype=torch.float64)
    gathered = torch.cat(_tables_of_all(mine))
    whole = f"{num_steps} minibatches in {seconds:.1f} s, weights: {pipeline.semantics}"
    lines = [whole, _pace(pipeline, progress)]
    for worker, (busy_seconds, sent_bytes) in enumerate(gathered.tolist()):
        lines.append(
            f"worker {worker}, stage {pipeline.pipe.stages[worker]}: "
            f"{1 - busy_seconds / seconds:.1%} of the time idle, "
            f"{format_bytes(round(sent_bytes / num_steps))} sent a minibatch"
        )
    return lines


def _pace(pipeline: Pipeline, progress: Progress) -> str:
    """The line on seconds per minibatch. Predictions are of 1F1B: a flushed run has none."""
    plan, measured = pipeline.plan, progress.steady_seconds
    said = []
    if pipeline.semantics != "flush":
        said.append(f"{plan.seconds:.6f} s planned")
        if plan.simulated_seconds is not None:
            said.append(f"{plan.simulated_seconds:.6f} s simulated")
    if measured is None:
        return f"a minibatch: {', '.join((*said, 'too few to measure'))}"
    rate = progress.samples_per_step / measured
    said.append(f"{measured:.6f} s measured while the pipe was full: {rate:.1f} samples/s")
    return f"a minibatch: {', '.join(said)}"


def spans_of_all(pipeline: Pipeline) -> list[Span]:
    """Spans of what every worker computed, as in the simulator's trace; they must keep a record.

    All workers must call it; only the first one has those of all.
    """
    rows = [
        (_KINDS.index(done.kind), done.minibatch, done.version, done.begin, done.end)
        for done in pipeline.done
    ]
    mine = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    spans = []
    for worker, table in enumerate(_tables_of_all(mine)):
        for kind, minibatch, version, begin, end in table.tolist():
            name = f"{_KINDS[int(kind)]} {minibatch:.0f}"
            details = {"version": int(version)}
            spans.append(Span(f"worker {worker}", "compute", name, begin, end, details))
    first = min((span.start for span in spans), default=0.0)
    return [span._replace(start=span.start - first, end=span.end - first) for span in spans]


def _tables_of_all(mine: torch.Tensor) -> list[torch.Tensor]:
    """Tables [rows, columns] of all workers, gathered at the first; elsewhere the own table only.

    Point to point: the tensors of a collective are let go by a thread of gloo's, for which Python
    must be there, and a process that has come to its end meanwhile aborts (torch 2.13).
    """
    count = torch.tensor([len(mine)])
    if distributed.get_rank():
        for tensor in (count, mine):
            distributed.send(tensor, 0)
        return [mine]
    tables = [mine]
    for worker in range(1, distributed.get_world_size()):
        distributed.recv(count, worker)
        tables.append(mine.new_empty(int(count), mine.size(1)))
        distributed.recv(tables[-1], worker)
    return tables
