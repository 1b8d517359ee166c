"""Parsers of the commands: usage that says what is needed, an example, the nearest flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

_NEAR = 0.75
"""Least likeness of a flag that may have been meant, of 1."""


class CommandParser(argparse.ArgumentParser):
    """A parser that explains unknown words itself, beside its own usage.

    Otherwise those of a command would be explained with the usage of the whole program.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._hint(rest)}")
        return found, rest

    def _hint(self, words: Sequence[str]) -> str:
        """The flag that may have been meant, and where options of vLLM stand."""
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        known = [name for action in self._actions for name in action.option_strings]
        nearest = [name for flag in flags for name in get_close_matches(flag, known, 1, _NEAR)]
        if nearest:
            return f": did you mean {' and '.join(nearest)}?"
        return (
            ": options for vLLM stand behind --" if flags and self.get_default("takes_vllm") else ""
        )


def add_command(
    commands: argparse._SubParsersAction[CommandParser],
    name: str,
    command: Callable[..., int],
    about: str,
    *,
    usage: str,
    example: str,
    exit_codes: Mapping[int, str] | None = None,
) -> CommandParser:
    """Add a command.

    ``usage`` are its words behind its name, those that are needed first. ``exit_codes`` are those
    that mean more than that it worked or did not.
    """
    epilog = f"example:\n  {example}"
    if exit_codes:
        codes = "".join(f"\n  {code:<3} {meaning}" for code, meaning in exit_codes.items())
        epilog += f"\n\nexit codes:{codes}"
    added = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines = usage.splitlines()
    added.usage = f"\n{' ' * len('usage: ')}".join(f"{added.prog} {line}" for line in lines)
    added.set_defaults(command=command, takes_vllm=False)
    return added
