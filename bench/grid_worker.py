"""One of the workers of ``bench.grid_peers``: measures the link and the layers, or trains in turns.

``facts`` measures what a planner is told, on one worker while all do the same. ``train`` keeps all
cases of a file ready, grids and peers, and runs them one after another, in rounds. The last worker
prints a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.grid.grid import Grid
from elbowroom.grid.transport import Channel, ProcessTransport, all_sum
from elbowroom.plans.grid import GridPlan
from elbowroom.profiling.layers import SweepLimits
from elbowroom.profiling.script import load_subject
from elbowroom.profiling.shapes import with_seconds
from elbowroom.training.operations.find import shapes_of

SWEEPS, SUMS, WARM_UP = 16, 30, 5
SMALL, LARGE = 1, 1 << 20
"""Elements of the sums that measure the link."""
MATRIX = 768
FIRST_LINEAR = "fc0"

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[Batch], float]
"""Trains with a minibatch; gives the worker's loss of it."""


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    module = importlib.import_module(f"bench.models.{args.model}")
    said = facts(module) if args.cases is None else train(module, args)
    if distributed.get_rank() == distributed.get_world_size() - 1:
        print(json.dumps(said), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def facts(module: ModuleType) -> dict[str, Any]:
    """The link between workers, the layers' seconds and the rate of products, all busy at once."""
    latency, bandwidth = link()
    return {
        "latency_seconds": latency,
        "bandwidth": bandwidth,
        "flops_per_second": flops_per_second(),
        "shapes": shapes(module).to_json(),
    }


def link() -> tuple[float, float]:
    """Seconds of a small message between two, and what each sends a second in a sum of all.

    A sum's additions and copies count: where the link is fast they decide what it takes.
    """
    channel = Channel(ProcessTransport())
    pair, everyone = sorted((channel.worker, channel.worker ^ 1)), range(channel.num_workers)
    small, large = _summing(channel, pair, SMALL), _summing(channel, everyone, LARGE)
    sent = 2 * (len(everyone) - 1) / len(everyone) * LARGE * 4
    return small, sent / (large - 2 * small)


def _summing(channel: Channel, workers: Sequence[int], numel: int) -> float:
    seconds = []
    for _ in range(WARM_UP + SUMS):
        distributed.barrier()
        channel.begin_step()
        route, tensor = channel.route("SUM"), torch.zeros(numel)
        begin = time.perf_counter()
        all_sum(tensor, workers, channel, route, "forward")
        seconds.append(time.perf_counter() - begin)
    channel.transport.drain()
    return statistics.median(seconds[WARM_UP:])


def flops_per_second() -> float:
    one = torch.randn(MATRIX, MATRIX)
    seconds = []
    for _ in range(WARM_UP + SWEEPS):
        begin = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - begin)
    distributed.barrier()
    return 2 * MATRIX**3 / min(seconds)


def shapes(module: ModuleType) -> ModelShapes:
    """As ``train profile --shapes`` measures them, but the means of sweeps, not the medians.

    Workers outnumber cores: a layer takes its time, or much more when it is interrupted, and a
    median knows one of both only.
    """
    subject = replace(
        load_subject(Path(str(module.__file__)), 0, 1, leaves=True), optimizer_fn=None
    )
    found = shapes_of(subject.traced)
    distributed.barrier()
    sweeps = [
        with_seconds(found, subject.measure(SweepLimits(1, 0.0, 1))).layers for _ in range(SWEEPS)
    ]
    distributed.barrier()
    layers = [
        replace(
            each[0],
            forward_seconds=statistics.mean(layer.forward_seconds for layer in each),
            backward_seconds=statistics.mean(layer.backward_seconds for layer in each),
        )
        for each in zip(*sweeps, strict=True)
    ]
    return replace(found, layers=tuple(layers))


def train(module: ModuleType, args: argparse.Namespace) -> dict[str, Any]:
    """For each case its seconds in each round, its loss after the first, and what workers sent."""
    generator = torch.Generator().manual_seed(0)
    batches = [module.make_batch(generator) for _ in range(args.steps + 1)]
    cases = json.loads(args.cases.read_text())
    made = [make(module, case) for case in cases]
    found: list[dict[str, Any]] = [{"name": case["name"], "rounds": []} for case in cases]
    for number in range(args.rounds + 1):
        for case, said in zip(made, found, strict=True):
            seconds, loss = run(case, batches)
            if number:
                said["rounds"].append(seconds)
            else:  # later, rounding errors have grown
                said["loss"] = loss
    for case, said in zip(made, found, strict=True):
        said |= case.sent(len(batches) * (args.rounds + 1))
    return {"cases": found}


