"""Whole networks on a grid train as one process does: losses, gradients, weights, statistics."""

from __future__ import annotations

import random
from functools import cache

import pytest
from torch import nn

from elbowroom.plans.grid import GridPlan
from elbowroom.plans.grid_traffic import SMALL_WEIGHTS, traffic
from tests.grid.nets import (
    NETS,
    STEPS,
    Batch,
    Trained,
    batches_of,
    grids_of,
    model_of,
    shapes_for,
    train_on_grid,
    train_plainly,
    uniform_plans,
)

_TOLERANCE = 1e-12
_ELEMENT_BYTES = 8


@cache
def plain(net: str, num_samples: int) -> tuple[nn.Module, list[Batch], Trained]:
    model, batches = model_of(net), batches_of(net, num_samples)
    return model, batches, train_plainly(model, batches)


def check(net: str, num_samples: int, plan: GridPlan) -> None:
    """Compare with plain training, and what was sent with what the plan says."""
    model, batches, expected = plain(net, num_samples)
    trained = train_on_grid(model, batches, plan)
    about = [str(layer) for layer in plan.layers]
    assert expected.difference(trained) <= _TOLERANCE, about
    planned = traffic(shapes_for(model, batches[0]), plan)
    sums = 0
    for name, sent in planned.items():
        sums += sent.update.messages
        for direction in ("forward", "backward"):
            counted = trained.counts.get((name, direction), (0, 0))
            expected_sent = getattr(sent, direction)
            wanted = (expected_sent.messages, expected_sent.elements * _ELEMENT_BYTES)
            assert counted == tuple(STEPS * each for each in wanted), (name, direction, about)
    counts = [n.messages for (_, direction), n in trained.counts.items() if direction == "update"]
    assert sum(counts) == STEPS * sums, about
    small = planned[SMALL_WEIGHTS].update
    wanted = (STEPS * small.messages, STEPS * small.elements * _ELEMENT_BYTES)
    assert trained.counts.get((SMALL_WEIGHTS, "update"), (0, 0)) == wanted, about


@pytest.mark.parametrize(("procs", "num_samples"), [(1, 3), (2, 3), (3, 2), (4, 2), (8, 3)])
@pytest.mark.parametrize("net", NETS)
def test_any_grids(net: str, procs: int, num_samples: int) -> None:
    """A plan in which each layer has some grid, with more parts than samples among them."""
    model, batches, _ = plain(net, num_samples)
    shapes = shapes_for(model, batches[0])
    rng = random.Random(f"{net} {procs} {num_samples}")
    layers = tuple(rng.choice(grids_of(shapes, layer, procs)) for layer in shapes.weighted)
    check(net, num_samples, GridPlan(procs, num_samples, layers))


@pytest.mark.nightly
@pytest.mark.parametrize("num_samples", [3, 2])
@pytest.mark.parametrize("procs", [1, 2, 3, 4])
@pytest.mark.parametrize("net", NETS)
def test_every_grid(net: str, procs: int, num_samples: int) -> None:
    model, batches, _ = plain(net, num_samples)
    plans = list(uniform_plans(shapes_for(model, batches[0]), procs))
    assert len(plans) >= procs
    for plan in plans:
        check(net, num_samples, plan)
