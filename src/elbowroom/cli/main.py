"""The command line: reads flags, hands them on, and turns what happens into exit codes."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import NoReturn

import shtab

from elbowroom.cli.exit_codes import EXIT_CODES, EXIT_GOOD, EXIT_RESUMABLE, exit_code
from elbowroom.cli.inspect import add_inspect_commands
from elbowroom.cli.parser import CommandParser, add_command
from elbowroom.cli.plan import add_plan_commands
from elbowroom.cli.run import add_run_command
from elbowroom.cli.screen import Console, discard_rest
from elbowroom.cli.train import add_train_commands
from elbowroom.core.errors import ElbowroomError, InputError
from elbowroom.jobs.job import how_to_resume

_ABOUT = (
    "Runs large models on the devices you have: batch inference with pooled weights, and training."
)
_EXAMPLES = """\
each command has an example and its options:
  elbowroom run --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``elbowroom``. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    console = Console(stderr=True)
    try:
        args = build_parser().parse_args(words[:end], argparse.Namespace(vllm=words[end + 1 :]))
        command: Callable[[argparse.Namespace, Console], int] = args.command
        if args.vllm and not args.takes_vllm:
            raise InputError("only `run`, `plan` and `check` take options for vLLM, behind --")
        return command(args, console)
    except BrokenPipeError:  # whoever read our output has seen enough
        discard_rest(sys.stdout)
        return EXIT_GOOD
    except ElbowroomError as error:
        with suppress(BrokenPipeError):
            console.print(
                f"elbowroom: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
        return exit_code(error)
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        reason = str(error) or "stopped at once"
        advice = how_to_resume("--restart" in words)
        console.print(f"elbowroom: {reason}; {advice}", soft_wrap=True)
        return EXIT_RESUMABLE


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="elbowroom",
        description=_ABOUT,
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show program's version number and exit"
    )
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = partial(add_command, commands)
    add_run_command(add)
    add_inspect_commands(add)
    add_plan_commands(add)
    about = "profile a model in training, split it, train it"
    train = commands.add_parser("train", help=about, description=f"{about.capitalize()}.")
    add_train_commands(partial(add_command, train.add_subparsers(required=True, metavar="COMMAND")))
    return parser


class _ShowVersion(argparse.Action):
    """Looks the version up when it is asked for: that takes longer than to parse a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"elbowroom {version('elbowroom')}")
        parser.exit()
