"""Training on a grid beyond layers: losses, clipping, dropout, ties, sizes, and what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elbowroom.core.errors import InputError, PeerLostError
from elbowroom.grid.grid import Grid
from elbowroom.grid.options import GridOptions
from elbowroom.grid.transport import Transport
from elbowroom.grid.twin import run_twin
from elbowroom.plans.grid import GridPlan, LayerGrid
from tests.grid.nets import (
    Batch,
    batches_of,
    loss_fn,
    model_of,
    sgd,
    shapes_for,
    train_on_grid,
    train_plainly,
)

_TOLERANCE = 1e-12


def linear_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 4)).double()


def linear_batches(num_samples: int = 6) -> list[Batch]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return [
            (torch.randn(num_samples, 12, dtype=torch.float64), torch.randint(4, (num_samples,)))
            for _ in range(3)
        ]


COLUMNS_ROWS = GridPlan(
    4, 6, (LayerGrid("0", batch=2, outputs=2), LayerGrid("2", batch=2, inputs=2))
)


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_clipping(limit: float) -> None:
    """Gradients are those that ``clip_grad_norm_`` leaves, whether the limit is reached or not."""
    model, batches = linear_net(), linear_batches()
    expected = train_plainly(model, batches, limit)
    trained = train_on_grid(model, batches, COLUMNS_ROWS, GridOptions(clip_norm=limit))
    assert expected.difference(trained) <= _TOLERANCE


@pytest.mark.parametrize("place", ["batch", "space", "whole"])
def test_a_loss_of_voxels(place: Any) -> None:
    model, batches = model_of("unet3d"), batches_of("unet3d", 3)
    layers = [
        LayerGrid(layer.name, 1, (2, 1, 2)) for layer in shapes_for(model, batches[0]).weighted
    ]
    plan = GridPlan(4, 3, tuple(layers))
    trained = train_on_grid(model, batches, plan, GridOptions(loss=place))
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE


def test_a_loss_that_is_no_mean() -> None:
    """A sum over samples is refused by the first step, and is right of the whole."""
    model, batches = linear_net(), linear_batches()

    def total(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")

    with pytest.raises(InputError, match="--loss whole"):
        train_on_grid(model, batches, COLUMNS_ROWS, loss=total)
    trained = train_on_grid(model, batches, COLUMNS_ROWS, GridOptions(loss="whole"), loss=total)
    optimizer = sgd()(model.parameters())
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = total(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trained.losses == pytest.approx(losses, rel=_TOLERANCE)


def test_a_loss_of_some_samples() -> None:
    """It is refused also where all samples have the same loss, because nothing is known yet."""
    model = linear_net()
    for parameter in model[2].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    batches = linear_batches()
    for _, targets in batches:
        targets[[1, 5]] = -100  # which cross_entropy ignores; each worker has another sample
    with pytest.raises(InputError, match="--loss whole"):
        train_on_grid(model, batches, COLUMNS_ROWS)
    trained = train_on_grid(model, batches, COLUMNS_ROWS, GridOptions(loss="whole"))
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.first(x))
        return self.other(x), self.head(x)


@pytest.mark.parametrize("num_samples", [3, 4])
def test_a_result_that_the_loss_does_not_read(num_samples: int) -> None:
    """A worker without samples waits for no gradients of it: nobody has them."""
    torch.manual_seed(6)
    model, batches = TwoHeads().double(), linear_batches(num_samples)

    def of_one(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return loss_fn(outputs[1], targets)

    alone, trained = (
        train_on_grid(model, batches, GridPlan(procs, num_samples, layers), loss=of_one)
        for procs in (1, 4)
        for layers in [tuple(LayerGrid(name, procs) for name in ("first", "head", "other"))]
    )
    assert alone.difference(trained) <= _TOLERANCE


def test_minibatches_of_other_sizes() -> None:
    """A last minibatch may be smaller, also than there are parts."""
    model = model_of("transformer")
    batches = [batches_of("transformer", n)[0] for n in (6, 6, 1, 4)]
    names = [layer.name for layer in shapes_for(model, batches[0]).weighted]
    plan = GridPlan(3, 6, tuple(LayerGrid(name, 3) for name in names))
    trained = train_on_grid(model, batches, plan)
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE


class Odd(nn.Module):
    """Operations without a rule, between layers that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 10), nn.Linear(10, 4)
        self.recurrent = nn.GRU(10, 10, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cumsum(self.one(x), 0).softmax(-1)
        hidden, last = self.recurrent(y.unsqueeze(1))
        return self.two(hidden.squeeze(1) + last[0] + y.flip(0))


def test_operations_without_a_rule() -> None:
    """They run on every worker, on what was gathered, also where they mix samples."""
    torch.manual_seed(3)
    model, batches = Odd().double(), linear_batches()
    shapes = shapes_for(model, batches[0])
    assert {"cumsum", "recurrent", "flip"} <= {x.name for x in shapes.layers if x.kind == "whole"}
    plan = GridPlan(4, 6, (LayerGrid("one", 2, (), 1, 2), LayerGrid("two", 1, (), 2, 2)))
    assert train_plainly(model, batches).difference(train_on_grid(model, batches, plan)) <= 1e-11


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.inner(self.embed(tokens)))))


