"""Whether a layer can have the grid that a plan gives it."""

from __future__ import annotations

import math

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import LayerShape
from elbowroom.plans.grid import LayerGrid


def check_grid(layer: LayerShape, grid: LayerGrid, source: LayerShape) -> None:
    """Raise InputError for a grid with more parts than there are features, or than the layer has.

    More parts than samples or rows are allowed: some workers then have none.
    """
    features = layer.groups if layer.kind == "attention" else layer.num_features
    kinds = {"attention": 1, "embedding": layer.weights // max(1, layer.num_features)}
    most_inputs = kinds.get(layer.kind, source.num_features)
    is_grouped = layer.kind in ("conv", "conv_transpose") and layer.groups > 1
    if is_grouped:
        features = most_inputs = 1
    space = () if layer.kind == "attention" else layer.space
    for what, parts, most in (
        ("out", grid.outputs, features),
        ("in", grid.inputs, most_inputs),
    ):
        if parts > most:
            why = ": its channels are in groups" if is_grouped else ""
            raise InputError(
                f"layer '{layer.name}' is split in {parts} parts of its {what} features, and can "
                f"be in {most}{why}: plan again"
            )
    if len(grid.space) > len(space) and math.prod(grid.space) > 1:
        raise InputError(
            f"layer '{layer.name}' is split along {len(grid.space)} dimensions of space, and has "
            f"{len(space)} to be split: plan again"
        )
