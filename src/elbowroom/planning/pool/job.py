"""Simulation of a whole job: replicas pull rows from one queue and batch them continuously.

Every row has its own length. A replica admits rows while its KV cache has room for them to their
end, takes prompts in chunks beside its decode rows as vLLM does, and decodes. All iterations
between two events (a row is admitted, a row ends) are timed at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.kv_cache import KvGroups
from elbowroom.core.workload import Workload
from elbowroom.planning.cost import Batch
from elbowroom.planning.pool.modes import Mode, PoolTimes

Policy = Literal["local", "mapped", "streamed", "shipped", "per-replica", "group", "mixed"]
"""Rule by which the mode of an iteration is chosen.

``local`` is without a pool; ``per-replica`` takes the faster of streamed and shipped by the
replica's own batch; ``group`` lets all replicas of the group use one mode by their mean batch,
reconsidered once a minute, as in the paper.
"""

GROUP_PERIOD_SECONDS = 60.0
_MAX_SEGMENTS = 20_000


@dataclass(frozen=True)
class ReplicaLimits:
    """Limits of one replica: KV tokens, rows at once, tokens of one iteration."""

    num_kv_tokens: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_tokens: int = 32
    groups: KvGroups = field(default_factory=KvGroups)

    def row_tokens(self, num_tokens: float) -> int:
        """KV tokens that a row of ``num_tokens`` tokens takes, in whole blocks."""
        return self.groups.row_tokens(num_tokens, self.block_tokens)

    def longest_row(self, most: int) -> int:
        """Tokens of the longest row that fits, up to ``most``; 0 if none does."""
        return self.groups.longest_row(self.num_kv_tokens, self.block_tokens, most)

    def rows_at_once(self, workload: Workload) -> int:
        """Rows of a workload's mean length that fit at once."""
        return min(self.max_num_seqs, self.num_kv_tokens // self.row_tokens(workload.mean_row))


class Segment(NamedTuple):
    """Consecutive iterations of one replica, for the trace. Times are in seconds."""

    replica: int
    start: float
    end: float
    num_iterations: int
    num_rows: int
    prefill_tokens: int
    mode: Mode


@dataclass
class ReplicaOutcome:
    """Totals of one replica. ``mode_iterations`` counts iterations by mode."""

    finish_seconds: float = 0.0
    num_rows: int = 0
    num_iterations: int = 0
    output_tokens: int = 0
    peak_rows: int = 0
    peak_kv_tokens: int = 0
    mode_iterations: dict[Mode, int] = field(default_factory=dict)


@dataclass(frozen=True)
class JobOutcome:
    """Result of a simulated job. ``segments`` is cut off after 20,000."""

    seconds: float
    output_tokens: int
    replicas: tuple[ReplicaOutcome, ...]
    segments: tuple[Segment, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def mode_share(self, mode: Mode) -> float:
        """Fraction of all iterations that ran in ``mode``."""
        done = sum(replica.mode_iterations.get(mode, 0) for replica in self.replicas)
        return done / max(1, sum(replica.num_iterations for replica in self.replicas))


def simulate_job(
    times: PoolTimes,
    limits: ReplicaLimits,
    workload: Workload,
    num_replicas: int,
    policy: Policy,
    speeds: tuple[float, ...] | None = None,
) -> JobOutcome:
    """Run a workload on equal replicas; ``speeds[r]`` is the relative speed of replica r.

    Raises MemoryPlanError when a row is longer than a replica's KV cache.
    """
    needed = limits.row_tokens(workload.longest_row)
    if needed > limits.num_kv_tokens:
        raise MemoryPlanError(
            f"the longest row has {workload.longest_row} tokens, and a replica's KV cache "
            f"{limits.num_kv_tokens}: leave it out, or give replicas more memory"
        )
    iterations = _Iterations(times, policy, num_replicas, speeds or (1.0,) * num_replicas)
    rows = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    queue = deque(rows)
    segments: list[Segment] = []
    replicas = [_Replica(number, limits, iterations, segments) for number in range(num_replicas)]
    # At the start all have room: rows are dealt out. Later only a replica whose row ended has any.
    while sum(replica.take(queue) for replica in replicas):
        pass
    clocks = [(0.0, number) for number in range(num_replicas)]
    while clocks:
        now, number = heapq.heappop(clocks)
        end = replicas[number].advance(now, queue)
        if end is not None:
            heapq.heappush(clocks, (end, number))
    outcomes = tuple(replica.outcome for replica in replicas)
    return JobOutcome(
        seconds=max(outcome.finish_seconds for outcome in outcomes),
        output_tokens=sum(outcome.output_tokens for outcome in outcomes),
        replicas=outcomes,
        segments=tuple(segments),
    )


class _Replica:
    """One engine. Rows in its heap are ordered by the iteration in which they will end."""

    def __init__(
        self,
        number: int,
        limits: ReplicaLimits,
        iterations: _Iterations,
        segments: list[Segment],
    ) -> None:
        self.outcome = ReplicaOutcome()
        self._number = number
        self._limits = limits
        self._iterations = iterations
        self._segments = segments
        self._prompts: deque[list[int]] = deque()  # [tokens done, prompt, output]
        self._ends: list[tuple[int, int, int]] = []  # (iteration, context then, reserved)
        self._reserved = 0
        self._context = 0

    def advance(self, now: float, queue: deque[tuple[int, int]]) -> float | None:
        """Admit rows, and compute up to the next event. Returns its time, None without work."""
        while self.take(queue):
            pass
        num_rows = len(self._ends)
        if self._prompts:
            end = self._prefill(now)
        elif num_rows:
            end = self._decode(now)
        else:
            self._iterations.rows[self._number] = 0
            return None
        self.outcome.finish_seconds = end
        self._retire()
        return end

    def take(self, queue: deque[tuple[int, int]]) -> bool:
        """Admit the next row, if there is room for it to its end."""
        limits, outcome = self._limits, self.outcome
        num_rows = len(self._prompts) + len(self._ends)
        self._iterations.rows[self._number] = num_rows
        if not queue or num_rows == limits.max_num_seqs:
            return False
        prompt, output = queue[0]
        reserved = self._reserved + limits.row_tokens(prompt + output)
        if reserved > limits.num_kv_tokens:
            return False
        queue.popleft()
        self._reserved = reserved
        self._prompts.append([0, prompt, output])
        outcome.num_rows += 1
        outcome.peak_kv_tokens = max(outcome.peak_kv_tokens, reserved)
        outcome.peak_rows = max(outcome.peak_rows, num_rows + 1)
        return True

    def _prefill(self, now: float) -> float:
        """Run one iteration with prompts, which get the token budget that decode rows leave."""
        budget = max(1, self._limits.max_num_batched_tokens - len(self._ends))
        num_decode, num_prompts, tokens, pairs, finished = len(self._ends), 0, 0, 0.0, []
        while self._prompts and tokens < budget:
            row = self._prompts[0]
            done, prompt, output = row
            chunk = min(prompt - done, budget - tokens)
            num_prompts += 1
            tokens += chunk
            pairs += chunk * (done + chunk / 2)
            row[0] += chunk
            if row[0] == prompt:
                self._prompts.popleft()
                finished.append((prompt, output))
        batch = Batch(num_decode, self._context, tokens, pairs, num_prompts)
        seconds, mode = self._iterations.one(self._number, now, batch)
        self._pass(now, now + seconds, 1, mode, tokens)
        for prompt, output in finished:
            self._start_decoding(prompt, output)
        return now + seconds

    def _start_decoding(self, prompt: int, output: int) -> None:
        """Move a row from prompts to decoding; its first token came with its last prompt chunk."""
        self.outcome.output_tokens += 1
        reserved = self._limits.row_tokens(prompt + output)
        last = self.outcome.num_iterations + output - 1
        heapq.heappush(self._ends, (last, prompt + output, reserved))
        self._context += prompt + 1

    def _decode(self, now: float) -> float:
        """Run all iterations up to the next end of a row; returns the time after them."""
        count = self._ends[0][0] - self.outcome.num_iterations
        if count <= 0:
            return now
        num_rows = len(self._ends)
        ends, mode = self._iterations.many(self._number, now, num_rows, self._context, count)
        self._pass(now, float(ends[-1]), len(ends), mode, 0)
        return float(ends[-1])

    def _pass(self, start: float, end: float, count: int, mode: Mode, prefill: int) -> None:
        num_rows = len(self._ends)
        outcome = self.outcome
        outcome.num_iterations += count
        outcome.output_tokens += count * num_rows
        outcome.mode_iterations[mode] = outcome.mode_iterations.get(mode, 0) + count
        self._context += count * num_rows
        if len(self._segments) < _MAX_SEGMENTS:
            self._segments.append(Segment(self._number, start, end, count, num_rows, prefill, mode))

    def _retire(self) -> None:
        while self._ends and self._ends[0][0] <= self.outcome.num_iterations:
            _, context, reserved = heapq.heappop(self._ends)
            self._context -= context
            self._reserved -= reserved


class _Iterations:
    """Seconds of iterations under a policy; what does not depend on the context is cached."""

    def __init__(
        self, times: PoolTimes, policy: Policy, num_replicas: int, speeds: tuple[float, ...]
    ) -> None:
        self.rows = [0] * num_replicas
        self._times = times
        self._policy = policy
        self._speeds = speeds
        self._fixed = cache(lambda tokens: times.cost.iteration(Batch(tokens, 0)).total)
        self._group_mode: Mode = "streamed"
        self._group_looked = float("-inf")

    def one(self, replica: int, now: float, batch: Batch) -> tuple[float, Mode]:
        """Seconds and mode of an iteration with prompts in it."""
        local = self._times.cost.iteration(batch).total
        seconds, mode = self._choose(replica, now, int(batch.num_tokens), np.array([local]))
        return float(seconds[0]) / self._speeds[replica], mode

    def many(
        self, replica: int, now: float, num_rows: int, context: int, count: int
    ) -> tuple[NDArray[np.float64], Mode]:
        """End times of ``count`` decode iterations, and their mode.

        Under policy ``group`` the list stops where the mode is due to be reconsidered.
        """
        contexts = context + num_rows * np.arange(count, dtype=np.float64)
        reads = self._times.cost.kv_read_seconds(contexts, num_rows)
        local = self._fixed(num_rows) + reads
        seconds, mode = self._choose(replica, now, num_rows, local)
        ends = now + np.cumsum(seconds) / self._speeds[replica]
        if self._policy == "group":
            due = self._group_looked + GROUP_PERIOD_SECONDS
            ends = ends[: max(1, int(np.searchsorted(ends, due, side="right")) + 1)]
        return ends, mode

    def _choose(
        self, replica: int, now: float, tokens: int, local: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], Mode]:
        times, policy = self._times, self._policy
        if policy == "local" or times.num_ranks == 1:
            return local, "local"
        if policy == "mapped":
            return local + self._mapped_extra(tokens), "mapped"
        if policy == "mixed":
            batch, joined = Batch(tokens, 0), self._joined_rows(replica, tokens)
            mixed = [times.mixed_seconds(batch, float(seconds), joined) for seconds in local]
            return np.array(mixed), "mixed"
        if policy == "group":
            return self._group(replica, now, tokens, local)
        stream = times.stream_seconds(local)
        if policy == "streamed":
            return stream, "streamed"
        ship = local + self._shipped_extra(tokens, self._joined_rows(replica, tokens))
        if policy == "shipped" or float(ship.sum()) < float(stream.sum()):
            return ship, "shipped"
        return stream, "streamed"

    def _mapped_extra(self, tokens: int) -> float:
        return self._times.mapped_seconds(Batch(tokens, 0), 0.0)

    def _shipped_extra(self, tokens: int, joined_rows: float) -> float:
        return self._times.ship_seconds(Batch(tokens, 0), 0.0, joined_rows)

    def _joined_rows(self, replica: int, tokens: int) -> float:
        """Rows that an owner joins: ``tokens`` of this replica, and those of the others.

        Each other replica of the group counts with their present mean; idle ones have no rows.
        """
        others = (sum(self.rows) - self.rows[replica]) / max(1, len(self.rows) - 1)
        return tokens + others * (self._times.num_ranks - 1)

    def _group(
        self, replica: int, now: float, tokens: int, local: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], Mode]:
        """Seconds and mode where the whole group uses one mode.

        Shipping is lockstep: all replicas wait for the one with the most rows, and for the slowest.
        """
        if now >= self._group_looked + GROUP_PERIOD_SECONDS:
            self._group_looked = now
            mean = int(np.ceil(np.mean(self.rows)))
            of_mean = np.array([self._fixed(max(1, mean))])
            shipped = self._shipped_extra(max(1, mean), sum(self.rows))
            streams = self._times.stream_seconds(of_mean) <= of_mean + shipped
            self._group_mode = "streamed" if streams[0] else "shipped"
        if self._group_mode == "streamed":
            return self._times.stream_seconds(local), "streamed"
        most = max(tokens, *self.rows)
        waiting = self._fixed(most) - self._fixed(tokens)
        lockstep = local + waiting + self._shipped_extra(most, sum(self.rows))
        return lockstep * (self._speeds[replica] / min(self._speeds)), "shipped"
