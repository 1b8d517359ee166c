"""How layers come into a pool: placeholders, packing, restarts, what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import PoolMode, PoolShare
from elbowroom.pool.ffn import find_ffn
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.store import LocalHub, LocalStore
from tests.pool.groups import (
    NUM_LAYERS,
    all_at_once,
    logits,
    make_loader,
    make_shares,
)
from tests.pool.hf import blocks_of, make_model


def test_placeholders_hold_no_memory() -> None:
    share = make_shares(2, "streamed")[0]
    loader = PoolLoader(share, LocalStore())
    for layer, block in enumerate(blocks_of(make_model("llama", NUM_LAYERS))):
        ffn = loader.add_block(block)
        weights = [span.weight for span in ffn.spans]
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
    first = ffn.spans[0].weight.data_ptr()
    after = linear.get_parameter("weight").clone()
    loader.attach().close()
    assert first == hub.published[0].data_ptr()
    assert torch.equal(after, before) or not keep


def test_pack_is_applied_to_what_a_rank_owns_before_peers_see_it() -> None:
    """Packing by the owner alone: doubled weights everywhere, each exactly once."""
    hub = LocalHub()
    shares, double = make_shares(2, "mapped"), PoolOptions(pack=lambda w: w * 2)
    models = [make_model("llama", NUM_LAYERS) for _ in shares]
    loaders = [
        make_loader(share, LocalStore(hub), model, double)
        for share, model in zip(shares, models, strict=True)
    ]
    all_at_once([loader.attach for loader in loaders])
    plain = make_model("llama", NUM_LAYERS)
    for model in models:
        for block, other in zip(blocks_of(model), blocks_of(plain), strict=True):
            for span, other_span in zip(find_ffn(block).spans, find_ffn(other).spans, strict=True):
                packed = span.weight
                assert torch.equal(packed, 2 * other_span.weight)


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_a_rank_that_is_started_again_finds_its_layers(mode: PoolMode) -> None:
    """It neither allocates, loads nor packs what is there; its peers notice nothing."""
    hub = LocalHub()
    shares = make_shares(2, mode)

    def join(share: PoolShare, keep_weights: bool = True) -> tuple[nn.Module, PoolLoader]:
        model = make_model("llama", NUM_LAYERS)
        loader = PoolLoader(share, LocalStore(hub), PoolOptions(pack=lambda w: w * 2))
        for block in blocks_of(model):
            loader.add_block(block, keep_weights)
        return model, loader

    models, loaders = zip(*(join(share) for share in shares), strict=True)
    pools = all_at_once([loader.attach for loader in loaders])
    for pool in pools:
        pool.start()
    expected = logits(models[0])
    pools[0].close()
    published = {layer: buffer.data_ptr() for layer, buffer in hub.published.items()}
    again, loader = join(shares[0], keep_weights=False)
    for block in blocks_of(again):
        assert all(span.weight.is_meta for span in find_ffn(block).spans)
    pool = loader.attach()
    pool.start()
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(models[1]), expected)
    assert {layer: buffer.data_ptr() for layer, buffer in hub.published.items()} == published
    assert pool.stats().owned_bytes == pools[1].stats().owned_bytes * 3 // 2
    for one in (pool, pools[1]):
        one.close()


def test_plan_that_fetches_other_layers() -> None:
    shares = make_shares(2, "streamed")
    wrong = PoolShare("streamed", 0, 2, shares[0].owners, 1, shares[1].fetches)
    hub = LocalHub()
    loaders = [
        make_loader(share, LocalStore(hub), make_model("llama", NUM_LAYERS))
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
    loader = make_loader(PoolShare("mapped", 1, 2, (0,)), LocalStore(hub), make_model("llama", 1))
    with pytest.raises(PeerLostError, match="has 64 bytes, expected 18432"):
        loader.attach()


def test_peer_that_never_publishes() -> None:
    share, options = PoolShare("mapped", 1, 2, (0,)), PoolOptions(peer_timeout_seconds=0.05)
    loader = make_loader(share, LocalStore(), make_model("llama", 1), options)
    with pytest.raises(PeerLostError, match=r"rank 0 did not publish layer 0 within 0\.05 s"):
        loader.attach()
