"""Commands, options and files that README and docs name are real, and what README shows is so."""

from __future__ import annotations

import re
import shlex
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tools.draw_pictures import FIGURES
from tools.grid_pictures import grid_pictures
from tools.make_docs import (
    ENGINE,
    LIVE,
    OUTPUT,
    ROOT,
    broken_links,
    commands_of,
    filled,
    make_blocks,
)
from tools.make_docs import PAGES as MADE_PAGES

from elbowroom.cli.main import build_parser
from elbowroom.pipeline.__main__ import build_parser as pipeline_parser

PAGES = [*MADE_PAGES, ROOT / "CONTRIBUTING.md"]
MODULES = ("tools.make_docs", "tools.draw_pictures", "tools.make_smollm2", "elbowroom.pipeline")
OF_OTHERS = {
    *("--runner", "--convert", "--enforce-eager", "--no-enforce-eager", "--model-impl"),  # vLLM
    *("--nproc-per-node", "--shm-size", "--small", "--device"),  # torchrun, Docker, bench
    "--wheel",  # tools.make_smollm2
}
_FENCE = re.compile(r"^```(bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_MADE = re.compile(r"<!-- made: ([\w-]+) -->")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


class Command(NamedTuple):
    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> Iterator[Command]:
    for page in PAGES:
        for language, fence in _FENCE.findall(page.read_text()):
            for line in fence.replace("\\\n", " ").splitlines():
                if language == "console" and not line.startswith("$ "):
                    continue
                for part in line.removeprefix("$ ").split(" && "):
                    if words := shlex.split(part, comments=True):
                        yield Command(str(page.relative_to(ROOT)), words)
    for name, command in {**LIVE, **ENGINE}.items():
        yield Command(f"make_docs, {name}", shlex.split(command.replace("\\\n", " ")))


COMMANDS = list(commands())


def parse(parser: ArgumentParser, words: list[str]) -> None:
    """Fails as the command itself would, but for what stands behind ``--``."""
    end = words.index("--") if "--" in words else len(words)
    try:
        parser.parse_args(words[:end])
    except SystemExit as stopped:
        assert stopped.code == 0, words


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_real(command: Command) -> None:
    program, *words = command.words
    program = program.removeprefix(".venv/bin/")
    if program == "elbowroom":
        parse(build_parser(), words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for named in re.findall(r"\[([\w,]+)\]", words[1]):
            assert set(named.split(",")) <= set(extras["optional-dependencies"])
    elif program == "python" and words[0] == "-m":
        assert words[1] in (*MODULES, "pytest")
    elif program == "cp":
        assert (ROOT / words[0]).exists()
    else:
        assert program in ("ruff", "mypy", "lint-imports")


def options_of(parser: ArgumentParser) -> set[str]:
    own = {name for action in parser._actions for name in action.option_strings}
    return own.union(*map(options_of, commands_of(parser).values()))


def test_options_are_real() -> None:
    """Also those of tables and running text."""
    known = options_of(build_parser()) | options_of(pipeline_parser()) | OF_OTHERS
    for page in PAGES:
        for code in _CODE.findall(page.read_text()):
            assert set(_OPTION.findall(code)) <= known, (page, code)


def test_files_are_real() -> None:
    """Modules that pages name by their place in the package."""
    for page in PAGES:
        for code in _CODE.findall(page.read_text()):
            if found := re.fullmatch(r"((?:[a-z_]+/)+[a-z_]+\.py)(:.*)?", code):
                places = (ROOT, ROOT / "src" / "elbowroom", ROOT / "src" / "elbowroom" / "engine")
                assert any((place / found[1]).exists() for place in places), (page, code)


def test_lines_of_the_report_are_real() -> None:
    """All that a run prints in its report, and nothing else, is explained."""
    shown = (OUTPUT / "first-run.txt").read_text().partition("\nReport\n")[2]
    printed = {line.strip().split("  ")[0] for line in shown.splitlines() if line[1:2] != " "}
    guide = (ROOT / "docs" / "guide" / "batch.md").read_text().partition("read the report")[2]
    rows = re.findall(r"^\| ([^|]+) \|", guide.partition("## ")[0], re.MULTILINE)
    assert set(rows) - {"line", "---"} == printed - {"rows", "tokens", "seconds", "restarts"} - {
        "prompt tokens in the prefix cache"
    }


def test_links_lead_somewhere() -> None:
    assert broken_links() == []


def test_pages_show_what_is_printed(tmp_path: Path) -> None:
    """The commands that need no engine run here. If pages differ: python -m tools.make_docs."""
    blocks = make_blocks(tmp_path / "work")
    for page in MADE_PAGES:
        assert filled(page.read_text(), blocks) == page.read_text(), page
    used = {name for page in MADE_PAGES for name in _MADE.findall(page.read_text())}
    assert set(blocks) == used


def test_pictures_of_grids_show_what_is_planned() -> None:
    """If they differ: python -m tools.draw_pictures."""
    for name, picture in grid_pictures().items():
        assert (FIGURES / f"{name}.svg").read_text() == picture.svg, name
