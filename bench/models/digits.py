"""A small VGG and scikit-learn's digits, 1,797 scanned ones of 8 x 8: for ``bench.accuracy``."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache, partial
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LinearLR

CHANNELS = (16, 16, 32, 32)
HIDDEN, NUM_CLASSES, SIDE, BRIGHTEST = 128, 10, 8, 16.0
ROWS, NUM_TRAINED = 32, 1184
MINIBATCHES_AN_EPOCH = NUM_TRAINED // ROWS

make_optimizer = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
loss_fn = functional.cross_entropy


def make_scheduler(optimizer: torch.optim.Optimizer, num_steps: int) -> LinearLR:
    """Falls to nothing: at a constant rate all methods jump by more than they differ."""
    return LinearLR(optimizer, 1.0, 0.0, num_steps)


class Rows(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


def make_model() -> nn.Module:
    """Images [rows, 1, 8, 8] -> logits [rows, 10]; each child is a layer with weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before, side = 1, SIDE
    for number, channels in enumerate(CHANNELS):
        parts = [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
        if number % 2:
            parts.append(nn.MaxPool2d(2))
            side //= 2
        layers[f"conv{number}"] = nn.Sequential(*parts)
        before = channels
    flat = nn.Linear(before * side * side, HIDDEN)
    layers["fc0"] = nn.Sequential(nn.Flatten(), flat, nn.ReLU())
    layers["fc1"] = nn.Linear(HIDDEN, NUM_CLASSES)
    model = nn.Sequential(layers)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


def make_batch(generator: torch.Generator) -> Rows:
    """Drawn from those to train with; an epoch draws as many as there are."""
    chosen = torch.randint(NUM_TRAINED, (ROWS,), generator=generator)
    return Rows(*(tensor[chosen] for tensor in _digits()))


def accuracy(model: nn.Module) -> float:
    """The share of the other 613 digits that a model gets right."""
    images, labels = (tensor[NUM_TRAINED:] for tensor in _digits())
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


@cache
def _digits() -> Rows:
    """In an order of their own: the data set is sorted by writers."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / BRIGHTEST
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Rows(images[order], torch.tensor(digits.target)[order])