def test_tied_weights() -> None:
    """A table that is a head's matrix, too, and a layer that is called twice."""
    torch.manual_seed(4)
    model, batches = Tied().double(), batches_of("transformer", 4)
    shapes = shapes_for(model, batches[0])
    grids = [(2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]
    names = [layer.name for layer in shapes.weighted]
    layers = [
        LayerGrid(name, batch, (), outputs, inputs)
        for name, (batch, outputs, inputs) in zip(names, grids, strict=True)
    ]
    trained = train_on_grid(model, batches, GridPlan(4, 4, tuple(layers)))
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE


class NormedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(12, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.two(torch.relu(self.norm(self.one(x)))))


def normed_twice(one: LayerGrid, two: LayerGrid) -> float:
    torch.manual_seed(8)
    model, batches = NormedTwice().double(), linear_batches()
    trained = train_on_grid(model, batches, GridPlan(4, 6, (one, two)))
    return train_plainly(model, batches).difference(trained)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (LayerGrid("one"), LayerGrid("two", 4)),
        (LayerGrid("one", 2, outputs=2), LayerGrid("two", 2, outputs=2)),
    ],
)
def test_a_norm_that_is_called_twice(one: LayerGrid, two: LayerGrid) -> None:
    """Its statistics are of both calls, also where only one of them is over several workers."""
    assert normed_twice(one, two) <= _TOLERANCE


def test_a_norm_whose_channels_are_split_otherwise() -> None:
    with pytest.raises(InputError, match=r"norm\.running_mean"):
        normed_twice(LayerGrid("one", outputs=2), LayerGrid("two", outputs=4))


def dropped() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4)).double()


def test_dropout_that_does_not_depend_on_the_grid() -> None:
    model, batches = dropped(), linear_batches()
    exact = GridOptions(exact_randomness=True)
    alone = train_on_grid(model, batches, plan_of(1, (1, 1, 1)), exact)
    split = train_on_grid(model, batches, plan_of(4, (1, 2, 2)), exact)
    assert alone.difference(split) <= _TOLERANCE


