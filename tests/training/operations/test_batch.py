"""Which layers grow with the batch: positions, masks and other tables do not."""

from __future__ import annotations

import torch
from torch import nn

from elbowroom.training.layers import trace_model
from elbowroom.training.operations.find import shapes_of


class Positions(nn.Module):
    """As many positions as samples, which a rule by sizes would take for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = self.places(torch.arange(4))
        return self.head(self.tokens(tokens) + places)


def test_tables_do_not_grow_with_the_batch() -> None:
    tokens = torch.randint(11, (4, 4))
    shapes = shapes_of(trace_model(Positions(), tokens, leaves=True))
    assert shapes.batch == 4
    larger = shapes.for_batch(12)
    sizes = {layer.name: layer.shape for layer in larger.layers}
    assert sizes["places"] == (4, 8)
    assert sizes["tokens_1"] == sizes["add"] == (12, 4, 8)
    assert sizes["head"] == (12, 4, 3)
