"""Claim: a grid for each layer communicates less than the paper's best form, in its own cost model.

    python -m bench.grid_reproduction

Prints the tables of ``docs/grid-reproduction.md`` and keeps the numbers in ``bench/results``.
Nothing is measured but the seconds that planning takes: the rest is computed.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from bench.common import write_result
from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.paper import PaperForms, crossovers
from elbowroom.planning.grid.plan import PlannedGrid, plan_grid
from elbowroom.planning.grid.settings import KNL, Forms

FLOPS = 2.9e12
"""Of one worker: AlexNet's 0.6 s for 256 samples on a KNL (1609.06870)."""


class Case(NamedTuple):
    net: str
    procs: int
    batch: int


CASES = (
    Case("alexnet", 8, 2048),
    Case("alexnet", 32, 2048),
    Case("alexnet", 128, 2048),
    Case("alexnet", 512, 2048),
    Case("alexnet", 512, 512),
    Case("alexnet", 1024, 512),
    Case("alexnet", 2048, 512),
    Case("alexnet", 4096, 512),
    Case("vgg16", 8, 256),
    Case("vgg16", 512, 2048),
    Case("vgg16", 512, 512),
    Case("vgg16", 512, 64),
    Case("vgg16", 4096, 512),
    Case("resnet50", 8, 256),
    Case("resnet50", 512, 8192),
    Case("resnet50", 512, 512),
    Case("resnet50", 512, 64),
    Case("unet3d", 8, 8),
    Case("unet3d", 512, 8),
    Case("unet3d", 512, 64),
    Case("unet3d", 512, 512),
)
FORMS: tuple[Forms, ...] = ("linear", "all")


def main() -> None:
    result = {
        "latency_seconds": KNL.latency_seconds,
        "bandwidth": KNL.bandwidth,
        "flops_per_second": FLOPS,
        "crossovers": dict(crossovers(known_net("alexnet"))),
        "rows": [row(case) for case in CASES],
    }
    write_result("grid_reproduction", result)


def row(case: Case) -> dict[str, Any]:
    """Seconds of communication alone, of an iteration with overlap, and memory, of each form."""
    paper = PaperForms(known_net(case.net).for_batch(case.batch), case.procs, KNL)
    by_batch, best = paper.batch(), paper.best()
    planned = {forms: _timed(case, forms, None) for forms in FORMS}
    overlapped = {forms: _timed(case, forms, FLOPS) for forms in FORMS}
    explanation = planned["all"].grid.explanation
    hidden = overlapped["all"].grid.explanation
    weighted = known_net(case.net).weighted
    # Weights' gradients, and inputs' but of the first layer, take as much as the forward.
    flops = (3 * sum(layer.flops for layer in weighted) - weighted[0].flops) * case.batch
    batch_memory = [each.batch.memory_bytes for each in explanation.layers if each.batch]
    found = {
        **case._asdict(),
        "paper_batch_seconds": by_batch and by_batch.seconds,
        "paper_best_seconds": best and best.seconds,
        "batch_seconds": explanation.batch_seconds,
        "batch_memory_bytes": sum(batch_memory) or None,
        "products_seconds": flops / case.procs / FLOPS,
        "overlapped_batch_seconds": hidden.batch_seconds,
        "overlapped_paper_seconds": hidden.paper_seconds,
        **{forms: _shown(each) for forms, each in planned.items()},
        **{f"overlapped_{forms}": _shown(each) for forms, each in overlapped.items()},
    }
    print(found, flush=True)
    return found


class _Timed(NamedTuple):
    grid: PlannedGrid
    planning_seconds: float


def _timed(case: Case, forms: Forms, rate: float | None) -> _Timed:
    start = time.perf_counter()
    planned = plan_grid(
        known_net(case.net), case.procs, case.batch, KNL, forms=forms, flops_per_second=rate
    )
    return _Timed(planned, time.perf_counter() - start)


def _shown(timed: _Timed) -> dict[str, Any]:
    plan, explanation = timed.grid
    return {
        "seconds": plan.prediction.seconds,
        "memory_bytes": plan.prediction.memory_bytes,
        "planning_seconds": timed.planning_seconds,
        "is_exact": explanation.is_exact,
        "grids": [f"{grid.name}: {grid}" for grid in plan.layers],
    }


if __name__ == "__main__":
    main()
