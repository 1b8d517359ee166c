"""What the docs show of commands and results, made by running and reading them.

    python -m tools.make_docs            # the marked blocks of README.md and docs/
    python -m tools.make_docs engine     # docs/output: what needs vLLM, torchrun, PyPI (minutes)
    python -m tools.make_docs links      # links of README and its neighbours

A block stands between ``<!-- made: NAME -->`` and ``<!-- end -->``; ``make_blocks`` has the names.
The first needs no PyTorch. Its commands run in build/docs-work, where ``examples`` and ``tests``
are the repository's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools import batch_tables, gpu_tables, grid_tables, swap_tables, training_tables

from elbowroom.cli.exit_codes import EXIT_CODES
from elbowroom.cli.main import build_parser
from elbowroom.core.cluster import Cluster
from elbowroom.core.cluster_file import DEVICES, parse_cluster

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "output"
WORK = ROOT / "build" / "docs-work"
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CLUSTERS = ROOT / "src" / "elbowroom" / "core" / "clusters"
COLUMNS = 100

LLAMA = "--model tests/data/models/Llama-3.1-70B"

LIVE = {
    "plan-long": f"elbowroom plan {LLAMA} --lengths 4096:1024x10000 \\\n"
    "    --cluster h200-8 --replicas 4 --json plan.json",
    "plan-short": f"elbowroom plan {LLAMA} --lengths 1024:512x10000 --cluster h200-8",
    "plan-explain": f"elbowroom plan {LLAMA} --lengths 4096:1024x10000 \\\n"
    "    --cluster h200-8 --replicas 4 --explain",
    "plan-no-fit": f"elbowroom plan {LLAMA} --lengths 4096:1024x10000 \\\n"
    "    --cluster h200-8 --replicas 8 --pool none",
    "simulate": "elbowroom simulate --plan plan.json --trace trace.json",
    "check": "elbowroom check requests.jsonl --model examples/demo/model \\\n"
    "    --served-model-name demo --no-tokens",
    "verify": "elbowroom verify requests.jsonl results.jsonl",
    "train-plan": "elbowroom train plan-pipeline lm.json --workers 2 --bandwidth 10Gbit/s \\\n"
    "    --straight --json train-plan.json",
    "swap-plan": "elbowroom train plan-swap step.json --budget 24MiB --json swap-plan.json",
    "grid-plan": "elbowroom train plan-grid shapes.json --procs 4 --batch 2 \\\n"
    "    --latency 50us --bandwidth 10Gbit/s --json grid.json",
    "grid-known": "elbowroom train plan-grid alexnet --procs 32 --batch 256 --flops 2.9TFLOP/s",
}
"""Commands that run while the site is built; each may use what those before it wrote."""

ENGINE = {
    "first-run": "elbowroom run --model examples/demo/model --served-model-name demo \\\n"
    "    --input requests.jsonl --output results.jsonl",
    "status": "elbowroom status results.jsonl",
    "smollm2": "python -m tools.make_smollm2 smollm2",
    "smollm2-check": "elbowroom check examples/questions.jsonl --model smollm2",
    "smollm2-run": "elbowroom run --model smollm2 --input examples/questions.jsonl \\\n"
    "    --output answers.jsonl --replicas 2 --pool mapped --memory 1GiB",
    "demo": "elbowroom run --model examples/demo/model --served-model-name demo \\\n"
    "    --input examples/demo/requests.jsonl --output demo.jsonl \\\n"
    "    --replicas 2 --memory 160MiB",
    "train-profile": "elbowroom train profile examples/train_demo_lm.py --out lm.json \\\n"
    "    --threads 1 --workers 2",
    "train-plan": LIVE["train-plan"],
    "train-run": "elbowroom train run examples/train_demo_lm.py --plan train-plan.json \\\n"
    "    --steps 50 --trace trace.json",
    "swap-profile": "elbowroom train profile examples/train_unet3d.py --step --out step.json \\\n"
    "    --threads 1",
    "swap-plan": LIVE["swap-plan"],
    "swap-run": "elbowroom train run examples/train_unet3d.py --plan swap-plan.json \\\n"
    "    --steps 30 --picture memory.svg",
    "grid-profile": "elbowroom train profile examples/train_unet3d.py --shapes \\\n"
    "    --out shapes.json --threads 1",
    "grid-plan": LIVE["grid-plan"],
    "grid-run": "elbowroom train run examples/train_unet3d.py --plan grid.json \\\n"
    "    --steps 30 --loss space",
}

REFUSED = {"plan-no-fit": 2}
"""Exit codes of commands that are shown because they are refused."""

KEPT = {
    "results.jsonl": "first-results.jsonl",
    "answers.jsonl": "smollm2-answers.jsonl",
    "lm.json": "lm.json",
    "step.json": "step.json",
    "shapes.json": "shapes.json",
    "memory.svg": "memory.svg",
}
"""Files of ``ENGINE`` that ``LIVE`` uses, or pages show."""

EXCERPTS = {
    "taken": ("first-run", ("taken: ", "pool ", "next best: ")),
    "first-run-short": (
        "first-run",
        (
            "taken: ",
            "pool ",
            "next best: ",
            " rows  ",
            " tokens  ",
            " seconds  ",
            " output tokens/s",
        ),
    ),
    "smollm2-run-short": (
        "smollm2-run",
        ("$ ", "    --output", "taken: ", " rows  ", " tokens  ", " seconds  ", " weights "),
    ),
    "train-run-short": ("train-run", ("loss: ", "50 minibatches", "a minibatch: ")),
}
"""Lines of stored output, by how they begin."""

SHORTENED = {"smollm2-run"}
"""Stored outputs that pages show only in excerpts."""

_BLOCK = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)|(?:src|href)=\"([^\"#]+)\"")


def run(command: str, folder: Path = WORK, exit_code: int = 0) -> str:
    """A command and what a terminal would show of it. Ends the program on another exit code."""
    words = shlex.split(command.replace("\\\n", "").removeprefix("python -m "))
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != exit_code:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    lines = (line.rstrip() for line in done.stdout.splitlines())
    shown = "\n".join(line for line in lines if not is_repeated(line))
    return f"$ {command}\n{shown}\n"


def is_repeated(line: str) -> bool:
    """Lines of progress from before the first row is finished say nothing in a document."""
    return bool(re.match(r"0/\d+ rows, ", line)) and "0:00 elapsed" not in line


def prepare(folder: Path = WORK) -> None:
    """Make a folder with the repository's examples, two requests, and what is kept of engines."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples" / "requests.jsonl", folder)
    for name, kept in KEPT.items():
        if (OUTPUT / kept).exists():
            shutil.copy(OUTPUT / kept, folder / name)


