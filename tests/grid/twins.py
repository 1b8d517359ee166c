"""A layer on all workers of a grid, as threads, against torch on the whole tensor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from elbowroom.grid.parts import Part, cut
from elbowroom.grid.transport import Channel, Counted, Direction
from elbowroom.grid.twin import run_twin
from elbowroom.plans.grid_layout import Box, Layout, prime_factors

MOST = 1e-12
"""Between what a grid computes and what one process does, relative to the largest element."""

LAYER = "layer"

CASES = 150
SEEDS = range(2)
"""Random cases of each kind of layer, for each seed."""

OnPart = Callable[[Part, Sequence[Tensor], Channel], Part]
OnWhole = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Split:
    """How one parameter lies: its dimensions' digits; it is whole without them."""

    dims: tuple[tuple[int, ...], ...] = ()


@dataclass
class Outcome:
    """What a layer computed, put together, and what all its workers sent."""

    output: Tensor
    input_gradient: Tensor
    gradients: list[Tensor]
    sent: dict[Direction, Counted] = field(default_factory=dict)


class _Seen(NamedTuple):
    part: Part
    gradients: tuple[Tensor, ...]
    counts: dict[tuple[str, Direction], Counted]


def random_layout(rng: random.Random, procs: int, dims: Sequence[int], num_dims: int) -> Layout:
    """Digits of the workers' numbers dealt to some dimensions, or to none, which are replicas."""
    radices = prime_factors(procs)
    given: list[list[int]] = [[] for _ in range(num_dims)]
    for position in rng.sample(range(len(radices)), len(radices)):
        dim = rng.choice([*dims, *dims, *dims, None])
        if dim is not None:
            given[dim].append(position)
    return Layout(radices, tuple(map(tuple, given)))


def layout_of(parts: Sequence[int], replicas: int = 1) -> Layout:
    """So many parts of each dimension, each of digits of its own, and replicas behind them."""
    radices: list[int] = []
    dims = []
    for count in parts:
        factors = prime_factors(count)
        dims.append(tuple(range(len(radices), len(radices) + len(factors))))
        radices += factors
    return Layout((*radices, *prime_factors(replicas)), tuple(dims))


def on_grid(
    compute: OnPart,
    layout: Layout,
    whole: Tensor,
    parameters: Sequence[Tensor],
    direction: Tensor,
    *,
    splits: Sequence[Split] | None = None,
    input_needs_gradient: bool = True,
) -> Outcome:
    """Outputs and gradients of a layer whose output has the shape of ``direction``."""
    splits = splits or [Split()] * len(parameters)

    def work(channel: Channel) -> _Seen:
        worker = channel.worker
        shape = tuple(whole.shape)
        local = cut(whole, layout.box(worker, shape)).detach().clone()
        local.requires_grad_(input_needs_gradient)
        own = [
            cut(each, _split_box(layout, split, worker, each)).detach().clone().requires_grad_()
            for each, split in zip(parameters, splits, strict=True)
        ]
        channel.begin_step()
        channel.at(LAYER)
        part = compute(Part(local, shape, layout, worker), own, channel)
        assert part.shape == tuple(direction.shape)
        assert tuple(part.local.shape) == part.layout.local_shape(worker, part.shape)
        gradient = cut(direction, part.box)
        if input_needs_gradient:
            found = torch.autograd.grad(part.local, [local, *own], gradient)
        else:
            found = (torch.zeros_like(local), *torch.autograd.grad(part.local, own, gradient))
        return _Seen(part, found, channel.counts)

    seen = run_twin(layout.num_workers, lambda transport: work(Channel(transport)))
    return _put_together(seen, layout, whole, parameters, splits)


def _put_together(
    seen: list[_Seen],
    layout: Layout,
    whole: Tensor,
    parameters: Sequence[Tensor],
    splits: Sequence[Split],
) -> Outcome:
    """Everything summed over workers, but those that do the same as another.

    Outputs then are sums where workers have summands of them, and input gradients where workers
    used the same input.
    """
    output = seen[0].part.layout
    replicas = sorted({*range(len(layout.radices))} - {*layout.used, *output.used})
    result = Outcome(
        torch.zeros(seen[0].part.shape, dtype=whole.dtype),
        torch.zeros_like(whole),
        [torch.zeros_like(each) for each in parameters],
    )
    for worker, (part, (input_gradient, *gradients), counts) in enumerate(seen):
        first, *_ = layout.group(worker, replicas)
        if worker == first:
            cut(result.output, part.box).add_(part.local.detach())
            cut(result.input_gradient, layout.box(worker, whole.shape)).add_(input_gradient)
            for total, split, one in zip(result.gradients, splits, gradients, strict=True):
                cut(total, _split_box(layout, split, worker, total)).add_(one)
        else:
            assert torch.equal(seen[first].part.local, part.local), "replicas differ"
        for (layer, way), counted in counts.items():
            assert layer == LAYER
            before = result.sent.get(way, Counted())
            both = zip(before, counted, strict=True)
            result.sent[way] = Counted(*(one + other for one, other in both))
    return result


def _split_box(layout: Layout, split: Split, worker: int, parameter: Tensor) -> Box:
    dims = split.dims or ((),) * parameter.dim()
    return Layout(layout.radices, dims).box(worker, parameter.shape)


def check(
    on_part: OnPart,
    on_whole: OnWhole,
    layout: Layout,
    whole: Tensor,
    parameters: Sequence[Tensor] = (),
    case: object = None,
    *,
    splits: Sequence[Split] | None = None,
    most: float = MOST,
) -> Outcome:
    """Assert that a grid gives torch's output, and gradients of input and parameters."""
    inputs = [whole.detach().clone().requires_grad_()]
    inputs += [each.detach().clone().requires_grad_() for each in parameters]
    plain = on_whole(inputs[0], inputs[1:])
    direction = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, direction)
    found = on_grid(on_part, layout, whole, parameters, direction, splits=splits)
    others = [found.output, found.input_gradient, *found.gradients]
    for one, other in zip([plain.detach(), *wanted], others, strict=True):
        largest = float(one.abs().max()) if one.numel() else 0.0
        assert (one - other).abs().max().item() <= most * max(1.0, largest), case
    return found


def note(seen: Counter[str], layout: Layout, shape: Sequence[int], result: Sequence[int]) -> None:
    """Count what makes a case hard."""
    seen["workers without input"] += any(
        0 in layout.local_shape(worker, shape) for worker in range(layout.num_workers)
    )
    seen["workers without output"] += any(
        0 in layout.local_shape(worker, result) for worker in range(layout.num_workers)
    )
    seen["replicas"] += bool(layout.replicas)
    seen["several axes"] += sum(parts > 1 for parts in layout.parts[2:]) > 1
    seen["batch and space"] += layout.parts[0] > 1 and max(layout.parts[2:]) > 1
    seen["batch smaller than parts"] += shape[0] < layout.parts[0]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def started(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def draw_procs(rng: random.Random, case: int) -> int:
    """From 2 to 9 workers, and once 64."""
    return 64 if case == 0 else rng.choice([2, 3, 4, 5, 6, 6, 7, 8, 8, 9, 9])


def draw_sizes(rng: random.Random, num_dims: int) -> list[int]:
    return [rng.randint(1, {1: 40, 2: 15, 3: 7}[num_dims]) for _ in range(num_dims)]


def assert_hard(seen: Counter[str]) -> None:
    least = {"workers without input": 10, "workers without output": 10, "replicas": 10}
    least |= {"several axes": 5, "batch and space": 10, "batch smaller than parts": 5}
    assert all(seen[hard] >= number for hard, number in least.items()), seen
