"""The experts of a mixture in a pool: weights that vLLM brings into another form when loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from elbowroom.core.errors import UnsupportedModelError
from elbowroom.pool.ffn import WeightSpan, frozen

GiveBack = Callable[[], None]


def take_experts(
    module: nn.Module, spans: Sequence[WeightSpan], device: torch.device, loaded: Callable[[], None]
) -> GiveBack:
    """Have the pool hold the experts' weights of ``module`` in the form that vLLM makes of them.

    vLLM still makes it, as it also builds its kernel then: an owner's weights go back to where the
    pool keeps them, and a borrower makes it of zeros, which it drops. ``loaded`` is called when
    that is done. What is returned leaves ``module`` to vLLM again.

    Raises UnsupportedModelError for weights that are quantised, and, when they are loaded, for a
    form of another size.
    """
    method: Any = module.quant_method
    if type(method) is not UnquantizedFusedMoEMethod:
        raise UnsupportedModelError(
            f"experts are quantised ({type(method).__name__}): the pool holds plain bf16, fp16 or "
            f"fp32 weights; use --pool none"
        )
    original = method.process_weights_after_loading
    method.process_weights_after_loading = partial(_process, original, spans, device, loaded)
    return partial(delattr, method, "process_weights_after_loading")


def _process(
    original: Callable[[nn.Module], None],
    spans: Sequence[WeightSpan],
    device: torch.device,
    loaded: Callable[[], None],
    layer: nn.Module,
) -> None:
    homes = [span.weight.data for span in spans]
    for span in spans:
        if span.weight.is_meta:
            _fill_with_zeros(span, device)
    original(layer)
    for span, home in zip(spans, homes, strict=True):
        _bring_home(span, home)
    loaded()  # which may measure memory: nothing may be left here


def _fill_with_zeros(span: WeightSpan, device: torch.device) -> None:
    zeros = frozen(torch.zeros(span.shape, dtype=span.dtype, device=device))
    vars(zeros).update(vars(span.weight))
    setattr(span.module, span.leaf, zeros)


def _bring_home(span: WeightSpan, home: torch.Tensor) -> None:
    """Keep what vLLM made in ``home``, or, where that is a placeholder, drop it."""
    made = span.weight.data
    if (made.shape, made.dtype) != (span.shape, span.dtype) or not made.is_contiguous():
        raise UnsupportedModelError(
            f"vLLM makes {made.dtype} {list(made.shape)} of the experts' {span.leaf}, which is "
            f"{span.dtype} {list(span.shape)}: no pool holds such a form; use --pool none"
        )
    if not home.is_meta:
        home.copy_(made)
    setattr(span.module, span.leaf, frozen(home))
