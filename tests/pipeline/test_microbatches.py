"""Microbatches of unlike shapes give the step of the whole minibatch, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn import functional

import elbowroom
from elbowroom import Microbatch, StageOptions
from elbowroom.core.errors import InputError
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.plans.pipeline_schedule import Kind
from elbowroom.swap.link import Link
from elbowroom.swap.minibatches import SwappedMinibatches
from elbowroom.swap.tier import MemoryTier
from elbowroom.training.checkpoint import newest_checkpoint
from elbowroom.training.keeping import Keeper
from elbowroom.training.layers import trace_model
from elbowroom.training.script import load_script
from tests.pipeline.members import Members
from tests.pipeline.models import plan_of
from tests.pipeline.script_member import ScriptCase, plans
from tests.pipeline.test_public_scripts import plain
from tests.pipeline.test_training import start

SCRIPTS = Path(__file__).parents[1] / "data" / "training"


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    members = Members("tests.pipeline.script_member")
    yield members
    members.end()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["unlike_lengths", "unlike_lengths_by_row"])
@pytest.mark.parametrize(("stages", "replicas", "count"), [(2, 1, 4), (2, 1, 1), (1, 2, 5)])
def test_as_plain_steps_over_whole_minibatches(
    members: Members, tmp_path: Path, name: str, stages: int, replicas: int, count: int
) -> None:
    """Weights after 6 steps, in float64; means over tokens, and over rows."""
    path = SCRIPTS / f"{name}.py"
    case = ScriptCase(str(path), stages, 6, microbatches=count, num_replicas=replicas)
    seen = members.run(case, tmp_path)
    assert [one["error"] for one in seen] == ["", ""]
    found = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    expected, begin = plain(path, 6), plain(path, 0)
    assert set().union(*found) == expected.keys()
    for weights in found:
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-12, atol=1e-12)
    assert all((expected[key] - begin[key]).abs().max() > 1e-6 for key in expected)


DIES_ONCE = """
import os

make_batch_that_lives, made = make_batch, []


def make_batch(generator):
    made.append(None)
    if (len(made), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (6, "1", "0"):
        os._exit(9)
    return make_batch_that_lives(generator)
"""
"""A worker ends as it makes its sixth minibatch, unless all have been started again."""


def test_a_run_that_starts_again(tmp_path: Path) -> None:
    """By torchrun, with stages that swap: weights in the end are those of the plain loop."""
    path = SCRIPTS / "unlike_lengths.py"
    plan = next(plans(load_script(path), 2))
    stages = [replace(one, in_flight=3, memory_bytes=99, swapped_bytes=1) for one in plan.stages]
    plan = replace(plan, stages=tuple(stages))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    (tmp_path / "train.py").write_text(path.read_text() + DIES_ONCE)
    kept = tmp_path / "kept"
    flags = ("--semantics", "flush", "--microbatches", "4", "--steps", "6")
    flags = (*flags, "--every", "2", "--checkpoints", str(kept))
    process = start(tmp_path, 2, "plan.json", *flags, torchrun=("--max-restarts", "1"))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "2 minibatches in" in said
    model = load_script(path).make_model(1)
    checkpoint = newest_checkpoint(kept)
    assert checkpoint is not None
    checkpoint.load_weights(model)
    expected = plain(path, 6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_lengths_are_unlike() -> None:
    """The comparison above would prove little if the shapes were alike."""
    script = load_script(SCRIPTS / "unlike_lengths.py")
    batch = script.make_batch(torch.Generator().manual_seed(0))
    parts = script.make_microbatches(batch, 4)
    shapes = {tuple(part.inputs[0].shape) for part in parts}
    assert len({rows for rows, _ in shapes}) > 1
    assert len({length for _, length in shapes}) > 1


def pipeline_of(
    model: nn.Module,
    inputs: Any,
    options: StageOptions,
    loss_fn: Callable[..., Any],
    keeper: Keeper | None = None,
) -> Pipeline:
    names = [layer.name for layer in trace_model(model.train(), inputs).layers]
    optimizer_fn = partial(torch.optim.SGD, lr=0.5)
    return Pipeline(model, plan_of([names]), optimizer_fn, loss_fn, options, keeper=keeper)


def rows(*numbers: int, size: float | None = None) -> list[Microbatch]:
    """Of a linear model from 3 to 1, in as many rows each."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(number, 4, generator=generator) for number in numbers]
    return [Microbatch(part[:, :3], part[:, 3:], size) for part in parts]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", [None, 7.0])
def test_losses_are_weighted_as_gradients_are(size: float | None) -> None:
    """By rows, so that it is the loss of all; or by given sizes, here all alike."""
    torch.manual_seed(0)
    model, parts = nn.Linear(3, 1), rows(5, 1, 2, size=size)
    expected = [functional.mse_loss(model(part.inputs), part.targets) for part in parts]
    shares = [5 / 8, 1 / 8, 2 / 8] if size is None else [1 / 3] * 3
    total = sum(loss * share for loss, share in zip(expected, shares, strict=True))
    assert isinstance(total, torch.Tensor)
    gradient = torch.autograd.grad(total, model.weight)[0]
    before = model.weight.detach().clone()
    options = StageOptions("flush", 3)
    pipeline = pipeline_of(nn.Sequential(model), parts[0].inputs, options, functional.mse_loss)
    loss = pipeline.train_step(parts)
    pipeline.close()
    assert loss == pytest.approx(total.item(), rel=1e-6)
    assert isinstance(loss, float)
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * gradient)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("schedule", ["1f1b-flush", "gpipe"])
def test_a_keeper_changes_nothing(schedule: Kind) -> None:
    """To the bit, though what leaves has another size each time."""
    weights, moved = [], []
    for keeper in (None, SwappedMinibatches(Link(MemoryTier(1 << 20)), smallest_bytes=1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
        options = StageOptions("flush", 4, schedule=schedule)
        parts = rows(5, 1, 9, 2)
        pipeline = pipeline_of(model, parts[0].inputs, options, functional.mse_loss, keeper)
        for _ in range(2):
            pipeline.train_step(parts)
        weights.append([weight.detach().clone() for weight in pipeline.module.parameters()])
        pipeline.close()
        moved.append(keeper.in_bytes if keeper else 0)
    assert all(map(torch.equal, *weights))
    assert (moved[1] > 0) == (schedule == "gpipe")  # else the only one in flight stays


@pytest.mark.usefixtures("alone")
def test_lists_of_two_tensors_are_whole_minibatches() -> None:
    """As torch's DataLoader gives them."""
    batch = [torch.randn(4, 3), torch.randn(4, 1)]
    options = StageOptions("flush", 2)
    pipeline = pipeline_of(nn.Sequential(nn.Linear(3, 1)), batch[0], options, functional.mse_loss)
    assert pipeline.train_step(batch) is not None  # type: ignore[arg-type]
    pipeline.close()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        (StageOptions("stash"), rows(2), "semantics 'stash'"),
        (StageOptions("predict"), rows(2, 3), "semantics 'predict'"),
        (StageOptions("flush", 2), [], "a list of 0 microbatches"),
        (
            StageOptions("flush", 2),
            rows(2, 2, 2),
            "a list of 3 microbatches, and the options say 2",
        ),
        (StageOptions("flush"), rows(2, 2), "a list of 2 microbatches, and the options say 1"),
        (StageOptions("flush", 2), rows(2, 0), "more than 0"),
        (StageOptions("flush", 2), rows(2, 2, size=-1.0), "more than 0"),
        (StageOptions("flush", 2), rows(2, 2, size=float("nan")), "more than 0"),
        (StageOptions("flush", 2), rows(2, 2, size=float("inf")), "more than 0"),
        (StageOptions("flush", 3), [tuple(part[:2]) for part in rows(2, 2, 2)], "Microbatch"),
    ],
)
def test_lists_that_are_refused(options: StageOptions, batch: Sequence[Any], words: str) -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 3)
    pipeline = pipeline_of(model, inputs, options, functional.mse_loss)
    for _ in range(2):  # before anything is built, and after
        with pytest.raises(InputError, match=words):
            pipeline.train_step(batch)
        if options.microbatches < 3:
            pipeline.train_step((inputs, torch.randn(2, 1)))
    pipeline.close()


