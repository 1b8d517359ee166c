"""Small networks of the kinds that grids are for, and their training, plain and on a grid."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.grid.grid import Grid
from elbowroom.grid.options import GridOptions
from elbowroom.grid.transport import Counted, Direction, Transport
from elbowroom.grid.twin import run_twin
from elbowroom.grid.weight_parts import put_intervals
from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_check import check_grid
from elbowroom.training.layers import trace_model
from elbowroom.training.operations.find import shapes_of
from elbowroom.training.tracing import called

STEPS = 3
_LABELS = 4
_WORDS = 11
_TOKENS = 6


class AlexNetLike(nn.Module):
    """Windows of stride 2 that sizes are no multiples of, pools that overhang, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5, 2, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2, 2, ceil_mode=True),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 15),
            nn.ReLU(),
            nn.Linear(15, 10),
            nn.ReLU(),
            nn.Linear(10, _LABELS),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.down(x)
        return nn.functional.relu(y)


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 7, 2, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.blocks = nn.Sequential(_Block(4, 4, 1), _Block(4, 8, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, _LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(2, outputs),
        nn.LeakyReLU(0.1),
        nn.Conv3d(outputs, outputs, 3, padding=1),
        nn.BatchNorm3d(outputs),
        nn.ReLU(),
    )


class UNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = _double_conv(1, 4), _double_conv(4, 6)
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(6, 4, 2, 2)
        self.out = nn.Sequential(_double_conv(8, 4), nn.Conv3d(4, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = self.down(x)
        inner = self.up(self.inner(self.pool(skipped)))
        return self.out(torch.cat([inner, skipped], 1))


class TransformerLike(nn.Module):
    def __init__(self, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, width)
        self.position = nn.Parameter(torch.randn(1, _TOKENS, width) / 10)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )
        self.head = nn.Linear(width, _WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.feed_forward(self.norm2(x))
        return self.head(x)


Batch = tuple[torch.Tensor, torch.Tensor]


class Net(NamedTuple):
    """A network, and its inputs and targets for a number of samples."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]


def _labelled(*sizes: int) -> Callable[[int], Batch]:
    return lambda n: (
        torch.randn(n, *sizes, dtype=torch.float64),
        torch.randint(_LABELS, (n,)),
    )


NETS = {
    "alexnet": Net(AlexNetLike, _labelled(3, 25, 23)),
    "resnet": Net(ResNetLike, _labelled(3, 33, 30)),
    "unet3d": Net(
        UNetLike,
        lambda n: (
            torch.randn(n, 1, 8, 6, 10, dtype=torch.float64),
            torch.randint(2, (n, 8, 6, 10)),
        ),
    ),
    "transformer": Net(
        TransformerLike,
        lambda n: (
            torch.randint(_WORDS, (n, _TOKENS)),
            torch.randint(_WORDS, (n, _TOKENS)),
        ),
    ),
}


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy, of each token too."""
    if outputs.dim() == 3:
        outputs, targets = outputs.flatten(0, 1), targets.flatten()
    return nn.functional.cross_entropy(outputs, targets)


class RecordingSGD(torch.optim.SGD):
    """SGD that keeps the gradients of its last step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.gradients[parameter] = parameter.grad.clone()
        return super().step(closure)


@dataclass
class Trained:
    """What training left behind: whole tensors, by name.

    ``counts`` are of all workers; ``stored`` are the elements of a parameter on each.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    counts: dict[tuple[str, Direction], Counted] = field(default_factory=dict)
    stored: dict[str, list[int]] = field(default_factory=dict)

    def difference(self, other: Trained) -> float:
        """The largest difference, relative to the largest element of each tensor, or to 1."""
        pairs = [(torch.tensor(self.losses), torch.tensor(other.losses))]
        for name in ("weights", "gradients", "buffers"):
            one, two = getattr(self, name), getattr(other, name)
            assert one.keys() == two.keys()
            pairs += [(one[key].double(), two[key].double()) for key in one]
        return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)


def batches_of(net: str, num_samples: int, seed: int = 0) -> list[Batch]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [NETS[net].batch(num_samples) for _ in range(STEPS)]


def model_of(net: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NETS[net].make().double()


def shapes_for(model: nn.Module, batch: Batch) -> ModelShapes:
    return shapes_of(trace_model(copy.deepcopy(model), batch[0], leaves=True))


def train_plainly(
    model: nn.Module, batches: Sequence[Batch], clip_norm: float | None = None
) -> Trained:
    model = copy.deepcopy(model)
    optimizer = RecordingSGD(model.parameters())
    losses = []
    for inputs, targets in batches:
        loss = loss_fn(called(model, inputs), targets)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    named = dict(model.named_parameters())
    return Trained(
        losses,
        {name: parameter.detach() for name, parameter in named.items()},
        {name: optimizer.gradients[parameter] for name, parameter in named.items()},
        dict(model.named_buffers()),
    )


def train_on_grid(
    model: nn.Module,
    batches: Sequence[Batch],
    plan: GridPlan,
    options: GridOptions | None = None,
    loss: Callable[[Any, Any], torch.Tensor] = loss_fn,
) -> Trained:
    """Train on a grid of threads; weights must be equal where workers have the same part."""
    tracing, together = threading.Lock(), threading.Barrier(plan.procs)

    def work(transport: Transport) -> tuple[Grid, list[float], RecordingSGD]:
        made: list[RecordingSGD] = []

        def optimizer_fn(parameters: Any) -> RecordingSGD:
            made.append(RecordingSGD(parameters))
            return made[0]

        own = copy.deepcopy(model)
        grid = Grid(own, plan, optimizer_fn, loss, options, transport=transport)
        try:
            with tracing:  # it changes what all threads of a process share
                grid.prepare(batches[0])
        except BaseException:
            together.abort()
            raise
        together.wait(60)
        losses = [grid.train_step(batch) for batch in batches]
        return grid, losses, made[0]

    results = run_twin(plan.procs, work, 30)
    grids = [grid for grid, _, _ in results]
    locals_of = [grid.weights.local for grid in grids]
    gradients_of = [
        {
            name: optimizer.gradients.get(p, torch.zeros_like(p))
            for name, p in grid.weights.parameters.items()
        }
        for grid, _, optimizer in results
    ]
    for _, losses, _ in results:
        assert losses == results[0][1], "every worker knows the same loss"
    names = grids[0].weights.parameters
    return Trained(
        results[0][1],
        {name: _whole(grids, name, [each[name].detach() for each in locals_of]) for name in names},
        {name: _whole(grids, name, [each[name] for each in gradients_of]) for name in names},
        {
            name: _whole(grids, name, [each[name] for each in locals_of])
            for name in locals_of[0]
            if name not in names
        },
        _counts(grids),
        {name: [each[name].numel() for each in locals_of] for name in names},
    )


def _whole(grids: list[Grid], name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    use = grids[0].weights.slices.get(name)
    if use is None and name not in grids[0].weights.partial:
        parts = [parts[worker] for worker in grids[0].weights.home(name)]
        assert all(torch.equal(part, parts[0]) for part in parts), f"workers agree on {name}"
        return parts[0]
    if use is None:
        partial_uses = [grid.weights.partial[name] for grid in grids]
        whole = torch.full_like(parts[0], float("nan"))
        for grid, each, part in zip(grids, partial_uses, parts, strict=True):
            (interval,) = each.part(grid.worker)[0]
            whole[slice(*interval)] = part[slice(*interval)]
        return whole
    whole = torch.full(use.shape, float("nan"), dtype=parts[0].dtype)
    for grid, part in zip(grids, parts, strict=True):
        put_intervals(whole, grid.weights.slices[name].part(grid.worker), part)
    return whole


def _counts(grids: list[Grid]) -> dict[tuple[str, Direction], Counted]:
    found: dict[tuple[str, Direction], Counted] = {}
    for grid in grids:
        for key, count in grid.channel.counts.items():
            before = found.get(key, Counted())
            found[key] = Counted(
                before.messages + count.messages, before.num_bytes + count.num_bytes
            )
    return found


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factors(number // first, count - 1))


def grids_of(shapes: ModelShapes, layer: LayerShape, procs: int) -> list[LayerGrid]:
    """All grids that a layer can have on so many workers."""
    num_space = 0 if layer.kind == "attention" else len(layer.space)
    found = []
    for batch, outputs, inputs, *space in factors(procs, 3 + num_space):
        grid = LayerGrid(layer.name, batch, tuple(space), outputs, inputs)
        try:
            check_grid(layer, grid, shapes.by_name[layer.sources[0]])
        except InputError:
            continue
        if layer.kind != "attention" or inputs == 1:
            found.append(grid)
    return found


def uniform_plans(shapes: ModelShapes, procs: int) -> Iterator[GridPlan]:
    """Every grid for the layers of each kind: all that have the same roles have the same grid.

    A layer that cannot have it is split by batch.
    """
    kinds = sorted({(layer.kind, len(layer.space)) for layer in shapes.weighted})
    joined = {("conv_transpose", dims): ("conv", dims) for _, dims in kinds}
    joined |= {("embedding", dims): ("linear", dims) for _, dims in kinds}
    roots = sorted({joined.get(kind, kind) for kind in kinds})
    choices = []
    for kind, num_space in roots:
        count = 2 if kind == "attention" else 3 + num_space
        choices.append(list(factors(procs, count)))
    for combination in itertools.product(*choices):
        parts = dict(zip(roots, combination, strict=True))
        layers = []
        for layer in shapes.weighted:
            key = (layer.kind, len(layer.space))
            layers.append(_fitting(shapes, layer, parts[joined.get(key, key)], procs))
        yield GridPlan(procs, shapes.batch, tuple(layers))


def _fitting(
    shapes: ModelShapes, layer: LayerShape, parts: tuple[int, ...], procs: int
) -> LayerGrid:
    batch, outputs, *rest = parts
    inputs, space = (rest[0], tuple(rest[1:])) if rest else (1, ())
    grid = LayerGrid(layer.name, batch, space, outputs, inputs)
    try:
        check_grid(layer, grid, shapes.by_name[layer.sources[0]])
    except InputError:
        return LayerGrid(layer.name, procs)
    return grid


def sgd(lr: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)
