"""Rules of functions of elements, such as activations and sums of two tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from elbowroom.training.operations.call import (
    Call,
    Found,
    NoRuleError,
    Read,
    Shape,
    is_constant,
)
from elbowroom.training.operations.operation import Argument, Constant, Pointwise, Source, Stored

Function = Callable[..., torch.Tensor]


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


NAMES = frozenset(
    [
        *("abs", "celu", "clamp", "clamp_max", "clamp_min", "clip", "clone", "cos", "elu", "erf"),
        *("exp", "expm1", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh"),
        *("leaky_relu", "log", "log1p", "log_sigmoid", "logsigmoid", "mish", "neg", "negative"),
        *("reciprocal", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus"),
        *("softshrink", "softsign", "sqrt", "square", "tanh", "tanhshrink"),
        *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide"),
        *("maximum", "minimum", "pow", "where", "masked_fill", "lerp", "addcmul"),
        *("contiguous", "to", "type", "float", "double", "half", "bfloat16", "_to_copy"),
    ]
)
"""Functions, methods and operations of ATen each element of which depends on its own ones only.

They write nothing but their result, or, with an underscore behind, their first argument.
"""

_OPERATORS: dict[Callable[..., Any], Function] = {
    operator.add: operator.add,
    operator.iadd: operator.add,
    operator.sub: operator.sub,
    operator.isub: operator.sub,
    operator.mul: operator.mul,
    operator.imul: operator.mul,
    operator.truediv: operator.truediv,
    operator.itruediv: operator.truediv,
    operator.pow: operator.pow,
    operator.ipow: operator.pow,
    operator.neg: operator.neg,
}

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}

_MODULES: dict[type[nn.Module], tuple[Function, str]] = {
    nn.CELU: (functional.celu, "alpha"),
    nn.ELU: (functional.elu, "alpha"),
    nn.GELU: (functional.gelu, "approximate"),
    nn.Hardshrink: (functional.hardshrink, "lambd"),
    nn.Hardsigmoid: (functional.hardsigmoid, ""),
    nn.Hardswish: (functional.hardswish, ""),
    nn.Hardtanh: (functional.hardtanh, "min_val max_val"),
    nn.Identity: (identity, ""),
    nn.LeakyReLU: (functional.leaky_relu, "negative_slope"),
    nn.LogSigmoid: (functional.logsigmoid, ""),
    nn.Mish: (functional.mish, ""),
    nn.ReLU: (functional.relu, ""),
    nn.ReLU6: (functional.relu6, ""),
    nn.SELU: (functional.selu, ""),
    nn.SiLU: (functional.silu, ""),
    nn.Sigmoid: (torch.sigmoid, ""),
    nn.Softplus: (functional.softplus, "beta threshold"),
    nn.Softshrink: (functional.softshrink, "lambd"),
    nn.Softsign: (functional.softsign, ""),
    nn.Tanh: (torch.tanh, ""),
    nn.Tanhshrink: (functional.tanhshrink, ""),
}
"""Activations, and their attributes that are arguments of the function."""


def module_function(module: nn.Module) -> tuple[Function, dict[str, Any]] | None:
    """The function of an activation and its named arguments; None for any other module."""
    found = _MODULES.get(type(module))
    if found is None:
        return None
    function, names = found
    return function, {name: getattr(module, name) for name in names.split()}


def function_of(target: Any) -> Function | None:
    """The function that does the same as a target of a graph and makes a new tensor."""
    if isinstance(target, str):
        return _method(target)
    if isinstance(target, torch._ops.OpOverload):
        return _aten(target)
    if target in _OPERATORS:
        return _OPERATORS[target]
    name = getattr(target, "__name__", "").removesuffix("_")
    for place in (functional, torch):
        # A function of the same name that is not torch's has no rule.
        if target in (getattr(place, name, None), getattr(place, f"{name}_", None)):
            return getattr(place, name, None) if name in NAMES else None
    return None


def _method(name: str) -> Function | None:
    name = name.removesuffix("_")
    if name in _DTYPES:
        return lambda x: _cast(x, _DTYPES[name])
    return getattr(torch.Tensor, name, None) if name in NAMES else None


def _aten(target: torch._ops.OpOverload) -> Function | None:
    name = target._opname.removesuffix("_")
    if target.namespace != "aten" or name not in NAMES:
        return None
    found: Function | None = getattr(getattr(torch.ops.aten, name), target._overloadname, None)
    return found


def pointwise(
    call: Call, function: Function, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> Found:
    """A function of one layer's output, or of several with shapes that broadcast."""
    keywords = {key: value for key, value in kwargs.items() if key != "inplace"}
    call.must_be(all(is_constant(value) for value in keywords.values()), "a tensor by name")
    sources: dict[str, None] = {}
    parameters: dict[str, str] = {}
    arguments: list[Argument] = []
    for value in args:
        if isinstance(value, Read):
            sources.setdefault(value.layer)
            arguments.append(Source([*sources].index(value.layer)))
        elif isinstance(value, Stored):
            parameters[value.name] = value.name
            arguments.append(value)
        elif is_constant(value):
            arguments.append(Constant(value))
        else:
            raise NoRuleError("an argument is no constant")
    call.must_be(bool(sources), "it reads no layer")
    found = Pointwise(function, tuple(arguments), keywords)
    _check(call, found, tuple(sources), parameters)
    is_single = len(sources) == 1 and not parameters
    return Found(
        kind="pointwise" if is_single else "elementwise",
        sources=tuple(sources),
        settings=found,
        features=_features(call, sources),
        parameters=parameters,
        matrices=(),
    )


def _features(call: Call, sources: Iterable[str]) -> int | None:
    """Features of the first source that has the shape of the result."""
    for source in sources:
        tensor = call.tensor(source)
        if tensor.shape == call.out.shape:
            return tensor.features
    return None


def _check(
    call: Call, found: Pointwise, sources: tuple[str, ...], parameters: Mapping[str, str]
) -> None:
    """What it makes must be what the model made, in shape and dtype, and each broadcast."""
    shapes = [call.tensor(source).shape for source in sources]
    shapes += [(*call.state[name].shape,) for name in parameters]
    call.must_be(call.out.shape in shapes, "all arguments are broadcast")
    for shape in shapes:
        call.must_be(_broadcasts(shape, call.out.shape), "shapes that do not broadcast")
    for name in parameters:
        shape = (*call.state[name].shape,)
        is_of_batch = len(shape) == len(call.out.shape) and shape[0] != 1
        call.must_be(not is_of_batch, "a parameter with a batch")
    metas = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for tensor in map(call.tensor, sources)
    ]
    try:
        made = found.value(metas, lambda name: call.state[name].detach().to("meta"))
    except Exception as error:
        raise NoRuleError(f"not out of place: {error}") from error
    is_same = isinstance(made, torch.Tensor) and (
        ((*made.shape,), made.dtype) == (call.out.shape, call.out.dtype)
    )
    call.must_be(is_same, "another result out of place")


def _broadcasts(shape: Shape, target: Shape) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(one in (1, other) for one, other in pairs)
