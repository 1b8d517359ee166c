"""Layers without windows and products on parts: functions of elements, shapes, means, dropout."""

from __future__ import annotations

import math

import torch

from elbowroom.grid.call import Call
from elbowroom.grid.parts import Part
from elbowroom.plans.grid_reshape import check_reshape
from elbowroom.training.operations.operation import Cat, Dropout, Pointwise


def pointwise(call: Call) -> Part:
    """A function of elements, of one tensor or of several that are broadcast."""
    roles = {name: role for role, name in call.operation.parameters.items()}
    value = call.settings(Pointwise).value(
        [source.local for source in call.sources], lambda name: call.weight(roles[name])
    )
    return call.output(value)


def dropout(call: Call) -> Part:
    """Elements kept by numbers that replicas share, and scaled."""
    settings = call.settings(Dropout)
    source = call.source
    if call.draws.exact:
        drawn = torch.rand(source.shape, generator=call.draws.generator(call.number))
        drawn = drawn[tuple(slice(start, stop) for start, stop in source.box)]
    else:
        starts = [start for start, _ in source.box]
        drawn = torch.rand(source.local.shape, generator=call.draws.generator(call.number, *starts))
    is_kept = drawn.to(source.local.device) >= settings.p
    scale = 1 / (1 - settings.p) if settings.p < 1 else 0.0
    return call.output(source.local * is_kept * scale)


def cat(call: Call) -> Part:
    dim = call.settings(Cat).dim
    return call.output(torch.cat([source.local for source in call.sources], dim))


def reshape(call: Call) -> Part:
    source = call.source
    check_reshape(call.operation.shape.name, source.shape, call.shape, source.layout)
    return call.output(source.local.reshape(call.local_shape))


def permute(call: Call) -> Part:
    return call.output(call.source.local.permute(call.operation.shape.order))


def global_pool(call: Call) -> Part:
    """Sums over this worker's rows, divided by all: a mean when workers have added theirs."""
    source = call.source
    dims = tuple(range(2, len(source.shape)))
    total = source.local.sum(dims) / math.prod(source.shape[2:])
    return call.output(total.reshape(call.local_shape))
