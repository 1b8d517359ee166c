"""Split a profile with one heavy last layer into stages, for links of several speeds.

python examples/plan_pipeline.py
"""

from elbowroom.core.layer_graph_file import parse_pipedream
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions

LAYER = (
    "node{0} -- Layer{0} -- forward_compute_time=10.0, backward_compute_time=20.0, "
    "activation_size=1000000.0, parameter_size={1}.0"
)


def main() -> None:
    layers = [LAYER.format(n, 400_000_000 if n == 7 else 1_000_000) for n in range(8)]
    edges = [f"\tnode{n} -- node{n + 1}" for n in range(7)]
    graph = parse_pipedream("\n".join([*layers, *edges]) + "\n")
    for gbits in (100, 10, 1):
        levels = (Level(4, gbits * 1e9 / 8),)
        plan = plan_on_levels(graph, levels, PipelineOptions(optimizer=None))
        print(f"{gbits:3} Gbit/s: {plan} workers, {plan.speedup:.1f}x data parallel training")


if __name__ == "__main__":
    main()
