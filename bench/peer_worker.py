"""One of two workers of ``bench.peers`` and ``bench.accuracy``: trains a model, by us or by a peer.

Methods update the weights once for each minibatch that the model's module makes, by its optimizer;
``double-batch`` once for two. The last worker prints what was asked for as a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.pipeline import Pipeline, SchedulerFunction
from elbowroom.plans.pipeline import read_pipeline_plan
from elbowroom.training.checkpoint import Checkpoint

WARM_UP = 5

Batches = Iterator[tuple[Any, Any]]
Weights = Callable[[nn.Module], None]
"""Puts the weights that were trained so far into a model; all workers must call it."""


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    module = importlib.import_module(f"bench.models.{args.model}")
    if args.rate is not None:
        module.make_optimizer = partial(module.make_optimizer, lr=args.rate)
    torch.manual_seed(args.seed)
    model = module.make_model()
    generator = torch.Generator().manual_seed(args.seed)
    batches = (module.make_batch(generator) for _ in range(args.steps))
    training = METHODS[args.method](module, model, batches, args)
    said = measure(module, training, args.epoch) if args.epoch else {"seconds": timed(training)}
    if distributed.get_rank() == 1:
        print(json.dumps(said), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def timed(training: Iterator[Weights]) -> float:
    """Seconds per minibatch, once it has warmed up."""
    ends = [time.perf_counter() for _ in training]
    return (ends[-1] - ends[WARM_UP]) / (len(ends) - 1 - WARM_UP)


def measure(module: ModuleType, training: Iterator[Weights], epoch: int) -> dict[str, Any]:
    """Accuracy after each epoch of so many minibatches."""
    curve = []
    for number, put_weights in enumerate(training, start=1):
        if number % epoch == 0:
            model = module.make_model()
            put_weights(model)
            curve.append(module.accuracy(model))
    return {"accuracy": curve}


def ours(
    module: ModuleType, model: nn.Module, batches: Batches, args: argparse.Namespace
) -> Iterator[Weights]:
    """1F1B; at each yield the last stage is done with a minibatch."""
    pipeline = Pipeline(
        model,
        read_pipeline_plan(args.plan),
        module.make_optimizer,
        module.loss_fn,
        StageOptions(args.semantics),
        scheduler_fn(module, args.steps),
    )

    def put_weights(target: nn.Module) -> None:
        Checkpoint(pipeline.save(args.checkpoints)).load_weights(target)

    for batch in batches:
        pipeline.train_step(batch)
        yield put_weights
    pipeline.close()


def data_parallel(
    module: ModuleType, model: nn.Module, batches: Batches, args: argparse.Namespace
) -> Iterator[Weights]:
    """DistributedDataParallel: each worker has half of each minibatch."""
    rank = distributed.get_rank()
    halves = ((x.tensor_split(2)[rank], y.tensor_split(2)[rank]) for x, y in batches)
    return _in_parallel(module, model, halves, args.steps)


def double_batch(
    module: ModuleType, model: nn.Module, batches: Batches, args: argparse.Namespace
) -> Iterator[Weights]:
    """The same with an update for two minibatches, one of each worker, as in the paper."""
    return _in_parallel(module, model, _every_second(batches), args.steps // 2)


def _every_second(batches: Batches) -> Iterator[tuple[Any, Any] | None]:
    """Every worker's own part of two minibatches, when both are there."""
    for first in batches:
        yield None
        if (second := next(batches, None)) is not None:
            yield (first, second)[distributed.get_rank()]


def _in_parallel(
    module: ModuleType, model: nn.Module, mine: Iterator[tuple[Any, Any] | None], num_updates: int
) -> Iterator[Weights]:
    """``mine`` gives what this worker learns from with each minibatch of the run, if anything."""
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = module.make_optimizer(parallel.parameters())
    scheduler = scheduler_fn(module, num_updates)(optimizer)

    def put_weights(target: nn.Module) -> None:
        target.load_state_dict(model.state_dict())

    for batch in mine:
        if batch is not None:
            inputs, targets = batch
            optimizer.zero_grad()
            module.loss_fn(parallel(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
        yield put_weights


def pipelining(
    module: ModuleType, model: nn.Module, batches: Batches, args: argparse.Namespace
) -> Iterator[Weights]:
    """torch.distributed.pipelining, 1F1B with a flush for each minibatch. Only for its speed."""
    rank, layers = distributed.get_rank(), dict(model.named_children())
    cut = [*layers].index(args.cut)
    mine = [*layers.values()][cut:] if rank else [*layers.values()][:cut]
    part = nn.Sequential(*mine)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, args.microbatches, loss_fn=module.loss_fn)
    optimizer = module.make_optimizer(part.parameters())

    for inputs, targets in batches:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(inputs, return_outputs=False)
        else:
            schedule.step(target=targets, losses=[], return_outputs=False)
        optimizer.step()
        yield lambda target: None


def scheduler_fn(module: ModuleType, num_steps: int) -> SchedulerFunction:
    """The module's own; else the rate stays as it is."""
    if hasattr(module, "make_scheduler"):
        return partial(module.make_scheduler, num_steps=num_steps)
    return partial(LambdaLR, lr_lambda=lambda _: 1.0)


METHODS = {
    "ours": ours,
    "data-parallel": data_parallel,
    "double-batch": double_batch,
    "pipelining": pipelining,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", help="a module of bench.models")
    parser.add_argument("--steps", type=int, required=True, help="minibatches")
    parser.add_argument("--plan", type=Path, help="of ours")
    parser.add_argument("--semantics", default="stash", help="of our weights")
    parser.add_argument("--cut", help="the layer with which the second stage of a peer begins")
    parser.add_argument("--microbatches", type=int, help="of the other pipeline")
    parser.add_argument("--checkpoints", type=Path, help="an empty folder, if ours has epochs")
    parser.add_argument("--epoch", type=int, help="minibatches; gives accuracies, not seconds")
    parser.add_argument("--rate", type=float, help="of learning, instead of the model's own")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
