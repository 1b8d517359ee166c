"""Turns around vLLM's forward passes, whose context is one global of a module.

Layers of mixtures look themselves up in it. With attention they share one forward pass at a time:
a context that a second thread put in place would be the first one's, too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.turns import Turns

_RUNNER = "vllm.v1.worker.gpu_model_runner"  # CPUs have theirs from it
_BEGIN = "set_forward_context"


def turns_of_passes(
    share: PoolShare, device: torch.device, is_divided: bool = False
) -> Turns | None:
    """Turns that every forward pass of the engine under construction takes.

    None where nothing is served, and where peers' rows are run beside the passes: on GPUs, which
    have streams, and where ranks of a replica ``is_divided`` among wait for each other amid a pass.
    One that has its rows back would wait, and serve nobody, for one whose owner waits likewise.

    What is run for peers has a forward context of its own, without attention. Raises PoolError if
    this vLLM begins its passes elsewhere than the versions that were tried.
    """
    if not share.ship_bytes or device.type != "cpu" or is_divided:
        return None
    runner = sys.modules.get(_RUNNER)
    begin = getattr(runner, _BEGIN, None)
    if begin is None:
        raise PoolError(
            f"{_RUNNER} has no {_BEGIN}, around which rows of peers could be run: use --pool "
            f"streamed, or a version of vllm that was tried"
        )
    turns = Turns(_ServedContext(get_current_vllm_config()))
    setattr(runner, _BEGIN, partial(_in_turn, begin, weakref.ref(turns)))
    return turns


@contextmanager
def _in_turn(
    begin: Callable[..., AbstractContextManager[None]],
    turns: weakref.ref[Turns],
    *args: Any,
    **kwargs: Any,
) -> Iterator[None]:
    """Begin a pass as vLLM does, once it has the turn."""
    taken = turns()  # None once that engine is gone: another one may run in this process
    with taken.forward_pass() if taken else nullcontext(), begin(*args, **kwargs):
        yield


class _ServedContext:
    """Forward contexts without attention, for layers that are run for peers."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._layers: dict[str, Any] = {}

    def __call__(self, num_rows: int) -> AbstractContextManager[None]:
        """Put a context in place until the end, and then the one that was there."""
        context = create_forward_context(None, self._config)
        if not self._layers:  # vLLM forgets them when an engine ends, and peers may not have ended
            self._layers = dict(context.no_compile_layers)
        context.no_compile_layers = self._layers
        placed: AbstractContextManager[None] = override_forward_context(context)
        return placed
