"""Claim: swapping makes room for LMS's sizes: 2.37 times the voxels, 4 times the images, 16 GiB.

Nothing is run: steps without data (FakeTensors), so kernels' workspaces are missing and all bytes
are lower bounds; seconds are FLOPs and bytes over a V100's rates, and plans are simulated.

python -m bench.swap_sizes
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bench.common import write_result
from bench.models import gpt2, resnet50, unet3d
from elbowroom.core.cluster import Rate
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import GIB
from elbowroom.planning.swap.choose import plan_swap, plan_thresholds
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.profiling.fake_step import FakeRates, profile_fake_step

BUDGET = 16 * GIB
V100 = FakeRates(flops=Rate(15e12, fraction=0.7), memory_bandwidth=Rate(900e9, fraction=0.8))
"""Single precision and HBM2 as NVIDIA announced them (GTC 2017); fractions assumed, not measured:
those of the devices in ``core/clusters``."""

LINKS = {
    "PCIe 3, 16 GB/s": SwapLink(16e9, 16e9, is_duplex=True),
    "PCIe 3, 32 GB/s": SwapLink(32e9, 32e9, is_duplex=True),
    "NVLink 2, 75 GB/s": SwapLink(75e9, 75e9, is_duplex=True),
    "NVLink 2, 150 GB/s": SwapLink(150e9, 150e9, is_duplex=True),
}
"""Each direction. LMS's authors give 32 and 150, which are the sums of both directions."""

Batch = tuple[torch.Tensor, torch.Tensor]


class Model(NamedTuple):
    """A model, what its size counts, sizes to show, and the steps in which a limit is searched."""

    name: str
    size: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], Batch]
    shown: tuple[int, ...]
    step: int
    most: int


def volumes(side: int) -> Batch:
    shape = (side, side, side)
    return torch.zeros(1, unet3d.CHANNELS, *shape), torch.zeros(1, *shape, dtype=torch.long)


def images(batch: int) -> Batch:
    side = resnet50.IMAGE_SIDE
    return torch.zeros(batch, 3, side, side), torch.zeros(batch, dtype=torch.long)


def texts(batch: int) -> Batch:
    tokens = torch.zeros(batch, gpt2.LENGTH, dtype=torch.long)
    return tokens, tokens.clone()


MODELS = (
    Model("3-D U-Net", "side", unet3d.UNet3d, volumes, (144, 160, 192, 208), 16, 512),
    Model("ResNet-50", "batch", resnet50.make_resnet50, images, (190, 800), 1, 4096),
    Model("GPT-2 medium", "batch", gpt2.Gpt2, texts, (1, 4, 16), 1, 128),
)


def main() -> None:
    result = {
        "budget_bytes": BUDGET,
        "without_workspace": True,
        "models": {model.name: measure(model) for model in MODELS},
    }
    write_result("swap_sizes", result)


def measure(model: Model) -> dict[str, Any]:
    """A model's sizes, and the largest that fit the budget, plainly and swapped."""

    @cache
    def profile(size: int) -> StepProfile:
        return profile_fake_step(
            model.make_model, lambda: model.make_batch(size), loss, V100, torch.optim.AdamW
        )

    plain = largest(model, lambda size: peak_bytes(profile(size), ()) <= BUDGET)
    swapped = largest(model, lambda size: floor_bytes(profile(size)) <= BUDGET)
    sizes = sorted({*model.shown, plain, swapped})
    return {
        "size": model.size,
        "step": model.step,
        "largest_plain": plain,
        "largest_swapped": swapped,
        "sizes": [row(size, profile(size)) for size in sizes],
    }


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch[0])
    is_text = logits.ndim == 3
    return F.cross_entropy(logits.transpose(1, 2) if is_text else logits, batch[1])


def largest(model: Model, fits: Callable[[int], bool]) -> int:
    """The largest size that fits, by bisection from the smallest that is shown."""
    low, high = model.shown[0] // model.step, model.most // model.step + 1
    assert fits(low * model.step) and not fits(high * model.step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * model.step) else (low, middle)
    return low * model.step


def row(size: int, profile: StepProfile) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "size": size,
        "num_storages": len(profile.storages),
        "static_bytes": profile.static_bytes,
        "saved_bytes": sum(storage.num_bytes for storage in profile.storages),
        "keep_all_bytes": peak_bytes(profile, ()),
        "floor_bytes": floor_bytes(profile),
        "compute_seconds": profile.compute_seconds,
        "plans": {},
    }
    if shown["floor_bytes"] <= BUDGET:
        shown["plans"] = {name: planned(profile, link) for name, link in LINKS.items()}
    print(shown, flush=True)
    return shown


def planned(profile: StepProfile, link: SwapLink) -> dict[str, Any]:
    begin = time.perf_counter()
    plan = plan_swap(profile, BUDGET, link)
    seconds = time.perf_counter() - begin
    thresholds = plan_thresholds(profile, BUDGET, link)
    return {
        "peak_bytes": plan.peak_bytes,
        "out_bytes": plan.out_bytes,
        "slowdown": plan.seconds / plan.compute_seconds - 1,
        "slowdown_thresholds": thresholds.seconds / thresholds.compute_seconds - 1,
        "planning_seconds": seconds,
    }


if __name__ == "__main__":
    main()
