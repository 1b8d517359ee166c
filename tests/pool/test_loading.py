"""How layers come into a pool: memory, restarts, what is compared, what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import NO_OWNER, PoolMode, PoolShare
from elbowroom.pool.layer import PooledLayer
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.pool import Pool
from elbowroom.pool.store import LocalHub, LocalStore
from tests.pool.groups import NUM_LAYERS, all_at_once, logits, make_loader, make_shares
from tests.pool.hf import blocks_of, make_model

LAYER_BYTES = 3 * 32 * 48 * 4


class Block(nn.Module):
    """A block that is nothing but a feed-forward module."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(x)
        return out


class Toy(nn.Module):
    """A module whose weights an engine changes when they are loaded.

    It takes them into another shape and type, drops one and makes another, and keeps a number of
    Python's and a tensor beside its parameters.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(96, 64, generator=generator), requires_grad=False)
        self.order = nn.Parameter(torch.arange(96).repeat(20), requires_grad=False)

    def process(self) -> None:
        weight, order = self.weight, self.order[:96]
        self.scale = float(weight.abs().max()) / 127
        self.sums = weight.sum(1)[order]
        del self.weight, self.order
        packed = (weight[order] / self.scale).round().to(torch.int8).t().contiguous().t()
        self.register_buffer("packed", packed)
        self.packed_too = nn.Parameter(packed.float() * self.scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.packed
        return x @ (packed.float() * self.scale).t() @ self.packed_too + self.sums[:64]


class Padded(Toy):
    """Ends in a tensor whose rows lie farther apart than they are long."""

    def process(self) -> None:
        del self.order
        wide = torch.zeros(96, 4096)
        wide[:, :64] = self.weight
        self.weight = nn.Parameter(wide[:, :64], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class Hiding(Toy):
    """Keeps nothing but what a closure holds."""

    def process(self) -> None:
        weight = self.weight.clone()
        del self.weight, self.order
        self.left = nn.Parameter(torch.zeros(1500), requires_grad=False)
        self.forward = lambda x: x @ weight.t()  # type: ignore[method-assign]


class Alias(Toy):
    """Keeps a second way to a parameter's memory."""

    def process(self) -> None:
        self.turned = [{"weight": self.weight.data.t()}]


def _load(share: PoolShare, hub: LocalHub, kind: Callable[[int], Toy]) -> PoolLoader:
    """Load as an engine does: build, then load and process, what is lent out layer by layer."""
    loader = PoolLoader(share, LocalStore(hub), PoolOptions(peer_timeout_seconds=5))
    toys = [kind(layer) for layer in range(len(share.owners))]
    values = [{name: weight.clone() for name, weight in toy.named_parameters()} for toy in toys]
    for toy in toys:
        loader.add_block(Block(toy), is_loaded=False)
    for layer, toy in enumerate(toys):
        if layer not in loader.layers_to_read():
            toy.process()
    for layer in loader.layers_to_read():
        for name, weight in toys[layer].named_parameters():
            weight.copy_(values[layer][name])
        toys[layer].process()
        loader.take(layer)
    loader.toys = toys  # type: ignore[attr-defined]
    return loader


def test_what_is_lent_out_lies_in_the_memory_of_one_layer() -> None:
    share = make_shares(2, "streamed")[0]
    loader = PoolLoader(share, LocalStore())
    layers: list[PooledLayer | None] = [
        loader.add_block(block, is_loaded=False)
        for block in blocks_of(make_model("llama", NUM_LAYERS))
    ]
    lent = [one for number, one in enumerate(layers) if one and not loader.owns(number)]
    storages = {t.untyped_storage().data_ptr() for one in lent for _, t in one.tensors()}
    assert len(lent) > 1
    assert len(storages) == 1
    assert lent[0].tensors()[0].tensor.untyped_storage().nbytes() == LAYER_BYTES
    assert loader.layers_to_read() == [1, 3]


