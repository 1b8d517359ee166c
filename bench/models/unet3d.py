"""A 3-D U-Net for whole volumes: the shape of arXiv 1606.06650, with padded convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CHANNELS, CLASSES = 4, 3
"""Scans of one patient and kinds of tumour, as in the brain scans that LMS's authors used."""


class UNet3d(nn.Module):
    """``depth`` levels, the first ``width`` channels wide and each next one twice as wide."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.down = nn.ModuleList(
            block(before, after) for before, after in zip([CHANNELS, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(2 * after, after, 2, stride=2) for after in reversed(widths[:-1])
        )
        self.merge = nn.ModuleList(block(2 * after, after) for after in reversed(widths[:-1]))
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
    """Two convolutions, each with a norm and a ReLU; the first has half of the channels."""
    half = max(before, after // 2)
    layers: list[nn.Module] = []
    for one, other in ((before, half), (half, after)):
        layers += [nn.Conv3d(one, other, 3, padding=1), nn.BatchNorm3d(other), nn.ReLU(True)]
    return nn.Sequential(*layers)
