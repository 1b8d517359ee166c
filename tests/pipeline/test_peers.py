"""What processes do together; what each of them must see is in ``peers``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.pipeline.members import run_together


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("lets_go_of_what_was_sent", 2),
        ("receives_no_more_than_it_may", 3),
        ("waits_until_no_more_are_unsent", 2),
        ("adds_up_in_a_ring", 3),
        ("all_reduces", 2),
        ("refuse_lists_together_that_differ", 2),
        ("hears_that_the_first_refused_its_list", 2),
        ("hears_that_the_last_refused_its_list", 2),
    ],
)
def test_peers(tmp_path: Path, name: str, size: int) -> None:
    command = (sys.executable, "-m", "tests.pipeline.peers", name, str(tmp_path))
    run_together([(*command, str(n), str(size)) for n in range(size)], 60)
