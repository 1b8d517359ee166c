"""Stages of a plan compute what the model does, to the bit; plans that cannot be applied."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from elbowroom.core.errors import InputError, SplitError
from elbowroom.pipeline.split import split
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions
from elbowroom.profiling.layers import profile
from elbowroom.training.layers import trace_model
from elbowroom.training.script import load_script
from tests.pipeline.models import CASES, ConvNet, TinyLM, evenly, plan_of, skips, tiny_lm
from tests.pipeline.runs import assert_equal, run_model, run_stages

SCRIPTS = Path(__file__).parents[1] / "data" / "training"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def compare(model: nn.Module, inputs: Any, num_stages: int, later: Any = None) -> None:
    """``later`` is another batch that the same stages are run with."""
    twin = copy.deepcopy(model)
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    stages = split(traced, evenly(names, min(num_stages, len(names))))
    batch = inputs if later is None else later
    assert_equal(run_model(twin, batch), run_stages(traced, stages, batch))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("name", CASES)
def test_stages_are_the_model(name: str, num_stages: int) -> None:
    compare(*CASES[name](), num_stages)


@pytest.mark.parametrize("name", CASES)
def test_stages_are_the_model_in_eval(name: str) -> None:
    model, inputs = CASES[name]()
    compare(model.eval(), inputs, 3)


def test_another_batch_has_other_sizes() -> None:
    model, inputs = tiny_lm()
    compare(model, inputs, 4, later=torch.randint(0, 50, (2, 7)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_plans_may_put_branches_in_any_order(name: str, seed: int) -> None:
    """Without random numbers, which are drawn in another order then."""
    model, inputs = CASES[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    traced = trace_model(model, inputs)
    rng = random.Random(seed)
    waiting = {layer.name: set(layer.sources) for layer in traced.layers}
    order: list[str] = []
    while waiting:
        order.append(rng.choice([n for n, read in waiting.items() if read <= set(order)]))
        del waiting[order[-1]]
    stages = split(traced, evenly(order, rng.randint(2, min(6, len(order)))))
    assert_equal(run_model(twin, inputs), run_stages(traced, stages, inputs))


def test_an_exported_model_has_one_shape() -> None:
    model, inputs = CASES["looks"]()
    traced = trace_model(model, inputs)
    with pytest.raises(InputError, match=r"'x' has the shape \[4, 6\], .* exported with \[5, 6\]"):
        traced.named_inputs(torch.randn(4, 6))


def test_shapes_and_types_of_what_travels() -> None:
    model, inputs = skips()
    traced = trace_model(model.double(), {name: x.double() for name, x in inputs.items()})
    facts = traced.tensors["lstm[1]"]
    assert facts == ("lstm[1]", (1, 3, 6), torch.float64, True, 8 * 3 * 6)
    assert not traced.tensors["x"].needs_grad


def test_a_norm_that_is_frozen_stays_frozen() -> None:
    model, inputs = CASES["conv_net"]()
    assert isinstance(model, ConvNet)
    model.blocks[0].bn2.eval()
    compare(model, inputs, 3)


def test_dropout_draws_what_the_model_draws() -> None:
    """Other numbers than with another seed: the equality above is not for want of dropout."""
    model, inputs = tiny_lm()
    traced = trace_model(model, inputs)
    stages = split(traced, evenly([layer.name for layer in traced.layers], 3))
    one = run_stages(traced, stages, inputs).outputs
    for stage in stages:
        stage.eval()
    assert not torch.equal(one, run_stages(traced, stages, inputs).outputs)


def test_weights_are_the_models_own() -> None:
    model, inputs = tiny_lm()
    traced = trace_model(model, inputs)
    stages = split(traced, evenly([layer.name for layer in traced.layers], 3))
    own = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for stage in stages:
        named = dict(stage.body.named_parameters())
        assert not found.keys() & named.keys()
        found |= named
    assert found.keys() == own.keys()
    assert all(found[name] is own[name] for name in own)


def test_what_skips_stages_is_passed_on() -> None:
    model, inputs = skips()
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    stages = split(traced, evenly(names, 4))
    first = names[names.index("tanh")]
    assert [first in stage.passes for stage in stages] == [True, True, True, False]
    assert [stage.loads for stage in stages] == [("x",), (), (), ("weight",)]
    for stage, behind in pairwise(stages):
        assert stage.passes == behind.receives


def test_tensors_of_a_tuple_are_named() -> None:
    model, inputs = skips()
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    place = names.index("lstm") + 1
    stages = split(traced, plan_of([names[:place], names[place:]]))
    assert stages[0].passes == ("tanh", "lstm[0]", "lstm[1]", "lstm[2]")


def test_tied_weights_stay_in_one_stage() -> None:
    traced = trace_model(TinyLM(tied=True), torch.randint(0, 50, (3, 10)))
    names = [layer.name for layer in traced.layers]
    assert [(tied.name, tied.layers) for tied in traced.tied] == [
        ("tokens.weight", ("tokens", "head"))
    ]
    with pytest.raises(SplitError, match=r"'tokens.weight' is shared .*'tokens' \(stage 0\)"):
        split(traced, evenly(names, 2))
    assert len(split(traced, evenly(names, 1))) == 1


def test_plans_keep_tied_weights_in_one_stage() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), shared, nn.ReLU(), shared, nn.Linear(8, 8))
    inputs = torch.randn(2, 8)
    plan = plan_on_levels(profile(model, inputs), (Level(3, 1e12),), PipelineOptions(straight=True))
    stages = split(trace_model(model, inputs), plan)
    assert [stage.layers for stage in plan.stages] == [("input", "0"), ("1", "2", "1_1"), ("4",)]
    assert len(stages) == 3


@pytest.mark.parametrize("name", ["c20_inplace", "c27_moe"])
def test_no_cut_changes_what_in_place_operations_do(name: str) -> None:
    """Each cut into two stages is refused, or gives what the model does, to the bit."""
    script = load_script(SCRIPTS / f"{name}.py")
    model = script.make_model(0).train()
    inputs, _ = script.make_batch(torch.Generator().manual_seed(0))
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    begin, expected = copy.deepcopy(model.state_dict()), run_model(copy.deepcopy(model), inputs)
    num_cut = 0
    for k in range(1, len(names)):
        try:
            stages = split(traced, plan_of([names[:k], names[k:]]))
        except SplitError:
            continue
        model.load_state_dict(begin)
        assert_equal(expected, run_stages(traced, stages, inputs))
        num_cut += 1
    assert 0 < num_cut < len(names) - 1


def test_tied_weights_that_are_not_trained_may_be_apart() -> None:
    model = TinyLM(tied=True)
    model.tokens.weight.requires_grad_(False)
    compare(model, torch.randint(0, 50, (3, 10)), 3)


def test_a_module_called_twice_is_tied() -> None:
    layer = nn.Linear(6, 6)
    traced = trace_model(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 6))
    assert [name.name for name in traced.layers] == ["input", "0", "1", "0_1"]
    with pytest.raises(SplitError, match="shared by layers of stages 0, 1"):
        split(traced, plan_of([["input", "0", "1"], ["0_1"]]))


def test_running_statistics_are_tied() -> None:
    norm = nn.BatchNorm1d(6, affine=False)
    traced = trace_model(nn.Sequential(norm, nn.ReLU(), norm), torch.randn(4, 6))
    assert {tied.name for tied in traced.tied} == {
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    }
    with pytest.raises(SplitError, match="is shared by layers of stages 0, 1"):
        split(traced, plan_of([["input", "0", "1"], ["0_1"]]))


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, len(x)


class Uses(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, int]) -> torch.Tensor:
        return pair[0] * pair[1]


def test_a_number_does_not_travel() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Counts(), Uses())
    traced = trace_model(model, torch.randn(4, 6))
    with pytest.raises(SplitError, match="layer '1' hands 4 to a later stage"):
        split(traced, plan_of([["input", "0", "1"], ["2"]]))
    assert len(split(traced, plan_of([["input", "0"], ["1", "2"]]))) == 2


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([["input", "0", "1"]], "does not have layers '2'"),
        ([["input", "0", "1"], ["2", "9"]], "has unknown layers '9'"),
        ([["input", "0", "1"], ["1", "2"]], "has more than once layers '1'"),
        ([["input", "1"], ["0", "2"]], "layer '1' in stage 0 reads '0'"),
    ],
)
def test_plans_of_other_models(stages: list[list[str]], words: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    traced = trace_model(model, torch.randn(4, 6))
    with pytest.raises(SplitError, match=words):
        split(traced, plan_of(stages))


class Functional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x * 2, 0.5, self.training)


def test_a_mode_that_tracing_has_fixed_stays() -> None:
    traced = trace_model(Functional(), torch.randn(4, 6))
    stages = split(traced, evenly([layer.name for layer in traced.layers], 2))
    stages[0].train()
    with pytest.raises(SplitError, match="training=True"):
        stages[0].eval()
