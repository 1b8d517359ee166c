"""Pools on real models, in one process: every layout gives the plain logits, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import FetchOrder, PoolMode, PoolShare
from elbowroom.pool.ffn import find_ffn
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.pool import Pool
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.pool.store import LocalHub, LocalStore, Store
from tests.pool.hf import CONFIGS, blocks_of, make_model

Result = TypeVar("Result")

NUM_LAYERS = 5  # divisible by neither 2 nor 3
TOKENS = torch.arange(12).reshape(2, 6)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def _shares(
    num_ranks: int,
    mode: PoolMode,
    slots: int | None = None,
    order: FetchOrder = "peak-shift",
    ship_below_rows: int = 0,
) -> tuple[PoolShare, ...]:
    ship_bytes = 16 * 32 * 4 if ship_below_rows else 0  # 16 rows
    return plan_shares(
        (1,) * NUM_LAYERS,
        num_ranks,
        mode,
        slots,
        order,
        ship_bytes=ship_bytes,
        ship_below_rows=ship_below_rows,
    )


@contextmanager
def _group(
    shares: tuple[PoolShare, ...], name: str = "llama", run_dir: Path | None = None
) -> Iterator[tuple[list[nn.Module], list[Pool]]]:
    """One model per rank, pooled and started; in shared memory if a run directory is given."""
    hub = LocalHub()
    models = [make_model(name, NUM_LAYERS) for _ in shares]
    options = PoolOptions(run_dir=run_dir, peer_timeout_seconds=5, stream_timeout_seconds=5)
    loaders = []
    for share, model in zip(shares, models, strict=True):
        store = SharedMemoryStore(run_dir, share.rank) if run_dir else LocalStore(hub)
        loaders.append(_loader(share, store, model, options))
    with ExitStack() as stack:
        pools = _all_at_once([loader.attach for loader in loaders])
        for pool in pools:
            stack.callback(pool.close)
            pool.start()
        yield models, pools


def _loader(
    share: PoolShare, store: Store, model: nn.Module, options: PoolOptions | None = None
) -> PoolLoader:
    """A loader that has all blocks of ``model``."""
    loader = PoolLoader(share, store, options)
    for block in blocks_of(model):
        loader.add_block(block)
    return loader


def _all_at_once(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each call gives, all on threads of their own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(20) for future in [threads.submit(call) for call in calls]]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_mapped_equals_plain(name: str, num_ranks: int) -> None:
    plain = _logits(make_model(name, NUM_LAYERS))
    with _group(_shares(num_ranks, "mapped"), name) as (models, _):
        for model in models:
            for _pass in range(2):
                assert torch.equal(_logits(model), plain)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, None, 7])
@pytest.mark.parametrize("order", ["peak-shift", "sliced"])
def test_streamed_equals_plain(num_ranks: int, slots: int | None, order: FetchOrder) -> None:
    plain = _logits(make_model("llama", NUM_LAYERS))
    with _group(_shares(num_ranks, "streamed", slots, order)) as (models, pools):
        for _pass in range(3):
            for model, pool in zip(models, pools, strict=True):
                assert torch.equal(_logits(model), plain)
                pool.check_integrity()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shipped_equals_plain_within_rounding(tmp_path: Path, num_ranks: int) -> None:
    """All ranks at once; PyTorch's fp32 products round a row as the size of its batch has it."""
    expected = _logits(make_model("llama", NUM_LAYERS))
    with _group(_shares(num_ranks, "streamed", ship_below_rows=100), run_dir=tmp_path) as group:
        models, pools = group
        for out in [
            out
            for _ in range(5)
            for out in _all_at_once([partial(_logits, model) for model in models])
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
    with _group(_shares(2, "streamed", 1, ship_below_rows=12), run_dir=tmp_path) as group:
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
    expected = _logits(make_model("llama", NUM_LAYERS))
    with _group(_shares(2, "streamed", ship_below_rows=100), run_dir=tmp_path) as (models, pools):
        torch.testing.assert_close(_logits(models[0]), expected, rtol=1e-4, atol=1e-5)
        before = pools[0].stats().shipped_rows
        pools[1].close()
        for _ in range(3):
            torch.testing.assert_close(_logits(models[0]), expected, rtol=1e-4, atol=1e-5)
        assert pools[0].stats().shipped_rows == before


def test_layers_in_many_slices() -> None:
    """Slices that do not divide a layer's bytes leave no byte out."""
    ffn_bytes = (find_ffn(blocks_of(make_model())[0]).num_bytes,) * NUM_LAYERS
    shares = plan_shares(ffn_bytes, 3, "streamed", 2, "sliced", slice_bytes=1000)
    assert shares[0].fetches[0].num_chunks == 19
    plain = _logits(make_model("llama", NUM_LAYERS))
    with _group(shares) as (models, _):
        assert all(torch.equal(_logits(model), plain) for model in models for _ in range(2))


def test_plain_logits_depend_on_weights() -> None:
    """Guards the comparisons above."""
    model = make_model("llama", NUM_LAYERS)
    plain = _logits(model)
    blocks_of(model)[3].get_submodule("mlp.up_proj").get_parameter("weight").data.mul_(2)
    assert not torch.equal(_logits(model), plain)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_pass_after_a_broken_pass(layer: int, where: str) -> None:
    plain = _logits(make_model("llama", NUM_LAYERS))
    with _group(_shares(3, "streamed", 2)) as (models, pools):
        for model, pool in zip(models, pools, strict=True):
            block = blocks_of(model)[layer]
            part = block.get_submodule("self_attn" if where == "before" else "mlp.down_proj")
            handle = part.register_forward_pre_hook(_explode)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="boom"):
                    _logits(model)
                pool.check_integrity()
            handle.remove()
            for _ in range(3):
                assert torch.equal(_logits(model), plain)
            pool.check_integrity()


