"""Rules of operations that change shapes: concatenations, means over space, views, permutations."""

from __future__ import annotations

import math
from typing import Any

from elbowroom.training.operations.call import Call, Found, Read, Shape
from elbowroom.training.operations.operation import Cat


def cat(call: Call) -> Found:
    given = call.raw("tensors", ())
    call.must_be(
        isinstance(given, tuple) and all(isinstance(each, Read) for each in given) and bool(given),
        "what is concatenated is not layers' output alone",
    )
    num_dims = len(call.out.shape)
    sources = tuple(each.layer for each in given)
    tensors = [call.tensor(source) for source in sources]
    dim = _dim(call, call.constant("dim", 0), num_dims)
    call.must_be(dim == tensors[0].features, "no features are concatenated")
    call.must_be(all(len(each.shape) == num_dims for each in tensors), "an empty tensor")
    call.must_be(all(each.dtype == call.out.dtype for each in tensors), "unlike dtypes")
    return Found("cat", sources, Cat(dim), dim)


def mean(call: Call) -> Found:
    """A mean over all of space, which leaves the batch and the channels."""
    source = call.source()
    tensor = call.tensor(source)
    dims = call.constant("dim")
    call.must_be(dims is not None and call.constant("dtype") is None, "a mean of all")
    num_dims = len(tensor.shape)
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    found = {_dim(call, dim, num_dims) for dim in given}
    call.must_be(tensor.features == 1 and num_dims > 2, "no space behind channels")
    call.must_be(found == {*range(2, num_dims)}, "not all of space")
    call.constant("keepdim", False)
    return Found("global_pool", (source,), features=1)


def reshape(call: Call) -> Found:
    """A view whose shape is known and keeps the batch; its arguments do not matter."""
    source = call.source()
    tensor, out = call.tensor(source), call.out
    call.must_be(tensor.dtype == out.dtype, "another dtype")
    call.must_be(math.prod(tensor.shape) == math.prod(out.shape), "other elements")
    is_kept = min(len(tensor.shape), len(out.shape)) > 0 and tensor.shape[0] == out.shape[0]
    call.must_be(is_kept, "the batch is not kept")
    return Found(
        "reshape", (source,), features=_features_behind(tensor.shape, tensor.features, out.shape)
    )


def permute(call: Call) -> Found:
    source = call.source()
    order = call.constant("dims")
    call.must_be(isinstance(order, tuple), "no dimensions")
    return _permuted(call, source, tuple(_dim(call, dim, len(order)) for dim in order))


def transpose(call: Call) -> Found:
    source = call.source()
    num_dims = len(call.out.shape)
    one, other = (_dim(call, call.constant(key), num_dims) for key in ("dim0", "dim1"))
    order = [*range(num_dims)]
    order[one], order[other] = order[other], order[one]
    return _permuted(call, source, tuple(order))


def _permuted(call: Call, source: str, order: tuple[int, ...]) -> Found:
    tensor = call.tensor(source)
    call.must_be(sorted(order) == [*range(len(tensor.shape))], "no permutation")
    call.must_be(tuple(tensor.shape[dim] for dim in order) == call.out.shape, "another shape")
    call.must_be(order[0] == 0, "the batch is not kept")
    features = order.index(tensor.features) if tensor.features < len(order) else None
    return Found("permute", (source,), features=features, order=order)


def _dim(call: Call, dim: Any, num_dims: int) -> int:
    call.must_be(isinstance(dim, int) and -num_dims <= dim < num_dims, f"dimension {dim}")
    return int(dim) % num_dims


def _features_behind(shape: Shape, features: int, out: Shape) -> int:
    """The dimension of ``out`` that begins where that of the features begins in ``shape``."""
    before = math.prod(shape[:features])
    for dim in range(1, len(out)):
        if math.prod(out[:dim]) == before and (out[dim] > 1 or dim == len(out) - 1):
            return dim
    inside = [dim for dim in range(1, len(out)) if math.prod(out[:dim]) <= before]
    return inside[-1] if inside else max(1, len(out) - 1)
