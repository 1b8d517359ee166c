"""Plain linear layers on CPUs, by one kernel that computes with an ordinary tensor."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from elbowroom.engine.vllm_seam.packed import is_packable, pack_weight, packed_linear
from elbowroom.pool.layer import without_routers


def take_linears(module: nn.Module) -> None:
    """Have the plain linear layers in ``module`` compute by ``OrdinaryLinearMethod``.

    Others are quantised, and left to vLLM, as routers are, and all on devices whose kernels take
    tensors anyway.
    """
    if not current_platform.is_cpu():
        return
    for _, part in without_routers(module):
        if type(getattr(part, "quant_method", None)) is UnquantizedLinearMethod:
            part.quant_method = OrdinaryLinearMethod()


class OrdinaryLinearMethod(UnquantizedLinearMethod):
    """A linear layer whose weight stays a tensor, in the packed form if this CPU has the kernel.

    vLLM's own method takes the weight into a kernel's handle, which no other process can read.
    Every layout, with or without a pool, runs this one kernel, so that results do not depend on
    the layout: a row comes out the same whatever the batch.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.get_parameter("weight")
        self._is_packed = is_packable(weight.shape, weight.dtype)
        if self._is_packed:
            weight.data = pack_weight(weight.data)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if not self._is_packed:
            return nn.functional.linear(x, weight, bias)
        return packed_linear(x, weight, bias)