def _explode(*_: object) -> None:
    raise RuntimeError("boom")


def test_lease_misuse() -> None:
    with _group(_shares(2, "mapped")) as (_, pools):
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
    with _group(_shares(2, "streamed", 1)) as (models, pools):
        plain = _logits(models[0])
        with pytest.raises(PoolError, match="layer 3 asked for, layer 1 is next"):
            pools[0].acquire(3)
        assert torch.equal(_logits(models[0]), plain), "the error must not spoil the next pass"


def test_placeholders_hold_no_memory() -> None:
    share = _shares(2, "streamed")[0]
    loader = PoolLoader(share, LocalStore())
    for layer, block in enumerate(blocks_of(make_model("llama", NUM_LAYERS))):
        ffn = loader.add_block(block)
        weights = [span.linear.get_parameter("weight") for span in ffn.spans]
        assert all(weight.is_meta != loader.owns(layer) for weight in weights)
        assert [weight.shape for weight in weights] == [span.shape for span in ffn.spans]


@pytest.mark.parametrize("keep", [True, False])
def test_owned_weights_lie_in_the_store(keep: bool) -> None:
    block = blocks_of(make_model("llama", 1))[0]
    linear = block.get_submodule("mlp.up_proj")
    before = linear.get_parameter("weight").clone()
    hub = LocalHub()
    loader = PoolLoader(plan_shares((1,), 1, "none")[0], LocalStore(hub))
    ffn = loader.add_block(block, keep_weights=keep)
    first = ffn.spans[0].linear.get_parameter("weight").data_ptr()
    after = linear.get_parameter("weight").clone()
    loader.attach().close()
    assert first == hub.published[0].data_ptr()
    assert torch.equal(after, before) or not keep


def test_pack_is_applied_to_what_a_rank_owns_before_peers_see_it() -> None:
    """Packing by the owner alone: doubled weights everywhere, each exactly once."""
    hub = LocalHub()
    shares, double = _shares(2, "mapped"), PoolOptions(pack=lambda w: w * 2)
    models = [make_model("llama", NUM_LAYERS) for _ in shares]
    loaders = [
        _loader(share, LocalStore(hub), model, double)
        for share, model in zip(shares, models, strict=True)
    ]
    _all_at_once([loader.attach for loader in loaders])
    plain = make_model("llama", NUM_LAYERS)
    for model in models:
        for block, other in zip(blocks_of(model), blocks_of(plain), strict=True):
            for span, other_span in zip(find_ffn(block).spans, find_ffn(other).spans, strict=True):
                packed = span.linear.get_parameter("weight")
                assert torch.equal(packed, 2 * other_span.linear.get_parameter("weight"))


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_a_rank_that_is_started_again_finds_its_layers(mode: PoolMode) -> None:
    """It neither allocates, loads nor packs what is there; its peers notice nothing."""
    hub = LocalHub()
    shares = _shares(2, mode)

    def join(share: PoolShare, keep_weights: bool = True) -> tuple[nn.Module, PoolLoader]:
        model = make_model("llama", NUM_LAYERS)
        loader = PoolLoader(share, LocalStore(hub), PoolOptions(pack=lambda w: w * 2))
        for block in blocks_of(model):
            loader.add_block(block, keep_weights)
        return model, loader

    models, loaders = zip(*(join(share) for share in shares), strict=True)
    pools = _all_at_once([loader.attach for loader in loaders])
    for pool in pools:
        pool.start()
    expected = _logits(models[0])
    pools[0].close()
    published = {layer: buffer.data_ptr() for layer, buffer in hub.published.items()}
    again, loader = join(shares[0], keep_weights=False)
    for block in blocks_of(again):
        assert all(span.linear.get_parameter("weight").is_meta for span in find_ffn(block).spans)
    pool = loader.attach()
    pool.start()
    assert torch.equal(_logits(again), expected)
    assert torch.equal(_logits(models[1]), expected)
    assert {layer: buffer.data_ptr() for layer, buffer in hub.published.items()} == published
    assert pool.stats().owned_bytes == pools[1].stats().owned_bytes * 3 // 2
    for one in (pool, pools[1]):
        one.close()


