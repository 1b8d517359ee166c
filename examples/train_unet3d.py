"""A 3-D U-Net on made volumes: a script to train in less memory, or on a grid of workers.

    elbowroom train profile examples/train_unet3d.py --step --out step.json
    elbowroom train plan-swap step.json --budget 24MiB --json plan.json
    elbowroom train run examples/train_unet3d.py --plan plan.json --steps 30

    elbowroom train profile examples/train_unet3d.py --shapes --out shapes.json
    elbowroom train plan-grid shapes.json --procs 4 --batch 2 --json grid.json
    elbowroom train run examples/train_unet3d.py --plan grid.json --steps 30 --loss space

Each volume has a few balls of other brightness than the noise around them; the net learns which
voxels lie in one.
"""

from __future__ import annotations

import torch
from torch import nn

SIDE, BATCH, BASE, DEPTH = 32, 2, 8, 3


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions at one resolution."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv3d(width, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Down by half and up again, with what was there before going down laid beside."""

    def __init__(self) -> None:
        super().__init__()
        widths = [BASE << level for level in range(DEPTH)]
        self.down = nn.ModuleList(map(block, [1, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.joined = nn.ModuleList(block(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv3d(BASE, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beside = []
        for level, down in enumerate(self.down):
            x = down(nn.functional.max_pool3d(x, 2) if level else x)
            beside.append(x)
        for up, joined, skip in reversed(list(zip(self.up, self.joined, beside[:-1], strict=True))):
            x = joined(torch.cat([up(x), skip], 1))
        return self.head(x)


def make_model() -> nn.Module:
    return UNet3d()


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes [BATCH, 1, SIDE, SIDE, SIDE], and for each voxel 1 if it lies in a ball, else 0."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij"), -1).float()
    centres = torch.rand(BATCH, 3, 1, 1, 1, 3, generator=generator) * SIDE
    radii = 3 + torch.rand(BATCH, 3, 1, 1, 1, generator=generator) * SIDE / 6
    targets = ((grid - centres).norm(dim=-1) < radii).any(1).long()
    noise = torch.randn(BATCH, 1, SIDE, SIDE, SIDE, generator=generator)
    return targets.unsqueeze(1) + noise, targets


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)
