"""What ``train profile --shapes`` does: it finds out how layers can be split, and measures them."""

from __future__ import annotations

import argparse
import time

from elbowroom.cli.screen import Console
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart, check_writable
from elbowroom.core.layer_shapes import LayerShape, ModelShapes, write_model_shapes

_FULL_WIDTH = 80
"""Columns of a screen that has room for all of the table's."""
_COLUMNS = ("layer", "kind", "output", "weights", "forward", "backward")
_NARROW = ("layer", "kind", "weights", "forward")


def profile_shapes(args: argparse.Namespace, console: Console) -> int:
    if args.text is not None:
        raise InputError("--text is for layers' profiles: leave it out of --shapes")
    begin = time.perf_counter()
    check_apart([("the script", args.script), ("--out", args.out)])
    check_writable([args.out])
    # Loaded here: torch takes longer to load than most commands to run.
    from elbowroom.profiling import shapes as profiling

    shapes = profiling.profile_shapes(
        args.script, args.seed, args.seconds, args.threads, args.workers
    )
    write_model_shapes(args.out, shapes)
    print_shapes(Console(), shapes)
    taken = time.perf_counter() - begin
    console.print(
        f"{taken:.1f} s taken: plan with `elbowroom train plan-grid {args.out} --procs ... "
        "--batch ...`",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def print_shapes(screen: Console, shapes: ModelShapes) -> None:
    """The layers that do something, and those for which there is no rule.

    There are fewer columns on a narrow terminal.
    """
    width = screen.width_of(_FULL_WIDTH)
    columns = _COLUMNS if width >= _FULL_WIDTH else _NARROW
    texts = ("layer", "kind", "output")
    rows = map(_row, shapes.layers)
    screen.print_rows(columns, rows, width, texts=texts, wraps="layer", cut=("layer",))
    for name, text in _totals(shapes):
        screen.say(f"{name:<9} {text}")


def _row(layer: LayerShape) -> dict[str, str]:
    weights = layer.weights + layer.biases
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "output": "x".join(map(str, layer.shape)) or "a number",
        "weights": str(weights) if weights else "-",
        "forward": _milliseconds(layer.forward_seconds),
        "backward": _milliseconds(layer.backward_seconds),
    }


def _totals(shapes: ModelShapes) -> list[tuple[str, str]]:
    layers = shapes.layers
    seconds = [
        _milliseconds(sum(layer.forward_seconds for layer in layers)),
        _milliseconds(sum(layer.backward_seconds for layer in layers)),
    ]
    whole = [layer.name for layer in layers if layer.kind == "whole"]
    found = [
        ("layers", f"{len(layers)}, {len(shapes.weighted)} of which a plan splits"),
        ("weights", str(shapes.num_weights)),
        ("batch", f"{shapes.batch}: {seconds[0]} forward, {seconds[1]} backward"),
    ]
    if whole:
        said = f"{', '.join(whole)}: no rule splits them, so every worker computes all of them"
        found.append(("whole", said))
    return found


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