def test_nothing_is_allocated_after_the_start() -> None:
    """Weights lie where they are published, or in one of two slots, in every pass."""
    with _group(_shares(3, "streamed", 2)) as (models, pools):
        blocks, owners = blocks_of(models[0]), pools[0].share.owners
        seen: list[set[tuple[bool, int]]] = []
        for block, owner in zip(blocks, owners, strict=True):
            block.get_submodule("mlp.gate_proj").register_forward_pre_hook(
                lambda linear, _, owns=owner == 0: seen[-1].add((owns, linear.weight.data_ptr()))
            )
        for _ in range(3):
            seen.append(set())
            _logits(models[0])
        assert all(pointers == seen[0] for pointers in seen)
        owned = {pointer for owns, pointer in seen[0] if owns}
        slots = {pointer for owns, pointer in seen[0] if not owns}
        assert (len(owned), len(slots)) == (owners.count(0), 2)
        assert not owned & slots


def test_counters() -> None:
    layer_bytes = 3 * 32 * 48 * 4
    with _group(_shares(2, "mapped")) as (_, pools):
        assert pools[0].stats().owned_bytes == 3 * layer_bytes
        assert pools[0].stats().mapped_bytes == 2 * layer_bytes
    with _group(_shares(2, "streamed", 1)) as (models, pools):
        for _ in range(4):
            _logits(models[0])
        stats = pools[0].stats()
        assert stats.slot_bytes == layer_bytes
        assert stats.mapped_bytes == 0
        assert 8 * layer_bytes <= stats.streamed_bytes <= 9 * layer_bytes, "one may run ahead"
        assert stats.wait_seconds >= 0


def test_plan_that_fetches_other_layers() -> None:
    shares = _shares(2, "streamed")
    wrong = PoolShare("streamed", 0, 2, shares[0].owners, 1, shares[1].fetches)
    hub = LocalHub()
    loaders = [
        _loader(share, LocalStore(hub), make_model("llama", NUM_LAYERS))
        for share in (wrong, shares[1])
    ]
    thread = threading.Thread(target=loaders[1].attach)
    thread.start()
    with pytest.raises(PoolError, match=r"rank 0 borrows layers \[1, 3\].*plan again"):
        loaders[0].attach()
    thread.join(10)


def test_a_block_more_than_the_plan_knows() -> None:
    loader = PoolLoader(plan_shares((1,), 1, "mapped")[0], LocalStore())
    blocks = blocks_of(make_model("llama", 2))
    loader.add_block(blocks[0])
    with pytest.raises(UnsupportedModelError, match="the plan knows 1 layers"):
        loader.add_block(blocks[1])


def test_peers_with_other_sizes_are_refused() -> None:
    hub = LocalHub()
    store = LocalStore(hub)
    store.allocate(0, 64)
    store.publish(0)
    loader = _loader(PoolShare("mapped", 1, 2, (0,)), LocalStore(hub), make_model("llama", 1))
    with pytest.raises(PeerLostError, match="has 64 bytes, expected 18432"):
        loader.attach()


def test_peer_that_never_publishes() -> None:
    share, options = PoolShare("mapped", 1, 2, (0,)), PoolOptions(peer_timeout_seconds=0.05)
    loader = _loader(share, LocalStore(), make_model("llama", 1), options)
    with pytest.raises(PeerLostError, match=r"rank 0 did not publish layer 0 within 0\.05 s"):
        loader.attach()
