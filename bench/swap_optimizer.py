"""Claim: with state and gradients away, AdamW needs at most 1.6 times its weights, not 4.

A chain of linear layers with a tiny batch: weights, gradients and state are all that counts. Peaks
are metered, with all weights in them. Seconds of a whole step are of alternating pairs, plain
and swapped; beside them is what the slow tier needs for the bytes that are moved.

python -m bench.swap_optimizer [--layers 16] [--width 1024] [--pairs 5] [--tier FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn, optim

from bench.common import write_result
from elbowroom.swap.link import Copy, Link
from elbowroom.swap.meter import installed_meter
from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.tier import FileTier


class Kind(NamedTuple):
    """An optimizer, and the limit for the norm of its gradients."""

    make: Callable[[Any], optim.Optimizer]
    clip_norm: float | None = None


KINDS = {
    "AdamW": Kind(optim.AdamW),
    "AdamW, clipped": Kind(optim.AdamW, 1.0),
    "SGD, momentum": Kind(lambda parameters: optim.SGD(parameters, lr=0.01, momentum=0.9)),
    "Adafactor": Kind(optim.Adafactor),
}


class Training:
    """Training of a chain of linear layers, plainly or with the optimizer away."""

    def __init__(self, kind: Kind, args: argparse.Namespace, *, is_swapped: bool) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(args.width, args.width) for _ in range(args.layers)]
        for (
            layer
        ) in layers:  # signals keep their size: squares of tiny ones take many times as long
            nn.init.normal_(layer.weight, std=args.width**-0.5)
        self.model = nn.Sequential(*layers)
        self.batch = torch.randn(2, args.width)
        self.optimizer = kind.make(self.model.parameters())
        self.clip_norm = None if is_swapped else kind.clip_norm
        if is_swapped:
            self.optimizer = SwappedOptimizer(
                self.optimizer, clip_norm=kind.clip_norm, tier=args.tier
            )

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def step(self) -> float:
        """Take a step. Returns its seconds."""
        begin = time.perf_counter()
        self.model(self.batch).pow(2).mean().backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tier", type=Path, help="folder of the slow tier")
    args = parser.parse_args()
    rows = {name: measure(kind, args) for name, kind in KINDS.items()}
    for name, row in rows.items():
        print(
            f"{name:<15} peak {row['plain_peak']:.2f} -> {row['swapped_peak']:.2f} W, moved "
            f"{row['moved']:.2f} W, step {row['times_plain']:.1f} x plain, "
            f"{row['times_floor']:.2f} x plain and copies one after the other"
        )
    shape = {"layers": args.layers, "width": args.width, "pairs": args.pairs}
    write_result("swap_optimizer", {**shape, "optimizers": rows})


def measure(kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    """Peaks and bytes over those of the weights, and seconds of steps."""
    peaks = {is_swapped: peak(kind, args, is_swapped=is_swapped) for is_swapped in (False, True)}
    plain, swapped = (Training(kind, args, is_swapped=each) for each in (False, True))
    assert isinstance(swapped.optimizer, SwappedOptimizer)
    link = swapped.optimizer.link
    for training in (plain, swapped):
        training.step()
    moved_before, pairs, floors = link.out_bytes + link.in_bytes, [], []
    for _ in range(args.pairs):
        pairs.append((plain.step(), swapped.step()))
        floors.append(seconds_per_byte(args))
    moved = (link.out_bytes + link.in_bytes - moved_before) / args.pairs
    for one, other in zip(plain.model.parameters(), swapped.model.parameters(), strict=True):
        assert torch.equal(one, other)
    swapped.optimizer.close()
    return {
        "plain_peak": peaks[False],
        "swapped_peak": peaks[True],
        "moved": moved / plain.weight_bytes,
        "times_plain": statistics.median(swapped / plain for plain, swapped in pairs),
        "times_floor": statistics.median(
            swapped / (plain + moved * floor)
            for (plain, swapped), floor in zip(pairs, floors, strict=True)
        ),
        "seconds": pairs,
        "floor_seconds": [moved * floor for floor in floors],
    }


def peak(kind: Kind, args: argparse.Namespace, *, is_swapped: bool) -> float:
    """Metered peak of three steps over the bytes of the weights."""
    meter = installed_meter()
    gc.collect()
    held = meter.held_bytes
    meter.reset_peak()
    training = Training(kind, args, is_swapped=is_swapped)
    for _ in range(3):
        training.step()
    result = (meter.peak_bytes - held) / training.weight_bytes
    if isinstance(training.optimizer, SwappedOptimizer):
        training.optimizer.close()
    return result


def seconds_per_byte(args: argparse.Namespace) -> float:
    """The link's own pace: tensors of a layer's size, as many out as in, and nothing besides."""
    link = Link(FileTier(args.tier))
    storage = torch.zeros(args.width, args.width).untyped_storage()
    slots = [link.tier.take(storage.nbytes()) for _ in range(8)]
    for slot in slots:  # the file has its blocks afterwards, as in training
        link.wait(_asked(link, Copy("out", storage, slot)))
    begin = time.perf_counter()
    for slot in slots:
        link.wait(_asked(link, Copy("out", storage, slot)))
        link.wait(_asked(link, Copy("in", storage, slot)))
    seconds = time.perf_counter() - begin
    link.close()
    return seconds / (2 * len(slots) * storage.nbytes())


def _asked(link: Link, copy: Copy) -> Copy:
    link.ask(copy)
    return copy


if __name__ == "__main__":
    main()
