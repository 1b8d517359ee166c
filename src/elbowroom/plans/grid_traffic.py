"""Messages that a grid plan's run sends, layer by layer, counted from the boxes of all workers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from elbowroom.core.layer_shapes import WINDOWED, LayerShape, ModelShapes
from elbowroom.core.windows import Exchange, Resize, exchange, part_of
from elbowroom.plans.grid import GridPlan
from elbowroom.plans.grid_layout import Layout, Sent, move_between
from elbowroom.plans.grid_placement import Placement, place

SMALL_SUM = 4096
"""Up to so many elements are summed in one round: each worker sends all of its own to all."""

JOINED_GRADIENT = 1 << 16
"""Up to so many elements, gradients of the same workers are joined, and summed in one."""

JOINED_SUM = 1 << 20
"""From so many elements on no more layers are joined, so that their sum can begin."""

SMALL_WEIGHTS = "small weights"
"""What is sent for joined gradients; no layer has such a name."""

_NOTHING = Sent()


class LayerTraffic(NamedTuple):
    """What all workers together send for one layer: forward, backward, and to sum gradients."""

    forward: Sent = _NOTHING
    backward: Sent = _NOTHING
    update: Sent = _NOTHING

    def plus(self, other: LayerTraffic) -> LayerTraffic:
        return LayerTraffic(*(a.plus(b) for a, b in zip(self, other, strict=True)))


def traffic(shapes: ModelShapes, plan: GridPlan) -> dict[str, LayerTraffic]:
    """The traffic of every layer in one step with ``shapes.batch`` samples, by name.

    Small gradients, which are joined, are ``SMALL_WEIGHTS``. What the loss and a limit on the norm
    of gradients send is not among it. Takes time and memory that grow with the square of the
    workers. Raises InputError as ``place`` does.
    """
    placements = place(shapes, plan)
    counter = _Counter(shapes, placements)
    sent = {layer.name: counter.layer(layer) for layer in shapes.layers}
    return {**sent, SMALL_WEIGHTS: counter.small_weights()}


def joined(sizes: Mapping[str, int]) -> list[list[str]]:
    """Layers whose small gradients are joined, from elements of each layer in their order.

    The last layers are joined first: the backward has them first.
    """
    found: list[list[str]] = []
    room = 0
    for name, size in reversed([*sizes.items()]):
        if room <= 0:
            found.append([])
            room = JOINED_SUM
        found[-1].append(name)
        room -= size
    return found


class _Counter:
    def __init__(self, shapes: ModelShapes, placements: Mapping[str, Placement]) -> None:
        self.shapes, self.placements = shapes, placements
        self.has_gradient: dict[str, bool] = {}
        self.small: dict[tuple[int, tuple[int, ...]], Counter[str]] = defaultdict(Counter)
        """Elements of small gradients of each layer, by worker and those with summands."""

    def small_weights(self) -> LayerTraffic:
        """Sums of all small gradients of the layers that were counted before."""
        update = _NOTHING
        for (worker, group), sizes in self.small.items():
            for names in joined(sizes):
                update = update.plus(_summed(worker, group, sum(sizes[name] for name in names)))
        return LayerTraffic(update=update)

    def layer(self, layer: LayerShape) -> LayerTraffic:
        placement = self.placements[layer.name]
        reads = any(self.has_gradient[name] for name in layer.sources)
        self.has_gradient[layer.name] = reads or layer.weights + layer.biases > 0
        total = self._reads(layer, placement)
        if layer.kind in WINDOWED:
            rows = _rows(self.shapes.by_name[layer.sources[0]].shape, layer, placement.reads[0])
            total = total.plus(LayerTraffic(rows, rows if reads else _NOTHING))
        if layer.kind in ("batch_norm", "group_norm"):
            statistics = _statistics(layer, placement.computed)
            total = total.plus(statistics if reads else LayerTraffic(statistics.forward))
        if placement.computed != placement.output:
            total = total.plus(self._collected(layer, placement))
        update = _NOTHING
        for numel, digits in _parameters(layer, placement):
            update = update.plus(self._large(layer.name, numel, placement.computed, digits))
        return total.plus(LayerTraffic(update=update))

    def _large(self, name: str, numel: list[int], layout: Layout, digits: tuple[int, ...]) -> Sent:
        """What summing a gradient by itself sends; a small one is noted, and sends nothing."""
        for worker, size in zip(layout.workers, numel, strict=True):
            if size <= JOINED_GRADIENT:
                self.small[worker, tuple(sorted(layout.group(worker, digits)))][name] += size
        return sum_sent([size if size > JOINED_GRADIENT else 0 for size in numel], layout, digits)

    def _reads(self, layer: LayerShape, placement: Placement) -> LayerTraffic:
        total = LayerTraffic()
        for number, name in enumerate(layer.sources):
            read, users = placement.reads[number], placement.users(number)
            source = self.shapes.by_name[name]
            before = self.placements[name].output
            if source.kind == "input":  # every worker has all of it
                continue
            forward = move_between(before, read, source.shape).sent
            backward = _NOTHING
            if self.has_gradient[name] and users:
                between = read.scattered(users, before.parts, source.shape)
                backward = move_between(read, between, source.shape, users).sent
                backward = backward.plus(move_between(between, before, source.shape).sent)
            elif self.has_gradient[name]:
                backward = move_between(read, before, source.shape).sent
            total = total.plus(LayerTraffic(forward, backward))
        return total

    def _collected(self, layer: LayerShape, placement: Placement) -> LayerTraffic:
        computed, output = placement.computed, placement.output
        forward = move_between(computed, output, layer.shape, placement.pending).sent
        back = move_between(output, computed, layer.shape).sent
        return LayerTraffic(forward, back if self.has_gradient[layer.name] else _NOTHING)


def _rows(shape: tuple[int, ...], layer: LayerShape, layout: Layout) -> Sent:
    """Rows that windows fetch, one dimension after the other, each with what is there by then."""
    total = _NOTHING
    space = [dim for dim in range(1, len(shape)) if dim != layer.features]
    steps = [
        (dim, exchange(window, shape[dim], layout.parts[dim]))
        for dim, window in zip(space, layer.windows, strict=True)
    ]
    for worker in layout.workers:
        sizes = list(layout.local_shape(worker, shape))
        for dim, found in steps:
            index = layout.index(worker, dim)
            if not found.is_local:
                total = total.plus(_given(sizes, dim, found, index))
                sizes[dim] = found.num_wanted(index)
    return total


def _given(sizes: list[int], dim: int, found: Exchange, giver: int) -> Sent:
    """What one part gives to the others along a dimension."""
    area = math.prod(size for other, size in enumerate(sizes) if other != dim)
    takers = (taker for taker in range(len(found.own)) if taker != giver)
    rows = [sum(each.size for each in found.taken(giver, taker)) for taker in takers]
    sent = [count * area for count in rows if count * area]
    return Sent(len(sent), sum(sent))


def _statistics(layer: LayerShape, layout: Layout) -> LayerTraffic:
    """Two numbers of each channel, or of each sample and group, in one message to each other.

    Forward, workers without elements send none; backward, all take part in a sum.
    """
    is_batch = layer.kind == "batch_norm"
    first = 0 if is_batch else 1
    dims = [dim for dim in range(first, len(layer.shape)) if dim != layer.features]
    positions = tuple(each for dim in dims for each in layout.dims[dim])
    others = layout.product(positions) - 1
    forward, numel = _NOTHING, []
    for worker in layout.workers:
        local = layout.local_shape(worker, layer.shape)
        groups = local[layer.features]
        if not is_batch:
            groups = local[0] * (layer.groups // layout.parts[layer.features])
        numel.append(2 * groups)
        if others and groups and all(local[dim] for dim in dims):
            forward = forward.plus(Sent(others, numel[-1] * others))
    return LayerTraffic(forward, sum_sent(numel, layout, positions))


def _parameters(
    layer: LayerShape, placement: Placement
) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """For each parameter its elements on each worker, and the digits of those who sum gradients."""
    computed, output = placement.computed, placement.output
    workers = computed.workers
    if not layer.is_weighted:
        if layer.kind in ("batch_norm", "group_norm", "layer_norm") and layer.biases:
            yield [layer.biases // 2] * len(workers), computed.used
            yield [layer.biases // 2] * len(workers), computed.used
        elif layer.kind == "elementwise" and layer.biases:
            yield [layer.biases] * len(workers), computed.used
        return
    outputs, inputs = placement.outputs, placement.inputs
    if layer.kind == "attention":
        width = layer.num_features
        share = [
            part_of(layer.groups, computed.product(outputs), computed.number(worker, outputs)).size
            * (width // layer.groups)
            for worker in workers
        ]
        yield [3 * each * width for each in share], placement.sharers
        yield [each * width for each in share], placement.sharers
        if layer.biases:
            yield [3 * each for each in share], placement.sharers
            yield [width] * len(workers), output.used if placement.pending else placement.sharers
        return
    own = [
        part_of(layer.num_features, computed.product(outputs), computed.number(w, outputs)).size
        for w in workers
    ]
    rest = layer.weights // layer.num_features
    parts = computed.product(inputs)
    if parts == 1:
        yield [each * rest for each in own], placement.sharers
    else:
        yield (
            [
                each * _share_of(layer, rest, parts, computed.number(worker, inputs))
                for worker, each in zip(workers, own, strict=True)
            ],
            placement.sharers,
        )
    if layer.biases and placement.pending:
        yield [layer.biases] * len(workers), output.used
    elif layer.biases:
        yield own, placement.sharers


def _share_of(layer: LayerShape, rest: int, parts: int, index: int) -> int:
    """Elements for one output feature in a part of the input features."""
    kernels = (window.kernel for window in layer.windows if not isinstance(window, Resize))
    area = math.prod(kernels)
    return part_of(rest // area, parts, index).size * area


def sum_sent(numel: list[int], layout: Layout, digits: tuple[int, ...]) -> Sent:
    """What summing a tensor sends, of so many elements on each worker, over some digits."""
    total = _NOTHING
    for worker, size in zip(layout.workers, numel, strict=True):
        total = total.plus(_summed(worker, sorted(layout.group(worker, digits)), size))
    return total


def _summed(worker: int, group: Sequence[int], size: int) -> Sent:
    """What one worker sends to sum so many elements with the others of a group."""
    others = len(group) - 1
    if not others or not size:
        return _NOTHING
    if size <= SMALL_SUM:
        return Sent(others, others * size)
    own = part_of(size, len(group), group.index(worker)).size
    return Sent(2 * others, size - own + own * others)
