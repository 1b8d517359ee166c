"""Pools on real models, in one process: every layout gives the plain logits, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import FetchOrder, PoolMode, PoolShare
from elbowroom.pool.ffn import find_ffn
from elbowroom.pool.housekeeper import Housekeeper
from elbowroom.pool.pool import Pool
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.pool.store import LocalHub, LocalStore
from tests.pool.hf import CONFIGS, blocks_of, make_model

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
    pools = []
    for share in shares:
        store = SharedMemoryStore(run_dir, share.rank) if run_dir else LocalStore(hub)
        pools.append(Pool(share, store, None, 5, stream_timeout_seconds=5, run_dir=run_dir))
    with ExitStack() as stack:
        for model, pool in zip(models, pools, strict=True):
            for block in blocks_of(model):
                pool.add_block(block)
            stack.callback(pool.close)
        _all_at_once([pool.attach for pool in pools])
        for pool in pools:
            pool.start()
        yield models, pools


def _all_at_once(calls: list[object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


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
        outputs: list[torch.Tensor] = []
        for _ in range(5):
            _all_at_once([lambda m=model: outputs.append(_logits(m)) for model in models])
        for out in outputs:
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for pool in pools:
            pool.check_integrity()
            stats, borrowed = pool.stats(), NUM_LAYERS - len(pool._owned)
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


def test_integrity_compares_lease_and_slot() -> None:
    with _group(_shares(2, "streamed", 1)) as (_, pools):
        pools[0].acquire(1)
        pools[0].check_integrity()
        pools[0]._lease = 3
        with pytest.raises(PoolError, match="lease on 3, slot 0 on another layer"):
            pools[0].check_integrity()


def test_placeholders_hold_no_memory() -> None:
    share = _shares(2, "streamed")[0]
    pool = Pool(share, LocalStore())
    for layer, block in enumerate(blocks_of(make_model("llama", NUM_LAYERS))):
        ffn = pool.add_block(block)
        weights = [span.linear.get_parameter("weight") for span in ffn.spans]
        assert all(weight.is_meta != pool.owns(layer) for weight in weights)
        assert [weight.shape for weight in weights] == [span.shape for span in ffn.spans]
    pool.close()


@pytest.mark.parametrize("keep", [True, False])
def test_owned_weights_lie_in_the_store(keep: bool) -> None:
    block = blocks_of(make_model("llama", 1))[0]
    linear = block.get_submodule("mlp.up_proj")
    before = linear.get_parameter("weight").clone()
    store = LocalStore()
    pool = Pool(plan_shares((1,), 1, "none")[0], store)
    ffn = pool.add_block(block, keep_weights=keep)
    buffer = store._own[0]
    buffer[-1] = 7
    first = ffn.spans[0].linear.get_parameter("weight")
    assert first.data_ptr() == buffer.data_ptr()
    assert torch.equal(linear.get_parameter("weight"), before) or not keep
    pool.close()


def test_pack_is_applied_to_what_a_rank_owns_before_peers_see_it() -> None:
    """Packing by the owner alone: doubled weights everywhere, each exactly once."""
    hub = LocalHub()
    pools = [Pool(s, LocalStore(hub), pack=lambda w: w * 2) for s in _shares(2, "mapped")]
    models = [make_model("llama", NUM_LAYERS) for _ in pools]
    for model, pool in zip(models, pools, strict=True):
        for block in blocks_of(model):
            pool.add_block(block)
    _all_at_once([pool.attach for pool in pools])
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

    def join(share: PoolShare, keep_weights: bool = True) -> tuple[nn.Module, Pool]:
        model, pool = make_model("llama", NUM_LAYERS), Pool(share, LocalStore(hub), lambda w: w * 2)
        for block in blocks_of(model):
            pool.add_block(block, keep_weights)
        return model, pool

    members = [join(share) for share in shares]
    _all_at_once([pool.attach for _, pool in members])
    for _, pool in members:
        pool.start()
    expected = _logits(members[0][0])
    members[0][1].close()
    published = {layer: buffer.data_ptr() for layer, buffer in hub.published.items()}
    again, pool = join(shares[0], keep_weights=False)
    for block in blocks_of(again):
        assert all(span.linear.get_parameter("weight").is_meta for span in find_ffn(block).spans)
    pool.attach()
    pool.start()
    assert torch.equal(_logits(again), expected)
    assert torch.equal(_logits(members[1][0]), expected)
    assert {layer: buffer.data_ptr() for layer, buffer in hub.published.items()} == published
    assert pool.stats().owned_bytes == members[1][1].stats().owned_bytes * 3 // 2
    for one in (pool, members[1][1]):
        one.close()


def test_nothing_is_allocated_after_the_start() -> None:
    with _group(_shares(3, "streamed", 2)) as (models, pools):
        assert pools[0]._streamer is not None
        slots = {buffer.data_ptr() for buffer in pools[0]._streamer.buffers}
        owned = {buffer.data_ptr() for buffer in pools[0]._owned.values()}
        seen: list[set[int]] = []
        for block in blocks_of(models[0]):
            block.get_submodule("mlp.gate_proj").register_forward_pre_hook(
                lambda linear, _: seen[-1].add(linear.weight.data_ptr())
            )
        for _ in range(3):
            seen.append(set())
            _logits(models[0])
        assert all(pointers == slots | owned for pointers in seen)


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


def test_failure_of_the_housekeeper_reaches_the_pass() -> None:
    with _group(_shares(2, "streamed", 1)) as (models, pools):
        _logits(models[0])
        housekeeper = pools[0]._streamer
        assert isinstance(housekeeper, Housekeeper)
        housekeeper._sources.clear()
        with pytest.raises(PoolError, match="was not streamed") as caught:
            for _ in range(3):
                _logits(models[0])
        assert isinstance(caught.value.__cause__, KeyError)


def test_plan_that_fetches_other_layers() -> None:
    shares = _shares(2, "streamed")
    wrong = PoolShare("streamed", 0, 2, shares[0].owners, 1, shares[1].fetches)
    hub = LocalHub()
    pools = [Pool(share, LocalStore(hub)) for share in (wrong, shares[1])]
    for pool in pools:
        for block in blocks_of(make_model("llama", NUM_LAYERS)):
            pool.add_block(block)
    thread = threading.Thread(target=pools[1].attach)
    thread.start()
    with pytest.raises(PoolError, match=r"rank 0 borrows layers \[1, 3\].*plan again"):
        pools[0].attach()
    thread.join(10)


def test_a_block_more_than_the_plan_knows() -> None:
    pool = Pool(plan_shares((1,), 1, "mapped")[0], LocalStore())
    blocks = blocks_of(make_model("llama", 2))
    pool.add_block(blocks[0])
    with pytest.raises(UnsupportedModelError, match="the plan knows 1 layers"):
        pool.add_block(blocks[1])


def test_peers_with_other_sizes_are_refused() -> None:
    hub = LocalHub()
    store = LocalStore(hub)
    store.allocate(0, 64)
    store.publish(0)
    pool = Pool(PoolShare("mapped", 1, 2, (0,)), LocalStore(hub))
    pool.add_block(blocks_of(make_model("llama", 1))[0])
    with pytest.raises(PeerLostError, match="has 64 bytes, expected 18432"):
        pool.attach()


def test_peer_that_never_publishes() -> None:
    pool = Pool(PoolShare("mapped", 1, 2, (0,)), LocalStore(), peer_timeout_seconds=0.05)
    pool.add_block(blocks_of(make_model("llama", 1))[0])
    with pytest.raises(PeerLostError, match=r"rank 0 did not publish layer 0 within 0\.05 s"):
        pool.attach()
