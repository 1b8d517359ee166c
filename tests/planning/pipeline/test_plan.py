"""Pipelines: the authors' results, topologies and limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from elbowroom.core.cluster import Link, Rate
from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.plan import levels_of, plan_on_levels, plan_pipeline
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan
from elbowroom.plans.pipeline_shape import Pipe
from tests.planning.facts import CPU, H20
from tests.planning.pipeline.pipelines import (
    TEN_GBIT,
    chain,
    crossing_bytes,
    flat,
    profile,
)

ALL_PROFILES = (
    *("alexnet", "densenet121", "gnmt", "gnmt_large", "inception_v3", "nasnetalarge"),
    *("nasnetamobile", "resnet18", "resnet50", "resnet101", "resnext50", "resnext101"),
    *("squeezenet1_0", "vgg16"),
)


@pytest.mark.parametrize(
    ("name", "num_workers", "shape", "seconds"),
    [
        ("vgg16", 4, "3-1", 0.171413),
        ("vgg16", 8, "7-1", 0.088874),
        ("vgg16", 16, "15-1", 0.044159),
        ("alexnet", 4, "3-1", 0.025436),
        ("alexnet", 8, "7-1", 0.015099),
        ("alexnet", 16, "15-1", 0.015099),
        ("resnet50", 4, "4", 0.110855),
        ("resnet50", 8, "8", 0.055427),
        ("resnet50", 16, "16", 0.027714),
    ],
)
def test_what_the_authors_found(name: str, num_workers: int, shape: str, seconds: float) -> None:
    """SOSP 2019, 10 Gbit/s, with the sync constant of their code."""
    plan = plan_on_levels(profile(name), flat(num_workers))
    assert str(plan) == shape
    assert plan.seconds == pytest.approx(seconds, rel=1e-4)
    assert plan.is_exact


@pytest.mark.parametrize("name", ["gnmt", "gnmt_large"])
@pytest.mark.parametrize("num_workers", [4, 8])
def test_translation_is_straight(name: str, num_workers: int) -> None:
    plan = plan_on_levels(profile(name), flat(num_workers))
    assert plan.replicas == (1,) * num_workers
    assert plan.is_exact


def test_the_sync_constant_decides() -> None:
    vgg16 = profile("vgg16")
    assert str(plan_on_levels(vgg16, flat(4), PipelineOptions(sync="ps"))) == "3-1"
    other = plan_on_levels(vgg16, flat(4), PipelineOptions(sync="allreduce"))
    assert other.replicas == (4,)
    assert other.seconds == pytest.approx(other.data_parallel.seconds)


def test_traffic_saved_on_vgg16() -> None:
    """The paper has 90-95 %. The profile is of 128 rows (its input is 128 x 3 x 224 x 224 x 4).

    Pipeline: 4 (15-1)/15 of the convolutions' weights, and 2 of the activations at the cut; data
    parallel: 4 (16-1)/16 of all weights.
    """
    vgg16 = profile("vgg16").for_batch(32 / 128)
    plan = plan_on_levels(vgg16, flat(16))
    assert str(plan) == "15-1"
    weights = sum(layer.parameter_bytes for layer in vgg16.layers)
    front = plan.stages[0]
    cut = frozenset(vgg16.index[name] for name in front.layers)
    moved = 4 * 14 * front.parameter_bytes // 15 + 2 * crossing_bytes(vgg16, cut)
    assert plan.traffic[0].num_bytes == moved
    assert plan.traffic[0].data_parallel_bytes == 4 * 15 * weights // 16
    assert plan.traffic[0].saved >= 0.89


@pytest.mark.parametrize("name", ALL_PROFILES)
@pytest.mark.parametrize("num_workers", [1, 5, 64])
def test_every_profile_is_planned(name: str, num_workers: int) -> None:
    check_planned(profile(name), num_workers)


def check_planned(layers: LayerGraph, num_workers: int) -> None:
    plan = plan_on_levels(layers, flat(num_workers))
    check_numbers(layers, plan)
    assert plan.num_workers == num_workers
    if plan.data_parallel.seconds > 0:
        assert plan.seconds <= plan.data_parallel.seconds * (1 + 1e-9)


def check_numbers(layers: LayerGraph, plan: PipelinePlan) -> None:
    """Memory of a flat plan, again from its layers; layers that read only inputs cost nothing."""
    placed = [name for stage in plan.stages for name in stage.layers]
    assert sorted(placed) == sorted(layer.name for layer in layers.layers)
    position = {name: number for number, name in enumerate(placed)}
    assert all(position[edge.source] < position[edge.destination] for edge in layers.edges)
    slowest, moved, before = 0.0, 0, set[int]()
    factor, bandwidth = plan.options.sync_factor, plan.levels[0].bandwidth
    inputs = {i for i, layer in enumerate(layers.layers) if layer.description.startswith("Input")}
    for stage in plan.stages:
        indices = {layers.index[name] for name in stage.layers}
        weights = sum(layers.layers[index].parameter_bytes for index in indices)
        work = sum(layers.layers[index].seconds for index in indices - inputs)
        share = (stage.replicas - 1) / stage.replicas
        seconds = max(work, factor * share * weights / bandwidth) / stage.replicas
        assert stage.seconds == pytest.approx(seconds, rel=1e-9, abs=1e-15)
        before |= indices
        crossing = crossing_bytes(layers, frozenset(before - inputs))
        assert stage.transfer_bytes == 2 * crossing
        moved += stage.transfer_bytes + factor * (stage.replicas - 1) * weights // stage.replicas
        slowest = max(slowest, seconds, 2 * crossing / bandwidth)
    assert plan.seconds == pytest.approx(slowest, rel=1e-9)
    assert plan.traffic[0].num_bytes == moved


def test_what_is_in_flight() -> None:
    """ceil(workers from a stage on / its replicas); the first is NOAM."""
    plan = plan_on_levels(chain([(0.003, 10, 10), (0.001, 10, 10), (0.001, 10, 10)]), flat(5, 1e12))
    assert str(plan) == "3-1-1"
    assert [stage.in_flight for stage in plan.stages] == [2, 2, 1]
    assert [stage.memory_bytes for stage in plan.stages] == [2 * 20, 2 * 30, 30]
    assert plan.noam == 2


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(6,), (3, 2), (2, 3)])
def test_warm_up_is_what_workers_do(sizes: tuple[int, ...], depth: int) -> None:
    layers = chain([(i % 3 + 1.0, 10**6, 10**8 * (i % 2)) for i in range(6)])
    levels = tuple(Level(size, 1e9 / 4**index) for index, size in enumerate(sizes))
    plan = plan_on_levels(layers, levels, PipelineOptions(depth=depth))
    assert len(plan.stages) > 1
    pipe = Pipe(plan.replicas)
    for number, stage in enumerate(plan.stages):
        assert stage.warmup_forwards == pipe.warmup_forwards(number, depth)
        assert stage.in_flight == stage.warmup_forwards + 1


def test_depth_is_above_zero() -> None:
    with pytest.raises(InputError, match="a pipe of depth 0"):
        PipelineOptions(depth=0)


def test_warm_up_is_that_of_the_paper() -> None:
    limit = 2 * 10**10
    plan = plan_on_levels(profile("vgg16"), flat(16), PipelineOptions(memory_limit_bytes=limit))
    before = 0
    for stage in plan.stages:
        assert stage.warmup_forwards == (plan.num_workers - 1 - before) // stage.replicas
        assert stage.memory_bytes <= limit
        before += stage.replicas
    assert plan.noam == plan.stages[0].in_flight


def test_a_cluster_has_levels() -> None:
    far = Link("network", 32, Rate(TEN_GBIT), 1e-5, network=True)
    cluster = replace(H20, num_devices=32, links=(*H20.links, far))
    assert [(level.num_units, level.name) for level in levels_of(cluster, 16)] == [
        (8, "NVLink 4"),
        (2, "network"),
    ]
    assert levels_of(cluster, 6) == (Level(6, 450e9 * 0.8, "NVLink 4"),)
    assert levels_of(cluster, 8) == (Level(8, 450e9 * 0.8, "NVLink 4"),)
    with pytest.raises(InputError, match="give a multiple of 8"):
        levels_of(cluster, 12)
    with pytest.raises(InputError, match="no link that joins 64"):
        levels_of(cluster, 64)
    with pytest.raises(InputError, match="at least 1"):
        levels_of(cluster, 0)


def test_a_cluster_limits_memory() -> None:
    layers = chain([(0.001, 85 * 10**7, 85 * 10**7)] * 4)
    plan = plan_pipeline(layers, CPU, 2)
    assert plan.options.memory_limit_bytes == CPU.device.usable_bytes
    with pytest.raises(MemoryPlanError, match=r"no plan on 1 workers fits in 5\.96"):
        plan_pipeline(layers, CPU, 1)


@pytest.mark.parametrize("levels", [(), flat(1025), (Level(32, 1e9), Level(33, 1e9))])
def test_topologies_that_are_refused(levels: tuple[Level, ...]) -> None:
    with pytest.raises(InputError, match="give levels of 1 to 1024"):
        plan_on_levels(chain([(0.001, 1, 1)]), levels)


def test_straight_needs_layers() -> None:
    layers = chain([(0.001, 1, 1)] * 3)
    with pytest.raises(InputError, match="4 workers in a straight pipeline"):
        plan_on_levels(layers, flat(4), PipelineOptions(straight=True))
    fewer = PipelineOptions(straight=True, fewer_workers=True)
    assert plan_on_levels(layers, flat(4, 1e12), fewer).num_workers == 3


def test_layers_without_time() -> None:
    plan = plan_on_levels(chain([(0.0, 5, 7)] * 3), flat(1))
    assert plan.seconds == 0
    assert plan.speedup == 1.0
    assert str(plan_on_levels(chain([(0.0, 5, 7)] * 3), flat(2))) in {"1-1", "2"}


@pytest.mark.parametrize("levels", [flat(64), (Level(8, 1e10), Level(8, 1e9))])
def test_long_chains_take_seconds(levels: tuple[Level, ...]) -> None:
    layers = chain([(i % 7 + 1.0, (i * 37 % 11 + 1) * 10**6, i * 1000) for i in range(3000)])
    plan = plan_on_levels(layers, levels)
    assert not plan.is_exact
    assert plan.num_cuts < 3000
    assert plan.num_workers == 64
    for stage, following in pairwise(plan.stages):
        assert layers.index[stage.layers[-1]] + 1 == layers.index[following.layers[0]]
    assert plan.seconds < plan.data_parallel.seconds * (1 + 1e-9)
