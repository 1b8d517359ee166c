"""Finding the feed-forward network of a block, on real architectures and on refused ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, MixtralConfig, Qwen2MoeConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

from elbowroom.core.errors import UnsupportedModelError
from elbowroom.pool.ffn import find_ffn
from tests.pool.hf import CONFIGS, blocks_of, make_model


class Block(nn.Module):
    """A block with nothing but the feed-forward network given, under the name given."""

    def __init__(self, ffn: nn.Module, name: str = "mlp") -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.add_module(name, ffn)


def _plain(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.GELU(), nn.Linear(6, 4, bias=bias))


@pytest.mark.parametrize("name", CONFIGS)
def test_gated_networks(name: str) -> None:
    block = blocks_of(make_model(name, num_layers=1))[0]
    ffn = find_ffn(block)
    assert ffn.module is block.get_submodule("mlp")
    assert sorted(span.shape for span in ffn.spans) == [(32, 48), (48, 32), (48, 32)]
    assert ffn.num_bytes == 3 * 32 * 48 * 4


@pytest.mark.parametrize("name", ["mlp", "feed_forward", "ffn"])
def test_plain_network_without_its_biases(name: str) -> None:
    ffn = find_ffn(Block(_plain(), name))
    assert [tuple(span.shape) for span in ffn.spans] == [(6, 4), (4, 6)]


def test_gpt2() -> None:
    block = GPT2Block(GPT2Config(n_embd=8, n_head=2, n_inner=16), layer_idx=0)
    assert [tuple(span.shape) for span in find_ffn(block).spans] == [(8, 16), (16, 8)]


def test_works_without_memory() -> None:
    with torch.device("meta"):
        block = Block(_plain())
    assert find_ffn(block).num_bytes == find_ffn(Block(_plain())).num_bytes


def test_matrices_do_not_overlap_and_are_aligned() -> None:
    ffn = find_ffn(Block(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 3))))
    buffer = torch.zeros(ffn.num_bytes, dtype=torch.uint8)
    for number, span in enumerate(ffn.spans, 1):
        assert span.offset_bytes % 64 == 0
        view = span.view(buffer)
        assert view.shape == span.shape
        assert view.untyped_storage().data_ptr() == buffer.data_ptr(), "a copy, not a view"
        view.fill_(number)
    for number, span in enumerate(ffn.spans, 1):
        assert torch.equal(span.view(buffer), torch.full(span.shape, float(number)))


@pytest.mark.parametrize(
    "block",
    [
        MixtralDecoderLayer(
            MixtralConfig(
                hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2
            ),
            layer_idx=0,
        ),
        Qwen2MoeDecoderLayer(
            Qwen2MoeConfig(
                hidden_size=8,
                num_attention_heads=2,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_experts=2,
            ),
            layer_idx=0,
        ),
    ],
    ids=["mixtral", "qwen2-moe"],
)
def test_a_mixture_is_its_experts_and_what_all_tokens_pass(block: nn.Module) -> None:
    """Routers stay with every replica."""
    ffn = find_ffn(block)
    experts = [span for span in ffn.spans if span.holds_experts]
    assert len(experts) == 2
    pooled = {id(span.weight) for span in ffn.spans}
    left = {
        name: weight for name, weight in ffn.module.named_parameters() if id(weight) not in pooled
    }
    assert {name.split(".")[0] for name in left} <= {"gate", "shared_expert_gate"}
    assert "gate.weight" in left


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (nn.Linear(4, 4), "no submodule named mlp"),
        (Block(nn.Sequential(nn.Linear(4, 4))), "1 matrices in 1 linear layers"),
        (Block(nn.Bilinear(2, 2, 2)), "1 matrices in 0 linear layers"),
    ],
)
def test_what_is_no_feed_forward_network(block: nn.Module, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=found):
        find_ffn(block)
