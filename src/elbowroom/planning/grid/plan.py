"""Grid plans: from the shapes of a model to a grid for each of its layers."""

from __future__ import annotations

from typing import NamedTuple

from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.planning.grid.explanation import GridExplanation
from elbowroom.planning.grid.settings import Forms, GridLink, GridSettings
from elbowroom.plans.grid import GridPlan


class PlannedGrid(NamedTuple):
    """A plan, and why it is what it is."""

    plan: GridPlan
    explanation: GridExplanation


def plan_grid(
    shapes: ModelShapes,
    procs: int,
    batch: int,
    link: GridLink,
    *,
    forms: Forms = "all",
    flops_per_second: float | None = None,
    memory_bytes: int | None = None,
    overlap: bool = True,
) -> PlannedGrid:
    """The best grid for each layer of a model, and what each costs.

    Arguments are those of ``GridSettings``. Raises InputError for numbers that make no sense and
    where some layer cannot be split in the allowed forms, MemoryPlanError, with the smallest that
    was found, where no plan fits in ``memory_bytes``.
    """
    raise NotImplementedError(GridSettings)
