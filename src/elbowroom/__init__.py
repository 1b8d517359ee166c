"""Offline LLM inference on replicas that hold the feed-forward weights once, and pipelines.

``run_batch`` answers a batch file, ``iter_batch`` yields rows as they finish. ``profile`` measures
the layers of a model in training, ``plan_pipeline`` cuts them into stages on a cluster that
``read_cluster`` knows, and ``Pipeline`` trains by such a plan, or one that ``read_pipeline_plan``
finds in a file; ``balanced_microbatches`` shares samples of unlike length out over each minibatch's
``Microbatch``. ``plan_grid`` splits each layer by batch, space and features, and
``read_grid_plan`` reads such a plan. ``Swap`` trains under a memory budget, ``SwappedOptimizer``
keeps an optimizer's state and gradients away.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elbowroom.app.batch import iter_batch, run_batch
    from elbowroom.app.swap import Swap
    from elbowroom.core.cluster_file import read_cluster
    from elbowroom.grid.grid import Grid
    from elbowroom.grid.options import GridOptions
    from elbowroom.pipeline.options import StageOptions
    from elbowroom.pipeline.pipeline import Pipeline
    from elbowroom.planning.grid.plan import plan_grid
    from elbowroom.planning.microbatches import balanced_microbatches
    from elbowroom.planning.pipeline.plan import plan_pipeline
    from elbowroom.plans.grid import read_grid_plan
    from elbowroom.plans.pipeline import read_pipeline_plan
    from elbowroom.profiling.layers import profile
    from elbowroom.swap.optimizer import SwappedOptimizer
    from elbowroom.training.microbatch import Microbatch

__all__ = [
    "Grid",
    "GridOptions",
    "Microbatch",
    "Pipeline",
    "StageOptions",
    "Swap",
    "SwappedOptimizer",
    "balanced_microbatches",
    "iter_batch",
    "plan_grid",
    "plan_pipeline",
    "profile",
    "read_cluster",
    "read_grid_plan",
    "read_pipeline_plan",
    "run_batch",
]

_MODULES = {
    "Grid": "elbowroom.grid.grid",
    "GridOptions": "elbowroom.grid.options",
    "Microbatch": "elbowroom.training.microbatch",
    "Pipeline": "elbowroom.pipeline.pipeline",
    "StageOptions": "elbowroom.pipeline.options",
    "Swap": "elbowroom.app.swap",
    "SwappedOptimizer": "elbowroom.swap.optimizer",
    "balanced_microbatches": "elbowroom.planning.microbatches",
    "iter_batch": "elbowroom.app.batch",
    "plan_grid": "elbowroom.planning.grid.plan",
    "plan_pipeline": "elbowroom.planning.pipeline.plan",
    "profile": "elbowroom.profiling.layers",
    "read_cluster": "elbowroom.core.cluster_file",
    "read_grid_plan": "elbowroom.plans.grid",
    "read_pipeline_plan": "elbowroom.plans.pipeline",
    "run_batch": "elbowroom.app.batch",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: engines import this package too, and need nothing of it."""
    if name == "__version__":
        return importlib.metadata.version("elbowroom")
    if name not in __all__:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MODULES[name]), name)
