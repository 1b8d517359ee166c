"""Tables of computed results about grids: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from tools.results import load, ratios, table, where

from elbowroom.core.units import format_bytes

_NETS = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50", "unet3d": "3-D U-Net"}


def crossovers() -> str:
    """The batch below which rows of a layer's weights move less than a batch's gradients."""
    found = load("grid_reproduction")["crossovers"]
    cells = [f"{batch:.2f}" if batch < 100 else f"{batch:.0f}" for batch in found.values()]
    return table(found, [cells])


def communication() -> str:
    """Milliseconds of communication in an iteration."""
    data = load("grid_reproduction")
    rows = []
    for row in data["rows"]:
        has_paper = row["net"] in ("alexnet", "vgg16")  # its forms know no norms and no joins
        best = row["paper_best_seconds"] if has_paper else None
        batch = row["paper_batch_seconds"] if has_paper else row["batch_seconds"]
        linear, free = (row[forms]["seconds"] for forms in ("linear", "all"))
        gains = (f"{best / seconds:.2f}x" if best else "" for seconds in (linear, free))
        rows.append([*_case(row), *map(_ms, (batch, best, linear, free)), *gains])
    date = f"{data['date']}, commit {data['commit'][:7]}"
    forms = ("batch", "paper's best form", "`linear`", "`all`")
    gains = ("paper's over `linear`", "over `all`")
    return table((f"{date}", "workers", "batch size", *forms, *gains), rows)


def prices() -> str:
    """Milliseconds of communication by a sketch's simpler prices, and what ours add to them."""
    data = load("grid_prices")
    rows = []
    for row in data["rows"]:
        cells = _case(row)
        for forms in ("linear", "all"):
            simpler, ours = row[forms]["simpler"], row[forms]["ours"]
            cells += [_ms(simpler), f"{100 * (ours / simpler - 1):.2f} %"]
        rows.append(cells)
    date = f"{data['date']}, commit {data['commit'][:7]}"
    forms = ("`linear`, simpler", "ours adds", "`all`, simpler", "ours adds")
    return table((date, "workers", "batch size", *forms), rows)


def overlapped() -> str:
    """Milliseconds of an iteration whose sums of weights run behind the backward."""
    rows = []
    for row in load("grid_reproduction")["rows"]:
        seconds = [row["products_seconds"], row["overlapped_batch_seconds"]]
        has_paper = row["net"] in ("alexnet", "vgg16")
        seconds.append(row["overlapped_paper_seconds"] if has_paper else None)
        seconds += [row[f"overlapped_{forms}"]["seconds"] for forms in ("linear", "all")]
        rows.append([*_case(row), *map(_ms, seconds)])
    forms = ("products alone", "batch", "paper's best form", "`linear`", "`all`")
    return table(("", "workers", "batch size", *forms), rows)


def memory() -> str:
    """Memory of a worker, and the seconds that planning took."""
    rows = []
    for row in load("grid_reproduction")["rows"]:
        batch = row["batch_memory_bytes"]
        held = [format_bytes(round(row[forms]["memory_bytes"])) for forms in ("linear", "all")]
        took = (row[forms]["planning_seconds"] for forms in ("all", "overlapped_all"))
        by_batch = format_bytes(round(batch)) if batch else "-"
        rows.append([*_case(row), by_batch, *held, *(f"{each:.2f} s" for each in took)])
    held = ("memory by batch", "`linear`", "`all`")
    return table(("", "workers", "batch size", *held, "planned in", "with overlap"), rows)


def peers() -> str:
    """Seconds of a step of four workers: grids, data and tensor parallel."""
    data = load("grid_peers")
    parts = [data[link] for link in _LINKS]
    methods = [{each["name"]: each for each in (*p["grids"], *p["peers"])} for p in parts]

    def best(start: str) -> list[str]:
        found = ([m for name, m in all_.items() if name.startswith(start)] for all_ in methods)
        return [f"{min(median(each['rounds']) for each in some):.3f}" for some in found]

    choices = [all_["planned, all"] for all_ in methods]
    rows = [
        ["Elbowroom, the planner's choice", *best("planned, all")],
        ["Elbowroom, best grid in the paper's forms", *best("planned, paper")],
        ["Elbowroom, every layer by batch", *best("batch")],
        ["DistributedDataParallel, the better of two bucket sizes", *best("data parallel")],
        ["torch's tensor parallel, the best of three forms", *best("tensor parallel")],
        ["data parallel over the planner's choice", *_over(parts, "data_parallel")],
        ["tensor parallel over the planner's choice", *_over(parts, "tensor_parallel")],
        ["the planner's choice, as predicted", *(f"{each['predicted']:.3f}" for each in choices)],
        ["minimum: bytes over the link, or products", *_floors(parts)],
    ]
    return table((f"seconds a step, {where(data)}", *_LINKS.values()), rows)


def predicted() -> str:
    """How well grids are predicted over the slow link."""
    found = load("grid_peers")["200 Mbit/s"]
    over = [median(grid["rounds"]) / grid["predicted"] for grid in found["grids"]]
    cells = [
        str(len(over)),
        f"{found['rank_correlation']:.3f}",
        f"{found['choice_over_best']:.2f}x",
        f"{min(over):.2f} to {max(over):.2f}",
    ]
    head = ("grids", "rank correlation", "the choice over the best", "measured over predicted")
    return table(head, [cells])


_LINKS = {"200 Mbit/s": "200 Mbit/s", "not held back": "free link"}


def _over(parts: list[dict[str, Any]], peer: str) -> list[str]:
    return [ratios(part[f"{peer}_over_choice"]["rounds"]) for part in parts]


def _floors(parts: list[dict[str, Any]]) -> list[str]:
    return [f"{part['floor_seconds']:.3f}" for part in parts]


def _case(row: dict[str, Any]) -> list[str]:
    return [_NETS[row["net"]], str(row["procs"]), str(row["batch"])]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


TABLES: dict[str, Callable[[], str]] = {
    "grid-crossovers": crossovers,
    "grid-communication": communication,
    "grid-prices": prices,
    "grid-overlapped": overlapped,
    "grid-memory": memory,
    "grid-peers": peers,
    "grid-predicted": predicted,
}
