"""Claim: what norms and activations made is cheaper made again than moved over a slow link.

Measured: which part of a step's saved bytes has recipes, and what their replays cost, on a 3-D
U-Net, a CNN and a transformer. Then steps of the U-Net at one budget, planned with and without
recompute, in alternating pairs, over a link in memory that is held to a rate.

python -m bench.swap_recompute [--rate 50] [--pairs 5]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from tests.swap.models import Case, ConvBlock, Transformer, UNet3d
from tests.swap.steps import plain_step, profiled
from torch import nn

from bench.common import write_result
from elbowroom.core.recipe import Call, Recipe
from elbowroom.core.step_profile import SavedStorage, StepProfile
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.tier import MemoryTier

HEAVY = {"conv2d", "conv3d", "conv_transpose3d", "linear", "max_pool3d"}

NUM_PROFILES = 3

BUDGET_PART = 0.4
"""The budget, from the floor (0) to keeping all (1)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=50, help="MB/s of the link, each way")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: shares(make()) for name, make in CASES.items()}
    result = {"shares": rows, "pairs": compare(unet(), args.rate * 1e6, args.pairs)}
    write_result("swap_recompute", result)


def unet(width: int = 16, batch: int = 2) -> Case:
    size = (32, 32, 32)
    return Case(UNet3d(width), torch.randn(batch, 1, *size), torch.randint(2, (batch, *size)))


def cnn() -> Case:
    widths = [3, 32, 32, 32, 64, 64]
    blocks = [ConvBlock(*pair) for pair in pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)]
    return Case(nn.Sequential(*blocks, *head), torch.randn(8, 3, 64, 64), torch.arange(8) % 4)


def transformer() -> Case:
    tokens = torch.randint(50, (8, 128))
    return Case(Transformer(128, 4), tokens, torch.randint(50, (8, 128)))


CASES = {
    "unet": unet,
    "narrow unet, batch 1": lambda: unet(8, 1),  # no oneDNN there, in torch 2.13: slow_conv3d
    "wide unet": lambda: unet(64),
    "cnn": cnn,
    "transformer": transformer,
}


def shares(case: Case) -> dict[str, Any]:
    """Parts of the saved bytes that can be made again, and of the forward's seconds for it.

    Those of convolutions and products are counted apart: they cost as much as in the forward.
    Seconds are the least of a few profiles, of replays and forward alike.
    """
    link = Link(MemoryTier(1 << 30))
    for _ in range(2):
        plain_step(case)
    profiles = [profiled(case, link) for _ in range(NUM_PROFILES)]
    link.close()
    saved = sum(storage.num_bytes for storage in profiles[0].storages)
    forward = min(forward_seconds(profile) for profile in profiles)
    able = []
    for storage in profiles[0].storages:
        recipes = [profile.storages[storage.number].recipe for profile in profiles]
        found = [recipe for recipe in recipes if recipe is not None]
        if found:
            able.append((storage, min(found, key=lambda recipe: recipe.seconds)))
    light = [each for each in able if not HEAVY & {name(call) for call in each[1].calls}]
    return {
        "saved_bytes": saved,
        "forward_seconds": forward,
        "part": sum(storage.num_bytes for storage, _ in able) / saved,
        "part_without_heavy": sum(storage.num_bytes for storage, _ in light) / saved,
        "seconds_of_forward_without_heavy": sum(each.seconds for _, each in light) / forward,
        "seconds_of_forward_for_30_percent": cheapest_seconds(able, 0.3 * saved) / forward,
    }


def forward_seconds(profile: StepProfile) -> float:
    return profile.seconds_before + sum(profile.seconds[: profile.num_forward_ticks])


def cheapest_seconds(able: list[tuple[SavedStorage, Recipe]], num_bytes: float) -> float:
    """Seconds of the replays of so many bytes, those with the least for a byte first.

    Infinite if there are not so many.
    """
    seconds = 0.0
    for storage, recipe in sorted(able, key=lambda each: each[1].seconds / each[0].num_bytes):
        if num_bytes <= 0:
            return seconds
        seconds, num_bytes = seconds + recipe.seconds, num_bytes - storage.num_bytes
    return seconds if num_bytes <= 0 else math.inf


def name(call: Call) -> str:
    return call.function.rpartition(".")[2]


def compare(case: Case, bytes_per_second: float, num_pairs: int) -> dict[str, Any]:
    """Steps at one budget with and without recompute, in turns."""
    for _ in range(2):
        plain_step(case)
    link = Link(MemoryTier(1 << 30), bytes_per_second=bytes_per_second)
    profile = profiled(case, link)
    planned_for = SwapLink(bytes_per_second, bytes_per_second)
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    budget = floor + int((keep_all - floor) * BUDGET_PART)
    plans = [plan_swap(profile, budget, planned_for, recompute=each) for each in (False, True)]
    for plan in plans:
        step_seconds(case, link, plan)
    pairs = [[step_seconds(case, link, plan) for plan in plans] for _ in range(num_pairs)]
    link.close()
    return {
        "rate": bytes_per_second,
        "budget_bytes": budget,
        "keep_all_bytes": keep_all,
        "plans": [about(profile, plan) for plan in plans],
        "seconds": pairs,
        "median_ratio": statistics.median(other / one for one, other in pairs),
    }


def about(profile: StepProfile, plan: SwapPlan) -> dict[str, Any]:
    return {
        "swapped": len(plan.swapped),
        "recomputed": len(plan.recomputed),
        "moved_bytes": plan.out_bytes + plan.in_bytes,
        "recomputed_bytes": plan.recomputed_bytes,
        "predicted_slowdown": plan.seconds / profile.compute_seconds - 1,
    }


def step_seconds(case: Case, link: Link, plan: SwapPlan) -> float:
    case.clear()
    step = SwappedStep(plan, link, Candidates(case.model, plan.smallest_bytes), on_change="raise")
    begin = time.perf_counter()
    with step.hooks():
        case.loss().backward()
    step.end()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
