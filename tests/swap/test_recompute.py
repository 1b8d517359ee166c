"""Storages made again: the same bits as were saved, or an error; never something else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from elbowroom.core.errors import InputError, SwapError
from elbowroom.core.recipe import Call, Recipe, TensorArgument
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.memory import floor_choices
from elbowroom.plans.swap import Choice, Recomputed, Swapped, SwapPlan
from elbowroom.profiling.recipes import recipe_prover
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from tests.swap.models import MAKERS, Case, UNet3d, make
from tests.swap.steps import (
    SMALLEST,
    assert_same,
    needed_meter,
    plain_step,
    profiled,
    swapped_step,
)

IN_PLACE = "modified by an inplace operation"


class Chain(nn.Module):
    """Affine, then functions of ``x``, each saved by the next; ``scale`` may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(400))
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        return F.leaky_relu(y, self.scale).exp().sin()


def chain() -> Case:
    """A case whose batch and loss are plain sums."""

    class Summed(Case):
        def loss(self) -> torch.Tensor:
            return self.model(self.inputs).sum()

    model = Chain()
    return Summed(model, torch.randn(400), torch.zeros(1))


def plan_with(profile: StepProfile, *functions: str, is_swapped: bool = False) -> SwapPlan:
    """A plan that recomputes what ends with these functions; the rest is kept, or swapped."""
    choices: dict[int, Choice] = {}
    if is_swapped:
        choices |= {choice.storage: choice for choice in floor_choices(profile)}
    for storage in profile.storages:
        if storage.recipe and last_name(storage.recipe.calls[-1]) in functions:
            choices[storage.number] = Recomputed(storage.number, storage.recipe)
            for number in storage.recipe.sources:
                source = choices.get(number)
                if isinstance(source, Swapped):
                    assert source.bring is not None and storage.use_tick is not None
                    bring = min(source.bring, storage.use_tick)
                    choices[number] = replace(source, bring=bring)
    plan = make_plan(profile, choices.values())
    assert plan.recomputed
    return plan


def last_name(call: Call) -> str:
    return call.function.rpartition(".")[2]


@pytest.mark.parametrize("name", MAKERS)
def test_every_recipe_gives_the_bits_that_were_saved(link: Link, name: str) -> None:
    """One at a time, its sources kept or swapped in turn; the replay is compared, too."""
    case = make(name)
    plain_step(case)
    plain = plain_step(case)
    profile = profiled(case, link)
    able = [storage for storage in profile.storages if storage.recipe is not None]
    assert bool(able) == (name != "lstm")
    for storage in able:
        assert storage.recipe is not None and storage.use_tick is not None
        remade = Recomputed(storage.number, storage.recipe)
        sources = [
            Swapped(number, profile.storages[number].pack_tick, bring)
            for number in storage.recipe.sources
            for bring in [min(storage.use_tick, profile.storages[number].use_tick or 0)]
        ]
        choices = [remade, *sources] if storage.number % 2 else [remade]
        outcome = swapped_step(case, link, make_plan(profile, choices), on_change="raise")
        assert_same(plain, outcome)
        assert outcome.counts.recomputed_bytes == storage.num_bytes


def test_a_third_of_a_unets_bytes_is_normalised_again(link: Link) -> None:
    small = make("unet")
    case = Case(UNet3d(16), small.inputs, small.targets)
    plain_step(case)
    storages = profiled(case, link).storages
    normed = [
        storage.num_bytes
        for storage in storages
        if storage.recipe is not None
        and [last_name(call) for call in storage.recipe.calls] == ["batch_norm", "relu"]
    ]
    assert sum(normed) >= 0.3 * sum(storage.num_bytes for storage in storages)


