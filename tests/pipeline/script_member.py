"""One worker that trains a user's script, for tests; see ``member`` for how it is spoken to.

The model is cut into as many stages as the case has, as evenly as ties allow. A worker that is
refused says why.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, combinations, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed

from elbowroom.core.errors import ElbowroomError, SplitError
from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.pipeline.split import split
from elbowroom.plans.pipeline import PipelinePlan, Semantics
from elbowroom.training.layers import trace_model
from elbowroom.training.microbatch import Minibatch
from elbowroom.training.outcome import in_training
from elbowroom.training.script import TrainingScript, load_script
from tests.pipeline.models import plan_of


@dataclass(frozen=True)
class ScriptCase:
    """A script of ``tests/data/training`` and how it is trained.

    ``saves`` are steps after which a checkpoint is written; ``resumes`` is a folder to resume from.
    """

    script: str
    num_stages: int = 2
    num_steps: int = 8
    semantics: Semantics = "flush"
    microbatches: int = 1
    saves: bool = False
    checkpoints: str = ""
    first: int = 0
    num_replicas: int = 1
    autocast: bool = False
    lr: float | None = None

    @property
    def replicas(self) -> tuple[int, ...]:
        return (self.num_replicas,) * self.num_stages

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def plans(script: TrainingScript, num_stages: int) -> Iterator[PipelinePlan]:
    """Plans of all ways to cut the model into stages, the most even first."""
    generator = torch.Generator().manual_seed(0)
    model = in_training(script.make_model(0))
    traced = trace_model(model, script.make_batch(generator)[0])
    names = [layer.name for layer in traced.layers]
    middle = [len(names) * k / num_stages for k in range(1, num_stages)]
    ways = combinations(range(1, len(names)), num_stages - 1)

    def unevenness(ends: tuple[int, ...]) -> float:
        return sum(abs(end - wanted) for end, wanted in zip(ends, middle, strict=True))

    for ends in sorted(ways, key=unevenness):
        plan = plan_of([names[a:b] for a, b in pairwise((0, *ends, len(names)))])
        try:
            split(traced, plan)
        except SplitError:
            continue
        yield plan


def main(case: ScriptCase, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    random.seed(time.time_ns())  # as each process has it by itself
    np.random.seed(time.time_ns() % 2**32)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=number,
        world_size=sum(case.replicas),
    )
    try:
        seen = {"error": "", **train(case, folder, number)}
    except ElbowroomError as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    finally:
        distributed.destroy_process_group()
    (folder / f"{number}.json").write_text(json.dumps(seen))


def train(case: ScriptCase, folder: Path, number: int) -> dict[str, object]:
    script = load_script(Path(case.script))
    plan = next(plans(script, case.num_stages))
    if case.num_replicas > 1:
        plan = plan_of([plan.stages[0].layers], [case.num_replicas])
    pipeline = Pipeline(
        script.make_model(0),
        plan,
        script.optimizer_fn(case.lr),
        script.loss_fn,
        StageOptions(
            case.semantics,
            case.microbatches,
            autocast=torch.bfloat16 if case.autocast else None,
        ),
        partial(script.make_scheduler, num_steps=case.num_steps) if script.has_scheduler else None,
    )
    checkpoints = Path(case.checkpoints)
    first = pipeline.restore(checkpoints) if case.first else 0
    assert first == case.first
    generator = torch.Generator().manual_seed(0)
    batches = (minibatch(script, case, generator) for _ in range(case.num_steps))
    ahead = pipeline.prepare(islice(batches, 3))
    for step, batch in enumerate(chain(ahead, batches)):
        if step >= first:
            pipeline.train_step(batch)
    pipeline.drain()
    if case.saves:
        pipeline.save(checkpoints)
    weights = {name: p.detach().clone() for name, p in pipeline.module.body.named_parameters()}
    save_file(weights, folder / f"{number}.safetensors")
    pipeline.close()
    return {"layers": pipeline.module.layers, "notes": pipeline.notes}


def minibatch(script: TrainingScript, case: ScriptCase, generator: torch.Generator) -> Minibatch:
    batch = script.make_batch(generator)
    is_cut = script.cuts_microbatches and case.semantics == "flush"
    return script.make_microbatches(batch, case.microbatches) if is_cut else batch


if __name__ == "__main__":
    for line in sys.stdin:
        case, folder, number = json.loads(line)
        with redirect_stdout(sys.stderr):  # what scripts print is not for whoever reads us
            main(ScriptCase(**json.loads(case)), Path(folder), number)
        print("done", flush=True)
