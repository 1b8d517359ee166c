"""Tables of results about training: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from tools.results import load, ratios, table, where

PEERS = (
    ("ours", "Elbowroom, `stash`, split by the planner"),
    ("data parallel", "DistributedDataParallel, half a minibatch each"),
    ("pipelining, split by hand", "torch.distributed.pipelining, 1F1B, split by hand"),
    ("pipelining, split as ours", "torch.distributed.pipelining, split as ours"),
    ("data parallel, double batch", "data parallel, one update for two minibatches"),
)
LINKS = (("1 Gbit/s", "1 Gbit/s"), ("not held back", "free link"))
MODELS = (("vgg_like", "VGG"), ("gpt_like", "GPT"))


def peers() -> str:
    """Seconds of a minibatch, ours and other ways to train."""
    data = load("peers")
    parts = [data[model][link] for model, _ in MODELS for link, _ in LINKS]
    head = [f"{model}, {link}" for _, model in MODELS for _, link in LINKS]

    def best(one: dict[str, float], names: tuple[str, ...]) -> float:
        return min(one[name] for name in names) / one["ours"]

    lines = [
        [name, *(f"{median(each[key] for each in part['rounds']):.3f}" for part in parts)]
        for key, name in PEERS
    ]
    lines[3:3] = [
        [
            "Elbowroom over the better of these two, median (rounds)",
            *(ratios(part["over_best_peer"]["rounds"]) for part in parts),
        ]
    ]
    lines.append(
        [
            "Elbowroom over that",
            *(
                ratios(best(each, ("data parallel, double batch",)) for each in part["rounds"])
                for part in parts
            ),
        ]
    )
    for key, name in (
        ("planned_seconds", "Elbowroom, as planned"),
        ("floor_seconds", "minimum: half of the compute"),
    ):
        lines.append([name, *(f"{part[key]:.3f}" for part in parts)])
    return table((f"seconds a minibatch, {where(data)}", *head), lines)


METHODS = (
    ("stash", "`stash`"),
    ("predict", "`predict`"),
    (
        "data parallel, a minibatch each",
        "data parallel, a minibatch on each worker, as in the paper",
    ),
    (
        "data parallel, half a minibatch each",
        "data parallel, half of each minibatch on each worker",
    ),
)


def accuracy() -> str:
    """Epochs to a share of held-out digits right, and the share at the end."""
    data = load("accuracy")
    levels = ("0.8", "0.9", "0.95", "0.97", "0.98")
    rows = []
    for rate in ("0.01", "0.02", "0.05"):
        part = data[f"rate {rate}"]
        for number, (method, name) in enumerate(METHODS):
            epochs = [part["epochs_to"][level][method] for level in levels]
            rows.append(
                [
                    "" if number else rate,
                    name,
                    *("never" if epoch is None else str(epoch) for epoch in epochs),
                    f"{part['means'][method][-1]:.1%}",
                ]
            )
    shares = (f"{float(level):.0%}" for level in levels)
    return table(("learning rate", "method", *shares, "at the end"), rows)


CUTS = (
    ("as-they-come", "as they come"),
    ("equal-numbers", "sorted, equal numbers"),
    ("even-cost", "sorted, even padded cost"),
)


def balanced_microbatches() -> str:
    """Seconds of a minibatch of unlike lengths, by how it is cut, and the load meanwhile."""
    data = load("balanced_microbatches")
    rounds, over = data["rounds"], data["even_cost_over_in_rounds"]
    rows = [
        [
            name,
            f"{median(each['padded_tokens'][key] / each['tokens'] for each in rounds):.2f}",
            f"{data['median_seconds'][key]:.2f}",
            ratios(over[key]) if key in over else "",
        ]
        for key, name in CUTS
    ]
    rows.append(["minimum: no padding, no waiting", "1.00", f"{data['floor_seconds']:.2f}", ""])
    loads = [each["load"] for each in rounds]
    about = f"{where(data)}, load average {min(loads):.1f} to {max(loads):.1f}"
    head = ("padded tokens a token", "seconds a minibatch", "even cost over that (rounds)")
    return table((f"medians, {about}", *head), rows)


TABLES: dict[str, Callable[[], str]] = {
    "peers": peers,
    "accuracy": accuracy,
    "balanced-microbatches": balanced_microbatches,
}
