"""Tensors that are broadcast: their gradients are sums over all samples and rows that read them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_traffic import traffic
from tests.grid.nets import STEPS, Batch, batches_of, shapes_for, train_on_grid, train_plainly

_TOLERANCE = 1e-12


class Excited(nn.Module):
    """A squeeze and excitation: channels are scaled by numbers that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(x * torch.sigmoid(self.gate(self.pool(x)))).mean((2, 3))


class Placed(nn.Module):
    """Positions from a table that has no batch, and a factor that has no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.places: torch.Tensor
        self.register_buffer("places", torch.arange(6))
        self.factor = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position(self.places)
        return self.head(torch.tanh(x) * self.factor.exp())


def check(model: nn.Module, batches: list[Batch], plan: GridPlan) -> None:
    trained = train_on_grid(model, batches, plan)
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE
    for name, sent in traffic(shapes_for(model, batches[0]), plan).items():
        for direction in ("forward", "backward"):
            counted = trained.counts.get((name, direction), (0, 0))
            wanted = getattr(sent, direction)
            assert counted == (STEPS * wanted.messages, STEPS * wanted.elements * 8), name


@pytest.mark.parametrize(
    "gate", [LayerGrid("gate", 2), LayerGrid("gate", outputs=2), LayerGrid("gate", inputs=2)]
)
@pytest.mark.parametrize("space", [(2,), (2, 2)])
def test_over_rows(space: tuple[int, ...], gate: LayerGrid) -> None:
    torch.manual_seed(0)
    model = Excited().double()
    batches = [
        (torch.randn(3, 3, 6, 5, dtype=torch.float64), torch.randint(4, (3,))) for _ in range(STEPS)
    ]
    layers = LayerGrid("first", space=space), gate, LayerGrid("last", space=space)
    check(model, batches, GridPlan(4, 3, layers))


@pytest.mark.parametrize("batch", [2, 4])
def test_over_samples(batch: int) -> None:
    torch.manual_seed(0)
    model = Placed().double()
    layers = LayerGrid("embed", batch), LayerGrid("head", batch, outputs=4 // batch)
    check(model, batches_of("transformer", 4), GridPlan(4, 4, layers))
