"""One worker of a pipeline at a time that watches its memory, for tests.

Reads lines of JSON, [CASE, FOLDER, WORKER]. For each it trains by ``FOLDER/plan.json``, writes the
bytes that it held at most to ``FOLDER/WORKER.json``, with checksums of its weights and the bytes
that it swapped, and says that it is done.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import distributed

from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.plans.pipeline import read_pipeline_plan
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.swap.checksum import checksum
from elbowroom.swap.link import Link
from elbowroom.swap.minibatches import SwappedMinibatches
from elbowroom.swap.tier import MemoryTier
from elbowroom.training.memory_watch import MemoryWatch
from tests.pipeline.memory_cases import MODELS, Case, make_optimizer

WARM_UP, NUM_MINIBATCHES = 6, 10


def main(case: Case, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    plan = read_pipeline_plan(folder / "plan.json")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=number,
        world_size=plan.num_workers,
    )
    with MemoryWatch() as watch:
        torch.manual_seed(1)
        model, make_batch, loss_fn = MODELS[case.model]()
        options = StageOptions(case.semantics, case.microbatches)
        stage = plan.stages[Pipe(plan.replicas).stages[number]]
        swaps = case.swaps or stage.swapped_bytes
        keeper = SwappedMinibatches(Link(MemoryTier(1 << 30))) if swaps else None
        pipeline = Pipeline(model, plan, make_optimizer(case), loss_fn, options, keeper=keeper)
        for step in range(NUM_MINIBATCHES):
            if step == WARM_UP:
                watch.mark("steady")
            pipeline.train_step(make_batch())
        buffer_bytes = pipeline.buffer_bytes
        watch.mark("drained")
        pipeline.close()
    held = {
        "peak": watch.peak_bytes("steady"),
        "buffers": buffer_bytes,
        "weights": [checksum(p.untyped_storage()) for p in pipeline.module.parameters()],
        "moved": [keeper.out_bytes, keeper.in_bytes] if keeper else [0, 0],
    }
    (folder / f"{number}.json").write_text(json.dumps(held))
    distributed.destroy_process_group()


if __name__ == "__main__":
    for line in sys.stdin:
        case, folder, number = json.loads(line)
        main(Case.from_json(case), Path(folder), number)
        gc.collect()  # what is freed later would be missing from what the next case holds
        print("done", flush=True)
