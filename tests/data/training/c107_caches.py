"""What the first call fills and later ones find: a table by length, a property, a warning once."""
import functools

import torch
from torch import nn

WARNED = {"once": False}


class Positions(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.length = 0

    @functools.cached_property
    def scale(self):
        return 0.5

    def forward(self, x):
        if not WARNED["once"]:
            WARNED["once"] = True
        if self.length != x.shape[1]:
            self.length = x.shape[1]
            self.table = torch.linspace(0, 1, x.shape[1])
        return x + self.scale * self.linear(x + self.table)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Positions(), nn.Tanh(), Positions(), nn.Linear(16, 4))


def make_batch(generator):
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def loss_fn(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)
