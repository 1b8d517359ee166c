"""Which worker does what: workers are numbered stage by stage, replicas of a stage take turns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Places:
    """``replicas[k]`` workers run stage k. Minibatch i is replica i mod replicas[k]'s."""

    replicas: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.replicas)

    @property
    def num_workers(self) -> int:
        return sum(self.replicas)

    def first_worker(self, stage: int) -> int:
        return sum(self.replicas[:stage])

    def stage_of(self, worker: int) -> int:
        return next(k for k, end in enumerate(accumulate(self.replicas)) if worker < end)

    def workers(self, stage: int) -> range:
        """Of a stage; of none for a stage that there is not."""
        if not 0 <= stage < self.num_stages:
            return range(0)
        begin = self.first_worker(stage)
        return range(begin, begin + self.replicas[stage])

    def worker(self, stage: int, minibatch: int) -> int:
        """Who runs a minibatch at a stage, forward and backward."""
        return self.first_worker(stage) + minibatch % self.replicas[stage]

    def warmup_forwards(self, stage: int) -> int:
        """Forwards of each replica before its first backward (papers: 1F1B-RR)."""
        return (self.num_workers - 1 - self.first_worker(stage)) // self.replicas[stage]
