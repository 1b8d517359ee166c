"""Plans of models that we have measured, against every plan there is: needs no file from elsewhere.

The profiles were made, on one thread, of the scripts beside them:

    elbowroom train profile NAME.py --threads 1 --seconds 0.2 --out NAME.json
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions
from tests.planning.pipeline.pipelines import flat
from tests.planning.pipeline.test_all_plans import check_against_all_plans
from tests.planning.pipeline.test_plan import check_planned

FOLDER = Path(__file__).parents[2] / "data" / "profiles"
NAMES = ("gnmt_small", "resnet_small", "vgg_small")
BANDWIDTHS = (1e7, 1e8, 1.25e9)


def read(name: str) -> LayerGraph:
    return read_layer_graph(FOLDER / f"{name}.json")


def without_inputs(layers: LayerGraph) -> LayerGraph:
    """The planner sets them aside; the naive one would give one a worker of its own."""
    kept = tuple(layer for layer in layers.layers if layer.description != "Input")
    assert len(kept) == len(layers.layers) - 1
    names = {layer.name for layer in kept}
    edges = tuple(edge for edge in layers.edges if {edge.source, edge.destination} <= names)
    return replace(layers, layers=kept, edges=edges)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_no_plan_is_better(name: str, num_workers: int, bandwidth: float) -> None:
    layers = without_inputs(read(name))
    check_against_all_plans(layers, flat(num_workers, bandwidth), PipelineOptions())


@pytest.mark.parametrize("name", NAMES)
def test_no_plan_of_two_levels_is_better(name: str) -> None:
    levels = (Level(2, 1.25e9), Level(2, 1e8))
    check_against_all_plans(without_inputs(read(name)), levels, PipelineOptions())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_workers", [1, 5, 64])
def test_every_profile_is_planned(name: str, num_workers: int) -> None:
    check_planned(read(name), num_workers)


def test_bandwidth_decides() -> None:
    """Guards the tests above: plans are straight, replicated and mixed."""
    shapes = {
        str(plan_on_levels(read(name), flat(3, bandwidth)))
        for name in NAMES
        for bandwidth in BANDWIDTHS
    }
    assert shapes >= {"1-1-1", "2-1", "3"}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    text = json.loads((FOLDER / f"{name}.json").read_text())
    assert read(name).to_json() == text
