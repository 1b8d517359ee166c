"""A toy way to quantise, registered with vLLM: what it does to weights, real ones do somewhere.

When weights are loaded it takes them into another shape and type, deletes and adds parameters, and
keeps a Python float and a tensor outside the module. With ``hides`` in its config, nothing is left
of a linear layer's weight but what a closure holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

NAME = "toy"


def _packed(weight: torch.Tensor) -> tuple[nn.Parameter, float]:
    """8 bits, in and out exchanged, and the number that they are multiplied with."""
    scale = float(weight.float().abs().max()) / 127
    rounded = (weight.float() / scale).round().to(torch.int8)
    return nn.Parameter(rounded.transpose(-1, -2).contiguous(), requires_grad=False), scale


def _unpacked(packed: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return (packed.transpose(-1, -2).float() * scale).to(dtype)


class ToyLinear(UnquantizedLinearMethod):
    def __init__(self, hides: bool) -> None:
        super().__init__()
        self._hides = hides

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.get_parameter("weight").data.clone()
        del layer.weight
        if self._hides:
            layer.compute = lambda x: x @ weight.t()  # type: ignore[assignment]
            return
        layer.packed, self.scale = _packed(weight)
        layer.register_buffer("halves", weight.float() / 2)
        self.offset = weight.float().mean(1)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._hides:
            out: torch.Tensor = layer.compute(x)  # type: ignore[operator]
            return out
        weight = _unpacked(layer.get_parameter("packed"), self.scale, x.dtype)
        halves = layer.get_buffer("halves").to(x.dtype)
        return nn.functional.linear(x, weight + halves, self.offset.to(x.dtype))


class ToyExperts(UnquantizedFusedMoEMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.scales = []
        for name in ("w13", "w2"):
            packed, scale = _packed(layer.get_parameter(f"{name}_weight").data)
            delattr(layer, f"{name}_weight")
            layer.register_parameter(f"{name}_packed", packed)
            self.scales.append(scale)
        self.biases = layer.get_parameter("w2_packed").float().mean(1) * self.scales[1]

    @property
    def is_monolithic(self) -> bool:
        return False

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        wide = _unpacked(layer.get_parameter("w13_packed"), self.scales[0], x.dtype)
        narrow = _unpacked(layer.get_parameter("w2_packed"), self.scales[1], x.dtype)
        for row, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
            for expert, share in zip(ids, weights, strict=True):
                gate, up = (wide[expert] @ x[row]).chunk(2)
                inner = nn.functional.silu(gate) * up
                out[row] += (narrow[expert] @ inner + self.biases[expert].to(x.dtype)) * share
        return out


@register_quantization_config(NAME)
class ToyConfig(QuantizationConfig):
    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.hides = hides

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ToyConfig:
        return cls(bool(config.get("hides")))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return ToyLinear(self.hides) if ".mlp." in prefix else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return ToyExperts(layer.moe_config)
        return None


assert issubclass(ToyExperts, FusedMoEMethodBase)
