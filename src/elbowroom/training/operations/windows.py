"""Rules of operations that read neighbouring rows: convolutions, poolings, interpolations."""

from __future__ import annotations

import math
from typing import Any

from elbowroom.core.windows import (
    AxisWindow,
    PaddingMode,
    Resize,
    ResizeMode,
    TransposedWindow,
    Window,
)
from elbowroom.training.operations.call import Call, Found, NoRuleError
from elbowroom.training.operations.operation import Conv, Pool

_MODES: dict[str, ResizeMode] = {
    "nearest": "nearest",
    "nearest-exact": "nearest-exact",
    "linear": "linear",
    "bilinear": "linear",
    "trilinear": "linear",
}


def conv(call: Call) -> Found:
    source, num_space = _image(call)
    parameters = {"weight": call.needs("weight"), **call.roles("bias")}
    kernel = call.state[parameters["weight"]].shape
    call.must_be(len(kernel) == num_space + 2, "the weight has other dimensions")
    stride, dilation = (call.each(key, num_space, 1) for key in ("stride", "dilation"))
    groups, mode = call.constant("groups", 1), call.constant("padding_mode", "zeros")
    sides = _sides(call, kernel[2:], dilation)
    windows = tuple(
        Window(k, s, before, behind, d, mode=mode)
        for k, s, (before, behind), d in zip(kernel[2:], stride, sides, dilation, strict=True)
    )
    _check_padding(call, source, sides, mode)
    weight = call.state[parameters["weight"]]
    return Found(
        kind="conv",
        sources=(source,),
        settings=Conv(stride, dilation, groups),
        features=1,
        windows=_fitting(call, source, windows),
        parameters=parameters,
        groups=groups,
        flops=2.0 * math.prod(call.out.shape) * (weight.numel() // weight.shape[0]),
    )


def conv_transpose(call: Call) -> Found:
    source, num_space = _image(call)
    parameters = {"weight": call.needs("weight"), **call.roles("bias")}
    weight = call.state[parameters["weight"]]
    call.must_be(weight.ndim == num_space + 2, "the weight has other dimensions")
    call.must_be(call.constant("padding_mode", "zeros") == "zeros", "padding_mode")
    stride, dilation = (call.each(key, num_space, 1) for key in ("stride", "dilation"))
    padding, extra = (call.each(key, num_space, 0) for key in ("padding", "output_padding"))
    groups = call.constant("groups", 1)
    windows = tuple(
        TransposedWindow(*each)
        for each in zip(weight.shape[2:], stride, padding, dilation, extra, strict=True)
    )
    shape = call.tensor(source).shape
    return Found(
        kind="conv_transpose",
        sources=(source,),
        settings=Conv(stride, dilation, groups),
        features=1,
        windows=_fitting(call, source, windows),
        parameters=parameters,
        groups=groups,
        flops=2.0 * math.prod(shape) * (weight.numel() // weight.shape[0]),
    )


def max_pool(call: Call) -> Found:
    source, num_space = _image(call)
    call.must_be(call.constant("return_indices", False) is False, "return_indices")
    windows = _pool_windows(call, num_space)
    return Found(
        kind="max_pool",
        sources=(source,),
        settings=_pool(windows),
        features=1,
        windows=_fitting(call, source, windows),
    )


def avg_pool(call: Call) -> Found:
    source, num_space = _image(call)
    windows = _pool_windows(call, num_space)
    counts = call.constant("count_include_pad", True)
    return Found(
        kind="avg_pool",
        sources=(source,),
        settings=_pool(windows, counts, call.constant("divisor_override")),
        features=1,
        windows=_fitting(call, source, windows),
    )


def adaptive_avg_pool(call: Call) -> Found:
    """To one row, or to a number of rows that divides those there are."""
    source, num_space = _image(call)
    sizes = call.tensor(source).shape[2:]
    wanted = call.constant("output_size")
    wanted = (wanted,) * num_space if isinstance(wanted, int) else tuple(wanted)
    rows = [size if want is None else want for want, size in zip(wanted, sizes, strict=True)]
    if all(row == 1 for row in rows):
        call.must_be(call.tensor(source).features == 1, "no space behind channels")
        return Found("global_pool", (source,), features=1)
    pairs = list(zip(sizes, rows, strict=True))
    call.must_be(all(size % row == 0 for size, row in pairs), "windows of unlike sizes")
    windows = tuple(Window(size // row, size // row) for size, row in pairs)
    settings = _pool(windows)
    return Found("avg_pool", (source,), settings, 1, _fitting(call, source, windows))


def resize(call: Call) -> Found:
    source, num_space = _image(call)
    sizes, outputs = call.tensor(source).shape[2:], call.out.shape[2:]
    mode = _MODES.get(call.constant("mode", "nearest"))
    call.must_be(mode is not None, "the mode of the interpolation")
    assert mode is not None
    aligned = bool(call.constant("align_corners"))
    call.must_be(not call.constant("antialias", False), "antialias")
    call.constant("size")
    factors = _factors(call, num_space)
    windows = tuple(
        Resize(m, 1 / factor if factor else n / m, mode, aligned)
        for n, m, factor in zip(sizes, outputs, factors, strict=True)
    )
    return Found("resize", (source,), None, 1, _fitting(call, source, windows))


def _image(call: Call) -> tuple[str, int]:
    """The source, with a batch and channels, and the number of its dimensions of space."""
    source = call.source()
    tensor, num_space = call.tensor(source), call.constant("num_space")
    call.must_be(len(tensor.shape) == num_space + 2, "there is no batch")
    call.must_be(not tensor.dtype.is_complex, "complex numbers")
    return source, num_space


def _sides(
    call: Call, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Padding before and behind each dimension."""
    padding = call.constant("padding", 0)
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    values = (padding,) if isinstance(padding, int) else tuple(padding)
    if not all(isinstance(each, int) for each in values):
        raise NoRuleError(f"padding is {padding}")
    values = values * len(kernel) if len(values) == 1 else values
    return tuple((each, each) for each in values)


def _check_padding(
    call: Call, source: str, sides: tuple[tuple[int, int], ...], mode: PaddingMode
) -> None:
    """Torch pads by more rows than there are in the mode of constants only."""
    call.must_be(mode in ("zeros", "reflect", "replicate", "circular"), "padding_mode")
    sizes = call.tensor(source).shape[2:]
    for size, side in zip(sizes, sides, strict=True):
        fits = max(side) < size if mode == "reflect" else max(side) <= size
        call.must_be(fits or mode in ("zeros", "replicate"), "padding")


def _pool_windows(call: Call, num_space: int) -> tuple[Window, ...]:
    kernel = call.each("kernel_size", num_space)
    stride = call.constant("stride")
    stride = kernel if stride is None or stride == () else _spread(stride, num_space)
    padding, dilation = call.each("padding", num_space, 0), call.each("dilation", num_space, 1)
    ceil_mode = bool(call.constant("ceil_mode", False))
    return tuple(
        Window(k, s, p, p, d, ceil_mode)
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    )


def _spread(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _pool(windows: tuple[Window, ...], counts: bool = True, divisor: int | None = None) -> Pool:
    return Pool(
        tuple(each.kernel for each in windows),
        tuple(each.stride for each in windows),
        tuple(each.dilation for each in windows),
        bool(counts),
        divisor,
    )


def _fitting(call: Call, source: str, windows: tuple[AxisWindow, ...]) -> tuple[AxisWindow, ...]:
    """The windows, if they give what the model gave."""
    sizes = call.tensor(source).shape[2:]
    found = tuple(each.num_outputs(size) for each, size in zip(windows, sizes, strict=True))
    call.must_be(found == call.out.shape[2:], f"windows give {found}")
    return windows


def _factors(call: Call, num_space: int) -> tuple[float | None, ...]:
    """Scale factors that torch uses; None where it divides sizes."""
    given, again = call.constant("scale_factor"), call.constant("recompute_scale_factor")
    if given is None or again:
        return (None,) * num_space
    values = (given,) if isinstance(given, int | float) else tuple(given)
    return tuple(map(float, values * num_space if len(values) == 1 else values))
