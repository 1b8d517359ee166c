"""Tables of computed results about grids: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.results import load, table

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


def _case(row: dict[str, Any]) -> list[str]:
    return [_NETS[row["net"]], str(row["procs"]), str(row["batch"])]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


TABLES: dict[str, Callable[[], str]] = {
    "grid-crossovers": crossovers,
    "grid-communication": communication,
    "grid-overlapped": overlapped,
    "grid-memory": memory,
}
