"""Claim: with a sketch's simpler prices the planner of grids finds what the sketch found.

    python -m bench.grid_prices

Prints the table of ``docs/grid-reproduction.md`` on what the planner's own prices add, and keeps
the numbers in ``bench/results``. Nothing is measured: all of it is computed.
"""

from __future__ import annotations

from typing import Any

from tests.planning.grid.simpler import simpler_problem

from bench.common import write_result
from bench.grid_reproduction import CASES, FORMS, Case
from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.plan import plan_grid
from elbowroom.planning.grid.settings import KNL, Forms


def main() -> None:
    write_result("grid_prices", {"rows": [row(case) for case in CASES]})


def row(case: Case) -> dict[str, Any]:
    """Seconds of communication of the best plans, by simpler prices and by ours."""
    return {**case._asdict(), **{forms: _seconds(case, forms) for forms in FORMS}}


def _seconds(case: Case, forms: Forms) -> dict[str, float]:
    planned = plan_grid(known_net(case.net), case.procs, case.batch, KNL, forms=forms)
    return {
        "simpler": simpler_problem(*case, forms).milliseconds() / 1e3,
        "ours": planned.plan.prediction.seconds,
    }


if __name__ == "__main__":
    main()
