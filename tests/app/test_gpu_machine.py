"""What is decided for GPUs, and what is refused on them. Stub replicas stand for engines."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import elbowroom
from elbowroom.app import runnable
from elbowroom.app.machine import THIS_MACHINE, find_cluster, find_engine_cluster, split_cores
from elbowroom.app.plan import model_facts, plan_job, run_plan
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.errors import InputError, MeasuringError
from elbowroom.core.units import GIB
from elbowroom.core.workload import parse_lengths
from elbowroom.planning.pool.layouts import NOT_BETWEEN_GPUS
from tests.app.stub_command import Jobs
from tests.fake_gpus import Show, engine_for_gpus, show_gpus  # noqa: F401 (fixtures)
from tests.jobs.plans import write_batch
from tests.planning.facts import MODELS
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
    said = io.StringIO()
    report = elbowroom.run_batch(*files, memory="1GiB", console=Console(file=said, width=200))
    assert (report.plan.num_replicas, report.plan.shares[0].mode) == (2, "none")
    assert f"pool none: {NOT_BETWEEN_GPUS}\n" in said.getvalue()


def test_kernels_for_quantised_weights_are_left_to_vllm(
    files: tuple[Path, Path, Path],
    show_gpus: Show,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runnable, "is_known_engine", lambda _: pytest.fail("it was asked"))
    write_model(files[0], quantization_config={"quant_method": "awq", "bits": 4})
    show_gpus(1)
    assert elbowroom.run_batch(*files, memory="1GiB").num_succeeded == 4


@pytest.mark.parametrize(
    ("num_gpus", "options", "why"),
    [
        (2, {"replicas": 2, "pool": "streamed"}, "between several GPUs"),
        (1, {"replicas": 2, "memory": 60 * GIB}, "lower --memory or --replicas"),
        (1, {"replicas": 1, "tensor_parallel": 2, "memory": GIB}, "2 needs as many .* there are 1"),
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


def test_only_what_the_engine_computes_on_is_not_measured(show_gpus: Show) -> None:  # noqa: F811
    """Training computes on the CPU, whatever the engine is built for."""
    show_gpus(1)
    cores = split_cores(2)
    assert find_cluster(THIS_MACHINE, cores).num_devices == 2
    with pytest.raises(MeasuringError, match="GPUs are not measured"):
        find_engine_cluster(THIS_MACHINE, cores, "bfloat16")
    shared = find_engine_cluster("h100-1", cores, "bfloat16")
    assert (shared.num_devices, shared.device.maps_peers) == (2, True)
    alone = read_cluster("h100-1").device
    assert shared.device.memory_bandwidth.peak == alone.memory_bandwidth.peak / 2


def test_plans_for_other_clusters_need_no_gpu(show_gpus: Show) -> None:  # noqa: F811
    show_gpus(0)
    settings = PlanSettings(MODELS / "Qwen3-32B", "h200-8", tensor_parallel=1, pool="none")
    model = model_facts(settings)
    planned = plan_job(settings, model, parse_lengths("64:256x20"), "")
    assert planned.choice.best is not None
    assert run_plan(planned, planned.choice.best, settings).num_replicas == 8
