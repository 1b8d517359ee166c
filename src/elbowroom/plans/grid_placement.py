"""Layouts of all layers of a model that follow from a grid plan: what each reads, gives, and sums.

A weighted layer lies as its plan says: its input split by batch, space and input features; its
output by batch, space and output features, with sums pending over the input features, which are
scattered to where the next reader wants them. Other layers follow what they read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_check import check_grid
from elbowroom.plans.grid_layout import Layout, whole
from elbowroom.plans.grid_reshape import before_reshape, is_aligned, leading_dims


@dataclass(frozen=True)
class Placement:
    """Where one layer's tensors lie.

    Args:
        reads: the layout in which each source is read.
        computed: that of the output, as each worker computes it.
        output: that of the output when sums have been taken.
        pending: digits of workers whose outputs are summands of each other.
        outputs: digits that tell the part of the output features in the weights.
        inputs: digits that tell the part of the input features in the weights.

    """

    reads: tuple[Layout, ...]
    computed: Layout
    output: Layout
    pending: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()

    def users(self, source: int) -> tuple[int, ...]:
        """Digits of workers that read the same of a source, and each have a part of its gradient.

        They multiply it with other weights, or it is broadcast to their samples or rows.
        """
        work = {*self.computed.used, *self.pending}
        return tuple(sorted(work - {*self.reads[source].used}))

    @property
    def sharers(self) -> tuple[int, ...]:
        """Digits of workers that use the same part of the weights on other samples or rows."""
        features = {*self.outputs, *self.inputs}
        return tuple(each for each in self.computed.used if each not in features)


def place(shapes: ModelShapes, plan: GridPlan) -> dict[str, Placement]:
    """The placement of every layer, by name.

    Raises InputError for a plan of another model, or with more parts than a layer has features.
    """
    known = shapes.by_name
    if unknown := [layer.name for layer in plan.layers if layer.name not in known]:
        raise InputError(
            f"the plan has a grid for '{unknown[0]}', and the model has no such layer: plan again "
            f"for this model"
        )
    if missing := [each.name for each in shapes.weighted if each.name not in plan.grid_of]:
        raise InputError(f"the plan has no grid for layer '{missing[0]}': plan again, or add one")
    placer = _Placer(shapes, plan)
    return {layer.name: placer.place(layer) for layer in shapes.layers}


class _Placer:
    """Placements of layers so far; each layer is placed after those that it reads."""

    def __init__(self, shapes: ModelShapes, plan: GridPlan) -> None:
        self.shapes, self.plan = shapes, plan
        self.everyone = range(plan.procs)
        self.placed: dict[str, Placement] = {}

    def place(self, layer: LayerShape) -> Placement:
        grid = self.plan.grid_of.get(layer.name)
        if layer.is_weighted and layer.sources:
            assert grid is not None
            check_grid(layer, grid, self._source(layer))
            placement = self._weighted(layer, grid)
        else:
            placement = self._followed(layer, grid)
        self.placed[layer.name] = placement
        return placement

    def _weighted(self, layer: LayerShape, grid: LayerGrid) -> Placement:
        source = self._source(layer)
        before = self.placed[source.name].output
        splits_input = layer.kind not in ("embedding", "attention")
        parts = _parts(source, grid, grid.inputs if splits_input else 1, layer)
        read = self._near(before, grid).allotted(parts)
        free = list(read.replicas)
        outputs = read.take(free, grid.outputs)
        if layer.kind == "attention":
            computed = read.with_dims((read.dims[0], *((),) * (len(layer.shape) - 1)))
            output = computed.scattered(outputs, self._wanted(layer), layer.shape)
            return Placement((read,), computed, output, outputs, outputs)
        features = input_features(layer, source)
        inputs = read.take(free, grid.inputs) if features is None else read.dims[features]
        space = [read.dims[dim] for dim in range(1, len(source.shape)) if dim != features]
        computed = read.with_dims(_with_features(layer, read.dims[0], space, outputs))
        output = computed.scattered(inputs, self._wanted(layer), layer.shape)
        return Placement((read,), computed, output, inputs, outputs, inputs)

    def _followed(self, layer: LayerShape, grid: LayerGrid | None) -> Placement:
        if layer.kind == "input":
            first = self._first_grid(layer.name)
            workers = first.workers_of(self.plan.procs) if first else self.everyone
            layout = self._as_wanted(layer, workers)
            return Placement((), layout, layout)
        if layer.kind == "whole" or not layer.sources:
            reads = tuple(
                whole(self.everyone, len(self.shapes.by_name[name].shape)) for name in layer.sources
            )
            layout = whole(self.everyone, len(layer.shape))
            return self._moved(layer, Placement(reads, layout, layout), grid)
        if layer.kind == "elementwise":
            return self._elementwise(layer, grid)
        if layer.kind == "cat":
            return self._joined(layer, grid)
        if layer.kind == "reshape":
            return self._moved(layer, self._reshaped(layer), grid)
        read = self._readable(layer)
        if layer.kind == "permute":
            layout = read.with_dims(read.dims[dim] for dim in layer.order)
            return self._moved(layer, Placement((read,), layout, layout), grid)
        if layer.kind == "global_pool":
            return self._moved(layer, self._pooled(layer, read), grid)
        if layer.kind == "dot_attention":
            return self._moved(layer, Placement((read,) * len(layer.sources), read, read), grid)
        if grid is not None:
            source = self._source(layer)
            read = self._near(read, grid).allotted(_parts(source, grid, grid.outputs, layer))
        return Placement((read,), read, read)

    def _near(self, before: Layout, grid: LayerGrid) -> Layout:
        """A layout on the workers of a grid to take digits from: this one, if it is on those."""
        workers = grid.workers_of(self.plan.procs)
        return before if before.workers == workers else whole(workers, len(before.dims))

    def _first_grid(self, name: str) -> LayerGrid | None:
        """The grid of the first layer after this one that has one."""
        for reader in self.shapes.readers[name]:
            found = self.plan.grid_of.get(reader) or self._first_grid(reader)
            if found is not None:
                return found
        return None

    def _readable(self, layer: LayerShape) -> Layout:
        """The layout of a layer's first source, without what its kind cannot split."""
        source = self._source(layer)
        read = self.placed[source.name].output
        if layer.kind == "layer_norm":
            return read.without(source.features)
        if layer.kind == "group_norm" and layer.groups % read.parts[source.features]:
            return read.without(source.features)
        if layer.kind == "dot_attention":
            heads = [self.shapes.by_name[name].shape[1] for name in layer.sources]
            is_grouped = any(count != heads[0] for count in heads)
            return read.without(*range(1 if is_grouped else 2, len(source.shape)))
        return read

    def _elementwise(self, layer: LayerShape, grid: LayerGrid | None) -> Placement:
        sources = [self.shapes.by_name[name] for name in layer.sources]
        full = next((each for each in sources if each.shape == layer.shape), None)
        if full is not None:
            layout = self.placed[full.name].output
        else:
            before = self.placed[layer.sources[0]].output
            layout = self._as_wanted(layer, before.workers)
        if grid is not None:
            layout = self._near(layout, grid).allotted(_parts(layer, grid, grid.outputs, layer))
        reads = tuple(broadcast(layout, layer.shape, each.shape) for each in sources)
        return Placement(reads, layout, layout)

    def _joined(self, layer: LayerShape, grid: LayerGrid | None) -> Placement:
        layout = self.placed[layer.sources[0]].output.without(layer.features)
        if grid is not None:
            layout = self._near(layout, grid).allotted(_parts(layer, grid, 1, layer))
        return Placement((layout,) * len(layer.sources), layout, layout)

    def _pooled(self, layer: LayerShape, read: Layout) -> Placement:
        source = self._source(layer)
        pending = tuple(position for dim in source.space for position in read.dims[dim])
        kept = [read.dims[0], read.dims[source.features]]
        dims = (*kept, *((),) * (len(layer.shape) - 2))
        computed = read.with_dims(dims)
        output = computed.scattered(pending, self._wanted(layer), layer.shape)
        return Placement((read,), computed, output, pending)

    def _reshaped(self, layer: LayerShape) -> Placement:
        """Parts of the first dimension of each group of dimensions stay parts of the other's."""
        source = self._source(layer)
        before = self.placed[source.name].output
        wanted = self._wanted(layer)
        parts = [1] * len(source.shape)
        pairs = leading_dims(source.shape, layer.shape)
        for dim, other in pairs:
            for count in (wanted[other], before.parts[dim]):
                if is_aligned(source.shape[dim], layer.shape[other], count):
                    room = before.num_workers // math.prod(parts)
                    parts[dim] = count if room % count == 0 else 1
                    break
        read = before.allotted(parts)
        dims: list[tuple[int, ...]] = [()] * len(layer.shape)
        for dim, other in pairs:
            dims[other] = read.dims[dim]
        layout = read.with_dims(dims)
        return Placement((read,), layout, layout)

    def _moved(self, layer: LayerShape, placed: Placement, grid: LayerGrid | None) -> Placement:
        """The same with its output in the grid that the plan names, if it does."""
        if grid is None or placed.pending:
            return placed
        near = self._near(placed.computed, grid)
        output = near.allotted(_parts(layer, grid, grid.outputs, layer))
        return Placement(placed.reads, placed.computed, output)

    def _source(self, layer: LayerShape) -> LayerShape:
        return self.shapes.by_name[layer.sources[0]]

    def _as_wanted(self, layer: LayerShape, workers: range) -> Layout:
        """A layout of the output as the next weighted layer reads it, if so many workers can."""
        layout, parts = whole(workers, len(layer.shape)), self._wanted(layer)
        return layout if len(workers) % math.prod(parts) else layout.allotted(parts)

    def _wanted(self, layer: LayerShape) -> tuple[int, ...]:
        """Parts in which the next weighted layer reads this one's output; ones if unknown."""
        return self._wish(layer.name) or (1,) * len(layer.shape)

    def _wish(self, name: str) -> tuple[int, ...] | None:
        layer = self.shapes.by_name[name]
        for reader in (self.shapes.by_name[each] for each in self.shapes.readers[name]):
            grid = self.plan.grid_of.get(reader.name)
            if grid is not None and (reader.is_weighted or reader.kind != "reshape"):
                inputs = grid.inputs if reader.is_weighted else grid.outputs
                return _parts(layer, grid, 1 if reader.kind == "attention" else inputs, reader)
            if reader.kind in ("whole", "global_pool", "dot_attention"):
                continue
            wish = self._wish(reader.name)
            if wish is None:
                continue
            if reader.kind == "reshape":
                return before_reshape(layer.shape, reader.shape, wish)
            if reader.kind == "permute":
                return tuple(wish[reader.order.index(dim)] for dim in range(len(layer.shape)))
            if len(wish) == len(layer.shape):
                return _without(wish, reader)
        return None