class Case(NamedTuple):
    """A way to train; ``is_shared``: whether its losses are the whole minibatch's."""

    step: Step
    grid: Grid | None = None
    is_shared: bool = False

    def sent(self, num_steps: int) -> dict[str, Any]:
        """A step's messages and bytes of all workers, and bytes of the busiest."""
        if self.grid is None:
            return {}
        counts = self.grid.channel.counts.values()
        own = torch.tensor([[one.messages, one.num_bytes] for one in counts]).sum(0)
        everyone = [torch.zeros_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, own)
        each = torch.stack(everyone).double() / num_steps
        messages, num_bytes = each.sum(0).tolist()
        return {"messages": messages, "bytes": num_bytes, "busiest": each[:, 1].max().item()}


def make(module: ModuleType, case: dict[str, Any]) -> Case:
    torch.manual_seed(0)
    model = module.make_model()
    if "plan" in case:
        plan = GridPlan.from_json(case["plan"])
        grid = Grid(model, plan, module.make_optimizer, module.loss_fn)
        return Case(grid.train_step, grid, is_shared=True)
    if case["method"] == "data parallel":
        parallel = DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=case["bucket_mb"]
        )
        return Case(_own_samples(module, parallel))
    return tensor_parallel(module, model, case["form"])


def _own_samples(module: ModuleType, model: nn.Module) -> Step:
    worker, count = distributed.get_rank(), distributed.get_world_size()
    optimizer = module.make_optimizer(model.parameters())

    def step(batch: Batch) -> float:
        inputs, targets = (each.tensor_split(count)[worker] for each in batch)
        optimizer.zero_grad()
        loss: torch.Tensor = module.loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


FORMS: dict[str, dict[str, ColwiseParallel | RowwiseParallel]] = {
    "columns, rows, columns; logits by samples": {
        "fc0": ColwiseParallel(input_layouts=Shard(0)),
        "fc1": RowwiseParallel(output_layouts=Shard(0)),
        "fc2": ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
    },
    "columns, rows, columns; logits whole": {
        "fc0": ColwiseParallel(input_layouts=Shard(0)),
        "fc1": RowwiseParallel(),
        "fc2": ColwiseParallel(output_layouts=Replicate()),
    },
    "columns, gathered": {
        "fc0": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        "fc1": ColwiseParallel(output_layouts=Replicate()),
        "fc2": ColwiseParallel(output_layouts=Replicate()),
    },
}
"""Tensor-parallel styles of the linear layers. Each begins with a gathering of samples."""


def tensor_parallel(module: ModuleType, model: nn.Module, form: str) -> Case:
    """Convolutions in DistributedDataParallel, linear layers split by torch's tensor parallel."""
    worker, count = distributed.get_rank(), distributed.get_world_size()
    layers = dict(model.named_children())
    first = [*layers].index(FIRST_LINEAR)
    convolutions = nn.Sequential(*[*layers.values()][:first])
    linear = nn.Sequential()
    for name in [*layers][first:]:
        linear.add_module(name, layers[name])
    features = DistributedDataParallel(convolutions, gradient_as_bucket_view=True)
    parallelize_module(linear, init_device_mesh("cpu", (count,)), FORMS[form])
    optimizer = module.make_optimizer([*features.parameters(), *linear.parameters()])

    def step(batch: Batch) -> float:
        inputs, targets = batch
        optimizer.zero_grad()
        read = features(inputs.tensor_split(count)[worker])
        read.register_hook(lambda gradient: gradient * count)  # which DDP divides by
        outputs = linear(read)
        is_shared = len(outputs) == len(targets)
        own = targets if is_shared else targets.tensor_split(count)[worker]
        loss: torch.Tensor = module.loss_fn(outputs, own)
        (loss if is_shared else loss / count).backward()
        optimizer.step()
        return loss.item()

    return Case(step, is_shared="whole" in form or "gathered" in form)


def run(case: Case, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of a step, on the slowest worker, after one that is not counted; the last loss."""
    distributed.barrier()
    case.step(batches[0])
    begin = time.perf_counter()
    for batch in batches[1:]:
        loss = case.step(batch)
    seconds = torch.tensor([(time.perf_counter() - begin) / (len(batches) - 1)])
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    total = torch.tensor([loss], dtype=torch.float64)
    if not case.is_shared:
        distributed.all_reduce(total)
        total /= distributed.get_world_size()
    return seconds.item(), total.item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a module of bench.models")
    parser.add_argument("--cases", type=Path, help="to train; without, facts are measured")
    parser.add_argument("--rounds", type=int, default=3, help="counted; one more comes before")
    parser.add_argument("--steps", type=int, default=3, help="counted, of a case in a round")
    return parser


if __name__ == "__main__":
    main()
