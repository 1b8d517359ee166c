"""Claim: a swapped step takes what its plan predicts, from hidden transfers to a link that is full.

Compute is emulated by sleeping, and the link by copies in memory that are held back to a rate; so
what is measured is the mechanism and its model alone. TFLMS's thresholds are run beside. Steps of
either plan take turns with plain ones, and each is compared with the plain step of its round:
whatever else runs here delays them alike.

python -m bench.swap_emulated [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import product
from typing import Any

import torch
from torch import nn

from bench.common import write_result
from elbowroom.app.swap import Swap
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import GIB, MIB
from elbowroom.planning.swap.choose import plan_swap, plan_thresholds
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.tier import MemoryTier

FORWARD_SECONDS, BACKWARD_SECONDS = 0.010, 0.020
"""Compute of one layer; a backward takes twice its forward."""

SIZES = {
    "equal": (MIB,) * 12,
    "mixed": (2 * MIB, MIB // 4, MIB, MIB // 2) * 3,
}
MOVES = (0.5, 1.0, 2.0)
"""Steps' compute that the link takes to move everything out and in."""

BUDGETS = (0.25, 0.5)
"""Between the floor, 0, and keeping all, 1."""


class Sleeping(torch.autograd.Function):
    """A layer that takes its time, and saves its result for a backward that does so, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_bytes: int) -> torch.Tensor:
        begin = time.perf_counter()
        y = torch.empty(num_bytes // 4)
        y[-1] = 1
        ctx.save_for_backward(y)
        ctx.num_before = x.numel()
        sleep_until(begin + FORWARD_SECONDS)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        saved = ctx.saved_tensors[0]  # waits for what is not there: no compute
        begin = time.perf_counter()
        assert saved[-1] == 1
        sleep_until(begin + BACKWARD_SECONDS)
        return gradients[0].new_ones(()).expand(ctx.num_before), None


def sleep_until(end: float) -> None:
    """Sleep until a time of ``perf_counter``: what was done so far is part of the compute."""
    time.sleep(max(0.0, end - time.perf_counter()))


class Sleepers(nn.Module):
    """Layers that save so many bytes each."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.ones(1))
        self.sizes = sizes

    def forward(self) -> torch.Tensor:
        x: torch.Tensor = self.begin
        for num_bytes in self.sizes:
            x = Sleeping.apply(x, num_bytes)
        return x.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cases = []
    for name in SIZES:
        profile = profiled(name)
        for moves, part in product(MOVES, BUDGETS):
            cases.append(measure(name, profile, moves, part, args.rounds))
            print_case(cases[-1])
    ours = [case["ours"] for case in cases]
    hidden = [each["cost"] for each in ours if each["predicted_slowdown"] < 0.001]
    result = {
        "emulated": "compute and link, by sleeping",
        "cases": cases,
        "measured_over_predicted": [each["measured_over_predicted"] for each in ours],
        "num_hidden": len(hidden),
        "most_cost_if_hidden": max(hidden, default=None),
    }
    write_result("swap_emulated", result)


def print_case(case: dict[str, Any]) -> None:
    ours, rule = case["ours"], case["thresholds"]
    print(
        f"{case['sizes']:<5} moves {case['moves_steps']:g}, budget {case['budget_part']:.0%}: "
        f"predicted +{ours['predicted_slowdown']:.1%}, cost +{ours['cost']:.1%}, "
        f"ratio {ours['measured_over_predicted']:.3f}; thresholds +{rule['predicted_slowdown']:.1%}"
        f", +{rule['cost']:.1%}, {rule['measured_over_predicted']:.3f}",
        flush=True,
    )


def profiled(name: str) -> StepProfile:
    """A profile from the first step of a swap, after a plain one."""
    model = Sleepers(SIZES[name])
    model().backward()
    model.zero_grad()
    with Swap(model, budget=64 * GIB, tier=MemoryTier(GIB)) as swap:
        with swap.step():
            model().backward()
        assert swap.profile is not None
        return swap.profile


def measure(
    name: str, profile: StepProfile, moves: float, part: float, num_rounds: int
) -> dict[str, Any]:
    """One case: the plan and TFLMS's, run and compared with what they predict."""
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    budget = floor + int(part * (keep_all - floor))
    moved_bytes = 2 * sum(storage.num_bytes for storage in profile.storages)
    rate = moved_bytes / (moves * profile.compute_seconds)
    link = SwapLink(rate, rate)
    plans = {
        "ours": plan_swap(profile, budget, link),
        "thresholds": plan_thresholds(profile, budget, link),
    }
    model = Sleepers(SIZES[name])
    rounds: list[dict[str, float]] = []
    with ExitStack() as open_swaps:
        swaps = {
            key: open_swaps.enter_context(
                Swap(model, plan, tier=MemoryTier(GIB), bytes_per_second=rate, on_change="raise")
            )
            for key, plan in plans.items()
        }
        for _ in range(1 + num_rounds):  # in the first, the tiers' pages are made
            rounds.append({"plain": seconds_of(model, None)})
            rounds[-1] |= {key: seconds_of(model, swap) for key, swap in swaps.items()}
    return {
        "sizes": name,
        "moves_steps": moves,
        "budget_part": part,
        "bytes_per_second": rate,
        **{key: compared(plan, key, rounds[1:]) for key, plan in plans.items()},
    }


def seconds_of(model: nn.Module, swap: Swap | None) -> float:
    """Seconds of one step."""
    model.zero_grad()
    begin = time.perf_counter()
    with swap.step() if swap else nullcontext():
        model().backward()
    return time.perf_counter() - begin


def compared(plan: SwapPlan, key: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """What a plan costs over the plain steps beside it, and over what it predicts."""
    predicted = plan.seconds / plan.compute_seconds
    measured = statistics.median(each[key] / each["plain"] for each in rounds)
    return {
        "predicted_slowdown": predicted - 1,
        "cost": measured - 1,
        "measured_over_predicted": measured / predicted,
        "seconds": [each[key] for each in rounds],
        "plain_seconds": [each["plain"] for each in rounds],
    }


if __name__ == "__main__":
    main()