def test_batch_norm_updates_its_statistics_once(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    plain = plain_step(case)
    for is_swapped in (False, True):
        plan = plan_with(profiled(case, link), "relu", is_swapped=is_swapped)
        case = make("cnn")
        plain_step(case)
        outcome = swapped_step(case, link, plan, on_change="raise")
        assert outcome.counts.num_recomputed == len(plan.recomputed) >= 4
        assert all(map(torch.equal, plain.state.values(), outcome.state.values()))


def test_what_random_numbers_made_has_no_recipe(link: Link) -> None:
    case = make("transformer")
    plain_step(case)
    for storage in profiled(case, link).storages:
        calls = storage.recipe.calls if storage.recipe is not None else ()
        assert not any("dropout" in call.function for call in calls)


class Long(nn.Module):
    """Saves what three calls made before, and what they take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 0.5
        return y.pow(2) + ((y + 1) * 2 - 3).exp()


def test_what_a_replay_makes_on_the_way_goes_when_it_was_read(link: Link) -> None:
    model, x = Long(), torch.linspace(-1, 1, 400, requires_grad=True)
    case = Case(model, torch.zeros(1), torch.zeros(1))
    storages = profiled(case, link, lambda: model(x).sum().backward()).storages
    recipe = storages[-1].recipe
    assert recipe is not None
    assert [last_name(call) for call in recipe.calls] == ["add", "mul", "sub", "exp"]
    assert recipe.extra_bytes // 1600 == 1  # one beside the result at any time


class Secret(nn.Module):
    """Writes into a tensor past PyTorch, which counts no version then."""

    def __init__(self, is_secret: bool) -> None:
        super().__init__()
        self.is_secret = is_secret

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).sin()
        if self.is_secret:
            y.detach().numpy()[7] = 3
        return y.pow(2)  # saves y


@pytest.mark.parametrize("is_secret", [False, True])
def test_what_was_written_past_pytorch_has_no_recipe(link: Link, is_secret: bool) -> None:
    model = Secret(is_secret)
    x = torch.linspace(-1, 1, 400, requires_grad=True)
    case = Case(model, torch.zeros(1), torch.zeros(1))
    storages = profiled(case, link, lambda: model(x).sum().backward()).storages
    assert [bool(each.recipe) for each in storages] == [False, not is_secret]


class Out(nn.Module):
    """Has a result written where it says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        with torch.no_grad():
            z = y.clone()
            torch.mul(y, 3, out=z)
        return y.pow(2) + y * z  # saves both


def test_what_was_written_by_out_is_swapped(link: Link) -> None:
    model, x = Out(), torch.linspace(-1, 1, 400, requires_grad=True)
    case = Case(model, torch.zeros(1), torch.zeros(1))
    storages = profiled(case, link, lambda: model(x).sum().backward()).storages
    assert [storage.num_bytes for storage in storages] == [1600, 1600]
    assert not storages[1].recipe


def test_measuring_leaves_the_step_as_it_is(link: Link) -> None:
    """What recipes need is neither in the log nor in the numbers of the step."""
    case = make("unet")
    plain_step(case)
    profiles = []
    for finds_recipes in (True, False):
        meter = needed_meter()
        prover = recipe_prover(case.model, meter) if finds_recipes else None
        recorder = StepRecorder(case.model, meter, 0, SMALLEST, prover=prover)
        step = SwappedStep(None, link, Candidates(case.model, SMALLEST), observer=recorder)
        case.clear()
        with recorder.recording(), step.hooks():
            case.loss().backward()
        step.end()
        profiles.append(recorder.profile())
    with_recipes, without = profiles
    assert with_recipes.deltas == without.deltas
    assert with_recipes.tick_positions == without.tick_positions
    bare = tuple(replace(storage, recipe=None) for storage in with_recipes.storages)
    assert bare == without.storages != with_recipes.storages


@pytest.mark.parametrize("room_bytes", [0, 20_000, 60_000])
def test_recipes_are_tried_where_there_is_room(link: Link, room_bytes: int) -> None:
    """The measured step holds no more than its floor, or what it may; nothing is refused."""
    case = make("cnn")
    plain_step(case)
    plan = make_plan(profiled(case, link), ())
    floor = make_plan(profiled(case, link), floor_choices(profiled(case, link))).peak_bytes
    case.clear()
    gc.collect()
    meter = needed_meter()
    held = meter.held_bytes
    most = held + floor + room_bytes
    prover = recipe_prover(case.model, meter, most)
    recorder = StepRecorder(case.model, meter, 0, SMALLEST, prover=prover)
    step = SwappedStep(None, link, Candidates(case.model, SMALLEST), observer=recorder)
    meter.reset_peak()
    refused = meter.num_refused
    with meter.budget(most), recorder.recording(), step.hooks():
        case.loss().backward()
    step.end()
    assert meter.peak_bytes <= most
    assert meter.num_refused == refused
    profile = recorder.profile()
    assert make_plan(profile, ()).peak_bytes == plan.peak_bytes
    assert any(storage.recipe for storage in profile.storages)


def test_without_room_no_recipe_is_tried(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    meter = needed_meter()
    prover = recipe_prover(case.model, meter, meter.held_bytes)
    recorder = StepRecorder(case.model, meter, 0, SMALLEST, prover=prover)
    step = SwappedStep(None, link, Candidates(case.model, SMALLEST), observer=recorder)
    with recorder.recording(), step.hooks():
        case.loss().backward()
    step.end()
    assert not any(storage.recipe for storage in recorder.profile().storages)


def test_a_parameter_written_after_the_save_raises(link: Link) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "mul")
    step = SwappedStep(plan, link, Candidates(case.model, SMALLEST))
    with step.hooks():
        loss = case.loss()
    with torch.no_grad():
        case.model.weight.mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


class Written(nn.Module):
    """Its forward writes into what it saved, after a function of it was saved, if told."""

    def __init__(self) -> None:
        super().__init__()
        self.is_written = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1.5
        first = y.pow(2)  # saves y
        z = y.exp().tanh()  # saves what exp made of y
        if self.is_written:
            with torch.no_grad():
                y.add_(1)
        return first + z.pow(3)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_source_written_after_it_was_saved_raises_or_is_right(
    link: Link, is_swapped: bool
) -> None:
    """A kept source raises, as in PyTorch; a copy that left before has the bytes that were read."""

    def body() -> torch.Tensor:
        x = torch.linspace(-1, 1, 400, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        return x.grad

    model = Written()
    expected = body()
    profile = profiled(Case(model, torch.zeros(1), torch.zeros(1)), link, lambda: (body(), None)[1])
    plan = plan_with(profile, "exp", is_swapped=is_swapped)
    model.is_written = True
    step = SwappedStep(plan, link, Candidates(model, SMALLEST))
    with step.hooks():
        if is_swapped:
            assert torch.equal(body(), expected)
        else:
            with pytest.raises(RuntimeError, match=IN_PLACE):
                body()
    step.end()
    assert step.counts.num_recomputed == 1


def test_a_constant_that_changed_is_found(link: Link) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "exp")
    plain = plain_step(case)
    assert_same(plain, swapped_step(case, link, plan, on_change="raise"))
    case.model.scale = 2.5
    with pytest.raises(SwapError, match="recompute=False"):
        swapped_step(case, link, plan, on_change="raise")


def test_another_function_of_the_same_shape_is_found(link: Link) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "exp")
    case.model.forward = lambda x: F.elu(x * case.model.weight).exp().sin()  # type: ignore[method-assign]
    with pytest.raises(SwapError, match="other bytes"):
        swapped_step(case, link, plan)


