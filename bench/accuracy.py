"""Claim: with stashed weights a pipeline learns in as many epochs as data parallel training.

    python -m bench.accuracy [--seeds 3] [--epochs 20]

Two stages against DistributedDataParallel, from the same weights, on the same minibatches, with an
update for each: the share of digits right that neither has trained with, after each epoch. Epochs
to an accuracy are those of the mean of all seeds, and may differ by one. Draws
``docs/figures/accuracy.svg``.
"""

from __future__ import annotations

import argparse
import statistics
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

from bench.common import write_result
from bench.figures import label, save
from bench.models import digits
from bench.two_workers import LOCAL, plan_two_stages, run_workers

GIGABIT = 125e6
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    _, plan = plan_two_stages(digits, GIGABIT)
    methods = {"stash": ("ours", "--plan", str(plan)), "data parallel": ("data-parallel",)}
    curves = {
        name: [curve(seed, args.epochs, *method) for seed in range(args.seeds)]
        for name, method in methods.items()
    }
    means = {
        name: [statistics.mean(at) for at in zip(*of, strict=True)] for name, of in curves.items()
    }
    epochs = {
        str(level): {name: epochs_to(level, of) for name, of in means.items()} for level in LEVELS
    }
    draw(curves, means)
    write_result("accuracy", {"curves": curves, "means": means, "epochs_to": epochs})


def curve(seed: int, num_epochs: int, method: str, *flags: str) -> list[float]:
    epoch = digits.MINIBATCHES_AN_EPOCH
    command = ("bench.peer_worker", method, "digits", *flags, "--seed", str(seed))
    steps = ("--epoch", str(epoch), "--steps", str(epoch * num_epochs))
    with TemporaryDirectory() as folder:
        said = run_workers((LOCAL, LOCAL), *command, *steps, "--checkpoints", folder)
    accuracies: list[float] = said["accuracy"]
    return accuracies


def draw(curves: dict[str, list[list[float]]], means: dict[str, list[float]]) -> None:
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for color, name in zip(("C0", "C1"), curves, strict=True):
        for one in curves[name]:
            ax.plot(range(1, len(one) + 1), one, color=color, alpha=0.3, linewidth=0.8)
        ax.plot(range(1, len(means[name]) + 1), means[name], color=color, label=f"{name}, mean")
    label(ax, "a small VGG on scanned digits, three seeds", "epochs", "held-out digits right")
    ax.legend()
    save(figure, "accuracy")


def epochs_to(level: float, curve: list[float]) -> int | None:
    return next((number for number, one in enumerate(curve, start=1) if one >= level), None)


if __name__ == "__main__":
    main()
