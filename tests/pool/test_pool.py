"""Pools on real models, in one process: every layout gives the plain logits, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from elbowroom.core.errors import PoolError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import FetchOrder
from elbowroom.pool.layer import pooled_layer
from tests.pool.groups import (
    NUM_LAYERS,
    TOKENS,
    all_at_once,
    logits,
    make_group,
    make_shares,
)
from tests.pool.hf import CONFIGS, blocks_of, make_model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_mapped_equals_plain(name: str, num_ranks: int) -> None:
    plain = logits(make_model(name, NUM_LAYERS))
    with make_group(make_shares(num_ranks, "mapped"), name) as (models, _):
        for model in models:
            for _pass in range(2):
                assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, None, 7])
@pytest.mark.parametrize("order", ["peak-shift", "sliced"])
def test_streamed_equals_plain(num_ranks: int, slots: int | None, order: FetchOrder) -> None:
    plain = logits(make_model("llama", NUM_LAYERS))
    with make_group(make_shares(num_ranks, "streamed", slots, order)) as (models, pools):
        for _pass in range(3):
            for model, pool in zip(models, pools, strict=True):
                assert torch.equal(logits(model), plain)
                pool.check_integrity()


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shipped_equals_plain_within_rounding(
    tmp_path: Path, num_ranks: int, in_turns: bool
) -> None:
    """All ranks at once; PyTorch's fp32 products round a row as the size of its batch has it."""
    expected = logits(make_model("llama", NUM_LAYERS))
    with make_group(
        make_shares(num_ranks, "streamed", ship_below_rows=100),
        run_dir=tmp_path,
        in_turns=in_turns,
    ) as group:
        models, pools = group
        for out in [
            out
            for _ in range(5)
            for out in all_at_once([partial(logits, model) for model in models])
        ]:
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for pool in pools:
            pool.check_integrity()
            borrowed = sum(owner != pool.share.rank for owner in pool.share.owners)
            stats = pool.stats()
            assert (stats.shipped_iterations, stats.streamed_iterations) == (5, 0)
            assert stats.shipped_rows == 5 * borrowed * TOKENS.numel()
        served = sum(pool.stats().served_rows for pool in pools)
        assert served == sum(pool.stats().shipped_rows for pool in pools)


def test_modes_follow_the_batch_and_leave_slots_whole(tmp_path: Path) -> None:
    """16 rows fit the buffer: batches beyond it stream, and streaming ends without a trace."""
    model = make_model("llama", NUM_LAYERS)
    inputs = [torch.arange(rows).reshape(1, rows) for rows in (40, 4, 40, 4, 4)]
    with torch.inference_mode():
        expected = [model(tokens).logits for tokens in inputs for _ in range(25)]
    with make_group(make_shares(2, "streamed", 1, ship_below_rows=12), run_dir=tmp_path) as group:
        models, pools = group
        with torch.inference_mode():
            outputs = [models[0](tokens).logits for tokens in inputs for _ in range(25)]
        for out, plain in zip(outputs, expected, strict=True):
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
        pools[0].check_integrity()
        stats = pools[0].stats()
        assert stats.streamed_iterations >= 50
        assert stats.shipped_iterations >= 70
        assert stats.streamed_iterations + stats.shipped_iterations == 125


def test_a_dead_owner_is_read_instead(tmp_path: Path) -> None:
    """Its weights outlive it in shared memory: nobody waits, and results stay."""
    expected = logits(make_model("llama", NUM_LAYERS))
    with make_group(make_shares(2, "streamed", ship_below_rows=100), run_dir=tmp_path) as (
        models,
        pools,
    ):
        torch.testing.assert_close(logits(models[0]), expected, rtol=1e-4, atol=1e-5)
        before = pools[0].stats().shipped_rows
        pools[1].close()
        for _ in range(3):
            torch.testing.assert_close(logits(models[0]), expected, rtol=1e-4, atol=1e-5)
        assert pools[0].stats().shipped_rows == before


