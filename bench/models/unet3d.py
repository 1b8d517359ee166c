"""A U-Net for whole volumes: arXiv 1505.04597, figure 1, in three dimensions and padded."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CHANNELS, CLASSES = 4, 3
"""Scans of one patient and kinds of tumour, as in the brain scans that LMS's authors used."""


class UNet3d(nn.Module):
    """The first level is ``width`` channels wide, and each of ``depth`` below it twice as wide."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        back = widths[-2::-1]
        self.down = nn.ModuleList(map(block, [CHANNELS, *widths[:-1]], widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * after, after, 2, stride=2) for after in back)
        self.merge = nn.ModuleList(block(2 * after, after) for after in back)
        self.head = nn.Conv3d(width, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


def block(before: int, after: int) -> nn.Sequential:
    """Two convolutions, each with a norm and a ReLU."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv3d(channels, after, 3, padding=1), nn.BatchNorm3d(after), nn.ReLU(True)]
    return nn.Sequential(*layers)
