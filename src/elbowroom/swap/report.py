"""What a swapped step was predicted to cost, and what it did cost."""

from __future__ import annotations

from dataclasses import dataclass

from elbowroom.core.units import format_bytes
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.trace import StepTrace


@dataclass
class StepCounts:
    """What one step moved and how long it waited; ``change`` says where it left its plan."""

    num_packs: int = 0
    num_unpacks: int = 0
    num_swapped: int = 0
    num_recomputed: int = 0
    recomputed_bytes: int = 0
    out_bytes: int = 0
    in_bytes: int = 0
    num_waits: int = 0
    wait_seconds: float = 0.0
    recompute_seconds: float = 0.0
    change: str = ""


@dataclass(frozen=True)
class StepReport:
    """One step, predicted and measured.

    Args:
        plan: the plan that it followed; None if everything was swapped at once.
        predicted_peak_bytes: peak by the plan, with what was held when this step began.
        peak_bytes: metered peak of the step, all that was held included; None without a meter.
        seconds: wall-clock seconds inside the step.
        counts: bytes moved, waits, and where the step left its plan.
        link_seconds: seconds in which the link copied.
        trace: what the step did and when; None unless it was kept.

    """

    plan: SwapPlan | None
    predicted_peak_bytes: int | None
    peak_bytes: int | None
    seconds: float
    counts: StepCounts
    link_seconds: float
    trace: StepTrace | None = None

    def __str__(self) -> str:
        plan, counts = self.plan, self.counts
        recomputed = f"{_bytes(counts.recomputed_bytes)}, {counts.recompute_seconds:.3f} s"
        rows = [
            ("", "predicted", "measured"),
            ("peak", _bytes(self.predicted_peak_bytes), _bytes(self.peak_bytes)),
            ("seconds", f"{plan.seconds:.3f}" if plan else "-", f"{self.seconds:.3f}"),
            ("bytes out", _bytes(plan.out_bytes if plan else None), _bytes(counts.out_bytes)),
            ("bytes in", _bytes(plan.in_bytes if plan else None), _bytes(counts.in_bytes)),
            ("recomputed", _bytes(plan.recomputed_bytes if plan else None), recomputed),
            ("waits", "", f"{counts.num_waits}, {counts.wait_seconds:.3f} s"),
            ("link busy", "", f"{self.link_seconds:.3f} s"),
        ]
        if not counts.num_recomputed and not (plan and plan.recomputed):
            rows = [row for row in rows if row[0] != "recomputed"]
        lines = [f"{name:<10} {predicted:>14} {measured:>14}" for name, predicted, measured in rows]
        if counts.change:
            lines.append(f"left its plan: {counts.change}")
        return "\n".join(lines)


def _bytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)
