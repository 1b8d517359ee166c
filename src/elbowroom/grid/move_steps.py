"""A move as one worker carries it out: what it sends, keeps and is given, worked out once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from elbowroom.grid.transport import Channel, Direction, Route
from elbowroom.plans.grid_layout import Box, Move, volume


class _Piece(NamedTuple):
    """A box of a tensor; ``place`` is None where that is the whole tensor."""

    place: tuple[slice, ...] | None
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.place is None else tensor[self.place]


class _Given(NamedTuple):
    """What the result takes from one worker: pieces of the result.

    ``own`` are pieces of what the worker has already, if it is this one; ``is_direct`` is whether a
    message can be received into its place.
    """

    giver: int
    pieces: tuple[_Piece, ...]
    own: tuple[_Piece, ...]
    is_direct: bool

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)


class _Steps(NamedTuple):
    """A move on one worker: who takes which of its pieces, and what it is given, in order.

    ``covers`` is whether the first that is given stands in all of the result.
    """

    takers: tuple[tuple[tuple[int, ...], tuple[_Piece, ...]], ...]
    given: tuple[_Given, ...]
    shape: tuple[int, ...]
    covers: bool


def run_move(
    move: Move, local: torch.Tensor, channel: Channel, route: Route, direction: Direction
) -> torch.Tensor:
    """What this worker has after a move, from what it had. Raises PeerLostError."""
    steps = _steps(move, channel.worker)
    sends: dict[int, torch.Tensor] = {}
    for takers, pieces in steps.takers:
        sends.update(dict.fromkeys(takers, _packed(local, pieces)))
    is_filled = steps.covers or not move.is_sum
    result = local.new_empty(steps.shape) if is_filled else local.new_zeros(steps.shape)
    receives = {
        given.giver: given.pieces[0].of(result).view(-1)
        if given.is_direct
        else local.new_empty(given.numel)
        for given in steps.given
        if not given.own
    }
    pending = channel.start(sends, receives, route, direction)
    if not move.is_sum:  # while messages are on their way
        for given in steps.given:
            _put(result, given, [piece.of(local) for piece in given.own], adds=False)
    channel.wait(pending, route, direction)
    for number, given in enumerate(steps.given):
        adds = move.is_sum and not (number == 0 and steps.covers)
        if not given.own and not given.is_direct:
            _put(result, given, _unpacked(receives[given.giver], given.pieces), adds=adds)
        elif given.own and move.is_sum:
            _put(result, given, [piece.of(local) for piece in given.own], adds=adds)
    return result


@lru_cache(maxsize=4096)
def _steps(move: Move, worker: int) -> _Steps:
    own, wanted = move.source.box(worker, move.shape), move.target.box(worker, move.shape)
    takers: dict[tuple[Box, ...], list[int]] = {}
    given = []
    for (giver, taker), boxes in move.pieces.items():
        if giver == worker != taker:
            takers.setdefault(boxes, []).append(taker)
        if taker == worker:
            is_direct = not move.is_sum and len(boxes) == 1 and _is_block(boxes[0], wanted)
            kept = _within(boxes, own) if giver == worker else ()
            given.append(_Given(giver, _within(boxes, wanted), kept, is_direct))
    return _Steps(
        tuple((tuple(who), _within(boxes, own)) for boxes, who in takers.items()),
        tuple(given),
        tuple(interval.size for interval in wanted),
        bool(given) and given[0].numel == volume(wanted),
    )


def _within(boxes: Iterable[Box], of: Box) -> tuple[_Piece, ...]:
    """Where boxes stand in a tensor that has the box ``of``."""
    found = []
    for box in boxes:
        sides = zip(box, of, strict=True)
        place = tuple(slice(a - start, b - start) for (a, b), (start, _) in sides)
        found.append(_Piece(None if box == of else place, volume(box)))
    return tuple(found)


def _is_block(box: Box, of: Box) -> bool:
    """Whether the elements of a box follow one another in a tensor that has the box ``of``."""
    first = next((dim for dim, side in enumerate(box) if side.size > 1), len(box))
    return box[first + 1 :] == of[first + 1 :]


def _packed(local: torch.Tensor, pieces: Sequence[_Piece]) -> torch.Tensor:
    """A copy: what is sent stays, and the tensor may be written into."""
    return torch.cat([piece.of(local).reshape(-1) for piece in pieces])


def _unpacked(message: torch.Tensor, pieces: Sequence[_Piece]) -> Sequence[torch.Tensor]:
    return torch.split(message, [piece.numel for piece in pieces])


def _put(result: torch.Tensor, given: _Given, found: Sequence[torch.Tensor], *, adds: bool) -> None:
    """Write or add what was given to its places."""
    for piece, values in zip(given.pieces, found, strict=False):
        place = piece.of(result)
        values = values.view(place.shape)
        place.add_(values) if adds else place.copy_(values)
