"""Engine side: decoder layers are handed to the pool as vLLM builds and loads them."""

from __future__ import annotations

import atexit
import copy
import glob
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.offloader.base import BaseOffloader, get_offloader
from vllm.platforms import current_platform

from elbowroom.core import host
from elbowroom.core.errors import PoolError
from elbowroom.engine.process import resident_bytes, return_freed_memory
from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.engine.vllm_seam.forward_context import turns_of_passes
from elbowroom.engine.vllm_seam.linears import take_linears
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.layer import Forward, pooled_layer
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions, TensorParallel
from elbowroom.pool.pool import Pool
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.pool.stats import PoolStats
from elbowroom.pool.store import LocalStore, Store

LINK_VARIABLE = "ELBOWROOM_LINK_BYTES_PER_SECOND"
"""Environment variable that holds streaming back: benchmarks try other links with it."""


class PoolOffloader(BaseOffloader):
    """Gives every decoder layer's feed-forward weights to the pool.

    vLLM asks its offloader to wrap each layer right after building it, before weights are loaded;
    layers of models that it builds otherwise come through ``take_layers``. ``PoolModelLoader``
    loads what is lent out, and has the pool attached when all is loaded.
    """

    def __init__(
        self,
        share: PoolShare,
        store: Store,
        run_dir: Path | None = None,
        tensor_parallel: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = PoolOptions(
            run_dir=run_dir,
            tensor_parallel=tensor_parallel,
            dtype=dtype,
            link_bytes_per_second=float(os.environ.get(LINK_VARIABLE, "inf")),
            turns=turns_of_passes(share, store.device, tensor_parallel is not None),
        )
        self.loader = PoolLoader(share, store, options)
        self._store = store
        self._pool: Pool | None = None
        self._before_bytes = self._held_bytes()
        self.resident_bytes = 0
        self._share = share
        self._has_stack = False

    @property
    def pool(self) -> Pool | None:
        """The pool that this model runs with; None where it needs none.

        Raises PoolError when vLLM has handed over too few layers, or not yet loaded them.
        """
        if self._pool is None and self._share.mode != "none":
            raise PoolError(
                "vLLM loaded the model by another loader than the pool's: leave out --load-format "
                "behind --, or use --pool none"
            )
        return self._pool

    @staticmethod
    def from_config(
        config: dict[str, Any],
        world_size: int = 1,
        tensor_parallel: int = 1,
        dtype: torch.dtype | None = None,
    ) -> PoolOffloader:
        """The offloader that ``additional_config`` describes: a share and where the group meets.

        ``dtype`` is what the model computes in, None where its weights have the same.

        Each rank of a tensor-parallel replica pools with the same rank of the other replicas.
        Raises PoolError on devices that no store reaches yet, and for other kinds of parallelism.
        """
        if world_size != tensor_parallel:
            raise PoolError(
                f"a replica of {world_size} ranks, {tensor_parallel} of them tensor-parallel, "
                f"cannot be pooled: leave pipeline parallelism at 1, or run this model with vLLM"
            )
        share = PoolShare.from_json(config["share"])
        if share.mode == "none":
            return PoolOffloader(share, LocalStore())
        run_dir = Path(config["run_dir"])
        if not current_platform.is_cpu():
            return PoolOffloader(
                share, _device_store(run_dir, share.rank, tensor_parallel), run_dir, dtype=dtype
            )
        if tensor_parallel == 1:
            store = SharedMemoryStore(run_dir, share.rank)
            return PoolOffloader(share, store, run_dir, dtype=dtype)
        run_dir = run_dir / f"tensor-rank-{get_tensor_model_parallel_rank()}"
        run_dir.mkdir(mode=0o700, exist_ok=True)
        sums = TensorParallel(partial_forward, tensor_model_parallel_all_reduce)
        return PoolOffloader(share, SharedMemoryStore(run_dir, share.rank), run_dir, sums, dtype)

    def wrap_modules(
        self, modules_generator: Generator[nn.Module, None, None], prefix: str = ""
    ) -> list[nn.Module]:
        """Hand over the decoder layers. Another stack, of a draft model, is left to vLLM."""
        if self._has_stack:
            return list(modules_generator)
        self._has_stack = True
        return [self._wrap(module) for module in modules_generator]

    def take_layers(self, model: nn.Module) -> None:
        """Hand over the layers of a model that vLLM has built without asking for it.

        Raises PoolError where no list of modules has as many entries as the plan has layers, and a
        pool is asked for.
        """
        if self._has_stack:
            return
        num_layers = len(self._share.owners)
        lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
        blocks = next((part for part in lists if len(part) == num_layers), None)
        if blocks is None and self._share.mode != "none":
            raise PoolError(f"vLLM built no stack of {num_layers} layers: use --pool none")
        self.wrap_modules(block for block in blocks or ())

    def _wrap(self, block: nn.Module) -> nn.Module:
        """Hand one block over. Its plain linears compute by ``OrdinaryLinearMethod``."""
        if self._share.mode == "none":
            pooled = pooled_layer(block)
        else:
            pooled = self.loader.add_block(block, is_loaded=False)
        for module in pooled.modules if pooled else ():
            take_linears(module)
        return block

    def _held_bytes(self) -> int:
        """Memory that this process holds now, on the device that it computes on."""
        if self._store.device.type == "cpu":
            return resident_bytes()
        torch.cuda.empty_cache()  # weights that went into the store leave as much behind
        return torch.cuda.memory_allocated(self._store.device) + self._store.device_bytes

    def sync_prev_onload(self) -> None:
        """Before vLLM captures or replays a graph."""
        if self._pool is not None:
            self._pool.before_graph()

    def join_after_forward(self) -> None:
        """At the end of a forward pass that vLLM captures, within the capture."""
        if self._pool is not None:
            self._pool.after_capture()

    def attach(self) -> None:
        """Share with the group what this replica has loaded, once all of it is.

        Of another model that is loaded afterwards, to draft tokens, nothing is shared.
        """
        if self._pool is not None:
            return
        if self._share.mode != "none":
            self._pool = self.loader.attach()
        return_freed_memory()
        self.resident_bytes = self._held_bytes() - self._before_bytes
        if self._pool is None:
            return
        self._pool.start()
        forget_shared_names()
        atexit.register(self._pool.close)  # a thread inside a kernel must not see Python end


def _device_store(run_dir: Path, rank: int, tensor_parallel: int) -> Store:
    """The store of a replica on a GPU. Raises PoolError for what has not been seen to work."""
    if not current_platform.is_cuda() or tensor_parallel > 1:
        raise PoolError(
            f"a pool between replicas of {tensor_parallel} devices on "
            f"{current_platform.device_name} is not supported yet: use --pool none"
        )
    from elbowroom.pool.cuda import CudaStore  # needs NVIDIA's bindings

    return CudaStore(run_dir, rank, torch.device("cuda", torch.cuda.current_device()))


class PoolWorkerExtension:
    """Methods added to vLLM's worker, called by name from the request side (``collective_rpc``)."""

    def elbowroom_stats(self) -> dict[str, float]:
        """Counters of the pool; see ``PoolStats``. Fails if leases and slots disagree."""
        offloader = _pool_offloader(self)
        pool = offloader.pool if offloader else None
        if pool is None:
            return vars(PoolStats())
        pool.check_integrity()
        return vars(pool.stats())

    def elbowroom_resident_bytes(self) -> int:
        """Memory that loading took: weights, slots. Measured, without the KV cache.

        0 where vLLM loads by itself. Raises PoolError for a model without the pool it should have.
        """
        offloader = _pool_offloader(self)
        if offloader is None:
            return 0
        _ = offloader.pool  # raises where there should be one
        return offloader.resident_bytes


def partial_forward(module: nn.Module) -> Forward:
    """The forward of ``module`` without the sum over tensor-parallel ranks, on the same weights."""
    forward: Forward = _without_sum(module).forward
    return forward


def _without_sum(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # the pool's, which stands for the original
    if hasattr(twin, "reduce_results"):
        setattr(twin, "reduce_results", False)  # noqa: B010 (an attribute nn.Module does not name)
    twin._modules = {name: child and _without_sum(child) for name, child in module._modules.items()}
    return twin


def forget_shared_names() -> None:
    """Unlink the memory that tensor-parallel ranks on a CPU share, once all of them have it.

    vLLM does so when a worker ends by itself; of one that is killed, a name would stay.
    """
    replica, folder = os.environ.get("VLLM_DIST_IDENT"), host.shared_memory_folder()
    pattern = f"{glob.escape(replica)}-*cpushm*" if replica else ""
    for path in folder.glob(pattern) if folder and pattern else ():
        path.unlink(missing_ok=True)  # another rank may have been here


def _pool_offloader(worker: Any) -> PoolOffloader | None:
    """Our offloader; None in an engine that was started without a share of a pool."""
    offloader = get_offloader()
    if isinstance(offloader, PoolOffloader):
        return offloader
    if CONFIG_KEY in (worker.vllm_config.additional_config or {}):
        raise PoolError("vLLM built this model without our plugin: reinstall elbowroom beside vllm")
    return None
