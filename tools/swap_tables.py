"""Tables of results about swapping: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tools.results import load, table, where

from elbowroom.core.units import format_bytes


def sizes() -> str:
    """What steps save and need, from their shapes."""
    data = load("swap_sizes")
    budget = data["budget_bytes"]
    rows = []
    for name, row in _sizes(data):
        needs = [row[key] for key in ("static_bytes", "saved_bytes", "keep_all_bytes")]
        rows.append(
            [
                name,
                *map(format_bytes, (*needs, row["floor_bytes"])),
                "yes" if row["keep_all_bytes"] <= budget else "no",
                "yes" if row["floor_bytes"] <= budget else "no",
            ]
        )
    head = ("held before", "saved", "peak, all kept", "peak, all swapped")
    fits = [f"fits {format_bytes(budget)} {how}" for how in ("plainly", "swapped")]
    return table((f"{data['date']}, commit {data['commit'][:7]}", *head, *fits), rows)


def largest() -> str:
    """The largest sizes that fit."""
    data = load("swap_sizes")
    rows = []
    for name, model in data["models"].items():
        plain, swapped = model["largest_plain"], model["largest_swapped"]
        times = (swapped / plain) ** (3 if model["size"] == "side" else 1)
        what = "voxels" if model["size"] == "side" else "rows"
        limits = (f"{model['size']} {plain}", f"{model['size']} {swapped}")
        rows.append(
            (f"{name}, in steps of {model['step']}", *limits, f"{times:.2f} times the {what}")
        )
    return table(("largest that fits", "plainly", "swapped", "gain"), rows)


def slowdowns() -> str:
    """Predicted seconds over compute, by link."""
    data = load("swap_sizes")
    links: list[str] = []
    rows = []
    for name, row in _sizes(data):
        if not row["plans"] or not next(iter(row["plans"].values()))["out_bytes"]:
            continue
        links = list(row["plans"])
        plans = row["plans"].values()
        rows.append(
            [
                name,
                format_bytes(next(iter(plans))["out_bytes"]),
                *(f"{each['slowdown']:.1%} ({each['slowdown_thresholds']:.0%})" for each in plans),
            ]
        )
    head = ("predicted slowdown (TFLMS's thresholds)", "out, and back in")
    return table((*head, *links), rows)


def emulated() -> str:
    """Steps of emulated compute against their plans."""
    data = load("swap_emulated")
    rows = []
    for case in data["cases"]:
        moves = f"{case['sizes']} sizes, {case['moves_steps']:g}, {case['budget_part']:.0%}"
        rows.append([moves, *_emulated(case["ours"]), *_emulated(case["thresholds"])])
    head = ("predicted", "measured", "measured over predicted seconds")
    names = [*head, *(f"thresholds: {name}" for name in head)]
    return table((where(data), *names), rows)


def peers() -> str:
    """Swapping against checkpointing, by model."""
    data = load("swap_peers")
    rows = []
    for model in ("gpt", "cnn"):
        for key, way in data[model]["ways"].items():
            rows.append(
                [
                    f"{model.upper()}, {key}",
                    f"{way['peak_bytes'] / 1e6:.1f} MB",
                    *(_spread(way[added]) for added in ("thread_added", "wall_added")),
                    f"{way['other_seconds']['median'] / way['wall_seconds']['median']:.0%}",
                ]
            )
    head = ("peak", "CPU of the computing thread, added", "wall clock, added", "link thread busy")
    return table((where(data), *head), rows)


def memory_budget() -> str:
    """Peaks of torch.compile's activation_memory_budget."""
    data = load("swap_peers")
    gpt, cnn = (data[model]["activation_memory_budget"] for model in ("gpt", "cnn"))
    head = [f"{row['fraction']:.1f}" for row in gpt]
    rows = [
        [name, *(f"{row['peak_bytes'] / 1e6:.1f} MB" for row in part)]
        for name, part in (("GPT", gpt), ("CNN", cnn))
    ]
    return table(("peak at activation_memory_budget =", *head), rows)


def _sizes(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model in data["models"].items():
        for row in model["sizes"]:
            yield f"{name}, {model['size']} {row['size']}", row


def _emulated(run: dict[str, Any]) -> Iterator[str]:
    yield f"+{run['predicted_slowdown']:.1%}"
    yield f"{run['cost']:+.1%}"
    yield f"{run['measured_over_predicted']:.3f}"


def _spread(added: dict[str, float]) -> str:
    return f"{added['median']:+.0%} ({added['low']:+.0%} to {added['high']:+.0%})"


TABLES: dict[str, Callable[[], str]] = {
    "swap-sizes": sizes,
    "swap-largest": largest,
    "swap-slowdowns": slowdowns,
    "swap-emulated": emulated,
    "swap-peers": peers,
    "swap-memory-budget": memory_budget,
}
