"""The machine we run on: measured once, within its budget, or assumed; calibrated by runs."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.app import machine
from elbowroom.app.machine import (
    assumed_machine,
    cache_path,
    calibrated,
    divided,
    find_cluster,
    find_machines,
)
from elbowroom.app.plan import model_facts, plan_job
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.cli.main import main
from elbowroom.core import host
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.errors import InputError, MeasuringError
from elbowroom.core.workload import parse_lengths
from elbowroom.profiling.machine import measure_machine
from tests.planning.facts import CPU, MODELS

TWO = ((0,), (1,))
MIB = 2**20


def test_a_run_calibrates(tmp_path: Path) -> None:
    """A run at half the predicted speed makes the next prediction twice as long."""
    report = {
        "plan": {"prediction": {"output_tokens": 100, "seconds": 5.0}},
        "output_tokens_per_second": 10.0,
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    settings = PlanSettings(MODELS / "Qwen3-32B", "h200-8", tensor_parallel=1)
    model, rows = model_facts(settings), parse_lengths("64:256x200")
    before = plan_job(settings, model, rows, "").choice.best
    after = plan_job(replace(settings, calibrate=path), model, rows, "").choice
    assert before is not None
    again = next(c for c in after.candidates if c.layout == before.layout)
    assert before.layout.pool == "none"
    assert again.seconds == pytest.approx(2 * before.seconds, rel=0.01)
    prediction = {"output_tokens": 0, "prompt_tokens": 100, "seconds": 5.0}
    embedded = {"plan": {"prediction": prediction}, "prompt_tokens_per_second": 10.0}
    path.write_text(json.dumps({**embedded, "output_tokens_per_second": 0.0}))
    assert "2.000 times as long" in calibrated(CPU, path).sources["calibration"]
    path.write_text("{}")
    with pytest.raises(InputError, match="no prediction beside its outcome"):
        calibrated(CPU, path)


class Measured:
    """Stands for a measurement; counts how often it is made."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[object, str]] = []

    def __call__(self, cores: object, dtype: str) -> object:
        self.calls.append((cores, dtype))
        if self.error:
            raise self.error
        return CPU


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = Measured()
    monkeypatch.setattr(machine, "measure_machine", measured)
    return measured


def test_this_machine_is_measured_once_in_each_dtype(measured: Measured) -> None:
    said: list[str] = []
    for _ in range(2):
        assert find_cluster("this-machine", TWO, "bfloat16", said.append) == CPU
        assert find_cluster("this-machine", TWO, "float32", said.append) == CPU
    assert measured.calls == [(TWO, "bfloat16"), (TWO, "float32")]
    assert len(said) == 2
    assert str(cache_path(TWO)) in said[0]


def test_a_cache_that_cannot_be_used_costs_a_measurement(
    measured: Measured, tmp_path: Path
) -> None:
    (tmp_path / "elbowroom").write_text("in the way")
    said: list[str] = []
    assert find_cluster("this-machine", TWO, say=said.append) == CPU
    assert "the measurement is not kept" in said[-1]
    (tmp_path / "elbowroom").unlink()
    path = cache_path(TWO)
    assert path is not None
    path.parent.mkdir()
    path.write_text("name = 'cut o")
    assert find_cluster("this-machine", TWO) == CPU
    assert read_cluster(path) == CPU, "it was made again"


def test_without_a_home_nothing_is_kept(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    said: list[str] = []
    assert cache_path(TWO) is None
    assert find_cluster("this-machine", TWO, say=said.append) == CPU
    assert "there is no home folder" in said[0]


def test_a_machine_that_cannot_be_measured_is_assumed(measured: Measured) -> None:
    measured.error = MeasuringError("boom")
    said: list[str] = []
    found = find_machines("this-machine", 2, 64 * MIB, "bfloat16", say=said.append)
    assert not found.is_measured
    assert "not measured, so no times are predicted: boom" in said[-1]
    assert found.clusters[0].device.usable_bytes == 64 * MIB
    with pytest.raises(MeasuringError):
        find_cluster("this-machine", TWO)


def test_one_device_of_all_cores_is_compared_with_its_parts(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    found = find_machines("this-machine", None, None, "bfloat16")
    assert measured.calls == [((tuple(range(6)),), "bfloat16")], "parts are not measured again"
    assert [cluster.num_devices for cluster in found.clusters] == [CPU.num_devices, 2, 6]


def test_replicas_that_share_cores_are_not_measured_each(measured: Measured) -> None:
    """A hundred replicas on two cores are measured as two, of which each has a fiftieth."""
    cores = [(rank % 2,) for rank in range(100)]
    cluster = find_cluster("this-machine", cores)
    assert measured.calls == [(TWO, "bfloat16")]
    assert cluster.num_devices == 100
    assert cluster.device.flops.peak == pytest.approx(CPU.device.flops.peak / 50)
    assert cluster.link(100).num_devices == 100


def test_each_socket_has_an_engine_of_its_own(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cores", lambda: (0, 1, 2, 3))
    nodes = ((0, 2), (1, 3))  # as some systems number them
    monkeypatch.setattr(host, "memory_nodes", lambda: nodes)
    assert len(find_machines("this-machine", None, None, "bfloat16").clusters) == 1
    assert measured.calls == [(nodes, "bfloat16")]


def test_parts_share_rates_and_not_the_work_of_engines() -> None:
    half = divided(assumed_machine([(0, 1, 2, 3)]), 2, "2 cores")
    other = assumed_machine(((0, 1), (2, 3)))
    assert half.device == replace(other.device, name="2 cores")
    assert half.link(2).bandwidth == other.link(2).bandwidth


def test_profile_measures_this_machine(tmp_path: Path) -> None:
    """Every number is one that a computer could have; how fast it is says nothing about us."""
    path = tmp_path / "machine.toml"
    assert main(["profile", "--out", str(path), "--replicas", "1"]) == 0
    device = read_cluster(path).device
    assert 1e8 < device.flops.peak < 1e15
    assert 1e7 < device.attention_bandwidth.peak < 1e13
    assert 1e-7 < device.layer_seconds < 1
    rates = [point.elements_per_second for point in device.matmul]
    assert rates[-1] < rates[0], "more rows take longer"
    assert main(["profile", "--out", str(path), "--replicas", "1000"]) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slow_machine_is_measured_with_fewer_rows(dtype: str) -> None:
    """What takes longer than there is time is left out; a rate of each kind is there."""
    cluster = measure_machine([[host.cores()[0]]], dtype, 12.0)
    assert cluster.sources["dtype"] == dtype
    rows = [point.rows for point in cluster.device.matmul]
    assert rows[0] == 1
    assert cluster.device.attention_flops.peak > 0


MEASURING = {
    "ends": ("import sys; print('why', file=sys.stderr); sys.exit(3)", "ended with code 3"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "ended with code -9"),
    "hangs": ("import time; time.sleep(99)", "did not answer in time"),
    "talks on": ("print('ready')", "said"),
}


@pytest.mark.parametrize(("code", "words"), MEASURING.values(), ids=MEASURING)
def test_a_measurement_that_fails_names_its_log(code: str, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(MeasuringError, match=words) as caught:
        measure_machine([[0], [0]], seconds=2.0, command=(sys.executable, "-c", code))
    assert time.monotonic() - begin < 20
    log = Path(str(caught.value).rpartition(": ")[2])
    assert ("why" in log.read_text()) == ("code 3" in words)
    log.unlink()
