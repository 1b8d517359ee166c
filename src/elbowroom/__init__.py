"""Offline LLM inference on replicas that hold the feed-forward weights once, and pipelines.

``elbowroom.run_batch`` answers a batch file, ``elbowroom.iter_batch`` yields rows as they finish.
``elbowroom.profile`` measures the layers of a model in training.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elbowroom.api import iter_batch, run_batch
    from elbowroom.profiling.layers import profile

__all__ = ["iter_batch", "profile", "run_batch"]

_MODULES = {
    "iter_batch": "elbowroom.api",
    "profile": "elbowroom.profiling.layers",
    "run_batch": "elbowroom.api",
}


def __getattr__(name: str) -> Any:
    """Loaded when asked for: engines import this package too, and need nothing of it."""
    if name not in __all__:
        raise AttributeError(name)
    return getattr(importlib.import_module(_MODULES[name]), name)
