"""What is decided for GPUs, and what is refused on them. Stub replicas stand for engines."""

from __future__ import annotations

from pathlib import Path

import pytest

import elbowroom
from elbowroom.core.errors import InputError
from elbowroom.core.units import GIB
from tests.app.stub_command import Jobs
from tests.fake_gpus import Show, engine_for_gpus, show_gpus  # noqa: F401 (fixtures)
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

pytestmark = pytest.mark.usefixtures("engine_for_gpus", "jobs")


@pytest.fixture
def files(tmp_path: Path, jobs: Jobs) -> tuple[Path, Path, Path]:
    model = write_model(tmp_path / "tiny")
    return model, write_batch(tmp_path / "rows.jsonl", 4), tmp_path / "answers.jsonl"


def test_replicas_share_one_gpu_and_a_pool(
    files: tuple[Path, Path, Path],
    show_gpus: Show,  # noqa: F811
) -> None:
    show_gpus(1)
    report = elbowroom.run_batch(*files, replicas=2, pool="mapped")
    assert report.num_succeeded == 4
    assert report.plan.shares[0].mode == "mapped"
    assert report.plan.engine.dtype == "bfloat16", "as the model says, whatever the CPU can do"
    assert report.plan.prediction is None, "nothing is known of the GPU's speed"
    assert report.plan.budget.memory_bytes < 70000 * 2**20 / 2


def test_a_preset_predicts(files: tuple[Path, Path, Path], show_gpus: Show) -> None:  # noqa: F811
    show_gpus(1)
    report = elbowroom.run_batch(*files, replicas=2, pool="none", cluster="h100-1", memory="1GiB")
    assert report.plan.prediction is not None


def test_one_replica_for_each_gpu(files: tuple[Path, Path, Path], show_gpus: Show) -> None:  # noqa: F811
    show_gpus(2)
    report = elbowroom.run_batch(*files, memory="1GiB")
    assert (report.plan.num_replicas, report.plan.shares[0].mode) == (2, "none")


@pytest.mark.parametrize(
    ("num_gpus", "options", "why"),
    [
        (2, {"replicas": 2, "pool": "streamed"}, "between several GPUs"),
        (1, {"replicas": 2, "memory": 60 * GIB}, "lower --memory or --replicas"),
        (0, {}, "nvidia-smi shows none"),
    ],
)
def test_refused(
    files: tuple[Path, Path, Path],
    show_gpus: Show,  # noqa: F811
    num_gpus: int,
    options: dict[str, object],
    why: str,
) -> None:
    show_gpus(num_gpus)
    with pytest.raises(InputError, match=why):
        elbowroom.run_batch(*files, **options)
