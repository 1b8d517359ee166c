"""Help of the commands, and what is said of flags that are none."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from elbowroom.cli.main import build_parser, main


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands that do something, at any depth."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found = list(commands(below))
                yield from found or [below]


COMMANDS = {command.prog: command for command in commands(build_parser())}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_command_has_an_example_and_says_what_it_needs(
    command: argparse.ArgumentParser,
) -> None:
    text = command.format_help()
    _, _, example = text.partition("example:\n")
    words = shlex.split(example.partition("\n\n")[0].replace("\\\n", ""))
    assert words[0] == "elbowroom"
    build_parser().parse_args(words[1:])
    usage = text.partition("\n\n")[0]
    for action in command._actions:
        if action.required:
            name = action.option_strings[0] if action.option_strings else action.dest.upper()
            assert name in usage, name
    name = command.prog.removeprefix("elbowroom ")
    assert ("exit codes" in text) == (name in ("run", "check", "verify"))
    assert ("--max-stop" in text) == (name in ("run", "check", "plan", "simulate"))


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("run", "--model m --input i --output o --memroy 1GiB", "did you mean --memory?"),
        ("run", "--model m --input i --output o --runner x", "options for vLLM stand behind --"),
        ("check", "in --max_model_len 7", "did you mean --max-model-len?"),
        ("status", "out --jsn", "did you mean --json?"),
        ("train plan-pipeline", "p --workers 2 --sraight", "did you mean --straight?"),
        ("results", "out stray", "unrecognized arguments: stray"),
    ],
)
def test_a_flag_that_is_none(
    command: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the usage of the command, which is short."""
    with pytest.raises(SystemExit):
        main([*command.split(), *words.split()])
    error = capsys.readouterr().err
    assert said in error
    assert f"usage: elbowroom {command} " in error
    assert len(error.splitlines()) <= 4