def test_layers_in_many_slices() -> None:
    """Slices that do not divide a layer's bytes leave no byte out."""
    layer = pooled_layer(blocks_of(make_model())[0])
    assert layer is not None
    layer.settle()
    ffn_bytes = (layer.manifest.data_bytes,) * NUM_LAYERS
    shares = plan_shares(ffn_bytes, 3, "streamed", 2, "sliced", slice_bytes=1000)
    assert shares[0].fetches[0].num_chunks == 19
    plain = logits(make_model("llama", NUM_LAYERS))
    with make_group(shares) as (models, _):
        assert all(torch.equal(logits(model), plain) for model in models for _ in range(2))


def test_plain_logits_depend_on_weights() -> None:
    """Guards the comparisons above."""
    model = make_model("llama", NUM_LAYERS)
    plain = logits(model)
    blocks_of(model)[3].get_submodule("mlp.up_proj").get_parameter("weight").data.mul_(2)
    assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_pass_after_a_broken_pass(layer: int, where: str) -> None:
    plain = logits(make_model("llama", NUM_LAYERS))
    with make_group(make_shares(3, "streamed", 2)) as (models, pools):
        for model, pool in zip(models, pools, strict=True):
            block = blocks_of(model)[layer]
            part = block.get_submodule("self_attn" if where == "before" else "mlp.down_proj")
            handle = part.register_forward_pre_hook(_explode)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="boom"):
                    logits(model)
                pool.check_integrity()
            handle.remove()
            for _ in range(3):
                assert torch.equal(logits(model), plain)
            pool.check_integrity()


def _explode(*_: object) -> None:
    raise RuntimeError("boom")


def test_lease_misuse() -> None:
    with make_group(make_shares(2, "mapped")) as (_, pools):
        pool = pools[0]
        with pytest.raises(PoolError, match="layer 0 released, but None is leased"):
            pool.release(0)
        pool.acquire(1)
        with pytest.raises(PoolError, match="layer 2 asked for while layer 1 is leased"):
            pool.acquire(2)
        with pytest.raises(PoolError, match="layer 2 released, but 1 is leased"):
            pool.release(2)
        pool.release(1)
        pool.check_integrity()


def test_streamed_layers_out_of_order() -> None:
    with make_group(make_shares(2, "streamed", 1)) as (models, pools):
        plain = logits(models[0])
        with pytest.raises(PoolError, match="layer 3 asked for, layer 1 is next"):
            pools[0].acquire(3)
        assert torch.equal(logits(models[0]), plain), "the error must not spoil the next pass"


def test_nothing_is_allocated_after_the_start() -> None:
    """Weights lie where they are published, or in one of two slots, in every pass."""
    with make_group(make_shares(3, "streamed", 2)) as (models, pools):
        blocks, owners = blocks_of(models[0]), pools[0].share.owners
        seen: list[set[tuple[bool, int]]] = []
        for block, owner in zip(blocks, owners, strict=True):
            block.get_submodule("mlp.gate_proj").register_forward_pre_hook(
                lambda linear, _, owns=owner == 0: seen[-1].add((owns, linear.weight.data_ptr()))
            )
        for _ in range(3):
            seen.append(set())
            logits(models[0])
        assert all(pointers == seen[0] for pointers in seen)
        owned = {pointer for owns, pointer in seen[0] if owns}
        slots = {pointer for owns, pointer in seen[0] if not owns}
        assert (len(owned), len(slots)) == (owners.count(0), 2)
        assert not owned & slots


def test_counters() -> None:
    layer_bytes = 3 * 32 * 48 * 4
    with make_group(make_shares(2, "mapped")) as (_, pools):
        assert pools[0].stats().owned_bytes == 3 * layer_bytes
        assert pools[0].stats().mapped_bytes == 2 * layer_bytes
    with make_group(make_shares(2, "streamed", 1)) as (models, pools):
        for _ in range(4):
            logits(models[0])
        stats = pools[0].stats()
        assert stats.slot_bytes == layer_bytes
        assert stats.mapped_bytes == 0
        assert 8 * layer_bytes <= stats.streamed_bytes <= 9 * layer_bytes, "one may run ahead"
        assert stats.wait_seconds >= 0
