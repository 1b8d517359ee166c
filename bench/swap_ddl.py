"""Claim: a swapped step whose gradients are averaged takes the seconds that are simulated.

An emulation, in one process: layers compute by sleeping, and so does whatever moves bytes. Real are
autograd and its hooks, the swapped step with its plan, and the buckets that gradients fill as they
come. The wire stands for the link to the slow tier: copies and, where it is shared, the all-reduce
pass it in small chunks, first come first served, at a held rate. The network is another such wire.
Each emulated step is simulated from the profile of a step measured just before it.

python -m bench.swap_ddl [--repeats 3]
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.common import write_result
from bench.wire import Wire, WireTier, pass_all
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import MIB
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.reduction import GradientReduction
from elbowroom.planning.swap.timeline import SwapLink, simulate_swap
from elbowroom.plans.swap import SwapPlan
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.meter import installed_meter
from elbowroom.swap.tier import MemoryTier

NUM_LAYERS = 10
SAVED_BYTES = 4 * MIB
FORWARD_SECONDS, BACKWARD_SECONDS = 0.08, 0.16


class Case(NamedTuple):
    """Rates in bytes per second; ``part`` is the budget's place from the floor to keeping all."""

    name: str
    link: float
    part: float
    reduction: GradientReduction | None


def reduction(
    num_workers: int, network: float, *, shared: bool, size: int = 4
) -> GradientReduction:
    """An all-reduce of buckets of some MiB, the first of one."""
    return GradientReduction(num_workers, network, size * MIB, MIB, shares_link=shared)


CASES = [
    Case("no all-reduce, link keeps up", 80e6, 0.5, None),
    Case("no all-reduce, link-bound", 25e6, 0.1, None),
    Case("beside the link, hidden", 80e6, 0.5, reduction(2, 100e6, shared=False)),
    Case("beside the link, network-bound", 60e6, 0.3, reduction(8, 20e6, shared=False)),
    Case("on the link, which keeps up", 200e6, 0.5, reduction(2, 100e6, shared=True)),
    Case("on the link, slow network", 80e6, 0.3, reduction(4, 20e6, shared=True)),
    Case("on the link, as fast a network", 60e6, 0.3, reduction(4, 60e6, shared=True)),
    Case("on the link, small buckets", 60e6, 0.3, reduction(4, 60e6, shared=True, size=1)),
    Case("on the link, copies held up", 45e6, 0.0, reduction(4, 15e6, shared=True)),
    Case("on the link, link-bound", 30e6, 0.1, reduction(8, 1e9, shared=True)),
]


class Emulated(NamedTuple):
    """Seconds of a step until its gradients are reduced, and those it waited for copies."""

    seconds: float
    waited: float


class Averaging:
    """The all-reduce of one worker: buckets that gradients fill, and a thread that moves them.

    What is sent and what is received both pass the wire, if it is shared.
    """

    def __init__(self, model: nn.Module, about: GradientReduction, wire: Wire) -> None:
        self._about = about
        self._network = Wire(about.bandwidth)
        self._wires = {self._network: 1}
        self._chunk_bytes = self._network.chunk_bytes
        if about.shares_link:
            self._wires[wire] = 2
            self._chunk_bytes = wire.chunk_bytes / 2  # turns are fair if chunks are as large
        self._filling, self._limit = 0, about.first_bucket_bytes
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._came)  # type: ignore[no-untyped-call]
            for parameter in model.parameters()
        ]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Reduce what is left, and wait until all is."""
        self._send()
        self._queue.put(None)
        self._thread.join()
        self._network.close()
        for hook in self._hooks:
            hook.remove()

    def _came(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._filling += parameter.grad.nbytes
        if self._filling >= self._limit:
            self._send()

    def _send(self) -> None:
        self._queue.put(self._filling)
        self._filling, self._limit = 0, self._about.bucket_bytes

    def _run(self) -> None:
        ring = 2 * (self._about.num_workers - 1) / self._about.num_workers
        while (num_bytes := self._queue.get()) is not None:
            pass_all(ring * num_bytes, self._chunk_bytes, self._wires)


class Sleeping(torch.autograd.Function):
    """A layer that saves its input and takes its time in both passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight_size = weight.shape
        time.sleep(FORWARD_SECONDS)
        return x + 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        time.sleep(BACKWARD_SECONDS)
        return torch.zeros_like(x), torch.zeros(ctx.weight_size)