def test_a_retained_graph_and_second_derivatives(link: Link) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "exp", is_swapped=True)
    weight = case.model.weight

    def twice(loss: torch.Tensor) -> list[torch.Tensor]:
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (again,) = torch.autograd.grad(loss, weight, retain_graph=True)
        return [first, again, *torch.autograd.grad(first.pow(2).sum(), weight)]

    plain = twice(case.loss())
    step = SwappedStep(plan, link, Candidates(case.model, SMALLEST))
    with step.hooks():
        swapped = twice(case.loss())
    step.end()
    assert all(map(torch.equal, plain, swapped))
    assert step.counts.num_recomputed == 1
    assert step.counts.recomputed_bytes == 1600  # once for all backwards


def test_a_step_that_differs_half_way_is_right(link: Link) -> None:
    """A block is skipped: what was saved before is made again, what follows is swapped."""
    case = make("cnn")
    plain_step(case)
    plan = plan_with(profiled(case, link), "relu", is_swapped=True)
    blocks = case.model
    assert isinstance(blocks, nn.Sequential)
    blocks[3].forward = lambda x: x  # type: ignore[method-assign]
    plain = plain_step(case)
    outcome = swapped_step(case, link, plan)
    assert_same(plain, outcome)
    assert outcome.counts.change
    assert 0 < outcome.counts.num_recomputed < len(plan.recomputed)


def test_a_step_in_which_sources_are_gone_swaps_instead(link: Link) -> None:
    """The graph of the first forward is dropped before the second saves what is made of it."""
    x = torch.linspace(-1, 1, 400, requires_grad=True)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_dropped = False

        def forward(self) -> torch.Tensor:
            y = (x * 2).detach().requires_grad_()
            first = y.pow(2)  # saves y
            if self.is_dropped:
                first = x * 1
            return first.sum() + (y.exp().tanh() + x).sum()

    model = Parts()
    profile = profiled(
        Case(model, torch.zeros(1), torch.zeros(1)), link, lambda: model().backward()
    )
    plan = plan_with(profile, "exp")
    model.is_dropped = True
    step = SwappedStep(plan, link, Candidates(model, SMALLEST))
    x.grad = None
    with step.hooks():
        model().backward()
    step.end()
    assert torch.equal(x.grad, torch.full((400,), 2.0))
    assert not step.counts.num_recomputed and not step.counts.change
    assert step.counts.num_swapped == 1