def test_dropout_of_boxes() -> None:
    """Replicas drop the same, which ``train_on_grid`` compares; steps and seeds differ."""
    model, batches = dropped(), [linear_batches()[0]] * 3
    losses = [
        train_on_grid(model, batches, plan_of(4, (1, 4, 1)), GridOptions(seed=seed)).losses
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def plan_of(procs: int, parts: tuple[int, int, int]) -> GridPlan:
    batch, outputs, inputs = parts
    grids = [LayerGrid(name, batch, (), outputs, inputs) for name in ("0", "2")]
    return GridPlan(procs, 6, tuple(grids))


@pytest.mark.parametrize("procs", [16, pytest.param(64, marks=pytest.mark.nightly)])
def test_many_workers(procs: int) -> None:
    model, batches = linear_net(), linear_batches(5)
    layers = (LayerGrid("0", procs // 8, (), 4, 2), LayerGrid("2", procs // 4, (), 2, 2))
    trained = train_on_grid(model, batches, GridPlan(procs, 5, layers))
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE


def test_autocast() -> None:
    """Losses are near those of double precision, and weights stay what they were."""
    model, batches = linear_net(), linear_batches()
    single = copy.deepcopy(model).float()
    inputs = [(x.float(), y) for x, y in batches]
    options = GridOptions(autocast=torch.bfloat16)
    trained = train_on_grid(single, inputs, COLUMNS_ROWS, options)
    assert trained.losses == pytest.approx(train_plainly(model, batches).losses, rel=0.05)
    assert {weight.dtype for weight in trained.weights.values()} == {torch.float32}


class Convolved(nn.Module):
    """Layers whose products autocast has in bfloat16, and some that it has in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.pool, self.up = nn.AvgPool3d(2), nn.ConvTranspose3d(4, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.up(self.pool(self.first(x)))).mean((2, 3, 4))


@pytest.mark.parametrize(
    "layers",
    [
        (LayerGrid("first", 4), LayerGrid("up", space=(2, 2)), LayerGrid("second", 4)),
        (LayerGrid("first", space=(4,)), LayerGrid("up", inputs=2), LayerGrid("second", 4)),
        (LayerGrid("first", 2, (2,)), LayerGrid("up", space=(4,)), LayerGrid("second", inputs=4)),
    ],
)
def test_autocast_where_some_have_nothing(layers: tuple[LayerGrid, ...]) -> None:
    """A worker without samples or rows knows the type of what the others send."""
    torch.manual_seed(7)
    model = Convolved()
    batches = [(torch.randn(3, 1, 4, 4, 4), torch.randint(4, (3,))) for _ in range(2)]
    options = GridOptions(autocast=torch.bfloat16)
    trained = train_on_grid(model, batches, GridPlan(4, 3, layers), options)
    assert trained.losses == pytest.approx(train_plainly(model, batches).losses, rel=0.05)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (GridPlan(2, 6, (LayerGrid("0"), LayerGrid("2"))), "2 workers, and there are 4"),
        (GridPlan(4, 6, (LayerGrid("0"),)), "'2'"),
        (GridPlan(4, 6, (LayerGrid("0"), LayerGrid("2"), LayerGrid("3"))), "'3'"),
        (plan_of(16, (1, 1, 16)), "12"),
        (GridPlan(4, 6, (LayerGrid("0", space=(2, 2)), LayerGrid("2"))), "space"),
    ],
)
def test_plans_that_do_not_fit(plan: GridPlan, said: str) -> None:
    num_workers = 4 if plan.procs == 2 else plan.procs

    def work(transport: Transport) -> None:
        Grid(linear_net(), plan, sgd(), loss_fn, transport=transport).prepare(linear_batches()[0])

    with pytest.raises(InputError, match=said):
        run_one(num_workers, work)


def run_one(num_workers: int, work: Callable[[Transport], None]) -> None:
    """Run the first worker only: what is refused needs no others."""
    run_twin(num_workers, lambda transport: work(transport) if transport.worker == 0 else None)


def test_grouped_channels_are_not_split() -> None:
    plan = GridPlan(2, 6, (LayerGrid("0", outputs=2),))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten()).double()
    batch = torch.randn(6, 4, 2, 2, dtype=torch.float64), torch.zeros(6)

    def work(transport: Transport) -> None:
        Grid(model, plan, sgd(), loss_fn, transport=transport).prepare(batch)

    with pytest.raises(InputError, match="groups"):
        run_one(2, work)


def test_an_optimizer_that_needs_whole_parameters() -> None:
    def work(transport: Transport) -> None:
        grid = Grid(linear_net(), COLUMNS_ROWS, torch.optim.Adafactor, loss_fn, transport=transport)
        grid.prepare(linear_batches()[0])

    with pytest.raises(InputError, match="Adafactor"):
        run_one(4, work)


class OfRows(torch.optim.SGD):
    """SGD that keeps a number for each row."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = torch.zeros(len(parameter))
        return super().step(closure)


@pytest.mark.parametrize("procs", [1, 2])
def test_an_optimizer_whose_state_is_not_like_its_slices(procs: int, tmp_path: Path) -> None:
    tracing, together = threading.Lock(), threading.Barrier(procs)
    plan, batch = plan_of(procs, (1, procs, 1)), linear_batches()[0]

    def work(transport: Transport) -> None:
        with tracing:  # it changes what all threads of a process share
            grid = Grid(linear_net(), plan, OfRows, loss_fn, transport=transport)
            grid.prepare(batch)
        together.wait(60)
        grid.train_step(batch)
        grid.save(tmp_path)

    refused = pytest.raises(InputError, match="the optimizer keeps") if procs > 1 else nullcontext()
    with refused:
        run_twin(procs, work, 30)


def test_a_worker_that_fails() -> None:
    """The others end with an error that says so, not with a wait."""
    ended: dict[int, BaseException] = {}

    def work(transport: Transport) -> None:
        try:
            if transport.worker == 1:
                raise OSError("no memory")
            grid = Grid(linear_net(), plan_of(2, (2, 1, 1)), sgd(), loss_fn, transport=transport)
            grid.train_step(linear_batches()[0])
        except BaseException as error:
            ended[transport.worker] = error
            raise

    with pytest.raises(OSError, match="no memory"):
        run_twin(2, work, 30)
    assert isinstance(ended[0], PeerLostError)
