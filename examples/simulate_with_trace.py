"""Simulate a planned job row by row, and write a trace that Perfetto opens.

python examples/simulate_with_trace.py trace.json
"""

import sys
from pathlib import Path

from elbowroom.app.plan import PlanSettings, model_facts, plan_job, run_plan
from elbowroom.app.simulate import SimulationSettings, simulate_plan
from elbowroom.core.trace import write_trace
from elbowroom.core.workload import parse_lengths

MODEL = Path(__file__).parents[1] / "tests" / "data" / "models" / "Qwen3-32B"


def main() -> None:
    settings = PlanSettings(MODEL, cluster="h20-8", pool="streamed", replicas=8)
    planned = plan_job(settings, model_facts(settings), parse_lengths("1024:256x2000"), "2000 rows")
    plan = run_plan(planned, planned.choice.best, settings)
    simulated = simulate_plan(SimulationSettings(plan))
    print(f"{simulated.layout}: {simulated.job.seconds:.0f} s")
    write_trace(Path(sys.argv[1]), simulated.trace())


if __name__ == "__main__":
    main()
