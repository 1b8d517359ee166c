"""Finding the feed-forward modules of a block, on real architectures and on odd ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, MixtralConfig, OPTConfig, Qwen2MoeConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

from elbowroom.pool.find import FFN_NAMES, find_modules
from elbowroom.pool.layer import SMALL_BYTES, PooledLayer, pooled_layer
from tests.pool.hf import CONFIGS, blocks_of, make_model


class Attention(nn.Linear):
    """What mixes tokens, by its name."""


class Block(nn.Module):
    """A block with attention and the children given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.attention = Attention(64, 64)
        for name, child in children.items():
            self.add_module(name, child)


class Mixer(nn.Module):
    """Attention within a module that has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Attention(64, 64), nn.Linear(64, 64))


def _plain(width: int = 96) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))


def _layer(block: nn.Module) -> PooledLayer:
    layer = pooled_layer(block)
    assert layer is not None
    return layer


@pytest.mark.parametrize("name", CONFIGS)
def test_gated_networks(name: str) -> None:
    block = blocks_of(make_model(name, num_layers=1))[0]
    layer = _layer(block)
    assert layer.modules == (block.get_submodule("mlp"),)
    assert sorted(tuple(t.shape) for _, t in layer.tensors()) == [(32, 48), (48, 32), (48, 32)]


@pytest.mark.parametrize("name", sorted(FFN_NAMES))
def test_known_names_are_preferred(name: str) -> None:
    """Other children are projections of attention, or small networks beside it."""
    block = Block(**{name: _plain(), "qkv_proj": nn.Linear(64, 192)})
    assert list(find_modules(block)) == [name]


def test_gpt2() -> None:
    block = GPT2Block(GPT2Config(n_embd=32, n_head=2, n_inner=64), layer_idx=0)
    assert [tuple(t.shape) for _, t in _layer(block).tensors()] == [(32, 64), (64, 32)]


def test_layers_of_no_known_name_are_found_by_size() -> None:
    """Of two linear layers beside attention, both are taken; a gate of few bytes is not."""
    config = OPTConfig(hidden_size=64, ffn_dim=128, num_attention_heads=2, word_embed_proj_dim=64)
    assert list(find_modules(OPTDecoderLayer(config))) == ["fc1", "fc2"]
    small = nn.Linear(64, 7, bias=False)
    assert list(find_modules(Block(up=nn.Linear(64, 64, bias=False), small=small))) == ["up"]
    eighth = nn.Linear(64, 8, bias=False)
    assert list(find_modules(Block(up=nn.Linear(64, 64, bias=False), one=eighth))) == ["up", "one"]


def test_a_layer_that_only_mixes_tokens_has_none() -> None:
    """Whatever its mixer is called."""
    assert find_modules(Block(mixer=Mixer(), norm=nn.LayerNorm(64))) == {}
    assert pooled_layer(Block(mlp=Mixer())) is None


def test_works_without_memory() -> None:
    with torch.device("meta"):
        block = Block(mlp=_plain())
    assert list(find_modules(block)) == ["mlp"]


def test_small_tensors_stay_with_every_replica() -> None:
    layer = _layer(Block(mlp=_plain(width=96)))
    assert [name for name, _ in layer.tensors()] == ["mlp.0.weight", "mlp.2.weight"]
    wide = _layer(Block(mlp=_plain(width=SMALL_BYTES // 4)))
    assert [name for name, _ in wide.tensors()] == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight"]


@pytest.mark.parametrize(
    "block",
    [
        MixtralDecoderLayer(
            MixtralConfig(
                hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2
            ),
            layer_idx=0,
        ),
        Qwen2MoeDecoderLayer(
            Qwen2MoeConfig(
                hidden_size=32,
                num_attention_heads=2,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=64,
                num_experts=40,
            ),
            layer_idx=0,
        ),
    ],
    ids=["mixtral", "qwen2-moe"],
)
def test_a_mixture_is_its_experts_and_what_all_tokens_pass(block: nn.Module) -> None:
    """Routers stay with every replica."""
    layer = _layer(block)
    names = [name for name, _ in layer.tensors()]
    assert sum(tensor.dim() == 3 for _, tensor in layer.tensors()) == 2
    assert not any("gate.weight" in name.replace("gate_up", "") for name in names)
    left = {name for name, _ in layer.modules[0].named_parameters()}
    left -= {name.partition(".")[2] for name in names}
    assert {name.split(".")[0] for name in left} <= {"gate", "shared_expert_gate"}
    assert "gate.weight" in left
