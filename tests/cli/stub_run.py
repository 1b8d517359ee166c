"""``elbowroom run`` with stub replicas, as a process of its own that can be held up in any phase.

    python -m tests.cli.stub_run PHASE FLAGS ...

Says ``there`` on standard output when it is in the phase, in which it then stays for an hour; in
phase ``none`` it goes through. The model is not looked at: replicas answer with the prompt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from elbowroom.app import batch, machine
from elbowroom.cli.main import main as elbowroom
from elbowroom.jobs import runner
from elbowroom.jobs.dispatcher import Dispatcher
from elbowroom.jobs.group import ReplicaGroup
from elbowroom.jobs.job import Job
from elbowroom.jobs.order import OrderBuilder
from elbowroom.jobs.report import JobReport
from elbowroom.pool import run_dir
from elbowroom.profiling.machine import measure_machine

PHASES = ("measuring", "scanning", "starting", "running", "publishing")
HOUR = 3600.0


def stay(*_: Any, **__: Any) -> None:
    say_there()
    time.sleep(HOUR)


def say_there() -> None:
    print("there", flush=True)


def hold_up(phase: str) -> list[str]:
    """Prepare for staying in a phase. Returns options of the stub replicas."""
    if phase == "measuring":
        code = f"import time; print('', end='', flush=True); time.sleep({HOUR})"

        def measure(cores: Any, dtype: str) -> Any:
            say_there()
            return measure_machine(cores, dtype, command=(sys.executable, "-c", code))

        machine.measure_machine = measure
    elif phase == "scanning":
        OrderBuilder.visit = stay  # type: ignore[method-assign]
    elif phase == "starting":
        start = ReplicaGroup.start

        async def start_and_say(group: ReplicaGroup, replica: int) -> None:
            await start(group, replica)
            say_there()

        ReplicaGroup.start = start_and_say  # type: ignore[method-assign]
        return ["--never-ready"]
    elif phase == "running":
        join = Dispatcher.join

        def join_and_say(dispatcher: Dispatcher, *args: Any) -> None:
            join(dispatcher, *args)
            say_there()

        Dispatcher.join = join_and_say  # type: ignore[method-assign]
        return ["--latency", str(HOUR)]
    elif phase == "publishing":
        runner.publish = stay
    return []


def main() -> int:
    phase, *flags = sys.argv[1:]
    stub = [sys.executable, "-m", "tests.jobs.stub_replica", *hold_up(phase)]
    output = Path(flags[flags.index("--output") + 1])
    run_dir.default_root = lambda *_: output.parent
    run_job = runner.run_job

    async def run_with_stub(job: Job) -> JobReport:
        return await run_job(job, stub)

    batch.run_job = run_with_stub
    return elbowroom(["run", *flags])


if __name__ == "__main__":
    sys.exit(main())
