"""Plan a 70B model on eight H200 from Python, and compare the layouts that fit.

python examples/plan_for_cluster.py
"""

from pathlib import Path

from elbowroom.app.plan import PlanSettings, model_facts, plan_job
from elbowroom.core.workload import parse_lengths

MODEL = Path(__file__).parents[1] / "tests" / "data" / "models" / "Llama-3.1-70B"


def main() -> None:
    settings = PlanSettings(MODEL, cluster="h200-8", replicas=4)
    rows = parse_lengths("4096:1024x1000")
    planned = plan_job(settings, model_facts(settings), rows, "1000 rows")
    for candidate in planned.candidates:
        if candidate.seconds is not None:
            print(f"{candidate.layout!s:24} {candidate.seconds:6.0f} s")
    print(f"best: {planned.choice.best.layout}, because it is {planned.choice.reason}")


if __name__ == "__main__":
    main()
