"""One process of a grid, for tests: trains, resumes and saves as its cases say.

It reads a line for each case, with the case, a folder and its own number, and says when it is done.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from elbowroom.core.errors import ElbowroomError
from elbowroom.grid.grid import Grid
from elbowroom.plans.grid import GridPlan
from tests.grid.nets import batches_of, loss_fn, model_of, sgd

SAMPLES = 3


@dataclass(frozen=True)
class GridCase:
    """A plan, and a run by it: ``first`` steps are in the checkpoint that it resumes from.

    ``silent`` is a worker that takes no part in the last step.
    """

    net: str
    plan: dict[str, Any]
    num_steps: int
    checkpoints: str = ""
    first: int = 0
    saves_to: str = ""
    silent: int = -1
    seconds: float = 60.0

    @property
    def replicas(self) -> tuple[int, ...]:
        return (self.plan["procs"],)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(case: GridCase, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=number,
        world_size=case.plan["procs"],
        timeout=timedelta(seconds=case.seconds),
    )
    begin = time.monotonic()
    try:
        seen = {"error": "", "losses": train(case, number)}
    except ElbowroomError as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    finally:
        distributed.destroy_process_group()
    seen["seconds"] = time.monotonic() - begin
    (folder / f"{number}.json").write_text(json.dumps(seen))


def train(case: GridCase, number: int) -> list[float]:
    plan = GridPlan.from_json(case.plan)
    grid = Grid(model_of(case.net), plan, sgd(), loss_fn)
    if case.first:
        assert grid.restore(Path(case.checkpoints)) == case.first
    batches = batches_of(case.net, SAMPLES)
    grid.prepare(batches[0])
    losses = []
    for step in range(case.first, case.num_steps):
        if number == case.silent and step == case.num_steps - 1:
            return losses
        losses.append(grid.train_step(batches[step]))
    if case.saves_to:
        grid.save(Path(case.saves_to))
    grid.close()
    return losses


if __name__ == "__main__":
    for line in sys.stdin:
        case, folder, number = json.loads(line)
        main(GridCase(**json.loads(case)), Path(folder), number)
        print("done", flush=True)
