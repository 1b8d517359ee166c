"""Engine side: decoder layers are handed to the pool as vLLM builds and loads them."""

from __future__ import annotations

import atexit
import copy
import glob
import os
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.offloader.base import BaseOffloader, get_offloader
from vllm.platforms import current_platform

from elbowroom.core import host
from elbowroom.core.errors import PoolError, UnsupportedModelError
from elbowroom.engine.process import resident_bytes, return_freed_memory
from elbowroom.engine.vllm_seam import CONFIG_KEY
from elbowroom.engine.vllm_seam.experts import GiveBack, take_experts
from elbowroom.engine.vllm_seam.packed import is_packable, pack_weight, packed_linear
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.ffn import Forward, WeightSpan
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

    vLLM asks its offloader to wrap each layer right after building it, before weights are loaded.
    """

    def __init__(
        self,
        share: PoolShare,
        store: Store,
        run_dir: Path | None = None,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        options = PoolOptions(
            pack=pack_weight,
            run_dir=run_dir,
            tensor_parallel=tensor_parallel,
            link_bytes_per_second=float(os.environ.get(LINK_VARIABLE, "inf")),
        )
        self._loader = PoolLoader(share, store, options)
        self._store = store
        self._pool: Pool | None = None
        self._before_bytes = self._held_bytes()
        self.resident_bytes = 0
        self._share = share
        self._num_unloaded = 0
        self._is_plain = False
        self._tensor_parallel = tensor_parallel
        self._give_back: list[GiveBack] = []

    @property
    def pool(self) -> Pool | None:
        """The pool that this model runs with; None where it needs none.

        Raises PoolError when vLLM has handed over too few layers, or not yet loaded them.
        """
        if self._pool is None and self._share.mode != "none":
            raise PoolError(
                "vLLM built the model without handing its layers over, as it does with its "
                "Transformers backend: use --pool none"
                if not self._give_back
                else f"{self._num_unloaded} feed-forward modules are still to be loaded"
            )
        return self._pool

    @staticmethod
    def from_config(
        config: dict[str, Any], world_size: int = 1, tensor_parallel: int = 1
    ) -> PoolOffloader:
        """The offloader that ``additional_config`` describes: a share and where the group meets.

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
                share, _device_store(run_dir, share.rank, tensor_parallel), run_dir
            )
        if tensor_parallel == 1:
            return PoolOffloader(share, SharedMemoryStore(run_dir, share.rank), run_dir)
        run_dir = run_dir / f"tensor-rank-{get_tensor_model_parallel_rank()}"
        run_dir.mkdir(mode=0o700, exist_ok=True)
        sums = TensorParallel(partial_forward, tensor_model_parallel_all_reduce)
        return PoolOffloader(share, SharedMemoryStore(run_dir, share.rank), run_dir, sums)

    def wrap_modules(
        self, modules_generator: Generator[nn.Module, None, None], prefix: str = ""
    ) -> list[nn.Module]:
        return [self._wrap(module) for module in modules_generator]

    def _wrap(self, block: nn.Module) -> nn.Module:
        """Hand one block over. Its linears load and compute through ``PooledLinearMethod``."""
        if self._is_plain:
            return block
        try:
            self._hand_over(block)
        except UnsupportedModelError:
            if self._share.mode != "none":
                raise
            self._stand_back()
        return block

    def _hand_over(self, block: nn.Module) -> None:
        ffn = self._loader.add_block(block, keep_weights=False)
        experts = [span for span in ffn.spans if span.holds_experts]
        if experts:
            self._check_experts(block)
        for span in ffn.spans:
            if not span.holds_experts:
                self._take_linear(span)
        for module in dict.fromkeys(span.module for span in experts):
            spans = [span for span in experts if span.module is module]
            device, loaded = self._store.device, self.mark_loaded
            self._give_back.append(take_experts(module, spans, device, loaded))
            self._num_unloaded += 1

    def _take_linear(self, span: WeightSpan) -> None:
        linear: Any = span.module
        if type(linear.quant_method) is not UnquantizedLinearMethod:
            raise UnsupportedModelError(
                f"feed-forward weights are quantised ({type(linear.quant_method).__name__}): "
                f"the pool holds plain bf16, fp16 or fp32 weights; use --pool none"
            )
        if linear.weight.is_meta:
            linear.weight.weight_loader = _skip_loading
        self._give_back.append(partial(setattr, linear, "quant_method", linear.quant_method))
        linear.quant_method = PooledLinearMethod(self, span.shape, span.dtype)
        self._num_unloaded += 1

    def _check_experts(self, block: nn.Module) -> None:
        """Raise UnsupportedModelError where a pool of mixtures cannot do what the plan asks for."""
        if self._store.device.type != "cpu":
            raise UnsupportedModelError(
                f"{type(block).__name__} is a layer of a mixture, and no pool of mixtures has been "
                f"run on GPUs: use --pool none"
            )
        if self._share.ship_bytes or self._tensor_parallel is not None:
            raise UnsupportedModelError(
                f"{type(block).__name__} is a layer of a mixture, whose rows are not shipped, and "
                f"whose experts are not divided: use --pool mapped or streamed, and replicas of "
                f"one device"
            )

    def _stand_back(self) -> None:
        """Leave a model that no pool can hold to vLLM alone, as --pool none asks for."""
        for give_back in self._give_back:
            give_back()
        self._is_plain = True

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

    def mark_loaded(self) -> None:
        """One more module has its weights. After the last, the group shares what it has."""
        self._num_unloaded -= 1
        if self._num_unloaded == 0:
            self._pool = self._loader.attach()
            return_freed_memory()
            self.resident_bytes = self._held_bytes() - self._before_bytes
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


class PooledLinearMethod(UnquantizedLinearMethod):
    """A linear layer whose weight is whatever the pool leases to it, in the packed form if any.

    Every layout, with or without a pool, runs this one kernel, so that results do not depend on
    the layout: a row comes out the same whatever the batch.
    """

    def __init__(self, offloader: PoolOffloader, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self._offloader = offloader
        self._is_packed = is_packable(shape, dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._offloader.mark_loaded()

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if not self._is_packed:
            return nn.functional.linear(x, weight, bias)
        return packed_linear(x, weight, bias)


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
        if offloader is None or offloader.pool is None:
            return 0
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


def _skip_loading(*_: object, **__: object) -> None:
    """Weight loader of a placeholder: a borrower never reads the owner's weights from disk."""
