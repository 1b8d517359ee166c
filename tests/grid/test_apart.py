"""Modules of one model on processes of their own, with a move where they meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.grid.options import GridOptions
from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_traffic import traffic
from tests.grid.nets import STEPS, Batch, shapes_for, train_on_grid, train_plainly

_TOLERANCE = 1e-12
Workers = tuple[int, int]


class TwoModules(nn.Module):
    """An encoder of images, and a head of tokens that reads what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1)
        )
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        encoded = self.encoder(images).mean((2, 3))
        return self.head(self.embed(tokens) + encoded)


def two_modules() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = TwoModules().double()
    batches = [
        (
            (torch.randn(5, 3, 7, 6, dtype=torch.float64), torch.randint(11, (5,))),
            torch.randint(4, (5,)),
        )
        for _ in range(STEPS)
    ]
    return model, batches  # type: ignore[return-value]


def plan(encoder: Workers, head: Workers, procs: int, *, splits_features: bool) -> GridPlan:
    """Each module split in space or features as its workers allow."""
    count, others = encoder[1], head[1]
    outputs = others if splits_features else 1
    return GridPlan(
        procs,
        5,
        (
            LayerGrid("encoder.0", space=(count,), workers=encoder),
            LayerGrid("encoder.3", batch=count, workers=encoder),
            LayerGrid("embed", batch=others, workers=head),
            LayerGrid("head.0", batch=others // outputs, outputs=outputs, workers=head),
            LayerGrid("head.3", batch=others // outputs, inputs=outputs, workers=head),
        ),
    )


@pytest.mark.parametrize("splits_features", [True, False])
@pytest.mark.parametrize(
    ("encoder", "head", "procs"),
    [
        ((0, 3), (3, 1), 4),
        ((0, 1), (1, 3), 4),
        ((2, 4), (0, 2), 6),
        ((0, 4), (0, 2), 4),
        ((1, 3), (0, 4), 5),
    ],
)
def test_modules_apart(encoder: Workers, head: Workers, procs: int, splits_features: bool) -> None:
    """Apart, or on workers in common; one process of the last case has only a part of the loss."""
    model, batches = two_modules()
    by_sets = plan(encoder, head, procs, splits_features=splits_features)
    trained = train_on_grid(model, batches, by_sets)
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE
    planned = traffic(shapes_for(model, batches[0]), by_sets)
    for name, sent in planned.items():
        for direction in ("forward", "backward"):
            counted = trained.counts.get((name, direction), (0, 0))
            wanted = getattr(sent, direction)
            assert counted == (STEPS * wanted.messages, STEPS * wanted.elements * 8), name


def test_plans_on_workers_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="up to 4"):
        plan((2, 3), (0, 2), 4, splits_features=False)
    with pytest.raises(InputError, match="3"):
        GridPlan(4, 5, (LayerGrid("head", batch=2, workers=(0, 3)),))
    model, batches = two_modules()
    whole = plan((0, 3), (3, 1), 4, splits_features=True)
    with pytest.raises(InputError, match="autocast"):
        train_on_grid(model, batches, whole, GridOptions(autocast=torch.bfloat16))


def test_weights_of_others_take_no_memory() -> None:
    """A worker stores nothing of the matrices of layers that others have."""
    model, batches = two_modules()
    by_sets = plan((0, 3), (3, 1), 4, splits_features=True)
    trained = train_on_grid(model, batches, by_sets)
    assert trained.stored["encoder.0.weight"] == [3 * 8 * 9] * 3 + [0]
    assert trained.stored["head.0.weight"] == [0] * 3 + [72]


def test_json() -> None:
    by_sets = plan((0, 3), (3, 1), 4, splits_features=True)
    assert GridPlan.from_json(by_sets.to_json()) == by_sets
