"""Profiles of models in training: sizes are exact, times add up, and the model stays as it was."""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.pipeline.split import split
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions
from elbowroom.profiling.layers import SweepLimits, profile
from elbowroom.training.layers import trace_model
from tests.pipeline.models import CASES, ConvNet, Skips, TinyLM
from tests.pipeline.runs import assert_equal, run_model, run_stages

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = SweepLimits(least=2, seconds=0.0)


def sizes_of(graph: LayerGraph) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.activation_bytes, layer.parameter_bytes) for layer in graph.layers}


def test_sizes_and_edges_of_a_residual_net() -> None:
    graph = profile(ConvNet(), torch.randn(4, 3, 8, 8), limits=QUICK)
    grid = 4 * 4 * 8 * 6 * 6  # float32, rows, channels, height, width
    sizes = sizes_of(graph)
    assert sizes["image"] == (4 * 4 * 3 * 8 * 8, 0)
    assert sizes["stem"] == (grid, 4 * (3 * 8 * 9 + 8))
    assert sizes["blocks.0.bn1"] == (grid, 4 * (8 + 8))
    assert sizes["add"] == sizes["blocks.1.relu"] == (grid, 0)
    assert sizes["head"] == (4 * 4 * 10, 4 * (8 * 36 * 10 + 10))
    read = {edge.source for edge in graph.edges if edge.destination == "add"}
    assert read == {"stem", "blocks.0.bn2"}
    assert [layer.name for layer in graph.layers if layer.description == "Input"] == ["image"]


def test_tuples_are_summed_and_bytes_follow_the_type() -> None:
    model = nn.Sequential(nn.LSTM(6, 6, batch_first=True)).to(torch.float64)
    sizes = sizes_of(profile(model, torch.randn(3, 4, 6, dtype=torch.float64), limits=QUICK))
    assert sizes["0"][0] == 8 * (3 * 4 * 6 + 2 * 3 * 6)


def test_parameters_are_counted_once() -> None:
    model = TinyLM(tied=True)
    graph = profile(model, torch.randint(0, 50, (3, 10)), limits=QUICK)
    sizes = sizes_of(graph)
    assert sizes["tokens"][1] == 4 * 50 * 32
    assert sizes["head"][1] == 0
    assert sum(size for _, size in sizes.values()) == sum(p.nbytes for p in model.parameters())
    assert graph.tied == (("tokens", "head"),)


def test_what_needs_no_gradient_has_no_backward() -> None:
    graph = profile(TinyLM(), torch.randint(0, 50, (3, 10)), limits=QUICK)
    for layer in graph.layers:
        assert layer.forward_seconds > 0 or layer.description == "Input"
        assert (layer.backward_seconds == 0) == (layer.name == "ids"), layer.name


def test_the_first_layer_has_no_gradient_of_the_input() -> None:
    """Its backward is the weights' alone: of equal layers it is the cheaper, as in training."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    graph = profile(model, torch.randn(512, 512), limits=SweepLimits(seconds=0.3))
    _, first, second = graph.layers
    assert 0 < first.backward_seconds < 0.8 * second.backward_seconds


def step_seconds(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Median seconds of one forward, loss and backward."""
    seconds = []
    for _ in range(8):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        functional.cross_entropy(model(inputs), targets).backward()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def test_times_add_up_to_a_step() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(28800, 256)
    )
    inputs, targets = torch.randn(16, 3, 32, 32), torch.randint(0, 256, (16,))
    ratios = []
    for _ in range(3):  # the machine is shared: one quiet moment is enough
        graph = profile(
            model, (inputs, targets), functional.cross_entropy, SweepLimits(seconds=0.5)
        )
        whole = step_seconds(model, inputs, targets)
        ratios.append(sum(layer.seconds for layer in graph.layers) / whole)
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"layers add up to {ratios} of a step")


def test_the_loss_counts_in_the_last_layer() -> None:
    def slow(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return functional.cross_entropy(outputs, targets)

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    batch = torch.randn(4, 6), torch.randint(0, 3, (4,))
    _, first, last = profile(model, batch, slow, QUICK).layers
    assert last.forward_seconds > 0.01 > first.forward_seconds


@pytest.mark.parametrize("name", CASES)
def test_the_model_stays_as_it_was(name: str) -> None:
    model, inputs = CASES[name]()
    model.eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    gradients = [parameter.grad for parameter in model.parameters()]
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    profile(model, inputs, limits=QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert gradients[0] is not None
    assert torch.equal(gradients[0], torch.ones_like(gradients[0]))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_from_profile_to_stages(name: str, num_workers: int) -> None:
    """Stages give what the model gives, and what they pass on is what the plan has counted."""
    model, inputs = CASES[name]()
    graph = profile(model, inputs, limits=QUICK)
    plan = plan_on_levels(graph, (Level(num_workers, 1e9),), PipelineOptions(straight=True))
    assert len(plan.stages) == num_workers
    model.train()
    twin = copy.deepcopy(model)
    traced = trace_model(model, inputs)
    stages = split(traced, plan)
    # The planner may put branches the other way round, so stages do without random numbers.
    for module in (*model.modules(), *twin.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_equal(run_model(twin, inputs), run_stages(traced, stages, inputs))
    for stage, planned in zip(stages, plan.stages, strict=True):
        passed = [traced.tensors[name] for name in stage.passes]
        back = [tensor for tensor in passed if tensor.needs_grad]
        moved = sum(tensor.num_bytes for tensor in (*passed, *back))
        assert moved == planned.transfer_bytes


def test_several_results_reach_the_loss() -> None:
    def loss(outputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (outputs["last"] - target).square().sum() + outputs["first"].sum()

    inputs = {"x": torch.randn(3, 4, 6), "weight": torch.randn(6)}
    graph = profile(Skips(), (inputs, torch.zeros(6)), loss, QUICK)
    assert graph.layers[-1].name == "output"
    assert graph.layers[-1].seconds > 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, targets: outputs, "a tensor of one number"),
        (lambda outputs, targets: outputs.detach().sum(), "no gradient leads from the loss"),
        (functional.cross_entropy, "loss_fn failed on the model's outputs: "),
    ],
)
def test_losses_that_are_none(loss: object, words: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(InputError, match=words):
        profile(model, (torch.randn(4, 6), torch.zeros(9)), loss, QUICK)


def test_a_batch_without_targets() -> None:
    with pytest.raises(InputError, match="a pair"):
        profile(nn.Linear(6, 3), torch.randn(4, 6), functional.cross_entropy, QUICK)


def test_numbers_of_sweeps() -> None:
    with pytest.raises(InputError, match="at least 1"):
        SweepLimits(least=0)
