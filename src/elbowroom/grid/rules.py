"""Which function runs a layer of each kind on this worker's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from elbowroom.core.layer_shapes import Kind
from elbowroom.grid import elementary, norms, products, resize, transposed, windowed
from elbowroom.grid.call import Call
from elbowroom.grid.parts import Part
from elbowroom.training.operations.operation import Conv, Norm, Pool


def _conv(call: Call) -> Part:
    return _convolved(windowed.conv, call)


def _conv_transpose(call: Call) -> Part:
    return _convolved(transposed.conv_transpose, call)


def _convolved(function: Callable[..., Part], call: Call) -> Part:
    return function(
        call.source,
        call.weight(),
        call.bias(),
        call.operation.shape.windows,
        call.channel,
        groups=call.settings(Conv).groups,
        layout=call.placement.computed,
        features=call.shape[1],
    )


def _max_pool(call: Call) -> Part:
    return windowed.max_pool(call.source, _windows(call), call.channel)


def _avg_pool(call: Call) -> Part:
    settings = call.settings(Pool)
    return windowed.avg_pool(
        call.source,
        _windows(call),
        call.channel,
        count_include_pad=settings.count_include_pad,
        divisor_override=settings.divisor_override,
    )


def _resize(call: Call) -> Part:
    return resize.resize(call.source, _windows(call), call.channel)


def _batch_norm(call: Call) -> Part:
    settings = call.settings(Norm)
    mean, variance = call.parameter("running_mean"), call.parameter("running_var")
    running = None
    if mean is not None and variance is not None:
        count = call.parameter("num_batches_tracked")
        running = norms.Running(mean, variance, count, settings.momentum)
    return norms.batch_norm(
        call.source,
        call.parameter("weight"),
        call.parameter("bias"),
        call.channel,
        eps=settings.eps,
        uses_batch=settings.uses_batch,
        running=running,
    )


def _group_norm(call: Call) -> Part:
    return norms.group_norm(
        call.source,
        call.operation.shape.groups,
        call.parameter("weight"),
        call.parameter("bias"),
        call.channel,
        eps=call.settings(Norm).eps,
    )


def _layer_norm(call: Call) -> Part:
    settings = call.settings(Norm)
    return norms.layer_norm(
        call.source,
        settings.num_dims,
        call.parameter("weight"),
        call.parameter("bias"),
        eps=settings.eps,
    )


def _windows(call: Call) -> tuple[Any, ...]:
    return call.operation.shape.windows


RULES: Mapping[Kind, Callable[[Call], Part]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": products.linear,
    "embedding": products.embedding,
    "attention": products.attention,
    "dot_attention": products.dot_attention,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_pool": elementary.global_pool,
    "resize": _resize,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "pointwise": elementary.pointwise,
    "elementwise": elementary.pointwise,
    "dropout": elementary.dropout,
    "cat": elementary.cat,
    "reshape": elementary.reshape,
    "permute": elementary.permute,
}
"""Each takes a layer's sources, in the layouts of its placement; gives the output as computed."""
