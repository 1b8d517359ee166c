"""Masks of an attention's scores, of each of the kinds that ``nn.MultiheadAttention`` takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elbowroom.plans.grid import GridPlan, LayerGrid
from tests.grid.nets import batches_of, train_on_grid, train_plainly

_TOLERANCE = 1e-12


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        if isinstance(mask, nn.Parameter):
            self.mask = mask
        else:
            self.register_buffer("mask", mask)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0])


_LATER = torch.ones(6, 6, dtype=torch.bool).triu(1)
MASKS = {
    "numbers": torch.zeros(6, 6).masked_fill(_LATER, -torch.inf),
    "truths": _LATER,
    "trained": nn.Parameter(torch.linspace(-1, 1, 36).view(6, 6)),
}


@pytest.mark.parametrize("parts", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str, parts: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, batches = Masked(MASKS[kind]).double(), batches_of("transformer", 4)
    grids = (LayerGrid(name, parts[0], (), parts[1]) for name in ("embed", "attention", "head"))
    trained = train_on_grid(model, batches, GridPlan(4, 4, tuple(grids)))
    assert train_plainly(model, batches).difference(trained) <= _TOLERANCE