def make_blocks(folder: Path = WORK) -> dict[str, str]:
    """Markdown by name. Runs ``LIVE`` in ``folder``."""
    prepare(folder)
    made = {
        name: fenced("console", run(command, folder, REFUSED.get(name, 0)))
        for name, command in LIVE.items()
    }
    for name in ENGINE.keys() - LIVE.keys() - SHORTENED:
        made[name] = fenced("console", (OUTPUT / f"{name}.txt").read_text())
    made |= {name: fenced("console", excerpt(name)) for name in EXCERPTS}
    tables = {**batch_tables.TABLES, **training_tables.TABLES, **swap_tables.TABLES}
    tables |= {**grid_tables.TABLES, **gpu_tables.TABLES}
    made |= {f"table-{name}": make() for name, make in tables.items()}
    made["presets"] = "\n".join(preset_table()) + "\n"
    made["exit-codes"] = fenced("text", EXIT_CODES)
    made["cli"] = "\n".join(cli_page(build_parser()))
    made["requests"] = fenced("json", (folder / "requests.jsonl").read_text())
    made["answer"] = fenced("text", answers("first-results.jsonl"))
    made["smollm2-answers"] = fenced("text", answers("smollm2-answers.jsonl"))
    for name in ("plan", "train-plan", "grid"):
        plan = shortened(json.loads((folder / f"{name}.json").read_text()), folder)
        made[f"{name}-json"] = fenced("json", json.dumps(plan, indent=1) + "\n")
    made["h200"] = fenced("toml", (CLUSTERS / "h200.toml").read_text())
    return made


