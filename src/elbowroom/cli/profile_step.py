"""What ``train profile --step`` does: it measures the memory of a training step."""

from __future__ import annotations

import argparse
import time

from elbowroom.cli.screen import Console
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart, check_writable
from elbowroom.core.step_profile import StepProfile, write_step_profile
from elbowroom.core.units import format_bytes
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes


def profile_step(args: argparse.Namespace, console: Console) -> int:
    if args.text is not None or args.workers != 1:
        raise InputError("--text and --workers are for layers' profiles: leave them out of --step")
    begin = time.perf_counter()
    check_apart([("the script", args.script), ("--out", args.out)])
    check_writable([args.out])
    # Loaded here: torch takes longer to load than most commands to run.
    from elbowroom.profiling.script_step import profile_script_step
    from elbowroom.training.loop import LoopOptions, dtype_of

    dtype = dtype_of(args.autocast)
    options = LoopOptions(1, seed=args.seed, clip_norm=args.clip_norm, autocast=dtype)
    profile = profile_script_step(
        args.script,
        options,
        args.seconds,
        args.threads,
        args.tier,
        swaps_optimizer=args.swap_optimizer,
        most_bytes=args.memory or 0,
    )
    write_step_profile(args.out, profile)
    screen = Console()
    for name, text in _facts(profile):
        screen.say(f"{name:<11} {text}")
    taken = time.perf_counter() - begin
    console.print(
        f"{taken:.1f} s taken: plan with `elbowroom train plan-swap {args.out} --budget ...`",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _facts(profile: StepProfile) -> list[tuple[str, str]]:
    storages = profile.storages
    saved = format_bytes(sum(storage.num_bytes for storage in storages))
    floor, threads = floor_bytes(profile), profile.num_threads
    able = sum(storage.recipe is not None for storage in storages)
    return [
        ("saved", f"{len(storages)} tensors for the backward, {saved}"),
        ("static", f"{format_bytes(profile.static_bytes)} held between steps"),
        ("keep all", format_bytes(peak_bytes(profile, ()))),
        ("floor", f"{format_bytes(floor)}, the smallest feasible budget ({floor} bytes)"),
        ("recompute", f"{able} of the tensors can be made again instead of moved"),
        ("seconds", f"{profile.compute_seconds:.6f} of compute, torch's threads: {threads}"),
    ]
