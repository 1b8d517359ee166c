"""The shape of a pipe: workers, numbered stage by stage, and which of them runs which minibatch.

PipeDream: arXiv 1806.03377 section 3.2, SOSP 2019 section 3.2 (1F1B-RR: replicas take turns).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from elbowroom.core.errors import InputError

BUCKET_BYTES = 4 << 20
"""Size of a gradient bucket that replicas of a stage send while they compute other gradients."""


@dataclass(frozen=True)
class Pipe:
    """Workers arranged in stages: ``replicas`` has the number of workers of each stage.

    Raises InputError for stages without workers.
    """

    replicas: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.replicas or min(self.replicas) < 1:
            raise InputError(f"stages of {self.replicas} workers: give each stage at least one")

    @property
    def num_workers(self) -> int:
        return sum(self.replicas)

    @property
    def num_stages(self) -> int:
        return len(self.replicas)

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Stage of each worker."""
        return tuple(stage for stage, count in enumerate(self.replicas) for _ in range(count))

    @cached_property
    def _workers(self) -> tuple[range, ...]:
        ends = accumulate(self.replicas)
        return tuple(range(end - n, end) for end, n in zip(ends, self.replicas, strict=True))

    def workers(self, stage: int) -> range:
        """The replicas of a stage; none for a number that no stage has."""
        return self._workers[stage] if 0 <= stage < self.num_stages else range(0)

    def worker(self, stage: int, minibatch: int) -> int:
        """The worker that runs a minibatch at a stage, forward and backward."""
        workers = self.workers(stage)
        return workers[minibatch % len(workers)]

    def warmup_forwards(self, stage: int, depth: int = 1) -> int:
        """Forwards of each replica of a stage before its first backward, in 1F1B.

        ``depth`` times the papers' number, which is ceil(workers behind the stage / its replicas).
        """
        behind = self.num_workers - self.workers(stage).stop
        return depth * -(-behind // self.replicas[stage])
