"""What plans, checks and tells runs anywhere: without PyTorch, and on systems that are not Linux.

Needs nothing but pytest and the package, so that it also runs against a wheel in an environment of
its own (``make test-wheel``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = HERE.parent / "data" / "models" / "Llama-3.1-8B"
DEMO = HERE.parents[1] / "examples" / "demo"
PROFILE = """\
node1 -- Linear -- forward_compute_time=3.0, backward_compute_time=6.0, \
activation_size=4096.0, parameter_size=8192.0
node2 -- Linear -- forward_compute_time=3.0, backward_compute_time=6.0, \
activation_size=4096.0, parameter_size=8192.0
\tnode1 -- node2
"""
JOURNAL = """
import sys
from pathlib import Path
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.results import publish, response_line

given, output = map(Path, sys.argv[1:])
with BatchFile(given) as batch, Journal(output) as journal:
    journal.admit({}, batch.scan())
    for row in batch.rows():
        line = response_line(row.custom_id, 200, {})
        journal.put(FinishedRow(row.index, row.custom_id, row.content_hash, None, line))
    journal.commit()
    publish(journal, batch, output, output.with_name("errors"))
"""


def python(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process without what other systems have not, and without a home."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE / "bare")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, env=environment, cwd=cwd, text=True, capture_output=True, timeout=120
    )


def elbowroom(*words: str | Path, cwd: Path, code: int = 0) -> str:
    done = python("-m", "elbowroom", *words, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_names_are_gone(tmp_path: Path) -> None:
    for code in ("import fcntl", "import torch", "open('/proc/self/stat')", "os.stat('/proc')"):
        assert python("-c", f"import os; {code}", cwd=tmp_path).returncode == 1, code
    assert python("-c", "import elbowroom.cli.main", cwd=tmp_path).returncode == 0


def test_plan_and_simulate(tmp_path: Path) -> None:
    job = ("--lengths", "512:128x200", "--cluster", "h200-8", "--json", "plan.json")
    said = elbowroom("plan", "--model", MODEL, *job, cwd=tmp_path)
    assert "tokens/s" in said
    said = elbowroom("simulate", "--plan", "plan.json", "--trace", "t.json", cwd=tmp_path)
    assert "output tokens/s" in said
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_plan_on_a_machine_that_cannot_be_measured(tmp_path: Path) -> None:
    job = ("--lengths", "512:128x200", "--memory", "100GB")
    said = elbowroom("plan", "--model", MODEL, *job, cwd=tmp_path)
    assert "not measured, so no times are predicted" in said
    assert "> t1d1 none" in said


def test_plan_grid(tmp_path: Path) -> None:
    job = ("--procs", "8", "--batch", "2048", "--json", "grid.json")
    said = elbowroom("train", "plan-grid", "alexnet", *job, cwd=tmp_path)
    assert "fc8" in said
    assert json.loads((tmp_path / "grid.json").read_text())["procs"] == 8


def test_plan_pipeline(tmp_path: Path) -> None:
    (tmp_path / "profile.txt").write_text(PROFILE)
    links = ("--workers", "2", "--bandwidth", "10Gbit/s")
    assert "stage" in elbowroom("train", "plan-pipeline", "profile.txt", *links, cwd=tmp_path)


def test_plan_swap(tmp_path: Path) -> None:
    storage = {"number": 0, "num_bytes": 4096, "made_by": "", "pack_ticks": [0]}
    places = {"unpack_ticks": [1], "free": 2, "bring": 4, "release": 5}
    profile = {
        "format": "elbowroom step profile",
        "version": 1,
        "seconds_before": 0.1,
        "seconds": [0.1, 0.1],
        "num_forward_ticks": 1,
        "tick_positions": [1, 3],
        "deltas": [4096, 0, -4096, 0, 4096, -4096],
        "static_bytes": 2**20,
        "smallest_bytes": 1,
        "storages": [storage | places],
    }
    (tmp_path / "step.json").write_text(json.dumps(profile))
    said = elbowroom("train", "plan-swap", "step.json", "--budget", "2MiB", cwd=tmp_path)
    assert "peak        1.004 MiB of 2 MiB" in said


def test_check_verify_status_and_results(tmp_path: Path) -> None:
    given = DEMO / "requests.jsonl"
    demo = ("--model", DEMO / "model", "--served-model-name", "demo")
    said = elbowroom("check", given, *demo, "--no-tokens", cwd=tmp_path)
    assert "500 in" in said
    said = elbowroom("check", given, *demo, cwd=tmp_path, code=2)
    assert "needs transformers" in said
    assert "--no-tokens" in said
    made = python("-c", JOURNAL, given, "out.jsonl", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "exactly one result" in elbowroom("verify", given, "out.jsonl", cwd=tmp_path)
    assert "finished" in elbowroom("status", "out.jsonl", cwd=tmp_path)
    assert elbowroom("results", "out.jsonl", cwd=tmp_path).count("\n") == 500


@pytest.mark.parametrize("command", ["run", "profile"])
def test_what_needs_an_engine_says_so(tmp_path: Path, command: str) -> None:
    files = {
        "run": ("--model", DEMO / "model", "--input", DEMO / "requests.jsonl", "--output", "o"),
        "profile": ("--out", "machine.toml"),
    }
    said = elbowroom(command, *files[command], cwd=tmp_path, code=1 if command == "profile" else 2)
    assert "pip install" in said


@pytest.mark.parametrize(
    "words",
    [
        ("profile", "train.py", "--out", "p.json"),
        ("profile", "train.py", "--out", "p.json", "--step"),
        ("run", "train.py", "--plan", "p.json", "--steps", "1"),
    ],
)
def test_what_needs_pytorch_says_so(tmp_path: Path, words: tuple[str, ...]) -> None:
    said = elbowroom("train", *words, cwd=tmp_path, code=2)
    assert "pip install 'elbowroom[train]'" in said
