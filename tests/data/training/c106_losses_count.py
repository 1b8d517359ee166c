"""A rate that grows with the losses computed so far: blocks read it from a global."""
import torch
from torch import nn

STEP = [0]


class Warm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(x) * min(1.0, STEP[0] / 6)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Warm(), nn.Tanh(), Warm(), nn.Linear(16, 4))


def make_batch(generator):
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def loss_fn(outputs, targets):
    STEP[0] += 1
    return nn.functional.mse_loss(outputs, targets)
