"""Claim: at activation checkpointing's own peak, swapping costs less of the computing thread.

One process and one computing thread; rounds of a plain, a checkpointed and a swapped step take
turns. Peaks are the meter's. The link copies in a thread of its own, whose seconds stand beside: on
a device a copy engine does that. Further peers: selective checkpointing that saves products, and
``activation_memory_budget`` of torch.compile without generated code.

python -m bench.swap_peers [--rounds 15]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bench.common import write_result
from bench.models import blocks
from elbowroom.app.swap import Swap
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import GIB
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.meter import installed_meter
from elbowroom.swap.tier import MemoryTier

MODELS = {"gpt": blocks.gpt, "cnn": blocks.cnn}
FRACTIONS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
PRODUCTS.add(torch.ops.aten.convolution.default)

Step = Callable[[], None]


class Cost(NamedTuple):
    """One step: seconds of CPU of this thread and of all others, of wall clock, and its peak."""

    thread_seconds: float
    other_seconds: float
    wall_seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {name: measure(name, args.rounds) for name in args.models}
    write_result("swap_peers", {"rounds": args.rounds, "threads": 1, **result})


def measure(name: str, num_rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    steps = {
        "plain": partial(backward, model, batch),
        "checkpoint": partial(backward, model, batch, around=checkpointed),
        "selective": partial(backward, model, batch, around=selective),
    }
    for step in steps.values():
        cost_of(step, model)  # whatever is made once
    checkpoint_peak = cost_of(steps["checkpoint"], model).peak_bytes
    profile, link = profiled(model, batch)
    floor = floor_bytes(profile) - profile.static_bytes
    plan = plan_swap(profile, profile.static_bytes + checkpoint_peak, link)
    near_floor = plan_swap(profile, profile.static_bytes + floor * 21 // 20, link)
    with swapped(model, batch, plan) as swap, swapped(model, batch, near_floor) as tight:
        steps |= {"swap": swap, "swap, 5 % over its floor": tight}
        rounds = [
            {key: cost_of(step, model) for key, step in steps.items()} for _ in range(num_rounds)
        ]
    shown = {
        "floor_bytes": floor,
        "floor_over_checkpoint_peak": floor / checkpoint_peak,
        "num_storages": len(profile.storages),
        "link_bytes_per_second": link.out_bandwidth,
        "plan": plan_facts(plan),
        "near_floor": plan_facts(near_floor),
        **compared(rounds),
        "activation_memory_budget": [budgeted(name, fraction) for fraction in FRACTIONS],
    }
    print_model(name, shown)
    return shown


def backward(model: nn.Module, batch: blocks.Batch, **options: Any) -> None:
    blocks.loss_of(model(batch[0], **options), batch[1]).backward()


def checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(block, x, use_reentrant=False)
    return result


def selective(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    result: torch.Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return result


def save_products(_: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    is_product = operator in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def cost_of(step: Step, model: nn.Module) -> Cost:
    """Run a step from the same state as any other, and measure it."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    meter = installed_meter()
    held = meter.held_bytes
    meter.reset_peak()
    begins = time.thread_time(), time.process_time(), time.perf_counter()
    step()
    thread, process, wall = (
        end - begin
        for begin, end in zip(
            begins, (time.thread_time(), time.process_time(), time.perf_counter()), strict=True
        )
    )
    return Cost(thread, process - thread, wall, meter.peak_bytes - held)


def profiled(model: nn.Module, batch: blocks.Batch) -> tuple[StepProfile, SwapLink]:
    """The step's profile, and the rate at which a tier in memory copies once its pages are made."""
    model.zero_grad(set_to_none=True)
    with Swap(model, budget=64 * GIB, tier=MemoryTier(GIB)) as swap:
        with swap.step():
            backward(model, batch)
        profile = swap.profile
    assert profile is not None
    plan = plan_swap(profile, floor_bytes(profile))
    with Swap(model, plan, tier=MemoryTier(GIB), enforce=False) as swap:
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            with swap.step():
                backward(model, batch)
        report = swap.report()
    rate = (report.counts.out_bytes + report.counts.in_bytes) / report.link_seconds
    return profile, SwapLink(rate, rate)


