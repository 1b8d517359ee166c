"""What workers hold at most is what their plan has said, within 5 %.

Counted is all that PyTorch's allocator holds while the pipe is full: weights in all versions,
optimizer state, gradients, what autograd keeps, temporaries, and where messages are received. Not
counted, in either, are batches that the script makes: a stage that reads inputs counts those of the
minibatches in flight, any other worker holds one batch that it does not use.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import simulate_pipeline_plan
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan
from elbowroom.profiling.layers import SweepLimits, profile
from tests.pipeline.members import Members
from tests.pipeline.memory_cases import MODELS, Case
from tests.pipeline.memory_member import NUM_MINIBATCHES

pytestmark = pytest.mark.usefixtures("one_thread")

BANDWIDTHS = [10 ** (power / 4) for power in range(31, 49)]
"""From low to high: stages end where little crosses, as they do between machines; in the end there
is one stage of replicas."""


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    members = Members("tests.pipeline.memory_member")
    yield members
    members.end()


EACH_KIND = [
    Case("mlp", (1, 1), "adamw"),
    Case("conv", (2, 1), "momentum", depth=2),
    Case("conv", (3, 1), "momentum", "predict"),
    Case("blocks", (1, 1, 1), "momentum", "vertical-sync"),
    Case("blocks", (1, 1), "adamw", "flush", microbatches=4),
    Case("blocks", (3,), "adamw"),
]
"""Every model, optimizer and semantics, straight and replicated stages, one and two groups."""

MORE = [
    Case("conv", (1, 1), "momentum"),
    Case("conv", (1, 1, 1), "momentum"),
    Case("conv", (2, 1), "momentum"),
    Case("mlp", (1, 2, 2), "adamw"),
    Case("blocks", (3, 2), "adamw"),
    Case("blocks", (1, 1, 1), "momentum"),
    Case("blocks", (1, 1, 1), "momentum", "predict"),
]


@pytest.mark.parametrize(
    "case",
    [*EACH_KIND, *(pytest.param(case, marks=pytest.mark.nightly) for case in MORE)],
    ids=lambda case: f"{case.model}-{case.replicas}-{case.optimizer}-{case.semantics}-{case.depth}",
)
def test_what_was_planned(case: Case, members: Members, tmp_path: Path) -> None:
    graph = measure(case)
    plan = make_plan(case, graph)
    expected = predict(case, plan, graph)
    held = run(members, case, plan, tmp_path)
    assert held == [pytest.approx(num_bytes, rel=0.05) for num_bytes in expected]


def measure(case: Case) -> LayerGraph:
    """Profile of a microbatch, all layers equally slow, so that cuts are always the same."""
    gc.collect()  # what other tests have left must not go while memory is watched
    torch.manual_seed(1)
    model, make_batch, loss_fn = MODELS[case.model]()
    inputs, targets = (part[: len(part) // case.microbatches] for part in make_batch())
    graph = profile(model, (inputs, targets), loss_fn, SweepLimits(least=3, seconds=0.0))
    layers = (replace(layer, forward_seconds=1e-3, backward_seconds=2e-3) for layer in graph.layers)
    return replace(graph, layers=tuple(layers))


def make_plan(case: Case, graph: LayerGraph) -> PipelinePlan:
    options = PipelineOptions(
        optimizer=case.optimizer,
        straight=max(case.replicas) == 1,
        semantics="predict" if case.semantics == "predict" else "stash",
        depth=case.depth,
    )
    num_workers = sum(case.replicas)
    plans = (plan_on_levels(graph, (Level(num_workers, b),), options) for b in BANDWIDTHS)
    return next(plan for plan in plans if plan.replicas == case.replicas)


def predict(case: Case, plan: PipelinePlan, graph: LayerGraph) -> list[int]:
    """Bytes of each worker: the plan's, or those of another schedule."""
    replicas = plan.replicas
    if case.semantics == "flush":
        num_minibatches = NUM_MINIBATCHES * case.microbatches
        schedule = plan_schedule(replicas, num_minibatches, "1f1b-flush", case.microbatches)
    else:
        schedule = plan_schedule(replicas, NUM_MINIBATCHES, depth=case.depth)
    rule = "vertical-sync" if case.semantics == "vertical-sync" else "stash"
    expected = simulate_pipeline_plan(plan, graph, schedule, rule=rule).peak_bytes
    if case.semantics == plan.options.semantics:
        assert expected == tuple(
            stage.memory_bytes for stage in plan.stages for _ in range(stage.replicas)
        )
    return list(expected)


def run(members: Members, case: Case, plan: PipelinePlan, folder: Path) -> list[int]:
    """Bytes that each worker held."""
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    unused = sum(tensor.nbytes for tensor in MODELS[case.model]().make_batch())
    held = []
    for number, seen in enumerate(members.run(case, folder)):
        reads_inputs = number < plan.stages[0].replicas
        held.append(seen["peak"] + seen["buffers"] - (0 if reads_inputs else unused))
    return held
