"""Rows of unlike length in float64, padded: a bidirectional model with a mask, a mean over tokens."""
from functools import partial
import elbowroom
import torch
from torch import nn
from torch.nn import functional as F

ROWS, WIDTH, NONE = 12, 16, -100
make_optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).view(x.size(0), x.size(1), 3, WIDTH).unbind(2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(WIDTH, 20)

    def forward(self, ids, mask):
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def make_model():
    return Model().double()


def make_batch(generator):
    lengths = torch.randn(ROWS, generator=generator).exp().mul(6).long().clamp(1, 40)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(20, mask.shape, generator=generator)
    targets = torch.randint(20, mask.shape, generator=generator).masked_fill(~mask, NONE)
    return (ids * mask, mask), targets


def loss_fn(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=NONE)


def make_microbatches(inputs, targets, count):
    (ids, mask), parts = inputs, []
    for rows in elbowroom.balanced_microbatches(mask.sum(1).tolist(), count, crossover=6 * WIDTH):
        longest = int(mask[rows].sum(1).max())
        one, own, aims = (tensor[rows, :longest] for tensor in (ids, mask, targets))
        parts.append(elbowroom.Microbatch((one, own), aims, (aims != NONE).sum()))
    return parts
