"""What a job should take on a layout: before it runs, and for the token counts that occurred."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.model import ModelFacts
from elbowroom.core.workload import Workload
from elbowroom.planning.pool.layouts import EngineLimits, replica_limits
from elbowroom.planning.pool.search import job_seconds
from elbowroom.plans.pool import Layout, MemoryBudget, Prediction


@dataclass(frozen=True)
class Predictor:
    """Says what a run of a layout on a job should take, before it and for actual token counts.

    ``rows`` are in the order in which they are worked on.
    """

    model: ModelFacts
    cluster: Cluster
    layout: Layout
    budget: MemoryBudget
    engine: EngineLimits
    rows: Workload

    @cached_property
    def prediction(self) -> Prediction:
        """Prediction for the job as expected. Raises MemoryPlanError when a row cannot fit."""
        return self._predict(self.rows)

    def _predict(self, workload: Workload) -> Prediction:
        limits = replica_limits(self.budget, self.engine)
        seconds = job_seconds(self.model, self.cluster, workload, self.layout, limits)
        return prediction_of(seconds, workload, self.cluster)

    def for_actual(self, prompt_tokens: int, output_tokens: int) -> Prediction | None:
        """With the tokens that came out, spread over rows as they were expected to be."""
        expected = self.rows
        prompts = prompt_tokens / expected.num_prompt_tokens
        came = expected.scaled(prompts, output_tokens / expected.num_output_tokens)
        try:
            return self._predict(came)
        except MemoryPlanError:  # what came out is longer than what was thought to fit
            return None


def prediction_of(seconds: float, workload: Workload, cluster: Cluster) -> Prediction:
    return Prediction(
        cluster=cluster.name,
        num_rows=workload.num_rows,
        prompt_tokens=workload.num_prompt_tokens,
        output_tokens=workload.num_output_tokens if workload.generates else 0,
        seconds=seconds,
        low_seconds=seconds * (1 - cluster.uncertainty),
        high_seconds=seconds * (1 + cluster.uncertainty),
    )
