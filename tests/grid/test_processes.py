"""A grid of processes: it trains as threads do, and its checkpoints load on any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.training.checkpoint import newest_checkpoint
from tests.grid.member import SAMPLES, GridCase
from tests.grid.nets import batches_of, grids_of, model_of, shapes_for, train_plainly
from tests.pipeline.members import Members

_TOLERANCE = 1e-12
_NET = "resnet"


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    found = Members("tests.grid.member")
    yield found
    found.end()


def plan(procs: int, *roles: str) -> GridPlan:
    """A plan with the first grid of each layer that splits each of these roles, or by batch."""
    shapes = shapes_for(model_of(_NET), batches_of(_NET, SAMPLES)[0])
    layers = []
    for layer in shapes.weighted:
        grids = grids_of(shapes, layer, procs)
        parts = {
            "space": lambda grid: max(grid.space, default=1),
            "out": lambda grid: grid.outputs,
            "in": lambda grid: grid.inputs,
            "batch": lambda grid: grid.batch,
        }
        fitting = [grid for grid in grids if all(parts[role](grid) > 1 for role in roles)]
        layers.append((fitting or [LayerGrid(layer.name, procs)])[0])
    return GridPlan(procs, SAMPLES, tuple(layers))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by name."""
    (path,) = folder.glob("step-*")
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def saved(members: Members, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps on 2 x 2: output features and space, or output and input."""
    folder = tmp_path_factory.mktemp("saved")
    layers = [*plan(4, "space", "out").layers[:-1], plan(4, "in", "out").layers[-1]]
    by_name = GridPlan(4, SAMPLES, tuple(layers))
    seen = members.run(GridCase(_NET, by_name.to_json(), 2, saves_to=str(folder / "kept")), folder)
    assert [each["error"] for each in seen] == [""] * 4
    expected = train_plainly(model_of(_NET), batches_of(_NET, SAMPLES)[:2])
    for each in seen:
        assert each["losses"] == pytest.approx(expected.losses, rel=_TOLERANCE)
    return folder / "kept"


def test_plain_models_load_it(saved: Path) -> None:
    model, expected = model_of(_NET), train_plainly(model_of(_NET), batches_of(_NET, SAMPLES)[:2])
    checkpoint = newest_checkpoint(saved)
    assert checkpoint is not None
    with torch.no_grad():
        checkpoint.load_weights(model)
    for name, parameter in model.named_parameters():
        assert (parameter - expected.weights[name]).abs().max() <= _TOLERANCE
    for name, buffer in model.named_buffers():
        assert (buffer - expected.buffers[name]).abs().max() <= _TOLERANCE, name


@pytest.mark.parametrize("procs", [1, 3, 4])
def test_any_grid_loads_it(members: Members, saved: Path, tmp_path: Path, procs: int) -> None:
    """What another grid loads, it saves again to the bit; and it trains on as one process would."""
    other = plan(procs, *(["batch", "in"] if procs == 4 else []))
    again = GridCase(_NET, other.to_json(), 2, str(saved), 2, saves_to=str(tmp_path / "again"))
    (tmp_path / "first").mkdir()
    assert [each["error"] for each in members.run(again, tmp_path / "first")] == [""] * procs
    before, after = tensors_of(saved), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "second").mkdir()
    seen = members.run(GridCase(_NET, other.to_json(), 3, str(saved), 2), tmp_path / "second")
    expected = train_plainly(model_of(_NET), batches_of(_NET, SAMPLES)).losses[2:]
    for each in seen:
        assert each["losses"] == pytest.approx(expected, rel=_TOLERANCE)


def test_workers_of_some_layers_save(members: Members, tmp_path: Path) -> None:
    """Worker 0 has no state of the first layers, which the others save before the rest."""
    layers = [LayerGrid(layer.name, 2, workers=(1, 2)) for layer in plan(3).layers[:2]]
    by_sets = GridPlan(3, SAMPLES, (*layers, *plan(3, "out").layers[2:]))
    kept = tmp_path / "kept"
    seen = members.run(GridCase(_NET, by_sets.to_json(), 2, saves_to=str(kept)), tmp_path)
    assert [each["error"] for each in seen] == [""] * 3
    expected, tensors = (
        train_plainly(model_of(_NET), batches_of(_NET, SAMPLES)[:2]),
        tensors_of(kept),
    )
    for name, weight in expected.weights.items():
        assert (tensors[f"model.{name}"] - weight).abs().max() <= _TOLERANCE, name
        assert tensors[f"optimizer.{name}.momentum_buffer"].shape == weight.shape


def test_a_worker_that_says_nothing(members: Members, tmp_path: Path) -> None:
    """The others end within the timeout, and name one that they waited for."""
    case = GridCase(_NET, plan(3).to_json(), 2, silent=1, seconds=3.0)
    seen = members.run(case, tmp_path)
    assert seen[1]["error"] == ""
    for number in (0, 2):
        assert seen[number]["error"].startswith("PeerLostError: worker 1"), seen[number]
        assert seen[number]["seconds"] < 20
    members.end()  # what is left of that group is not for other tests
