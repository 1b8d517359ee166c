"""``elbowroom run`` on a small model whose replicas are stubs, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elbowroom.cli.main import main
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]


CASES = ROOT / "tests" / "data" / "batch"


class Jobs:
    """``elbowroom run`` on a small model whose replicas are stubs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.output = folder / "out.jsonl"
        self.num_started = 0
        self.stub: list[str] = []
        write_model(self.model)

    def flags(self, *names: str | Path) -> list[str]:
        files = [str(CASES / name) for name in names]
        return ["--model", str(self.model), "--input", *files, "--output", str(self.output)]

    def run(self, *names: str | Path, more: tuple[str, ...] = ()) -> int:
        small = ("--memory", "64MiB", "--max-num-batched-tokens", "64", "--max-num-seqs", "4")
        return main(["run", *self.flags(*names), *small, *more])

    def ids(self, name: str = "out.jsonl") -> list[str]:
        return [line["custom_id"] for line in self.lines(name)]

    def lines(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_bytes().split(b"\n")[:-1]]
