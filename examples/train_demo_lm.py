"""The demo model in plain PyTorch, and the tasks that it learns: a script to profile and train.

    elbowroom train profile examples/train_demo_lm.py --out lm.profile.json
    elbowroom train plan-pipeline lm.profile.json --workers 2 --semantics predict --json plan.json
    torchrun --nproc-per-node 2 -m elbowroom.pipeline examples/train_demo_lm.py --plan plan.json \\
        --steps 4000 --checkpoints weights
    python examples/train_demo_lm.py weights

The last line asks tasks that no training has seen. A script of yours needs ``make_model``,
``make_batch`` and ``loss_fn``; ``make_optimizer`` and ``make_scheduler`` are as you like.

The architecture is that of ``examples/demo/model`` (a small Qwen3), with one difference: there the
head's weights are those of the embedding, and here they are its own. Weights that the first and the
last stage share cannot be trained in a pipeline.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from elbowroom.training.checkpoint import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import demo_tasks  # noqa: E402
from demo_batches import IGNORED, draw_rows, encode, to_batch  # noqa: E402

VOCABULARY, HIDDEN, INNER, NUM_BLOCKS = 768, 192, 576, 6
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
LONGEST, ROPE_THETA, EPSILON, INITIAL_SCALE = 1024, 10_000.0, 1e-6, 0.02

ROWS, WIDTH = 32, 64
"""Shape of a minibatch. All rows are equally wide, so that stages know what they receive."""

PEAK_RATE, WARM_UP, FALLING, BETAS, DECAY = 7.5e-4, 100, 0.4, (0.9, 0.98), 0.05
NUM_ASKED, ASKED_SEED = 600, 2027


class Attention(nn.Module):
    """Causal attention: 4 heads of queries share 2 of keys and values; rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.q_norm = nn.RMSNorm(HEAD_DIM, EPSILON)
        self.k_norm = nn.RMSNorm(HEAD_DIM, EPSILON)
        speeds = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(LONGEST), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, HIDDEN], and gives the same."""
        q = self.rotated(self.q_norm(_heads(self.q_proj(x))))
        k = self.rotated(self.k_norm(_heads(self.k_proj(x))))
        v = _heads(self.v_proj(x))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, heads, width, HEAD_DIM], turned by position: both halves are coordinates."""
        one, other = x.chunk(2, dim=-1)
        width = x.size(2)
        return x * self.cos[:width] + torch.cat((-other, one), dim=-1) * self.sin[:width]


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, HIDDEN], and gives the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, EPSILON)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, EPSILON)
        self.mlp = FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, HIDDEN], and gives the same."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def make_model() -> nn.Module:
    """Token ids [rows, width] -> logits [rows, width, VOCABULARY]; each child is a layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=nn.Embedding(VOCABULARY, HIDDEN))
    for number in range(NUM_BLOCKS):
        layers[f"block{number}"] = Block()
    layers["norm"] = nn.RMSNorm(HIDDEN, EPSILON)
    layers["head"] = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    model = nn.Sequential(layers)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=INITIAL_SCALE)
    return model


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both [ROWS, WIDTH]: fresh tasks, of which the answers count."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    tokenizer = _tokenizer()
    return to_batch(draw_rows(tokenizer, rng, ROWS), tokenizer.pad_token_id, WIDTH)


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of answers."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Decay the matrices only; norms are left free."""
    matrices, others = [], []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS)


def make_scheduler(optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """Warm up, hold, and fall in a line over the last part of the steps."""
    return LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP, (num_steps - step) / (FALLING * num_steps)),
    )


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The share of held-out tasks of which a model finds each token most likely.

    Greedy decoding gives exactly those answers, so one pass over the whole text is enough.
    """
    tokenizer = _tokenizer()
    rows = encode(tokenizer, demo_tasks.generate(ASKED_SEED, NUM_ASKED))
    inputs, targets = to_batch(rows, tokenizer.pad_token_id)
    found = torch.cat([model(part).argmax(-1) for part in inputs.split(ROWS)])
    return ((found == targets) | (targets == IGNORED)).all(dim=1).float().mean().item()


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "demo" / "model")


def main() -> None:
    newest = newest_checkpoint(Path(sys.argv[1])) if len(sys.argv) == 2 else None
    if newest is None:
        sys.exit(f"usage: {sys.argv[0]} CHECKPOINTS, a folder with at least one")
    model = make_model()
    newest.load_weights(model)
    print(f"after {newest.index.steps} minibatches: {accuracy(model):.1%} of {NUM_ASKED} right")


if __name__ == "__main__":
    main()