def test_owned_weights_move_into_the_store() -> None:
    block = blocks_of(make_model("llama", 1))[0]
    weight = block.get_submodule("mlp.up_proj").get_parameter("weight")
    before = weight.clone()
    hub = LocalHub()
    loader = PoolLoader(plan_shares((1,), 1, "mapped")[0], LocalStore(hub))
    loader.add_block(block)
    loader.attach().close()
    assert weight.untyped_storage().data_ptr() == hub.published[0].untyped_storage().data_ptr()
    assert block.get_submodule("mlp.up_proj").get_parameter("weight") is weight, "the same object"
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", [Toy, Padded])
@pytest.mark.parametrize("mode", ["mapped", "streamed"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_weights_in_another_form_are_carried(
    mode: PoolMode, num_ranks: int, kind: type[Toy]
) -> None:
    """Whatever an engine made of them; what it keeps beside them is every replica's own."""
    x, plain = torch.randn(5, 64), [kind(layer) for layer in range(NUM_LAYERS)]
    for toy in plain:
        toy.process()
    hub = LocalHub()
    shares = plan_shares((1,) * NUM_LAYERS, num_ranks, mode, 1)
    loaders = [_load(share, hub, kind) for share in shares]
    for pool, loader in zip(all_at_once([one.attach for one in loaders]), loaders, strict=True):
        pool.start()
        for _ in range(3):
            for mine, toy in zip(loader.toys, plain, strict=True):  # type: ignore[attr-defined]
                assert torch.equal(mine(x), toy(x))
        pool.check_integrity()
        pool.close()


@pytest.mark.parametrize("share", plan_shares((1, 1), 2, "mapped"))
def test_hidden_weights_are_refused_by_owner_and_borrower(share: PoolShare) -> None:
    with pytest.raises(UnsupportedModelError, match=r"had 39936 bytes of weights, of which 6000"):
        _load(share, LocalHub(), Hiding).attach()


@pytest.mark.parametrize("share", plan_shares((1, 1), 2, "mapped"))
def test_a_second_way_to_a_parameter_is_refused(share: PoolShare) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer \d: Alias\.turned\.0\.weight lies in"):
        _load(share, LocalHub(), Alias).attach()


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_one_bit_that_differs_is_refused(mode: PoolMode) -> None:
    class Flipped(Toy):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            if seed == 1:
                self.weight.view(torch.int32)[95, 63] ^= 1

        def process(self) -> None:
            del self.order

    class Plain(Toy):
        def process(self) -> None:
            del self.order

    hub, shares = LocalHub(), plan_shares((1, 1), 2, mode, 1)
    thread = threading.Thread(target=_attach, args=(_load(shares[1], hub, Plain),))
    thread.start()
    with pytest.raises(PeerLostError, match=r"layer 1 of rank 1 .* bytes of mlp\.weight"):
        _load(shares[0], hub, Flipped).attach()
    thread.join(10)


def _attach(loader: PoolLoader) -> None:
    loader.attach().close()


def test_a_bit_that_changes_on_the_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between publishing and binding, or in the copy into a slot."""
    original = PooledLayer.fill_from

    def fill_badly(self: PooledLayer, buffer: torch.Tensor) -> None:
        original(self, buffer)
        self.tensors()[2].tensor.view(torch.int32)[0, 0] ^= 4

    monkeypatch.setattr(PooledLayer, "fill_from", fill_badly)
    hub, shares = LocalHub(), make_shares(2, "streamed", 1)
    loaders = [make_loader(s, LocalStore(hub), make_model("llama", NUM_LAYERS)) for s in shares]
    with pytest.raises(PoolError, match="layer 1 differs"):
        all_at_once([loader.attach for loader in loaders])


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_a_rank_that_is_started_again_finds_its_layers(mode: PoolMode) -> None:
    """It allocates nothing, and compares what it reads with what is there."""
    hub = LocalHub()
    shares = make_shares(2, mode)

    def join(share: PoolShare) -> tuple[nn.Module, PoolLoader]:
        model = make_model("llama", NUM_LAYERS)
        return model, make_loader(share, LocalStore(hub), model)

    models, loaders = zip(*(join(share) for share in shares), strict=True)
    pools = all_at_once([loader.attach for loader in loaders])
    for pool in pools:
        pool.start()
    expected = logits(models[0])
    pools[0].close()
    published = {layer: buffer.data_ptr() for layer, buffer in hub.published.items()}
    again, loader = join(shares[0])
    assert loader.layers_to_read() == list(range(NUM_LAYERS))
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


def test_blocks_that_are_missing() -> None:
    loader = make_loader(PoolShare("mapped", 0, 1, (0, 0)), LocalStore(), make_model("llama", 1))
    with pytest.raises(PoolError, match="the plan knows 2 layers, and 1 were handed over"):
        loader.attach()


@pytest.mark.parametrize(("owner", "has"), [(NO_OWNER, True), (0, False)])
def test_a_layer_of_another_kind_than_the_plan_knows(owner: int, has: bool) -> None:
    loader = PoolLoader(PoolShare("mapped", 0, 1, (owner,)), LocalStore())
    with pytest.raises(UnsupportedModelError, match="feed-forward network in layer 0"):
        loader.add_block(Block(nn.Linear(64, 64) if has else nn.LayerNorm(64)))


def test_a_pool_of_nothing_is_an_error() -> None:
    loader = PoolLoader(PoolShare("mapped", 0, 1, (NO_OWNER,)), LocalStore())
    assert loader.add_block(Block(nn.LayerNorm(64))) is None
    with pytest.raises(PoolError, match="no layer"):
        loader.attach()


def test_layers_that_only_mix_tokens_are_passed_over() -> None:
    x, hub = torch.randn(3, 64), LocalHub()
    shares = plan_shares((1, 0, 1, 0, 0, 1), 2, "streamed", 1)
    assert shares[0].owners.count(NO_OWNER) == 3

    def stack() -> list[Block]:
        torch.manual_seed(0)
        kinds = [nn.Linear(64, 64) if o != NO_OWNER else nn.LayerNorm(64) for o in shares[0].owners]
        return [Block(kind) for kind in kinds]

    expected = _run(stack(), x)
    stacks = [stack() for _ in shares]
    pools = _attach_all(hub, shares, stacks)
    for blocks, pool in zip(stacks, pools, strict=True):
        pool.start()
        assert all(torch.equal(_run(blocks, x), expected) for _ in range(3))
        pool.close()


class TwoLinears(nn.Module):
    """A block whose feed-forward modules have no module around them, as OPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.fc2(self.fc1(x).relu())
        return out


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_several_modules_run_under_one_lease(mode: PoolMode) -> None:
    x, hub = torch.randn(3, 64), LocalHub()

    def stack() -> list[TwoLinears]:
        torch.manual_seed(0)
        return [TwoLinears() for _ in range(5)]

    expected = _run(stack(), x)
    shares = plan_shares((1,) * 5, 2, mode, 1)
    stacks = [stack() for _ in shares]
    pools = _attach_all(hub, shares, stacks)
    for blocks, pool in zip(stacks, pools, strict=True):
        pool.start()
        for cut in (None, 0, 1, 4):
            if cut is not None:
                handle = blocks[cut].fc2.register_forward_pre_hook(_explode)
                with pytest.raises(RuntimeError, match="boom"):
                    _run(blocks, x)
                handle.remove()
            assert torch.equal(_run(blocks, x), expected)
        pool.check_integrity()
        pool.close()


def _run(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for block in blocks:
            x = block(x)
    return x


def _attach_all(
    hub: LocalHub, shares: Sequence[PoolShare], stacks: Sequence[Sequence[nn.Module]]
) -> list[Pool]:
    loaders = [PoolLoader(share, LocalStore(hub)) for share in shares]
    for loader, blocks in zip(loaders, stacks, strict=True):
        for block in blocks:
            loader.add_block(block)
    return all_at_once([loader.attach for loader in loaders])


def _explode(*_: object) -> None:
    raise RuntimeError("boom")


def test_several_modules_are_not_shipped(tmp_path: Path) -> None:
    shares, hub = (
        plan_shares((1,) * 2, 2, "streamed", 1, ship_bytes=64, ship_below_rows=9),
        LocalHub(),
    )

    torch.manual_seed(0)
    blocks = [TwoLinears() for _ in range(2)]
    loaders = [PoolLoader(s, LocalStore(hub), PoolOptions(run_dir=tmp_path)) for s in shares]
    for loader in loaders:
        for block in blocks:
            loader.add_block(copy.deepcopy(block))

    def attach(loader: PoolLoader) -> None:
        with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1\] have several"):
            loader.attach()

    all_at_once([partial(attach, loader) for loader in loaders])


def test_weights_of_several_layers_are_refused() -> None:
    shared = nn.Linear(64, 64)
    loader = PoolLoader(PoolShare("mapped", 0, 1, (0, 0)), LocalStore())
    loader.add_block(Block(shared))
    with pytest.raises(UnsupportedModelError, match="layer 1 has weights of an earlier layer"):
        loader.add_block(Block(shared))


def test_peers_with_other_sizes_are_refused() -> None:
    hub = LocalHub()
    store = LocalStore(hub)
    store.allocate(0, 64)
    store.publish(0)
    loader = make_loader(PoolShare("mapped", 1, 2, (0,)), LocalStore(hub), make_model("llama", 1))
    with pytest.raises(PeerLostError, match=f"has 64 bytes, expected {LAYER_BYTES + 32}"):
        loader.attach()


def test_peer_that_never_publishes() -> None:
    share, options = PoolShare("mapped", 1, 2, (0,)), PoolOptions(peer_timeout_seconds=0.05)
    loader = make_loader(share, LocalStore(), make_model("llama", 1), options)
    with pytest.raises(PeerLostError, match=r"rank 0 did not publish layer 0 within 0\.05 s"):
        loader.attach()