def preset_table() -> Iterator[str]:
    """Markdown of the presets' devices, one in a row."""
    yield "| device | memory | bf16, FP8 | reads | in a node | between nodes |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in DEVICES:
        node = parse_cluster(tomllib.loads((CLUSTERS / f"{name}.toml").read_text()))
        device = node.device
        near, far = ("; ".join(link_cells(node, network)) for network in (False, True))
        cells = (
            f"`{name}` x {node.num_devices}",
            f"{device.memory_bytes / 2**20:,.0f} MiB",
            f"{device.flops.peak / 1e12:g}, {device.flops_fp8.peak / 1e12:g} TFLOP/s",
            f"{device.memory_bandwidth.peak / 1e12:g} TB/s",
            near,
            far,
        )
        yield f"| {' | '.join(cells)} |"


def link_cells(node: Cluster, network: bool) -> Iterator[str]:
    for link in node.links:
        if link.network == network:
            pair = " a pair" if link.mesh else ""
            yield f"{link.name}, {link.bandwidth.peak / 1e9:g} GB/s{pair}"


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def answers(stored: str) -> str:
    """Stored answers, without what an OpenAI client does not look at."""
    lines = []
    for line in (OUTPUT / stored).read_text().splitlines():
        row = json.loads(line)
        body = row["response"]["body"]
        message = body["choices"][0]["message"]["content"]
        lines.append(f"{row['custom_id']}: {message}   ({body['usage']['total_tokens']} tokens)")
    return "\n".join(lines) + "\n"


def excerpt(name: str) -> str:
    """An excerpt of a stored output."""
    stored, beginnings = EXCERPTS[name]
    lines = (OUTPUT / f"{stored}.txt").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(beginnings))


def shortened(value: Any, folder: Path) -> Any:
    """Long lists with their first entries only, and paths without this machine's folders."""
    if isinstance(value, dict):
        return {key: shortened(found, folder) for key, found in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [shortened(value[0], folder), *(["..."] if len(value) > 1 else [])]
    if isinstance(value, list):
        return [
            *(shortened(found, folder) for found in value[:3]),
            *(["..."] if len(value) > 3 else []),
        ]
    return (
        value.replace(f"{folder}/", "").replace(f"{ROOT}/", "") if isinstance(value, str) else value
    )


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def cli_page(parser: argparse.ArgumentParser, depth: int = 1) -> Iterator[str]:
    """Markdown of a command and of those below it."""
    if depth > 1:
        yield f"\n{'#' * min(depth, 4)} {parser.prog}\n"
        yield f"{parser.description}\n"
    usage = parser.format_usage().removeprefix("usage: ").strip()
    yield f"```text\n{usage}\n```\n"
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        rows = [row for action in group._group_actions for row in option_row(action, formatter)]
        if rows:
            title = {"options": "", "positional arguments": ""}.get(group.title or "", group.title)
            yield f"| {title or 'option'} | meaning |\n| --- | --- |"
            yield "\n".join(rows) + "\n"
    for below in commands_of(parser).values():
        yield from cli_page(below, depth + 1)


def option_row(action: argparse.Action, formatter: argparse.HelpFormatter) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
        return
    if action.help == argparse.SUPPRESS:
        return
    values = ""
    if action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        values = str(action.metavar or choices or action.dest.upper())
    names = ", ".join(action.option_strings)
    shown = f"{names} {values}".strip() if names else values
    about = formatter._expand_help(action) if action.help else ""
    cells = (f"`{shown}`", about)
    yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def filled(page: str, blocks: dict[str, str]) -> str:
    """A page with its marked blocks as they are made now."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]].strip()}\n\n{match[3]}", page)


def run_engines() -> None:
    """Write ``docs/output`` anew."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    prepare()
    for name, command in ENGINE.items():
        (OUTPUT / f"{name}.txt").write_text(run(command))
    for name in ENGINE.keys() & LIVE.keys():
        (OUTPUT / f"{name}.txt").unlink()
    for name, kept in KEPT.items():
        shutil.copy(WORK / name, OUTPUT / kept)


def broken_links() -> list[str]:
    """Links of the documents at the root that lead to no file."""
    broken = []
    for path in (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for found in _LINK.finditer(path.read_text()):
            link = found[1] or found[2]
            if "://" not in link and not (ROOT / link).exists():
                broken.append(f"{path.name}: {link}")
    return broken


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "blocks"
    if what == "engine":
        return run_engines()
    if what == "links":
        sys.exit("\n".join(broken_links()) or None)
    blocks = make_blocks()
    for page in PAGES:
        text = page.read_text()
        if text != (new := filled(text, blocks)):
            page.write_text(new)


if __name__ == "__main__":
    main()
