"""Pictures of tensors on a grid, in docs/figures: drawn from a plan's own layouts.

The plan is the planner's, of VGG-16 with two samples on eight workers. A tensor is drawn sample by
sample: channels to the right, rows down. Its columns are whole, and have no direction of their own.
``python -m tools.draw_pictures`` writes the files; a test compares them with what is drawn now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tools.picture import KEPT, OTHER, SHARED, SLOTS, Picture

from elbowroom.core.known_nets import known_net
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.core.units import format_bytes
from elbowroom.core.windows import Interval, exchange
from elbowroom.planning.grid.plan import plan_grid
from elbowroom.planning.grid.settings import KNL
from elbowroom.plans.grid import GridPlan
from elbowroom.plans.grid_layout import Box, move_between
from elbowroom.plans.grid_placement import Placement, place

_BATCH, _CHANNELS, _ROWS = 0, 1, 2
_WIDTH, _LEFT, _GAP = 460, 60, 20
"""The picture is narrow: a phone shows it at three quarters of its size."""
_SAMPLE = 180
"""Pixels of all channels of a sample."""
_HIGH = 200
"""Pixels of all rows."""
_WORKER = 6
"""Whose box is shown."""


class _Planned(NamedTuple):
    """A plan, and where the tensors of its model lie."""

    shapes: ModelShapes
    plan: GridPlan
    placements: Mapping[str, Placement]


def grid_pictures() -> dict[str, Picture]:
    """Pictures by the names of their files."""
    shapes = known_net("vgg16").for_batch(2)
    plan = plan_grid(shapes, 8, 2, KNL).plan
    planned = _Planned(shapes, plan, place(shapes, plan))
    return {"grid-boxes": _boxes(planned), "grid-move": _move(planned)}


def _boxes(planned: _Planned) -> Picture:
    """The input of a convolution that is split by batch, rows and channels, and one's halo."""
    layer = next(
        each
        for each in planned.shapes.layers
        if each.kind == "conv" and planned.placements[each.name].reads[0].parts == (2, 2, 2, 1)
    )
    layout = planned.placements[layer.name].reads[0]
    shape = planned.shapes.by_name[layer.sources[0]].shape
    picture = _titled(planned, layer, shape, 404)
    tensor = _Tensor(picture, shape, 92)
    for worker in range(layout.num_workers):
        fill = SHARED if worker == _WORKER else KEPT
        tensor.box(layout.box(worker, shape), fill, f"worker {worker}")
    own = layout.box(_WORKER, shape)
    found = exchange(layer.windows[0], shape[_ROWS], layout.parts[_ROWS])
    neighbours = layout.along(_WORKER, _ROWS)
    index = layout.index(_WORKER, _ROWS)
    givers = []
    for giver, worker in enumerate(neighbours):
        for rows in found.taken(giver, index) if giver != index else ():
            tensor.box((own[_BATCH], own[_CHANNELS], rows, own[3]), SLOTS)
            givers.append(f"{_named(rows, 'row')} of worker {worker}")
    sizes = [interval.size for interval in own]
    first = f"worker {_WORKER} has {sizes[_CHANNELS]} channels of {sizes[_ROWS]} rows"
    _legend(picture, 322, SHARED, f"{first} of sample {own[_BATCH].start}")
    _legend(picture, 346, SLOTS, f"its halo: {', '.join(givers)}, which it fetches")
    picture.text(20, 382, "All columns of a row are on one worker, and are not drawn.", "start")
    return picture


def _move(planned: _Planned) -> Picture:
    """What a worker keeps and is given where the next layer is split otherwise."""
    layer = next(
        each
        for each in planned.shapes.layers
        if each.kind == "conv"
        and planned.placements[each.sources[0]].output.parts == (2, 2, 2, 1)
        and planned.placements[each.name].reads[0].parts == (1, 2, 1, 1)
    )
    source = planned.shapes.by_name[layer.sources[0]]
    before, after = planned.placements[source.name].output, planned.placements[layer.name].reads[0]
    move = move_between(before, after, source.shape)
    picture = _titled(planned, layer, source.shape, 706)
    given = _Tensor(picture, source.shape, 92)
    for worker in range(before.num_workers):
        fill = SHARED if worker == _WORKER else KEPT
        given.box(before.box(worker, source.shape), fill, f"worker {worker}")
    picture.text(20, 328, f"above: what {source.name} gives", "start")
    picture.text(_WIDTH / 2 + 16, 328, f"below: what worker {_WORKER} reads", "start")
    picture.arrow((_WIDTH / 2, 304), (_WIDTH / 2, 348))
    read = _Tensor(picture, source.shape, 374)
    for sample in range(source.shape[_BATCH]):
        whole = tuple(Interval(0, size) for size in source.shape)
        read.box((Interval(sample, sample + 1), *whole[1:]), OTHER)
    for (giver, taker), boxes in move.pieces.items():
        for box in boxes if taker == _WORKER else ():
            is_own = giver == taker
            read.box(box, SHARED if is_own else SLOTS, "kept" if is_own else f"from {giver}")
    _legend(picture, 604, SHARED, f"what worker {_WORKER} has, and keeps")
    _legend(picture, 628, SLOTS, "what it is sent: one message of each giver")
    sent = format_bytes(4 * move.sent.elements)
    _legend(picture, 652, OTHER, "what others read")
    line = f"All workers together: {move.sent.messages} messages, {sent}."
    picture.text(20, 688, line, "start")
    return picture


class _Tensor:
    """A tensor [batch, channels, rows, columns] on a picture, its samples beside each other."""

    def __init__(self, picture: Picture, shape: tuple[int, ...], top: float) -> None:
        self._picture, self._shape, self._top = picture, shape, top
        for sample in range(shape[_BATCH]):
            picture.text(self._x(sample, 0) + _SAMPLE / 2, top - 8, f"sample {sample}, channels →")
        picture.text(8, top + 12, "row 0", "start")
        picture.text(8, top + _HIGH, f"row {shape[_ROWS] - 1}", "start")

    def box(self, box: Box, fill: str, *lines: str) -> None:
        _, channels, rows, _ = box
        scale = _HIGH / self._shape[_ROWS]
        for sample in range(*box[_BATCH]):
            x, right = (self._x(sample, channel) for channel in channels)
            y = self._top + rows.start * scale
            self._picture.box(x, y, right - x, rows.size * scale, fill, *lines)

    def _x(self, sample: int, channel: int) -> float:
        return _LEFT + sample * (_SAMPLE + _GAP) + channel * _SAMPLE / self._shape[_CHANNELS]


def _titled(planned: _Planned, layer: LayerShape, shape: tuple[int, ...], height: int) -> Picture:
    about = f"{layer.name} of VGG-16 reads [{', '.join(map(str, shape))}]"
    grid = planned.plan.grid_of[layer.name]
    picture = Picture(_WIDTH, height, f"{about} on {planned.plan.procs} workers")
    picture.text(20, 24, about, "start", bold=True)
    picture.text(20, 46, f"batch x space x out x in: {grid}", "start")
    return picture


def _legend(picture: Picture, y: float, fill: str, line: str) -> None:
    picture.box(20, y - 11, 14, 14, fill)
    picture.text(42, y, line, "start")


def _named(rows: Interval, what: str) -> str:
    if rows.size == 1:
        return f"{what} {rows.start}"
    return f"{what}s {rows.start} to {rows.stop - 1}"
