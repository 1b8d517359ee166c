"""Offline LLM inference on replicas that hold the feed-forward weights once.

``elbowroom.run_batch`` answers a batch file, ``elbowroom.iter_batch`` yields rows as they finish.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elbowroom.api import iter_batch, run_batch

__all__ = ["iter_batch", "run_batch"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: engines import this package too, and need nothing of it."""
    if name not in __all__:
        raise AttributeError(name)
    from elbowroom import api

    return getattr(api, name)
