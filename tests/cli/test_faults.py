"""What a job can do without fails, one thing at a time: its rows are answered all the same."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elbowroom.app import batch, machine, prepare
from elbowroom.app.predict import Predictor
from elbowroom.cli import run
from elbowroom.cli.main import main
from elbowroom.core import host
from elbowroom.core.errors import OutputError, PoolError
from elbowroom.jobs.job import Job
from elbowroom.jobs.progress import ProgressView
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from elbowroom.pool.run_dir import default_root
from elbowroom.profiling.machine import measure_machine
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]
NUM_ROWS = 6
MIB = 2**20


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("this part fails")


class Broken(io.StringIO):
    """A terminal that is gone."""

    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")


def measuring(code: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A first run, on which the measuring process runs ``code``."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", os.environ["PYTEST_FOLDER"])
        command = (sys.executable, "-c", code)
        measure = partial(measure_machine, seconds=2.0, command=command)
        monkeypatch.setattr(machine, "measure_machine", measure)

    return inject


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", fail_to_find)
    monkeypatch.setattr(machine, "measure_machine", fail)


def fail_to_find(_: int) -> None:
    raise KeyError("no such user")


def read_only_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys")  # where not even root may write
    monkeypatch.setattr(machine, "measure_machine", lambda cores, _: machine.assumed_machine(cores))


def screen(**options: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("elbowroom.cli.main.Console", partial(Console, **options))

    return inject


def broken(target: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(target, name, fail)


def report_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("cannot write report: no space")

    monkeypatch.setattr(JobReport, "write", refuse)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "measuring fails": (measuring("1/0"), "not measured"),
    "measuring hangs": (measuring("import time; time.sleep(99)"), "did not answer in time"),
    "measuring is killed": (measuring("import os; os.kill(os.getpid(), 9)"), "code -9"),
    "measuring has a fault": (broken(machine, "find_cluster"), "this part fails"),
    "the cache is read-only": (read_only_cache, "the measurement is not kept"),
    "there is no home": (without_home, "not measured"),
    "lengths cannot be read": (broken(prepare, "read_lengths"), "no prediction: this part fails"),
    "prediction fails": (broken(Predictor, "_predict"), "no prediction: this part fails"),
    "looking back fails": (broken(Predictor, "for_actual"), "this part fails"),
    "the table of layouts fails": (broken(prepare, "print_plan_table"), "no table of layouts"),
    "the live view fails": (broken(ProgressView, "_show"), "no progress: this part fails"),
    "the report cannot be written": (report_refused, "no report file: cannot write report"),
    "the summary fails": (broken(run, "print_summary"), "no summary: this part fails"),
    "the terminal has 50 columns": (screen(width=50, force_terminal=True), "KV tokens"),
    "the terminal has 10 columns": (screen(width=10, force_terminal=True), ""),
    "the terminal is gone": (screen(file=Broken()), ""),
}


@pytest.mark.parametrize("num_refused", [0, 1])
@pytest.mark.parametrize(("inject", "said"), FAULTS.values(), ids=FAULTS)
def test_rows_are_answered_all_the_same(
    inject: Callable[[pytest.MonkeyPatch], None],
    said: str,
    num_refused: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code follows from the rows alone."""
    stub = [sys.executable, "-m", "tests.jobs.stub_replica"]
    if num_refused:
        stub += ["--refuses", str(NUM_ROWS)]

    async def run_with_stub(job: Job) -> JobReport:
        return await run_job(job, stub)

    monkeypatch.setattr(batch, "run_job", run_with_stub)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTEST_FOLDER", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # logs of measuring stay there
    inject(monkeypatch)
    output = tmp_path / "out.jsonl"
    files = ("--input", str(write_batch(tmp_path / "in.jsonl", NUM_ROWS)), "--output", str(output))
    flags = ("--model", str(write_model(tmp_path / "model")), "--memory", "64MiB")
    code = main(["run", *files, *flags, "--max-num-seqs", "4"])
    err = capsys.readouterr().err
    assert code == (3 if num_refused else 0), err
    assert len(output.read_text().splitlines()) == NUM_ROWS - num_refused
    assert said in err
    assert "Traceback" not in err


def test_a_pool_that_does_not_fit_in_shared_memory_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docker gives it: 64 MB of ``/dev/shm``, unless ``--shm-size`` says more."""
    free = {Path("/dev/shm"): 64 * MIB, tmp_path: 1024 * MIB}
    monkeypatch.setattr(host, "shared_memory_folder", lambda: Path("/dev/shm"))
    monkeypatch.setattr(host, "temporary_folder", lambda: tmp_path)
    monkeypatch.setattr(host, "free_bytes", free.__getitem__)
    said: list[str] = []
    assert default_root(64 * MIB, said.append) == Path("/dev/shm")
    assert not said
    assert default_root(65 * MIB, said.append) == tmp_path
    assert "--shm-size" in said[0]
    with pytest.raises(PoolError, match=r"--shm-size.* or use --pool none"):
        default_root(1025 * MIB, said.append)


_POOL = """
from pathlib import Path
import torch
from elbowroom.pool.run_dir import run_directory
from elbowroom.pool.shared_memory import SharedMemoryStore

said = []
with run_directory(num_bytes=100 << 20, say=said.append) as path:
    owner, peer = SharedMemoryStore(path, 0), SharedMemoryStore(path, 1)
    owner.allocate(0, 100 << 20).fill_(7)
    owner.publish(0)
    assert int(peer.open(0, 0, 100 << 20, 1.0).min()) == 7
print(said[0])
"""


def test_a_small_shared_memory_for_real(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=64m none /dev/shm"
    inside = ["unshare", "-rm", "sh", "-c"]
    try:
        subprocess.run([*inside, mount], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system gives no user a mount of its own")
    code = f'{mount} && exec "$0" -c "$1"'
    done = subprocess.run(
        [*inside, code, sys.executable, _POOL],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has 64 MiB" in done.stdout
    assert not list(tmp_path.iterdir())
