"""What processes do together; what each of them must see is in ``peers``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "size"), [("lets_go_of_what_was_sent", 2), ("adds_up_in_a_ring", 3), ("agrees", 2)]
)
def test_peers(tmp_path: Path, name: str, size: int) -> None:
    command = (sys.executable, "-m", "tests.pipeline.peers", name, str(tmp_path))
    peers = [subprocess.Popen([*command, str(n), str(size)]) for n in range(size)]
    try:
        for peer in peers:
            assert peer.wait(60) == 0
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