class Model(nn.Module):
    """Layers that sleep; later ones have more weights, and so their gradients come first."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1 + layer // 3) * MIB // 4 for layer in range(NUM_LAYERS)]
        self.weights = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = Sleeping.apply(x, weight)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Model()
    rows = []
    for case in CASES:
        rows.append(measure(model, case, args.repeats))
        print_row(rows[-1])
    result = {
        "is_emulated": True,
        "repeats": args.repeats,
        "cases": rows,
        "least_ratio": min(row["ratio"] for row in rows),
        "most_ratio": max(row["ratio"] for row in rows),
    }
    write_result("swap_ddl", result)


def print_row(row: dict[str, Any]) -> None:
    alone, apart, simulated, seconds = (
        statistics.median(row[key]) for key in ("alone", "apart", "simulated", "measured")
    )
    print(
        f"{row['case']:<32} without all-reduce {alone:.3f} s, beside the link {apart:.3f}, as it "
        f"is {simulated:.3f}; measured {seconds:.3f}, {row['ratio']:.3f} of it",
        flush=True,
    )


def measured(model: nn.Module) -> StepProfile:
    """Profile of the step, on a wire that takes no time."""
    recorder = StepRecorder(model, installed_meter(), 0, MIB)
    with linked(MemoryTier(1 << 28)) as link:
        step = SwappedStep(None, link, Candidates(model, MIB), observer=recorder)
        with recorder.recording():
            run(model, step)
    return recorder.profile()


def measure(model: nn.Module, case: Case, repeats: int) -> dict[str, Any]:
    """Simulated and measured seconds of a case, in alternating pairs of profile and step."""
    profile = measured(model)
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    link, about = SwapLink(case.link, case.link), case.reduction
    plan = plan_swap(profile, floor + int(case.part * (keep_all - floor)), link)
    pairs = []
    for _ in range(repeats):
        profile = measured(model)
        pairs.append((profile, emulate(model, plan, case)))
    simulated = [simulate_swap(profile, plan, link, about) for profile, _ in pairs]
    apart = replace(about, shares_link=False) if about else None
    seconds = [step.seconds for _, step in pairs]
    return {
        "case": case.name,
        "link_bytes_per_second": case.link,
        "budget_part": case.part,
        "replicas": about.num_workers if about else 1,
        "network_bytes_per_second": about.bandwidth if about else None,
        "bucket_bytes": about.bucket_bytes if about else None,
        "shares_link": about.shares_link if about else False,
        "moved_bytes": plan.out_bytes + plan.in_bytes,
        "compute": [profile.compute_seconds for profile, _ in pairs],
        "alone": [simulate_swap(profile, plan, link).seconds for profile, _ in pairs],
        "apart": [simulate_swap(profile, plan, link, apart).seconds for profile, _ in pairs],
        "simulated": [timeline.seconds for timeline in simulated],
        "measured": seconds,
        "simulated_waits": [sum(wait.seconds for wait in each.waits) for each in simulated],
        "measured_waits": [step.waited for _, step in pairs],
        "ratio": statistics.median(
            step / timeline.seconds for step, timeline in zip(seconds, simulated, strict=True)
        ),
    }


def emulate(model: nn.Module, plan: SwapPlan, case: Case) -> Emulated:
    """One emulated step. Raises AssertionError if the wire lost or added bytes."""
    wire = Wire(case.link)
    averaging = Averaging(model, case.reduction, wire) if case.reduction else None
    with linked(WireTier(1 << 28, wire)) as link:
        step = SwappedStep(plan, link, Candidates(model, MIB), on_change="raise")
        begin = time.perf_counter()
        run(model, step)
        if averaging:
            averaging.finish()
        seconds = time.perf_counter() - begin
    wire.close()
    crossed = float(plan.out_bytes + plan.in_bytes)
    if case.reduction and case.reduction.shares_link:
        total = sum(parameter.nbytes for parameter in model.parameters())
        crossed += 2 * case.reduction.sent_bytes(total)
    assert abs(wire.passed_bytes - crossed) < 1, (wire.passed_bytes, crossed)
    return Emulated(seconds, step.counts.wait_seconds)


def run(model: nn.Module, step: SwappedStep) -> None:
    """Forward and backward of one step."""
    x = torch.zeros(SAVED_BYTES // 4, requires_grad=True)
    with step.hooks():
        model(x + 0).sum().backward()
    step.end()
    model.zero_grad()


@contextmanager
def linked(tier: MemoryTier) -> Iterator[Link]:
    link = Link(tier)
    yield link
    link.close()


if __name__ == "__main__":
    main()
