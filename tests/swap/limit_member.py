"""Trains a CNN in a process whose private memory is limited: prints its losses and its peak."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from elbowroom.app.swap import Swap
from tests.swap.models import Case, ConvBlock

MB = 10**6
NUM_STEPS = 4


def cnn() -> Case:
    """Saves about 105 MB, which is many times its weights."""
    torch.manual_seed(3)
    blocks = [ConvBlock(3, 32), *(ConvBlock(32, 32) for _ in range(9))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return Case(nn.Sequential(*blocks, *head), torch.randn(8, 3, 64, 64), torch.arange(8))


def limit_private_memory(more_bytes: int) -> None:
    """Refuse what this process would take beyond what it has now, and so many bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, now + more_bytes))


def main(budget: str, limit_mb: str, folder: str) -> None:
    torch.set_num_threads(1)
    case = cnn()
    optimizer = torch.optim.AdamW(case.model.parameters())
    swap = None
    if budget != "none":
        swap = Swap(case.model, optimizer=optimizer, budget=budget, tier=folder)
    small = nn.Sequential(ConvBlock(3, 4), nn.Flatten(), nn.Linear(4 * 64, 2))
    small(torch.randn(2, 3, 8, 8)).sum().backward()  # what libraries allocate once is there
    if limit_mb != "none":
        limit_private_memory(int(limit_mb) * MB)
    losses, peak = [], 0
    for _ in range(NUM_STEPS):
        with swap.step() if swap else nullcontext():
            loss = case.loss()
            loss.backward()
        losses.append(loss.item())
        del loss
        peak = max(peak, swap.report().peak_bytes or 0) if swap else 0
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"losses": losses, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
