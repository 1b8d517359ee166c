"""Claim: with stashed weights a pipeline learns in as many epochs as data parallel training.

    python -m bench.accuracy [--seeds 3] [--epochs 20] [--rates 0.01 0.02 0.05]

Two stages against DistributedDataParallel, from the same weights, on the same minibatches: the
share of digits right that none has trained with, after each epoch. Data parallel training is as
in the paper, where each worker has a minibatch of its own and an update follows all of them; and
with half of each minibatch on each worker, so that it updates as often as the pipeline. Epochs to
an accuracy are those of the mean of all seeds, and may differ by one. What older weights cost grows
with the learning rate, hence several. Draws ``docs/figures/accuracy.svg``.
"""

from __future__ import annotations

import argparse
import statistics
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt

from bench.common import write_result
from bench.figures import label, save
from bench.models import digits
from bench.two_workers import LOCAL, plan_two_stages, run_workers

GIGABIT = 125e6
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98)


Curves = dict[str, list[list[float]]]
"""Accuracies after each epoch, of each seed, by method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    args = parser.parse_args()
    plan, path = plan_two_stages(digits, GIGABIT)
    methods = {
        "stash": ("ours", "--plan", str(path)),
        "predict": ("ours", "--plan", str(path), "--semantics", "predict"),
        "data parallel, a minibatch each": ("double-batch",),
        "data parallel, half a minibatch each": ("data-parallel",),
    }
    outcome: dict[str, Any] = {"cut": plan.stages[1].layers[0]}
    curves: dict[float, Curves] = {}
    for rate in args.rates:
        curves[rate] = {
            name: [curve(seed, rate, args.epochs, *method) for seed in range(args.seeds)]
            for name, method in methods.items()
        }
        means = {name: mean(of) for name, of in curves[rate].items()}
        outcome[f"rate {rate}"] = {
            "means": means,
            "epochs_to": {str(level): epochs_to(level, means) for level in LEVELS},
            "curves": curves[rate],
        }
    draw(curves)
    write_result("accuracy", outcome)


def curve(seed: int, rate: float, num_epochs: int, method: str, *flags: str) -> list[float]:
    epoch = digits.MINIBATCHES_AN_EPOCH
    command = (
        "bench.peer_worker",
        method,
        "digits",
        *flags,
        "--seed",
        str(seed),
        "--rate",
        str(rate),
    )
    steps = ("--epoch", str(epoch), "--steps", str(epoch * num_epochs))
    with TemporaryDirectory() as folder:
        said = run_workers((LOCAL, LOCAL), *command, *steps, "--checkpoints", folder)
    accuracies: list[float] = said["accuracy"]
    return accuracies


def mean(curves: list[list[float]]) -> list[float]:
    return [statistics.mean(at) for at in zip(*curves, strict=True)]


def epochs_to(level: float, means: dict[str, list[float]]) -> dict[str, int | None]:
    return {
        name: next((number for number, one in enumerate(of, start=1) if one >= level), None)
        for name, of in means.items()
    }


def draw(curves: dict[float, Curves]) -> None:
    figure, axes = plt.subplots(
        1, len(curves), figsize=(10, 3.2), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (rate, methods) in zip(axes[0], curves.items(), strict=True):
        for color, (name, of) in zip(("C0", "C2", "C1", "C3"), methods.items(), strict=True):
            for one in of:
                ax.plot(range(1, len(one) + 1), one, color=color, alpha=0.3, linewidth=0.8)
            ax.plot(range(1, len(of[0]) + 1), mean(of), color=color, label=name)
        label(ax, f"learning rate {rate}", "epochs", "held-out digits right")
    axes[0][0].set_ylim(0.4, 1.0)
    axes[0][0].legend(fontsize="small")
    save(figure, "accuracy")


if __name__ == "__main__":
    main()
