"""Models as layers: what is one, what it reads, and forwards that cannot be written down."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from elbowroom.core.errors import InputError, UntraceableModelError
from elbowroom.training.layers import trace_model
from elbowroom.training.traced import Tied
from tests.pipeline.models import Pair, Residual, looks, skips, tiny_lm

pytestmark = pytest.mark.usefixtures("one_thread")


def edges_of(model: nn.Module, inputs: object) -> set[tuple[str, str]]:
    return {tuple(edge) for edge in trace_model(model, inputs).edges}


def test_edges_of_a_residual_block() -> None:
    assert edges_of(Residual(4), torch.randn(2, 4, 5, 5)) == {
        ("x", "conv1"),
        ("conv1", "bn1"),
        ("bn1", "relu"),
        ("relu", "conv2"),
        ("conv2", "bn2"),
        ("bn2", "add"),
        ("x", "add"),
        ("add", "relu_1"),
    }


def test_children_of_a_sequential_are_layers() -> None:
    """Whatever happens in them: no tracer can follow these."""
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), Pair())
    traced = trace_model(model, torch.randn(2, 6))
    assert [layer.name for layer in traced.layers] == ["input", "0", "1"]
    assert [layer.parameters for layer in traced.layers] == [
        (),
        ("0.0.weight", "0.0.bias"),
        ("1.linear.weight", "1.linear.bias"),
    ]


def test_numbers_are_no_layers_but_what_they_are_taken_from_is_read() -> None:
    model, inputs = tiny_lm()
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    assert not [name for name in names if name.startswith(("size", "getattr"))]
    assert "ids" in traced.by_name["getitem"].sources
    assert traced.by_name["getitem"].parameters == ("places",)


def test_several_results_are_read_by_an_output_layer() -> None:
    model, inputs = skips()
    traced = trace_model(model, inputs)
    last = traced.layers[-1]
    assert last.name == "output"
    assert set(last.sources) == set(traced.results) == {"tanh", "getitem_2", "mul_1"}


def test_what_symbolic_tracing_cannot_follow_is_exported() -> None:
    model, inputs = looks()
    traced = trace_model(model, inputs)
    parameters = [name for layer in traced.layers for name in layer.parameters]
    assert sorted(set(parameters)) == sorted(name for name, _ in model.named_parameters())
    counted = {name for layer in traced.layers for name in layer.state if "num_batches" in name}
    assert counted == {"bn.num_batches_tracked"}


def frozen_norm(model: nn.Module) -> nn.Module:
    """In training, but for one batch norm."""
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    return model


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv2d(4, 4, 1), Residual(4), nn.Dropout(0.5)), Residual(4)]
)
def test_the_model_stays_as_it_was(model: nn.Module) -> None:
    model = frozen_norm(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    trace_model(model, torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


class Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor(2.0)


def test_constants_do_not_stay_in_the_model() -> None:
    model = Adds()
    before = sorted(vars(model))
    trace_model(model, torch.randn(3))
    assert sorted(vars(model)) == before


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return x * self.count


def test_a_buffer_that_is_assigned_stays_a_buffer() -> None:
    model = Assigns()
    count = model.count
    traced = trace_model(model, torch.randn(3))
    assert model.count is count
    assert count == 0
    assert [name for name, _ in traced.tied] == ["count"]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return self.linear(x)


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        z = y.view(-1, 3)
        z.add_(1)
        return y + z.view(-1, 6)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> int:
        return 3


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Nothing(), "gives no tensor"),
        (Branches(), r"test_layers.py:\d+: `if x.sum\(\) > 0:`.*nn.Sequential of blocks"),
        (Draws(), "draws from Python"),
    ],
)
def test_forwards_that_are_no_layers(model: nn.Module, words: str) -> None:
    with pytest.raises(UntraceableModelError, match=words):
        trace_model(model, torch.rand(2, 6))


def test_what_is_written_into_stays_with_all_that_read_it() -> None:
    traced = trace_model(Overwrites(), torch.rand(2, 6))
    assert traced.tied == (Tied("linear", ("linear", "view", "add_", "view_1", "add")),)


def test_a_batch_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="Linear does not run on this batch: mat1 and mat2"):
        trace_model(nn.Linear(6, 6), torch.randn(2, 5))
    with pytest.raises(InputError, match="takes 2 positional arguments but 3 were given"):
        trace_model(nn.Linear(6, 6), (torch.randn(2, 6), torch.randn(2, 6)))