@contextmanager
def swapped(model: nn.Module, batch: blocks.Batch, plan: SwapPlan) -> Iterator[Step]:
    """A step under a plan, after two in which its tier's pages are made."""
    with Swap(model, plan, tier=MemoryTier(GIB), enforce=False, on_change="raise") as swap:

        def step() -> None:
            with swap.step():
                backward(model, batch)

        for _ in range(2):
            cost_of(step, model)
        yield step


def compared(rounds: list[dict[str, Cost]]) -> dict[str, Any]:
    """Each way's medians and ranges, and what it adds to plain steps of the same rounds."""
    ways: dict[str, Any] = {}
    for key in rounds[0]:
        costs = [each[key] for each in rounds]
        over = [(each[key].thread_seconds / each["plain"].thread_seconds) - 1 for each in rounds]
        wall = [(each[key].wall_seconds / each["plain"].wall_seconds) - 1 for each in rounds]
        ways[key] = {
            "peak_bytes": costs[-1].peak_bytes,
            "thread_seconds": spread(cost.thread_seconds for cost in costs),
            "other_seconds": spread(cost.other_seconds for cost in costs),
            "wall_seconds": spread(cost.wall_seconds for cost in costs),
            "thread_added": spread(over),
            "wall_added": spread(wall),
        }
    added = {key: ways[key]["thread_added"]["median"] for key in ways}
    return {
        "ways": ways,
        "thread_added_swap_over_checkpoint": added["swap"] / added["checkpoint"],
        "wall_swap_over_checkpoint": spread(
            each["swap"].wall_seconds / each["checkpoint"].wall_seconds for each in rounds
        ),
    }


def spread(values: Any) -> dict[str, float]:
    """A median, and the range of the middle half."""
    numbers = sorted(values)
    quarter = len(numbers) // 4
    return {
        "median": statistics.median(numbers),
        "low": numbers[quarter],
        "high": numbers[-1 - quarter],
    }


def plan_facts(plan: SwapPlan) -> dict[str, Any]:
    return {
        "num_swapped": len(plan.choices),
        "out_bytes": plan.out_bytes,
        "in_bytes": plan.in_bytes,
        "predicted_slowdown": plan.seconds / plan.compute_seconds - 1,
    }


def budgeted(name: str, fraction: float, num_rounds: int = 3) -> dict[str, Any]:
    """A step compiled for a fraction of its activations, beside plain ones; not its compiling.

    Its peak is what counts here: no code is generated, so its seconds are not those of a user.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    with functorch_config.patch(activation_memory_budget=fraction):
        compiled = torch.compile(model, backend="aot_eager_decomp_partition")
        step = partial(backward, compiled, batch)
        begin = time.perf_counter()
        cost_of(step, model)
        compile_seconds = time.perf_counter() - begin
    plain = partial(backward, model, batch)
    rounds = [(cost_of(plain, model), cost_of(step, model)) for _ in range(num_rounds)]
    added = [mine.thread_seconds / other.thread_seconds - 1 for other, mine in rounds]
    return {
        "fraction": fraction,
        "peak_bytes": rounds[-1][1].peak_bytes,
        "thread_added": spread(added),
        "compile_seconds": compile_seconds,
    }


def print_model(name: str, shown: dict[str, Any]) -> None:
    print(f"{name}: floor over checkpoint's peak {shown['floor_over_checkpoint_peak']:.2f}")
    for key, way in shown["ways"].items():
        thread, wall = way["thread_added"]["median"], way["wall_added"]["median"]
        others = way["other_seconds"]["median"] / way["wall_seconds"]["median"]
        print(
            f"  {key:<25} {way['peak_bytes'] / 1e6:6.2f} MB, CPU +{thread:.1%}, wall +{wall:.1%}, "
            f"other threads busy {others:.0%}"
        )
    for row in shown["activation_memory_budget"]:
        print(
            f"  budget {row['fraction']:.1f}: {row['peak_bytes'] / 1e6:.2f} MB, "
            f"CPU +{row['thread_added']['median']:.1%}"
        )
    print(f"  CPU added, swap over checkpoint {shown['thread_added_swap_over_checkpoint']:.2f}")


if __name__ == "__main__":
    main()