class Looks(nn.Module):
    """Can only be exported, with the sizes that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.size(0) > 1 else self.linear(-x)


class Scales(nn.Module):
    """Its graph keeps a number that stands beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        return self.linear(x) / scale


class Counts(nn.Module):
    """Its graph keeps a length that the forward gets past the tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / _count(x)


def _count(x: Any) -> int:
    """The rows, or what a tracer's stand-in is told instead."""
    return len(x) if isinstance(x, torch.Tensor) else 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Looks(), "was exported with"),
        (Counts(), "minibatch 0, microbatch 2: the stages give something else"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_graphs_of_one_shape(model: nn.Module, words: str) -> None:
    options = StageOptions("flush", 3)
    parts = rows(2, 2, 3)
    pipeline = pipeline_of(model, parts[0].inputs, options, functional.mse_loss)
    with pytest.raises(InputError, match=words):
        pipeline.train_step(parts)
    assert pipeline.train_step(rows(2, 2, 2)) is not None
    pipeline.close()


@pytest.mark.usefixtures("alone")
def test_numbers_beside_tensors() -> None:
    options = StageOptions("flush", 2)
    one, other = (part._replace(inputs=(part.inputs, 2)) for part in rows(2, 2))
    pipeline = pipeline_of(Scales(), one.inputs, options, functional.mse_loss)
    with pytest.raises(InputError, match="the input 3 where the first minibatch had 2"):
        pipeline.train_step([one, other._replace(inputs=(other.inputs[0], 3))])
    assert pipeline.train_step([one, other]) is not None
    pipeline.close()


def test_what_scripts_may_return(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    source = (SCRIPTS / "unlike_lengths.py").read_text()
    path.write_text(source.replace("return parts", "return [tuple(part) for part in parts]"))
    script = load_script(path)
    batch = script.make_batch(torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="make_microbatches must return a list"):
        script.make_microbatches(batch, 4)
    with pytest.raises(InputError, match=r"make_microbatches failed: .*13 microbatches"):
        script.make_microbatches(batch, 13)
    assert elbowroom.Microbatch is Microbatch
