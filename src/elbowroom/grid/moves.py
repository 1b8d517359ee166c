"""Tensors that change their layout, and rows that a window needs, differentiable.

The gradient of a tensor lies in the tensor's own layout, whole on every replica. So the backward of
a move is the move back, without sums; sums stand only where several workers used the same rows
(``fetch``), used the same part for other outputs (``spread``), or have summands (``collect``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from elbowroom.core.windows import AxisWindow, Exchange, Interval, exchange
from elbowroom.grid.move_steps import run_move
from elbowroom.grid.parts import Part
from elbowroom.grid.transport import Channel, Route
from elbowroom.plans.grid_layout import Layout, Move, move_between


def moved(part: Part, target: Layout, channel: Channel) -> Part:
    """The same tensor in another layout."""
    if target == part.layout:
        return part
    route = channel.route("MOVE")
    there = move_between(part.layout, target, part.shape)
    back = move_between(target, part.layout, part.shape)
    local = _Moved.apply(part.local, there, [back], channel, route)  # type: ignore[no-untyped-call]
    return replace(part, local=local, layout=target)


def spread(part: Part, target: Layout, users: tuple[int, ...], channel: Channel) -> Part:
    """The same tensor in another layout, for workers of which each has a part of its gradient.

    Those differ in the digits ``users`` only, and read the same. Their gradients are summed on the
    way back.
    """
    if not users or not part.local.requires_grad:
        return moved(part, target, channel)
    route = channel.route("MOVE")
    there = move_between(part.layout, target, part.shape)
    between = target.scattered(users, part.layout.parts, part.shape)
    back = [
        move_between(target, between, part.shape, users),
        move_between(between, part.layout, part.shape),
    ]
    local = _Moved.apply(part.local, there, back, channel, route)  # type: ignore[no-untyped-call]
    return replace(part, local=local, layout=target)


def collect(part: Part, pending: tuple[int, ...], target: Layout, channel: Channel) -> Part:
    """The sum of what workers have that differ in ``pending`` digits only, in another layout."""
    if not pending:
        return moved(part, target, channel)
    route = channel.route("SUM")
    there = move_between(part.layout, target, part.shape, pending)
    back = move_between(target, part.layout, part.shape)
    local = _Moved.apply(part.local, there, [back], channel, route)  # type: ignore[no-untyped-call]
    return replace(part, local=local, layout=target)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, there: Move, back: list[Move], channel: Channel, route: Route
    ) -> torch.Tensor:
        ctx.back, ctx.channel, ctx.route = back, channel, route
        return run_move(there, local, channel, route, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        for move in ctx.back:
            gradient = run_move(move, gradient, ctx.channel, ctx.route, "backward")
        return gradient, None, None, None, None


@dataclass(frozen=True, eq=False)
class Fetched:
    """Rows of one dimension from their owners.

    ``local`` has the rows that ``exchange.wanted[index]`` names, along that dimension; which of
    them a window reads, and where padding stands, say ``exchange.positions(index)``.
    """

    local: torch.Tensor
    exchange: Exchange
    index: int

    @property
    def outputs(self) -> Interval:
        """Rows of the result that this worker computes."""
        return self.exchange.outputs[self.index]


def fetch(part: Part, dim: int, window: AxisWindow, channel: Channel) -> Fetched:
    """Fetch the rows of a dimension that this worker's share of a window's outputs reads.

    Other dimensions of ``part.local`` may have been fetched already. Nothing is padded: the next
    dimension would send that too.
    """
    found = exchange(window, part.shape[dim], part.layout.parts[dim])
    index = part.layout.index(part.worker, dim)
    if found.is_local:
        return Fetched(part.local, found, index)
    route = channel.route("HALO")
    workers = part.layout.along(part.worker, dim)
    arguments = (part.local, dim, found, index, workers, channel, route)
    return Fetched(_Rows.apply(*arguments), found, index)  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: torch.Tensor,
        dim: int,
        exchange: Exchange,
        index: int,
        workers: tuple[int, ...],
        channel: Channel,
        route: Route,
    ) -> torch.Tensor:
        ctx.about = dim, exchange, index, workers, channel, route
        ctx.shape = local.shape
        parts = range(len(workers))
        first = exchange.own[index].start
        sends = {
            workers[taker]: torch.cat([_rows(local, dim, rows, first) for rows in taken], dim)
            for taker in parts
            if taker != index and (taken := exchange.taken(index, taker))
        }
        shape = list(local.shape)
        shape[dim] = exchange.num_wanted(index)
        result = local.new_empty(shape)
        givers = [giver for giver in parts if giver != index and exchange.taken(giver, index)]
        receives = {workers[giver]: _room(local, dim, exchange, giver, index) for giver in givers}
        channel.swap(sends, receives, route, "forward")
        for rows in exchange.taken(index, index):
            _place(result, dim, exchange, index, rows).copy_(_rows(local, dim, rows, first))
        for giver in givers:
            at = 0
            for rows in exchange.taken(giver, index):
                piece = receives[workers[giver]].narrow(dim, at, rows.size)
                _place(result, dim, exchange, index, rows).copy_(piece)
                at += rows.size
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        dim, exchange, index, workers, channel, route = ctx.about
        parts = range(len(workers))
        first = exchange.own[index].start
        sends = {
            workers[giver]: torch.cat(
                [_place(gradient, dim, exchange, index, rows) for rows in taken], dim
            )
            for giver in parts
            if giver != index and (taken := exchange.taken(giver, index))
        }
        local = gradient.new_zeros(ctx.shape)
        takers = [taker for taker in parts if exchange.taken(index, taker)]
        receives = {
            workers[taker]: _room(local, dim, exchange, index, taker)
            for taker in takers
            if taker != index
        }
        channel.swap(sends, receives, route, "backward")
        for taker in takers:  # in the order of workers, so that sums have the same bits
            at = 0
            for rows in exchange.taken(index, taker):
                if taker == index:
                    piece = _place(gradient, dim, exchange, index, rows)
                else:
                    piece = receives[workers[taker]].narrow(dim, at, rows.size)
                    at += rows.size
                _rows(local, dim, rows, first).add_(piece)
        return local, None, None, None, None, None, None


def _rows(tensor: torch.Tensor, dim: int, rows: Interval, first: int) -> torch.Tensor:
    """Rows of a tensor whose own begin at the global row ``first``."""
    return tensor.narrow(dim, rows.start - first, rows.size)


def _place(
    tensor: torch.Tensor, dim: int, exchange: Exchange, index: int, rows: Interval
) -> torch.Tensor:
    """Where rows stand in a tensor of those that a part wanted."""
    at = 0
    for wanted in exchange.wanted[index]:
        if wanted.start <= rows.start < wanted.stop:
            return tensor.narrow(dim, at + rows.start - wanted.start, rows.size)
        at += wanted.size
    raise AssertionError("rows that are taken are wanted")


def _room(like: torch.Tensor, dim: int, exchange: Exchange, giver: int, taker: int) -> torch.Tensor:
    """Memory for rows that one part takes from another."""
    shape = list(like.shape)
    shape[dim] = sum(rows.size for rows in exchange.taken(giver, taker))
    return like.new_empty(shape)
