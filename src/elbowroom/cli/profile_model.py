"""The command that measures a model in training: ``train profile``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from elbowroom.cli.profile_shapes import profile_shapes
from elbowroom.cli.profile_step import profile_step
from elbowroom.cli.screen import Console
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart, check_writable, write_text
from elbowroom.core.flag_kinds import count, memory, number, positive, seconds
from elbowroom.core.layer_graph import Layer, LayerGraph
from elbowroom.core.layer_graph_file import write_pipedream
from elbowroom.core.units import format_bytes
from elbowroom.training.run_flags import AUTOCAST

_TABLE_WIDTH = 120
_OF_STEPS = ("tier", "autocast", "clip_norm", "memory", "swap_optimizer")
_LONGEST_DESCRIPTION = 48
_COLUMNS = ("layer", "what", "forward", "backward", "update", "output", "parameters")


def add_profile_model(add: Callable[..., argparse.ArgumentParser]) -> None:
    profile = add(
        "profile",
        _profile_model,
        "measure the layers of a model in training, or the memory of its steps",
        usage="SCRIPT --out OUT [options]",
        example="elbowroom train profile train.py --out lm.json --workers 2",
    )
    profile.add_argument(
        "script",
        type=Path,
        help="your Python file with make_model(), make_batch(generator), loss_fn(outputs, targets)",
    )
    profile.add_argument(
        "--out", type=Path, required=True, help="a profile for plan-pipeline, -swap or -grid"
    )
    kinds = profile.add_mutually_exclusive_group()
    kinds.add_argument(
        "--step",
        action="store_true",
        help="measure what a step saves and holds, for plan-swap: needs the smallest budget only",
    )
    kinds.add_argument(
        "--shapes",
        action="store_true",
        help="find out how each layer can be split, and measure them, for plan-grid",
    )
    profile.add_argument(
        "--tier", type=Path, help="with --step, folder to swap to (default: for temporary files)"
    )
    profile.add_argument("--text", type=Path, metavar="FILE", help="and one as PipeDream's text")
    profile.add_argument("--seconds", type=seconds, help="of measuring (default 1)")
    profile.add_argument(
        "--workers",
        type=count,
        default=1,
        help="that will train on this machine: as many run while one of them is measured, as they "
        "share its memory (default 1)",
    )
    profile.add_argument(
        "--threads", type=count, help="of torch, of each worker (default: torch's own)"
    )
    profile.add_argument(
        "--autocast", choices=AUTOCAST, help="with --step, as the run will have it"
    )
    profile.add_argument(
        "--swap-optimizer",
        action="store_true",
        help="with --step, keep gradients and optimizer state away between their uses",
    )
    profile.add_argument("--clip-norm", type=positive, help="with --step, as the run will have it")
    profile.add_argument(
        "--memory",
        type=memory,
        help="with --step, what it may hold: more than the smallest budget tries more of what "
        "could be recomputed",
    )
    profile.add_argument("--seed", type=number, default=0, help="of weights and batch (default 0)")


def _profile_model(args: argparse.Namespace, console: Console) -> int:
    if args.step:
        return profile_step(args, console)
    if any(getattr(args, name) for name in _OF_STEPS):
        names = ", ".join("--" + name.replace("_", "-") for name in _OF_STEPS)
        raise InputError(f"{names} are for --step: leave them out, or profile a step")
    if args.shapes:
        return profile_shapes(args, console)
    begin = time.perf_counter()
    check_apart([("the script", args.script), ("--out", args.out), ("--text", args.text)])
    check_writable([args.out, *([args.text] if args.text is not None else [])])
    # Loaded here: torch takes longer to load than most commands to run.
    from elbowroom.profiling.script import profile_script

    graph = profile_script(args.script, args.seed, args.seconds, args.threads, args.workers)
    # Whatever may be refused is refused before anything is written.
    texts = {args.out: json.dumps(graph.to_json(), indent=2) + "\n"}
    if args.text is not None:
        texts[args.text] = write_pipedream(graph)
    for path, text in texts.items():
        write_text(path, text)
    screen = Console(markup=False, highlight=False)  # names may have brackets
    screen.width = max(screen.width, _TABLE_WIDTH)
    _print_graph(screen, graph)
    _print_notes(console, graph, args.text)
    taken = time.perf_counter() - begin
    console.print(
        f"{taken:.1f} s taken: plan with `elbowroom train plan-pipeline {args.out}`",
        highlight=False,
    )
    return 0


def _print_graph(screen: Console, graph: LayerGraph) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        is_text = column in ("layer", "what")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for layer in graph.layers:
        table.add_row(*_row(layer))
    screen.print(table)
    forward = sum(layer.forward_seconds for layer in graph.layers)
    backward = sum(layer.backward_seconds for layer in graph.layers)
    update = sum(layer.update_seconds for layer in graph.layers)
    outputs = sum(layer.activation_bytes for layer in graph.layers)
    parameters = sum(layer.parameter_bytes for layer in graph.layers)
    screen.print(
        f"{len(graph.layers)} layers: {_milliseconds(forward)} forward, {_milliseconds(backward)} "
        f"backward, {_milliseconds(update)} update, outputs {format_bytes(outputs)}, parameters "
        f"{format_bytes(parameters)}",
        soft_wrap=True,
    )


def _row(layer: Layer) -> tuple[str, ...]:
    what = layer.description
    is_long = len(what) > _LONGEST_DESCRIPTION
    return (
        layer.name,
        f"{what[: _LONGEST_DESCRIPTION - 3]}..." if is_long else what,
        _milliseconds(layer.forward_seconds),
        _milliseconds(layer.backward_seconds),
        _milliseconds(layer.update_seconds),
        format_bytes(layer.activation_bytes),
        format_bytes(layer.parameter_bytes),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _print_notes(console: Console, graph: LayerGraph, text: Path | None) -> None:
    but = f" (not those for {text}, whose format cannot say so)" if text is not None else ""
    for names in graph.tied:
        console.print(
            f"{', '.join(names)} share weights, statistics or memory: plans{but} keep them and all "
            "between them in one stage",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
