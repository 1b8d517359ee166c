"""Pictures of README and docs, as SVG files in docs/figures: python -m tools.draw_pictures.

``room.svg`` is drawn to scale from the planner's own memory budgets, ``grid-boxes.svg`` and
``grid-move.svg`` from a grid plan's layouts; the others are boxes and arrows. The same code gives
the same files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.grid_pictures import grid_pictures
from tools.picture import CACHE, KEPT, OTHER, SHARED, SLOTS, Picture

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
MODEL = ROOT / "tests" / "data" / "models" / "Qwen3-32B"


def save(picture: Picture, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{name}.svg").write_text(picture.svg)


def memory_budget(*options: str) -> dict[str, int]:
    """The memory budget of a planned replica of Qwen3-32B on four H200."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "elbowroom", "plan", "--model", str(MODEL)]
        command += ["--lengths", "1024:512x10000", "--cluster", "h200-4", "--replicas", "4"]
        command += ["--tensor-parallel", "1", "--json", str(path), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        plan: dict[str, Any] = json.loads(path.read_text())
    return next(found for found in plan.values() if isinstance(found, dict) and "kv_bytes" in found)


def room() -> None:
    """Four replicas with full copies beside four with one pool."""
    full = memory_budget("--pool", "none")
    pooled = memory_budget("--pool", "streamed", "--slots", "3")
    picture = Picture(860, 408, "Memory of four replicas: full copies, and one pool")
    scale = 250 / full["memory_bytes"]
    for left, budget, title, is_pool in (
        (20, full, "Four replicas, full copies", False),
        (440, pooled, "Four replicas, one pool", True),
    ):
        picture.text(left + 200, 26, title, bold=True)
        for number in range(4):
            x, y = left + 102 * number, 44.0
            picture.text(x + 47, y + 268, f"replica {number}")
            parts = (
                ("kv_bytes", CACHE, "KV cache"),
                ("workspace_bytes", OTHER, ""),
                ("slot_bytes", SLOTS, ""),
                ("ffn_bytes", SHARED if is_pool else KEPT, "its layers" if is_pool else "all FFN"),
                ("replicated_bytes", KEPT, "other weights"),
            )
            for key, fill, name in parts:
                height = budget[key] * scale
                if height:
                    gib = f"{budget[key] / 2**30:.0f} GiB"
                    tall = height > 34
                    picture.box(x, y, 94, height, fill, *((name, gib) if name and tall else ()))
                    if name and not tall:
                        picture.text(x + 47, y + height / 2 + 4.5, name)
                y += height
    tokens = [budget["kv_bytes"] // budget["kv_bytes_per_token"] for budget in (full, pooled)]
    for left, number in ((220, tokens[0]), (640, tokens[1])):
        picture.text(left, 334, f"{number:,} KV tokens in each replica")
    x = 60.0
    for fill, name in (
        (CACHE, "KV cache"),
        (SHARED, "FFN layers a replica owns for the group"),
        (SLOTS, "slots for layers of others"),
        (KEPT, "full copies"),
    ):
        picture.box(x, 352, 14, 14, fill)
        picture.text(x + 20, 364, name, anchor="start")
        x += 44 + 7.2 * len(name)
    picture.text(
        430,
        394,
        "Qwen3-32B in bf16 on four H200 at 0.9 of their memory, as `elbowroom plan` divides it",
    )
    save(picture, "room")


def chain(
    name: str, title: str, steps: list[tuple[str, ...]], fills: list[str], columns: int = 4
) -> None:
    """Boxes in reading order, row by row, with an arrow from each to the next."""
    width, height, gap_x, gap_y = 184, 64, 26, 40
    rows = -(-len(steps) // columns)
    picture = Picture(columns * (width + gap_x) + 14, rows * (height + gap_y) - gap_y + 40, title)

    def corner(number: int) -> tuple[float, float]:
        row, column = divmod(number, columns)
        return 20 + column * (width + gap_x), 20 + row * (height + gap_y)

    for number, (lines, fill) in enumerate(zip(steps, fills, strict=True)):
        x, y = corner(number)
        picture.box(x, y, width, height, fill, *lines)
        if number + 1 == len(steps):
            break
        if (number + 1) % columns:
            picture.arrow((x + width, y + height / 2), (x + width + gap_x, y + height / 2))
        else:
            middle, below = y + height + gap_y / 2, corner(number + 1)
            picture.arrow(
                (x + width / 2, y + height),
                (x + width / 2, middle),
                (below[0] + width / 2, middle),
                (below[0] + width / 2, below[1]),
            )
    save(picture, name)


def architecture() -> None:
    """Who imports whom: the three kinds of code."""
    picture = Picture(860, 372, "Packages and who imports whom")
    for y, title in ((20, "surfaces"), (140, "mechanisms"), (260, "facts, decisions")):
        picture.text(20, y + 38, title, anchor="start", bold=True)

    def package(x: float, y: float, fill: str, name: str, about: str, width: float = 124) -> None:
        picture.box(x, y, width, 60, fill, name, about)

    for number, (name, about) in enumerate(
        (
            ("cli", "flags, exit codes"),
            ("app", "wiring"),
            ("jobs", "files, journal"),
            ("engine", "vLLM"),
        )
    ):
        package(190 + 160 * number, 20, CACHE, name, about)
        if number:
            picture.arrow((190 + 160 * number - 36, 50), (190 + 160 * number, 50))
    for number, (name, about) in enumerate(
        (
            ("profiling", "measures"),
            ("training", "layers, stages"),
            ("pipeline", "trains"),
            ("pool", "shares weights"),
        )
    ):
        package(190 + 160 * number, 140, SLOTS, name, about)
    picture.arrow((732, 80), (732, 140))
    picture.arrow((314, 170), (350, 170))
    picture.arrow((510, 170), (474, 170))
    for x, name, about in (
        (190, "planning", "pool: layouts"),
        (350, "planning", "pipeline: stages"),
        (510, "plans", "frozen data"),
        (670, "core", "models, clusters"),
    ):
        package(x, 260, KEPT, name, about)
    picture.arrow((474, 290), (510, 290))
    picture.arrow((252, 320), (252, 334), (572, 334), (572, 320))
    picture.arrow((634, 290), (670, 290))
    picture.arrow((720, 200), (720, 226), (580, 226), (580, 260))
    picture.arrow((572, 200), (572, 260))
    picture.arrow((412, 80), (412, 108), (170, 108), (170, 290), (190, 290))
    picture.text(
        430, 352, "An arrow points from the package that imports to the one that is imported."
    )
    save(picture, "architecture")


def row() -> None:
    """The way of one row through a run."""
    chain(
        "row",
        "The way of a row",
        [
            ("requests.jsonl", "lines, maybe .gz or .zst"),
            ("jobs/batch_file.py", "finds rows, checks limits"),
            ("jobs/order.py", "long first, prefixes together"),
            ("jobs/dispatcher.py", "to a replica with room"),
            ("engine/replica.py", "vLLM's OpenAI application"),
            ("pool/pool.py", "leases each layer's weights"),
            ("jobs/journal.py", "safe within a second"),
            ("results.jsonl", "in input order, verified"),
        ],
        [OTHER, CACHE, CACHE, CACHE, SHARED, SLOTS, CACHE, OTHER],
    )


def minibatch() -> None:
    """Two stages in 1F1B, over time: forwards and backwards of numbered minibatches."""
    picture = Picture(860, 236, "Two stages, one forward and one backward in turns")
    unit, left = 56, 110
    lanes = (
        (
            "worker 0",
            44,
            (("F0", 0), ("F1", 1), ("B0", 4), ("F2", 6), ("B1", 7), ("F3", 9), ("B2", 10)),
        ),
        (
            "worker 1",
            124,
            (
                ("F0", 1),
                ("B0", 2),
                ("F1", 4),
                ("B1", 5),
                ("F2", 7),
                ("B2", 8),
                ("F3", 10),
                ("B3", 11),
            ),
        ),
    )
    for name, y, actions in lanes:
        picture.text(20, y + 28, name, anchor="start", bold=True)
        for text, start in actions:
            fill, length = (CACHE, 1) if text[0] == "F" else (SLOTS, 2)
            picture.box(left + start * unit, y, length * unit - 3, 44, fill, text)
    picture.arrow((left + unit - 6, 88), (left + unit + 8, 124), dashed=True)
    picture.arrow((left + 4 * unit - 10, 124), (left + 4 * unit + 8, 88), dashed=True)
    picture.text(left, 26, "time →", anchor="start")
    picture.text(
        430, 200, "F2: forward of minibatch 2. B2: its backward, with the weights that F2 used."
    )
    picture.text(430, 220, "Down goes what crosses the cut, up come its gradients.")
    save(picture, "minibatch")


def plan() -> None:
    """The way of a plan: facts, decisions, data, and who uses it."""
    picture = Picture(860, 292, "The way of a plan")
    left, search, made, right = 20, 230, 440, 650
    for x, y, fill, *lines in (
        (left, 20, KEPT, "model", "config.json, headers"),
        (left, 100, KEPT, "cluster", "TOML, or measured"),
        (left, 180, KEPT, "job", "lengths of rows"),
        (search, 100, CACHE, "planning", "layouts, memory, time"),
        (made, 100, OTHER, "plan.json", "frozen data"),
        (right, 20, SLOTS, "run --plan", "carries it out"),
        (right, 100, OTHER, "report.json", "prediction, outcome"),
        (right, 180, CACHE, "simulate --plan", "times and a trace"),
    ):
        picture.box(x, y, 170, 64, fill, *lines)
    for y in (52, 212):
        picture.arrow((190, y), (210, y), (210, 132), (search, 132))
        picture.arrow((610, 132), (630, 132), (630, y), (right, y))
    picture.arrow((190, 132), (search, 132))
    picture.arrow((400, 132), (made, 132))
    picture.arrow((735, 84), (735, 100))
    picture.arrow((820, 132), (840, 132), (840, 266), (315, 266), (315, 164), dashed=True)
    picture.text(577, 284, "plan --calibrate: later predictions are scaled to the outcome")
    save(picture, "plan")


def main() -> None:
    for draw in (room, architecture, row, minibatch, plan):
        draw()
    for name, picture in grid_pictures().items():
        save(picture, name)


if __name__ == "__main__":
    main()
