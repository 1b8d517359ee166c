"""Claim: swap plans are never slower than TFLMS's autotune, near the optimum, and made in seconds.

All simulated: 27 cases of made-up steps shaped like a CNN, a U-Net and a GPT, and the optimum by
scipy's HiGHS where it closes within the limit.

python -m bench.swap_planning [--limit 60] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from tests.planning.swap.made_models import (
    Case,
    budget_at,
    gap_bandwidth,
    gpt_like,
    made_cases,
)
from tests.planning.swap.optimum import optimum

from bench.common import write_result
from elbowroom.planning.swap.choose import plan_swap, plan_thresholds
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import SwapPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60, help="seconds of one optimum")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = [measure(case, args.limit) for case in made_cases()]
    for row in rows:
        print_row(row)
    closed = [row for row in rows if row["is_closed"]]
    ours = statistics.mean(row["slowdown"] for row in rows)
    theirs = statistics.mean(row["thresholds"] for row in rows)
    result = {
        "cases": rows,
        "mean_slowdown": ours,
        "mean_slowdown_thresholds": theirs,
        "num_slower_than_thresholds": sum(row["slowdown"] > row["thresholds"] for row in rows),
        "num_closed": len(closed),
        "most_over_optimum": max(
            (row["slowdown"] - row["optimum"] for row in closed), default=None
        ),
        "seconds_538_storages": seconds_of_many(args.repeats),
    }
    write_result("swap_planning", result)


def measure(case: Case, limit: float) -> dict[str, Any]:
    begin = time.perf_counter()
    plan = plan_swap(case.profile, case.budget, case.link)
    seconds = time.perf_counter() - begin
    best = optimum(case.profile, case.link, case.budget, limit)
    compute = case.profile.compute_seconds
    return {
        "model": case.name,
        "num_storages": len(case.profile.storages),
        "budget_part": case.part,
        "link_steps": case.steps,
        "slowdown": slowdown(plan),
        "thresholds": slowdown(plan_thresholds(case.profile, case.budget, case.link)),
        "optimum": None if best is None else best.seconds / compute - 1,
        "bound": None if best is None else best.bound / compute - 1,
        "is_closed": best is not None and best.is_closed,
        "planning_seconds": seconds,
    }


def slowdown(plan: SwapPlan) -> float:
    return plan.seconds / plan.compute_seconds - 1


def print_row(row: dict[str, Any]) -> None:
    best = "none" if row["optimum"] is None else f"{row['optimum']:.1%}"
    known = "optimum" if row["is_closed"] else "best found"
    print(
        f"{row['model']:<5} budget {row['budget_part']:.0%}, all moves in {row['link_steps']:g} "
        f"steps: {row['slowdown']:.1%}, thresholds {row['thresholds']:.1%}, {known} {best}"
    )


def seconds_of_many(repeats: int) -> float:
    """Median of planning a step with 538 storages at a slow link, where nearly all is searched."""
    profile = gpt_like(67, 7)
    rate = gap_bandwidth(profile, 2)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan_swap(profile, budget_at(profile, 0.75), SwapLink(rate, rate))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
