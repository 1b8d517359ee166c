"""Pipeline plans: from a graph of layers and a topology to stages, their time and traffic."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np

from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.units import format_bytes
from elbowroom.planning.pipeline.cuts import find_cuts
from elbowroom.planning.pipeline.partition import TIE, Chain, Group, StageSearch, max_cuts
from elbowroom.plans.pipeline import (
    DataParallel,
    Level,
    LevelTraffic,
    PipelineOptions,
    PipelinePlan,
    StagePlan,
)

MAX_WORKERS = 1024
_COARSE = 64
"""Number of cuts in the first, coarse search, whose result bounds the second."""


def plan_pipeline(
    graph: LayerGraph, cluster: Cluster, num_workers: int, options: PipelineOptions | None = None
) -> PipelinePlan:
    """The best plan on workers of a cluster; their memory is the limit unless ``options`` sets one.

    Raises as ``plan_on_levels`` and ``levels_of`` do.
    """
    options = options or PipelineOptions()
    if options.memory_limit_bytes is None:
        options = replace(options, memory_limit_bytes=cluster.device.usable_bytes)
    return plan_on_levels(graph, levels_of(cluster, num_workers), options)


def levels_of(cluster: Cluster, num_workers: int) -> tuple[Level, ...]:
    """A cluster's links as levels of ``num_workers`` workers, the lowest first.

    Latencies are left out, as in the papers. Raises InputError for more workers than the links
    join, and for a number that leaves a node partly used.
    """
    if num_workers < 1:
        raise InputError(f"{num_workers} workers train nothing: give at least 1")
    cluster.link(num_workers)
    levels: list[Level] = []
    joined = 1
    for link in cluster.links:
        reached = min(link.num_devices, num_workers)
        if reached == joined and levels:
            break
        if reached % joined:
            raise InputError(
                f"{num_workers} workers do not fill nodes of {joined}: give a multiple of {joined}"
            )
        levels.append(Level(reached // joined, link.bandwidth.achieved, link.name))
        joined = reached
    return tuple(levels)


def plan_on_levels(
    graph: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions | None = None
) -> PipelinePlan:
    """The best plan on all workers of a topology; ``(Level(8, 1.25e9),)`` is 8 on 10 Gbit/s.

    Takes under 1 s for a chain of 500 layers on 64 workers, a few seconds for any graph (up to 20 s
    for a thousand workers in nested levels with too little memory): where there are too many cuts,
    only some are searched (``planning.pipeline.cuts``). Raises InputError for a topology or graph
    that cannot be planned, MemoryPlanError if nothing fits in the memory of a worker.
    """
    return _best_plan(_search(graph, levels, options or PipelineOptions()))


def plan_data_parallel(
    graph: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions | None = None
) -> PipelinePlan:
    """A plan with all layers in one stage, on all workers. Raises as ``plan_on_levels`` does."""
    search = _search(graph, levels, options or PipelineOptions())
    ends = search.cuts.only(np.array([0, search.cuts.num_cuts - 1]))
    return _best_plan(replace(search, cuts=ends))


def _search(graph: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions) -> StageSearch:
    num_workers = prod(level.num_units for level in levels)
    if not levels or num_workers > MAX_WORKERS:
        raise InputError(f"{num_workers} workers: give levels of 1 to {MAX_WORKERS} in all")
    cuts = find_cuts(graph, max_cuts(levels, options), options.optimizer is not None)
    return StageSearch(cuts, levels, options)


def _best_plan(whole: StageSearch) -> PipelinePlan:
    cuts, levels = whole.cuts, whole.levels
    search = _narrowed(whole)
    outermost, last = len(levels) - 1, search.cuts.num_cuts - 1
    chain = search.best_chain(outermost, 0, 0, last, _allowed_units(search))
    if chain is None:
        raise _nothing_fits(search)
    stages, moved = _lay_out(search, chain)
    return PipelinePlan(
        stages=stages,
        levels=levels,
        options=search.options,
        seconds=max(max(stage.seconds, stage.transfer_seconds) for stage in stages),
        traffic=_traffic(search, moved),
        data_parallel=_data_parallel(search),
        num_cuts=cuts.num_cuts,
        is_exact=cuts.is_exact,
    )


def _narrowed(search: StageSearch) -> StageSearch:
    """The same search without cuts and plans that cannot beat the best plan of a few cuts."""
    cuts, levels = search.cuts, search.levels
    coarse = replace(search, cuts=cuts.spread(_COARSE))
    seconds = coarse.least_seconds(_allowed_units(coarse))
    if not 0 < seconds < np.inf:
        return search
    most = seconds * (1 + TIE)
    copies, is_quick = 1, np.zeros(cuts.num_cuts, dtype=bool)
    for index in reversed(range(len(levels))):
        # Inside m units, each of which takes every m-th minibatch, a transfer costs 1/m per
        # minibatch.
        is_quick |= search.transfer_seconds(index) / copies <= most
        copies *= levels[index].num_units
    is_quick[[0, -1]] = True
    quick = cuts.only(np.flatnonzero(is_quick))
    return replace(search, cuts=quick, most_seconds=most)


def _allowed_units(search: StageSearch) -> range:
    num_units = search.levels[-1].num_units
    return range(1 if search.options.fewer_workers else num_units, num_units + 1)


def _nothing_fits(search: StageSearch) -> InputError | MemoryPlanError:
    num_workers = prod(level.num_units for level in search.levels)
    limit = search.options.memory_limit_bytes
    least = _least_memory(search)
    if least is None or limit is None:
        where = " between layers that share no weights" if search.cuts.graph.tied else ""
        return InputError(
            f"{num_workers} workers in a straight pipeline need as many stages, which the "
            f"{search.cuts.num_cuts} cuts of the graph{where} do not give: allow fewer workers or "
            "replicas"
        )
    swaps = ", with swapping," if search.options.swap_bandwidth is not None else ""
    return MemoryPlanError(
        f"no plan on {num_workers} workers fits in {format_bytes(limit)} of a worker: the least "
        f"that one needs{swaps} is {format_bytes(least)} ({least} bytes): "
        f"raise the limit to that{_swapping_instead(search, limit)}, or lower the batch"
    )


def _swapping_instead(search: StageSearch, limit: int) -> str:
    """The advice to let stages swap; empty where they do already, or where it does not help."""
    if search.options.swap_bandwidth is not None:
        return ""
    swapping = replace(search.options, swap_bandwidth=1.0)  # memory is the same with any
    least = _least_memory(replace(search, options=swapping), limit)
    if least is None or least > limit:
        return ""
    return (
        f", give a swap bandwidth (--swap-bandwidth), with which {format_bytes(least)} ({least} "
        "bytes) are enough"
    )


def _least_memory(search: StageSearch, bound: float = np.inf) -> int | None:
    """The smallest memory limit, in bytes, with which some plan fits; None if there is none.

    One above ``bound`` need not be found.
    """
    free = replace(search.options, memory_limit_bytes=None)
    wide = replace(search, options=free, minimised="memory", most_seconds=np.inf)
    if bound == np.inf:
        coarse = replace(wide, cuts=search.cuts.spread(_COARSE))
        bound = coarse.least_seconds(_allowed_units(coarse))
    if bound < np.inf:
        bounded = replace(free, memory_limit_bytes=int(bound))
        wide = replace(wide, options=bounded)
    least = wide.least_seconds(_allowed_units(wide))
    return int(least) if least < np.inf else None


class _Layout(NamedTuple):
    """Stages of a component, and the bytes per minibatch that they move at each level."""

    stages: tuple[StagePlan, ...]
    moved: tuple[int, ...]


def _lay_out(search: StageSearch, chain: Chain) -> _Layout:
    moved = [0] * len(search.levels)
    stages = _component(search, len(search.levels) - 1, chain, (), moved)
    return _Layout(tuple(stages), tuple(moved))


def _component(
    search: StageSearch, level: int, chain: Chain, outer: tuple[int, ...], moved: list[int]
) -> list[StagePlan]:
    """Stages of one component of a level, with its own replicas; adds its traffic to ``moved``."""
    stages: list[StagePlan] = []
    for group in chain.groups:
        replicas = (*outer, group.num_units)
        if level == 0:
            inside = [_one_worker(search, group, replicas)]
        else:
            units = (search.levels[level - 1].num_units,)
            chosen = search.best_chain(level - 1, group.unit_behind, group.start, group.stop, units)
            assert chosen is not None, "a group was chosen for the time its units take"
            inside = _component(search, level - 1, chosen, replicas, moved)
        inside = _replicate(search, level, group, inside, moved)
        if group is not chain.groups[-1]:
            inside[-1] = _with_transfer(search, level, group.stop, inside[-1])
            moved[level] += inside[-1].transfer_bytes
        stages += inside
    return stages


def _one_worker(search: StageSearch, group: Group, level_replicas: tuple[int, ...]) -> StagePlan:
    """A stage as one worker has it, before replicas share its minibatches."""
    cuts, start, stop = search.cuts, group.start, group.stop
    in_flight = search.in_flight(group.unit_behind)
    memory = search.worker_memory(start, stop, in_flight, group.num_units)
    return StagePlan(
        layers=cuts.layers_between(start, stop),
        level_replicas=level_replicas,
        replicas=prod(level_replicas),
        seconds=float(search.unit_seconds(start, stop, memory.swapped_bytes)),
        transfer_seconds=0.0,
        in_flight=in_flight,
        warmup_forwards=in_flight - 1,
        memory_bytes=int(memory.num_bytes),
        parameter_bytes=int(cuts.parameter_bytes[stop] - cuts.parameter_bytes[start]),
        sync_bytes=0,
        transfer_bytes=0,
        fixed_bytes=int(search.fixed_bytes(start, stop, in_flight, group.num_units)),
        swapped_bytes=int(memory.swapped_bytes),
    )


def _replicate(
    search: StageSearch, level: int, group: Group, inside: list[StagePlan], moved: list[int]
) -> list[StagePlan]:
    """The stages of one unit, replicated on all units of a group.

    Adds the bytes of their weight synchronisation to ``moved``.
    """
    cuts, units = search.cuts, group.num_units
    weights = cuts.parameter_bytes[group.stop] - cuts.parameter_bytes[group.start]

    def shared(seconds: float) -> float:
        return float(search.replicated(level, np.array(seconds), units, weights))

    replicated = []
    for stage in inside:
        sync_bytes = int(search.sync_bytes(units, np.array(stage.parameter_bytes)))
        moved[level] += sync_bytes
        replicated.append(
            replace(
                stage,
                seconds=shared(stage.seconds),
                transfer_seconds=shared(stage.transfer_seconds) if stage.transfer_bytes else 0.0,
                sync_bytes=stage.sync_bytes + sync_bytes,
            )
        )
    return replicated


def _with_transfer(search: StageSearch, level: int, cut: int, stage: StagePlan) -> StagePlan:
    return replace(
        stage,
        transfer_seconds=float(search.transfer_seconds(level)[cut]),
        transfer_bytes=int(search.transfer_bytes[cut]),
        returned_bytes=int(search.cuts.returned_bytes[cut]),
    )


def _traffic(search: StageSearch, moved: tuple[int, ...]) -> tuple[LevelTraffic, ...]:
    weights = search.cuts.parameter_bytes[-1]
    return tuple(
        LevelTraffic(level.name, num_bytes, int(search.sync_bytes(level.num_units, weights)))
        for level, num_bytes in zip(search.levels, moved, strict=True)
    )


def _data_parallel(search: StageSearch) -> DataParallel:
    cuts = search.cuts
    seconds = cuts.seconds[-1]
    for index, level in enumerate(search.levels):
        seconds = search.replicated(index, seconds, level.num_units, cuts.parameter_bytes[-1])
    num_workers = prod(level.num_units for level in search.levels)
    memory_bytes = search.memory_bytes(0, cuts.num_cuts - 1, 1, num_workers)
    return DataParallel(float(seconds), int(memory_bytes))
