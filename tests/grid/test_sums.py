"""Sums over workers: the same bits on all, in the memory of what is summed, or in a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from elbowroom.grid import gradient_sums, transport
from elbowroom.grid.transport import Channel, Counted, Sum, all_sum
from elbowroom.grid.twin import run_twin
from elbowroom.plans import grid_traffic
from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_traffic import JOINED_SUM, SMALL_SUM, joined
from tests.grid.nets import (
    NETS,
    STEPS,
    batches_of,
    grids_of,
    model_of,
    shapes_for,
    train_on_grid,
    train_plainly,
)

T = tuple[torch.Tensor, torch.Tensor, dict[tuple[str, str], Counted]]


def summand(worker: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(worker))


def on_workers(num_workers: int, numel: int, work: Callable[[torch.Tensor, Channel], T]) -> list[T]:
    return run_twin(
        num_workers,
        lambda transport: work(summand(transport.worker, numel), Channel(transport)),
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", [1, SMALL_SUM, SMALL_SUM + 1, 3 * SMALL_SUM + 2])
def test_a_sum(num_workers: int, numel: int) -> None:
    """Large ones are summed where they are, and each worker sends 2(q-1)/q of them."""

    def work(own: torch.Tensor, channel: Channel) -> T:
        found = Sum(own, range(num_workers), channel, channel.route("SUM"), "update").finish()
        return own, found, channel.counts  # type: ignore[return-value]

    seen = on_workers(num_workers, numel, work)
    wanted = torch.stack([summand(worker, numel) for worker in range(num_workers)]).sum(0)
    is_large = numel > SMALL_SUM
    for worker, (own, found, counts) in enumerate(seen):
        assert torch.equal(found, seen[0][1])
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.equal(own, found if is_large else summand(worker, numel))
        (counted,) = counts.values()
        assert counted.messages == (num_workers - 1) * (2 if is_large else 1)
    sent = sum(counted.num_bytes for *_, counts in seen for counted in counts.values())
    assert sent == (num_workers - 1) * numel * 4 * (2 if is_large else num_workers)


@pytest.mark.parametrize("numel", [5, SMALL_SUM + 1])
def test_what_is_summed_may_be_kept(numel: int) -> None:
    def work(own: torch.Tensor, channel: Channel) -> T:
        found = all_sum(own, range(3), channel, channel.route("SUM"), "forward")
        return own, found, channel.counts  # type: ignore[return-value]

    for worker, (own, found, _) in enumerate(on_workers(3, numel, work)):
        assert torch.equal(own, summand(worker, numel))
        assert not torch.equal(own, found)


def test_a_sum_of_a_tensor_with_gaps() -> None:
    def work(own: torch.Tensor, channel: Channel) -> T:
        columns = own.view(-1, 2).t()
        found = Sum(columns, range(2), channel, channel.route("SUM"), "update").finish()
        return columns, found, {}

    numel = 2 * SMALL_SUM
    wanted = sum(summand(worker, numel).view(-1, 2).t() for worker in range(2))
    for _, found, _ in on_workers(2, numel, work):
        assert torch.equal(found, wanted)  # type: ignore[arg-type]


def test_layers_that_are_joined() -> None:
    """From the last to the first, until there are enough."""
    assert joined({}) == []
    assert joined({"a": 1, "b": 2, "c": 3}) == [["c", "b", "a"]]
    half = JOINED_SUM // 2
    assert joined({"a": 1, "b": half, "c": half, "d": half}) == [["d", "c"], ["b", "a"]]
    assert joined({"a": JOINED_SUM, "b": half - 1, "c": half}) == [["c", "b", "a"]]


@pytest.mark.parametrize(("gradient", "sum_", "small"), [(60, 100, 30), (0, 1, 4), (10**6, 1, 8)])
@pytest.mark.parametrize("net", NETS)
def test_networks_with_other_limits(
    net: str, gradient: int, sum_: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several joined sums, none, and one a layer: the same results, and what is counted is sent."""
    for module, name, limit in [
        (grid_traffic, "JOINED_GRADIENT", gradient),
        (gradient_sums, "JOINED_GRADIENT", gradient),
        (grid_traffic, "JOINED_SUM", sum_),
        (grid_traffic, "SMALL_SUM", small),
        (transport, "SMALL_SUM", small),
    ]:
        monkeypatch.setattr(module, name, limit)
    model, batches = model_of(net), batches_of(net, 3)
    shapes = shapes_for(model, batches[0])
    layers = [
        next(
            (grid for grid in grids_of(shapes, layer, 4) if grid.batch == 2), LayerGrid(layer.name)
        )
        for layer in shapes.weighted
    ]
    plan = GridPlan(4, 3, tuple(layers))
    trained = train_on_grid(model, batches, plan)
    assert train_plainly(model, batches).difference(trained) <= 1e-12
    planned = grid_traffic.traffic(shapes, plan).values()
    counted = [n for (_, direction), n in trained.counts.items() if direction == "update"]
    assert sum(n.messages for n in counted) == STEPS * sum(sent.update.messages for sent in planned)
    num_bytes = STEPS * sum(sent.update.elements for sent in planned) * 8
    assert sum(n.num_bytes for n in counted) == num_bytes