def _without(wish: tuple[int, ...], reader: LayerShape) -> tuple[int, ...]:
    """A wish without parts of features that its reader could not use."""
    if reader.kind not in ("cat", "layer_norm"):
        return wish
    return tuple(1 if dim == reader.features else parts for dim, parts in enumerate(wish))


def _parts(
    tensor: LayerShape, grid: LayerGrid, features: int, reader: LayerShape
) -> tuple[int, ...]:
    """Parts of each dimension of a tensor that is read on a grid."""
    parts = [1] * len(tensor.shape)
    if parts:
        parts[0] = grid.batch
    own = input_features(reader, tensor)
    if own is not None and own < len(parts):
        parts[own] = features
    if reader.kind != "attention":
        space = [dim for dim in range(1, len(parts)) if dim != own]
        for dim, count in zip(space, grid.space, strict=False):
            parts[dim] = count
    return tuple(parts)


def input_features(reader: LayerShape, source: LayerShape) -> int | None:
    """The dimension that a layer reads its input features from; None if it has none."""
    if reader.kind == "embedding":
        return None
    if reader.kind == "linear":
        return len(source.shape) - 1
    return 1 if reader.is_weighted and reader.kind != "attention" else source.features


def _with_features(
    layer: LayerShape,
    batch: tuple[int, ...],
    space: Sequence[tuple[int, ...]],
    features: tuple[int, ...],
) -> tuple[tuple[int, ...], ...]:
    dims = [batch, *space]
    dims.insert(layer.features, features)
    return tuple(dims)


def broadcast(layout: Layout, shape: Sequence[int], source: Sequence[int]) -> Layout:
    """The layout of a tensor that is broadcast to one with this layout and shape."""
    missing = len(shape) - len(source)
    return layout.with_dims(
        layout.dims[missing + dim] if size == shape[missing + dim] else ()
        for dim, size in enumerate(source)
    )
