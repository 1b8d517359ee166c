"""What operations say, computed: each from recorded inputs and the model's tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.core.windows import PADDING, Interval, Resize, TransposedWindow, Window
from elbowroom.training.layers import trace_model
from elbowroom.training.operations.find import operations_of
from elbowroom.training.operations.operation import (
    Attention,
    Cat,
    Conv,
    DotAttention,
    Embedding,
    Norm,
    Operation,
    Pointwise,
    Pool,
)
from elbowroom.training.outcome import untouched
from elbowroom.training.traced import TracedModel

Tensors = Sequence[torch.Tensor]


class Exported(nn.Module):
    """A model that symbolic tracing cannot follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        if x.shape[0] > 1000:
            return x
        return self.inner(x)


class Calls(nn.Module):
    """A model of one function of its input and itself, with some weights."""

    def __init__(self, function: Any, **state: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in state.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def record(traced: TracedModel, inputs: Any) -> dict[str, Any]:
    """The output of each layer."""
    recorder = _Recorder(traced.graph.module)
    with untouched(traced.model):
        recorder.run(*traced.graph.placeholder_values(inputs), enable_io_processing=False)
    return {x.name: recorder.values[x.node] for x in traced.layers if x.node is not None}


def check(model: nn.Module, inputs: Any) -> list[str]:
    """Compare each layer that has a rule with what its rule gives; returns the kinds of layers."""
    traced = trace_model(model, inputs, leaves=True)
    values = record(traced, inputs)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    operations = operations_of(traced)
    for operation in operations:
        shape = operation.shape
        values[shape.name] = first(values[shape.name], shape)
        if shape.kind in ("whole", "input", "dropout"):
            continue
        expected = values[shape.name]
        assert shape.shape == (*expected.shape,)
        sources = [values[name] for name in shape.sources]
        copies = [source.clone() for source in sources]
        found = replayed(operation, sources, state)
        assert all(map(torch.equal, sources, copies)), "it writes into what it reads"
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return [operation.shape.kind for operation in operations if operation.shape.kind != "input"]


def first(value: Any, shape: LayerShape) -> Any:
    return value[0] if shape.kind == "attention" else value


def replayed(op: Operation, sources: Tensors, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """One layer's output from those of its sources, by its facts."""
    shape, x = op.shape, sources[0]
    by_role = {role: state[name] for role, name in op.parameters.items()}
    weight, bias = by_role.get("weight"), by_role.get("bias")
    settings = op.settings
    if isinstance(settings, Pointwise):
        return settings.value(sources, state.__getitem__)
    if isinstance(settings, Conv):
        return _conv(shape, settings, x, weight, bias)
    if isinstance(settings, Pool):
        return (_max_pool if shape.kind == "max_pool" else _avg_pool)(shape, settings, x)
    if isinstance(settings, Norm):
        return _norm(shape, settings, x, by_role)
    if isinstance(settings, Embedding):
        assert weight is not None
        return functional.embedding(x, weight, settings.padding_idx)
    if isinstance(settings, Cat):
        return torch.cat(list(sources), settings.dim)
    if isinstance(settings, DotAttention):
        return functional.scaled_dot_product_attention(
            *sources, is_causal=settings.is_causal, scale=settings.scale, enable_gqa=True
        )
    if isinstance(settings, Attention):
        return _attention(settings, x, by_role)
    if shape.kind == "linear":
        assert weight is not None
        return functional.linear(x, weight, bias)
    if shape.kind == "global_pool":
        return x.mean([*range(2, x.ndim)]).view(shape.shape)
    if shape.kind == "permute":
        return x.permute(shape.order)
    if shape.kind == "reshape":
        return x.reshape(shape.shape)
    assert shape.kind == "resize"
    return _resize(shape, x)


def _gathered(x: torch.Tensor, shape: LayerShape, constant: float) -> torch.Tensor:
    """All rows that windows read, in order."""
    for dim, window in enumerate(shape.windows, start=2):
        assert isinstance(window, Window)
        rows = window.rows(Interval(0, shape.shape[dim]), x.shape[dim])
        edge = torch.full_like(x.narrow(dim, 0, 1), constant)
        padded = torch.cat([x, edge], dim)
        where = [x.shape[dim] if row == PADDING else row for row in rows]
        x = padded.index_select(dim, torch.tensor(where))
    return x


def _conv(
    shape: LayerShape, settings: Conv, x: torch.Tensor, weight: Any, bias: Any
) -> torch.Tensor:
    n = len(shape.windows)
    more = {"dilation": settings.dilation, "groups": settings.groups}
    if shape.kind == "conv":
        x = _gathered(x, shape, 0.0)
        return getattr(functional, f"conv{n}d")(x, weight, bias, settings.stride, **more)
    padding = [w.padding for w in shape.windows if isinstance(w, TransposedWindow)]
    extra = [w.output_padding for w in shape.windows if isinstance(w, TransposedWindow)]
    function = getattr(functional, f"conv_transpose{n}d")
    return function(x, weight, bias, settings.stride, padding, extra, **more)


def _max_pool(shape: LayerShape, settings: Pool, x: torch.Tensor) -> torch.Tensor:
    function = getattr(functional, f"max_pool{len(shape.windows)}d")
    x = _gathered(x, shape, -math.inf)
    return function(x, settings.kernel, settings.stride, dilation=settings.dilation)


def _avg_pool(shape: LayerShape, settings: Pool, x: torch.Tensor) -> torch.Tensor:
    counts = torch.ones((), dtype=x.dtype)
    for dim, window in enumerate(shape.windows, start=2):
        assert isinstance(window, Window)
        n, row = x.shape[dim], []
        for output in range(shape.shape[dim]):
            start = output * window.stride - window.before
            stop = min(start + window.kernel, n + window.behind)
            if not settings.count_include_pad:
                start, stop = max(start, 0), min(stop, n)
            row.append(float(stop - start))
        at = [-1 if d == dim else 1 for d in range(x.ndim)]
        counts = counts * torch.tensor(row, dtype=x.dtype).view(at)
    if settings.divisor_override is not None:
        counts = torch.tensor(float(settings.divisor_override), dtype=x.dtype)
    function = getattr(functional, f"avg_pool{len(shape.windows)}d")
    sums = function(_gathered(x, shape, 0.0), settings.kernel, settings.stride)
    return sums * math.prod(settings.kernel) / counts


def _norm(
    shape: LayerShape, settings: Norm, x: torch.Tensor, by_role: dict[str, torch.Tensor]
) -> torch.Tensor:
    affine = by_role.get("weight"), by_role.get("bias")
    if shape.kind == "layer_norm":
        sizes = shape.shape[-settings.num_dims :]
        return functional.layer_norm(x, sizes, *affine, eps=settings.eps)
    if shape.kind == "group_norm":
        return functional.group_norm(x, shape.groups, *affine, eps=settings.eps)
    running = by_role.get("running_mean"), by_role.get("running_var")
    if settings.uses_batch:
        return functional.batch_norm(x, None, None, *affine, training=True, eps=settings.eps)
    return functional.batch_norm(x, *running, *affine, eps=settings.eps)


def _attention(
    settings: Attention, x: torch.Tensor, by_role: dict[str, torch.Tensor]
) -> torch.Tensor:
    samples, tokens, width = x.shape
    heads = (samples, tokens, 3, settings.heads, width // settings.heads)
    qkv = functional.linear(x, by_role["in_proj_weight"], by_role.get("in_proj_bias"))
    q, k, v = qkv.view(heads).permute(2, 0, 3, 1, 4)
    mask = by_role.get("attn_mask")
    out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=settings.is_causal)
    out = out.transpose(1, 2).reshape(x.shape)
    return functional.linear(out, by_role["out_proj.weight"], by_role.get("out_proj.bias"))


def _resize(shape: LayerShape, x: torch.Tensor) -> torch.Tensor:
    for dim, window in enumerate(shape.windows, start=2):
        assert isinstance(window, Resize)
        taps = window.taps(Interval(0, window.outputs), x.shape[dim])
        share = torch.tensor(taps.share, dtype=x.dtype)
        share = share.view([-1 if d == dim else 1 for d in range(x.ndim)])
        low, high = (x.index_select(dim, torch.tensor(rows)) for rows in (taps.low, taps.high))
        x = low * (1 - share) + high * share
    return x
