"""Under DDP and FSDP2 as they are, two processes train swapped what they train plainly.

Under DDP that is also what one process trains, with the batches of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.pipeline.members import run_together
from tests.swap.steps import needed_meter


def test_two_processes_are_bitwise_the_same_with_everything_swapped(tmp_path: Path) -> None:
    needed_meter()
    store = str(tmp_path / "store")
    commands = [
        [sys.executable, "-m", "tests.swap.parallel_member", str(n), store] for n in range(2)
    ]
    run_together(commands, 180)
