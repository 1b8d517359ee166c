"""One worker of a pipeline at a time, for tests.

Reads lines of JSON, [CASE, FOLDER, WORKER]. Of each it writes the weights and what the worker saw
to ``FOLDER/WORKER.safetensors`` and ``.json``, and says that it is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.worker import StageWorker
from elbowroom.plans.pipeline_shape import Pipe
from tests.pipeline.cases import (
    Case,
    loss_of,
    make_optimizer,
    make_scheduler,
    make_stages,
    minibatch,
)


def main(case: Case, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    pipe = Pipe(case.replicas)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=number,
        world_size=pipe.num_workers,
    )
    stage = make_stages(case)[pipe.stages[number]]
    optimizer = make_optimizer(case, stage)
    options = StageOptions(
        case.semantics,  # type: ignore[arg-type]
        case.microbatches,
        autocast=case.autocast_dtype,
        keeps_record=True,
        clip_norm=case.clip_norm,
        bucket_bytes=case.bucket_bytes,
        schedule=case.schedule,
    )
    worker = StageWorker(
        stage,
        pipe,
        number,
        optimizer,
        loss_of,
        options,
        make_scheduler(optimizer),
        depth=case.depth,
    )
    losses = []
    for index in range(case.num_minibatches):
        if index in case.breaks:
            worker.drain()
        inputs, target = minibatch(case, index)
        losses.append(worker.train_step(inputs if worker.stage == 0 else (), target))
    worker.drain()
    worker.close()
    seen = {
        "losses": losses,
        "done": [done[:3] for done in worker.done],
        "most_held": worker.versions.most_held,
        "sent_bytes": worker.sent_bytes,
    }
    save_file(dict(stage.named_parameters()), folder / f"{number}.safetensors")
    (folder / f"{number}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


if __name__ == "__main__":
    for line in sys.stdin:
        case, folder, number = json.loads(line)
        main(Case.from_json(case), Path(folder), number)
        print("done", flush=True)
