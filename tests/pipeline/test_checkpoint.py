"""Checkpoints: whole or not at all, the same weights as without a stop, on any number of stages."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from elbowroom.core.errors import InputError
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.training.checkpoint import Checkpoint
from tests.pipeline.models import plan_of
from tests.pipeline.test_training import files, start

__all__ = ["files"]

STEPS = ("--every", "20", "--lr", "0.01")


def _train(folder: Path, checkpoints: Path, workers: int, steps: int, *torchrun: str) -> str:
    flags = ("--steps", str(steps), "--checkpoints", str(checkpoints), *STEPS)
    process = start(folder, workers, f"plan{workers}.json", *flags, torchrun=torchrun)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def _weights(checkpoint: Path) -> dict[str, bytes]:
    """Weights of all stages and the optimizer's state, bit by bit."""
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {name: one.numpy().tobytes() for name, one in load_file(path).items()}
    return tensors


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of 60 steps on three workers without a stop: the last two."""
    folder = tmp_path_factory.mktemp("whole")
    _train(files, folder, 3, 60)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000040", "step-00000060"]
    return folder


def test_a_run_that_goes_on_gives_what_it_would_have_given(
    files: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "step-00000040", tmp_path / "step-00000040")
    said = _train(files, tmp_path, 3, 60)
    assert "20 minibatches in" in said
    assert _weights(tmp_path / "step-00000060") == _weights(whole / "step-00000060")


def test_on_another_number_of_stages(files: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "step-00000060", tmp_path / "step-00000060")
    _train(files, tmp_path, 2, 80)
    before, after = (_weights(tmp_path / f"step-000000{n}") for n in (60, 80))
    assert set(before) == set(after)
    assert before != after
    assert len(list((tmp_path / "step-00000080").glob("*.safetensors"))) == 2


def test_a_worker_dies_and_torchrun_starts_again(files: Path, whole: Path, tmp_path: Path) -> None:
    """What was being written is not taken for a checkpoint."""
    (tmp_path / "step-00000050.part").mkdir()
    shutil.copytree(whole / "step-00000040", tmp_path / "step-00000040")
    flags = ("--steps", "60", "--checkpoints", str(tmp_path), *STEPS)
    restarts = ("--max-restarts", "1")
    process = start(files, 3, "plan3.json", *flags, torchrun=restarts)
    children: list[psutil.Process] = []
    while len(children) < 3:
        children = psutil.Process(process.pid).children()
    children[1].send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert _weights(tmp_path / "step-00000060") == _weights(whole / "step-00000060")


def test_what_does_not_fit(files: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000040"
    shutil.copytree(whole / "step-00000040", path)
    index = json.loads((path / "index.json").read_text())
    lost = next(name for name in index["files"] if name.startswith("model."))
    del index["files"][lost]
    (path / "index.json").write_text(json.dumps(index))
    flags = ("--steps", "60", "--checkpoints", str(tmp_path), *STEPS)
    process = start(files, 3, "plan3.json", *flags)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"has no tensor '{lost}'" in said
    finished = start(files, 3, "plan3.json", "--steps", "40", "--checkpoints", str(whole))
    said, _ = finished.communicate(timeout=120)
    assert finished.returncode != 0
    assert "has learned from 60 already" in said


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _trained(num_steps: int) -> tuple[nn.Module, Pipeline]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer_fn = partial(torch.optim.SGD, lr=0.1)
    plan = plan_of([["input", "0", "1", "2"]])
    pipeline = Pipeline(model, plan, optimizer_fn, nn.functional.mse_loss)
    for _ in range(num_steps):
        pipeline.train_step((torch.randn(8, 3), torch.randn(8, 1)))
    return model, pipeline


@pytest.mark.usefixtures("alone")
def test_weights_for_a_plain_model(tmp_path: Path) -> None:
    model, pipeline = _trained(3)
    other, _ = _trained(0)
    Checkpoint(pipeline.save(tmp_path)).load_weights(other)
    assert not torch.equal(model[0].weight, _trained(0)[0][0].weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.usefixtures("alone")
def test_the_folder_of_another_run(tmp_path: Path) -> None:
    """Which has come further: neither its checkpoints are lost, nor ours at once."""
    _trained(5)[1].save(tmp_path)
    with pytest.raises(InputError, match="beyond step 3, of another run"):
        _trained(3)[1].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.usefixtures("alone")
def test_a_stage_without_weights(tmp_path: Path) -> None:
    def begin() -> Pipeline:
        plan, optimizer_fn = plan_of([["input", "0"]]), partial(torch.optim.AdamW, lr=0.1)
        return Pipeline(nn.Sequential(nn.Tanh()), plan, optimizer_fn, nn.functional.mse_loss)

    batch = (torch.zeros(2, 3), torch.ones(2, 3))
    pipeline = begin()
    assert pipeline.train_step(batch) == 1.0
    pipeline.save(tmp_path)
    pipeline.close()
    resumed = begin()
    assert resumed.restore(tmp_path) == 1
    assert resumed.train_step(batch) == 1.0
    resumed.close()
