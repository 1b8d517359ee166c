"""One worker of a pipeline: carries out the actions of its schedule as minibatches are fed.

Every worker is told of every minibatch and does what is its own. A call of ``train_step`` feeds one
minibatch into the pipe and does not wait for its backward; ``drain`` finishes all in flight. With
``flush``, each call feeds microbatches, after which the schedule drains the pipe and updates once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from elbowroom.pipeline.microbatches import microbatches
from elbowroom.pipeline.options import LossFunction, StageOptions
from elbowroom.pipeline.stage_actions import HANDLERS, Batch, Done, StageActions
from elbowroom.pipeline.versions import Versions
from elbowroom.plans.pipeline_actions import PipelineAction
from elbowroom.plans.pipeline_schedule import ActionStream
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.training.keeping import Keeper


class StageWorker:
    """One worker of a pipe: its stage, trained as minibatches are fed.

    It is number ``worker`` of ``pipe`` and needs a process group of all workers. ``module`` takes
    the tensors that the stage before it gives, then its own inputs, and gives a tuple of tensors;
    what the last stage gives goes to ``loss_fn``. ``scheduler`` steps after every update.
    Minibatches are numbered from ``next_minibatch``; ``depth`` is that of the plan. ``keeper``
    keeps what minibatches in flight have saved.
    """

    def __init__(
        self,
        module: nn.Module,
        pipe: Pipe,
        worker: int,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        options: StageOptions | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        next_minibatch: int = 0,
        depth: int = 1,
        keeper: Keeper | None = None,
    ) -> None:
        options = options or StageOptions()
        rule = options.schedule_rule(depth)
        self.stage = pipe.stages[worker]
        self._num_parts = options.microbatches
        self._stream = ActionStream(pipe, worker, rule, next_minibatch)
        self._actions = StageActions(
            module,
            pipe,
            worker,
            optimizer,
            loss_fn,
            options,
            scheduler,
            self._stream,
            depth,
            keeper,
        )

    @property
    def next_minibatch(self) -> int:
        """The number of the next minibatch to be fed, by which randomness is keyed."""
        return self._stream.next_minibatch

    @property
    def versions(self) -> Versions:
        """The versions of this stage's weights."""
        return self._actions.versions

    @property
    def done(self) -> list[Done]:
        """What was computed and when, if ``StageOptions`` keep a record."""
        return self._actions.done

    @property
    def busy_seconds(self) -> float:
        """Seconds in passes, all-reduces and updates, without waits for other stages."""
        return self._actions.busy_seconds

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Bytes sent to each worker: activations, gradients, and gradient all-reduce traffic."""
        sent = dict(self._actions.replicas.sent_bytes)
        for link in self._actions.links:
            sent |= link.sent_bytes
        return sent

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that other threads receive in."""
        link_bytes = sum(link.buffer_bytes for link in self._actions.links)
        return link_bytes + self._actions.replicas.buffer_bytes

    def train_step(
        self,
        inputs: Sequence[torch.Tensor],
        targets: object = None,
        num_rows: int | None = None,
    ) -> float | None:
        """Feed one minibatch; every worker must be called with every one, in the same order.

        ``inputs`` are those of this stage, beside what it receives; only the last one reads
        ``targets``. Microbatches cut what has ``num_rows`` rows, by default as many as the first
        input or target; all else goes with each of them. Gives the loss where the last stage has
        run the minibatch, else None; with several microbatches, the mean over those run here.
        """
        whole, count = (tuple(inputs), targets), self._num_parts
        parts = [whole] if count == 1 else microbatches(whole, count, num_rows)
        return self.train_parts(parts, [1.0] * count)

    def train_parts(
        self, parts: Sequence[tuple[Sequence[torch.Tensor], object]], sizes: Sequence[float]
    ) -> float | None:
        """Feed one minibatch that is cut already: inputs and targets of each microbatch.

        They are as many as the options say. Gradients, and the loss that it gives, are weighted
        by ``sizes``. For the rest see ``train_step``.
        """
        assert len(parts) == self._num_parts, "the schedule flushes after so many"
        total, here = sum(sizes), []
        for (inputs, targets), size in zip(parts, sizes, strict=True):
            own = tuple(tensor.detach() for tensor in inputs)
            loss = self._feed(Batch(own, targets, size / total))
            if loss is not None:
                here.append((loss, size))
        if not here:
            return None
        return sum(loss * size for loss, size in here) / sum(size for _, size in here)

    def drain(self) -> None:
        """Finish all minibatches in flight; every worker must call it. Then training may resume."""
        self._carry_out(self._stream.drain())

    def close(self) -> None:
        """End the channels, after ``drain``. Every worker must call it."""
        self._actions.replicas.close()
        for link in self._actions.links:
            link.close()

    def _feed(self, batch: Batch) -> float | None:
        minibatch = self._stream.next_minibatch
        if self._stream.is_own(minibatch):
            self._actions.batches[minibatch] = batch
        self._carry_out(self._stream.feed())
        return self._actions.losses.pop(minibatch, None)

    def _carry_out(self, actions: Iterable[PipelineAction]) -> None:
        for action in actions:
            HANDLERS[type(action)](self._actions, action)