def test_a_backward_in_another_order_is_right(link: Link) -> None:
    """Sources last until what is made of them was."""

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        y = (weight * 2).exp()
        return y.sin().sum(), (y * 3).tanh().pow(2).sum()

    class Two(nn.Module):
        def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
            return losses()

    model, weight = Two(), torch.linspace(-1, 1, 400, requires_grad=True)
    first, second = model()
    expected = [*torch.autograd.grad(first, weight, retain_graph=True)]
    expected += torch.autograd.grad(second, weight)

    def body() -> None:
        one, other = model()
        torch.autograd.grad(one, weight, retain_graph=True)
        torch.autograd.grad(other, weight)

    profile = profiled(Case(model, torch.zeros(1), torch.zeros(1)), link, body)
    plan = plan_with(profile, "tanh", "exp", "mul", is_swapped=True)
    step = SwappedStep(plan, link, Candidates(model, SMALLEST))
    with step.hooks():
        one, other = model()
        found = [*torch.autograd.grad(other, weight, retain_graph=True)]
        found = [*torch.autograd.grad(one, weight), *found]
    step.end()
    assert all(map(torch.equal, expected, found))


def test_a_graph_that_has_no_backward_is_released(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    plan = plan_with(profiled(case, link), "relu")
    gc.collect()
    gc.disable()
    held = needed_meter().held_bytes
    try:
        step = SwappedStep(plan, link, Candidates(case.model, SMALLEST))
        with step.hooks():
            case.loss()
        step.end()
        assert step.counts.num_recomputed
        assert needed_meter().held_bytes == held
    finally:
        gc.enable()


def test_a_backward_under_autocast_replays_without_it(link: Link) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU())
    inputs = torch.randn(8, 40)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(inputs).pow(2).mean()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    profile = profiled(Case(model, inputs, torch.zeros(1)), link, lambda: (gradients(), None)[1])
    step = SwappedStep(plan_with(profile, "linear"), link, Candidates(model, SMALLEST))
    with step.hooks():
        found = gradients()
    step.end()
    assert all(map(torch.equal, plain, found))
    assert step.counts.num_recomputed


def test_what_autocast_computes_has_no_recipe(link: Link) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU())

    def body() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(8, 40)).float().pow(2).mean()
        loss.backward()

    profile = profiled(Case(model, torch.zeros(1), torch.zeros(1)), link, body)
    assert not any(storage.recipe for storage in profile.storages)


def _with_call(plan: SwapPlan, change: Callable[[Call], Call]) -> SwapPlan:
    choices: list[Any] = []
    for choice in plan.choices:
        if isinstance(choice, Recomputed):
            first, *others = choice.recipe.calls
            recipe: Recipe = replace(choice.recipe, calls=(change(first), *others))
            choice = replace(choice, recipe=recipe)
        choices.append(choice)
    return replace(plan, choices=tuple(choices))


@pytest.mark.parametrize(
    "change",
    [
        lambda call: replace(call, function="torch.nn.functional.dropout"),
        lambda call: replace(call, function="os.system"),
        lambda call: replace(call, function="torch.load"),
        lambda call: Call("torch.Tensor.mul_", (call.args[0], 2.0)),
        lambda call: Call("torch.nn.functional.relu", call.args[:1], {"inplace": True}),
        lambda call: replace(
            call, args=(TensorArgument("absent.weight", "float32", (1,), (1,), 0), *call.args[1:])
        ),
        lambda call: replace(
            call, args=(TensorArgument("weight", "float31", (1,), (1,), 0), *call.args[1:])
        ),
    ],
)
def test_a_recipe_that_cannot_be_replayed_is_refused_at_the_start(
    link: Link, change: Callable[[Call], Call]
) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "exp")
    with pytest.raises(InputError):
        SwappedStep(_with_call(plan, change), link, Candidates(case.model, SMALLEST))


def test_a_recipe_that_writes_into_its_source_raises(link: Link) -> None:
    case = chain()
    plan = plan_with(profiled(case, link), "exp")
    plan = _with_call(plan, lambda call: Call("torch.nn.functional.relu", (call.args[0], True)))
    with pytest.raises(RuntimeError, match=IN_PLACE):
        swapped_step(case, link, plan)


def test_a_plan_with_recipes_is_followed_after_its_round_trip(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    plain = plain_step(case)
    plan = plan_with(profiled(case, link), "relu", is_swapped=True)
    again = SwapPlan.from_json(plan.to_json())
    assert again == plan
    assert_same(plain, swapped_step(case, link, again, on_change="raise"))
