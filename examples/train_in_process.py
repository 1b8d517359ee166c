"""Measure a small model, plan it for one worker, and train it, all in this process.

python examples/train_in_process.py
"""

from functools import partial

import torch
from torch import distributed, nn
from torch.nn import functional

import elbowroom
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    inputs = torch.randn(64, 16)
    batch = (inputs, inputs.sum(dim=1, keepdim=True))
    graph = elbowroom.profile(model, batch, functional.mse_loss)
    plan = plan_on_levels(graph, (Level(1, 1e9),))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    optimizer = partial(torch.optim.SGD, lr=0.05)
    pipeline = elbowroom.Pipeline(model, plan, optimizer, functional.mse_loss)
    losses = [pipeline.train_step(batch) for _ in range(100)]
    pipeline.close()
    distributed.destroy_process_group()
    print(f"{len(graph.layers)} layers, loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
