"""Offers rows to replicas: one queue, and each replica takes what it has room for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elbowroom.core.kv_cache import KvGroups
from elbowroom.jobs.rows import BYTES_PER_TOKEN, RejectedRow, Row

_FIRST_GUESS_OUTPUT_TOKENS = 256.0  # of a row without a limit, until rows have finished
_SLOWEST_LEARNING_RATE = 0.05  # of moving averages; the first rows count more


class TokenUsage(NamedTuple):
    """Tokens of one finished row, as the engine reports them."""

    prompt_tokens: int
    output_tokens: int


class RowEstimator:
    """How many tokens of KV cache a row will need at its end. Learns from finished rows.

    ``bytes_per_token`` is what prompts have until some have finished.
    """

    def __init__(self, bytes_per_token: float = BYTES_PER_TOKEN) -> None:
        self._num_learned = 0
        self._bytes_per_token = bytes_per_token
        self._output_tokens = 0.0
        self._deviation = 0.0

    def num_tokens(self, row: Row) -> int:
        """Expected prompt tokens, and a cautious guess (mean and one deviation) of the output.

        Before any row has finished, a row is believed to use all the output it asks for.
        """
        limit = row.output_limit
        guess = self._output_tokens + self._deviation
        if self._num_learned == 0:
            guess = limit if limit < float("inf") else _FIRST_GUESS_OUTPUT_TOKENS
        return int(row.prompt_bytes / self._bytes_per_token + min(guess, limit)) + 1

    def learn(self, row: Row, usage: TokenUsage) -> None:
        self._num_learned += 1
        rate = max(_SLOWEST_LEARNING_RATE, 1 / self._num_learned)
        ratio = row.prompt_bytes / max(1, usage.prompt_tokens)
        error = usage.output_tokens - self._output_tokens
        self._bytes_per_token += rate * (max(0.25, ratio) - self._bytes_per_token)
        self._output_tokens += rate * error
        if self._num_learned > 1:
            self._deviation += rate * (abs(error) - self._deviation)


@dataclass
class Intake:
    """What one replica holds: its rows in flight, and the KV tokens set aside for them.

    While ``suspects`` is not None, it holds rows of one cohort of suspects and no others;
    those of them that are still to be offered are in the list.
    """

    num_kv_tokens: int
    max_rows: int
    rows: dict[int, Row] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    suspects: deque[Row] | None = None

    @property
    def free_tokens(self) -> int:
        return self.num_kv_tokens - sum(self.reserved.values())

    def has_room(self, num_tokens: int) -> bool:
        """An empty replica takes any row: the engine itself refuses what can never fit."""
        return not self.rows or (len(self.rows) < self.max_rows and num_tokens <= self.free_tokens)


class Offer(NamedTuple):
    """A row, and the replica that takes it."""

    replica: int
    row: Row


class Dispatcher:
    """Owns the rows in flight. Rows are read one by one, as replicas have room for them.

    Rows that a replica held when it died are suspects: any of them may have killed it. They are
    tried again on a replica that holds nothing else, in two halves; a half that kills again is
    halved again, and a row that kills alone is given up. Halves wait in a queue, so that between
    two deaths by one row, others prove that replicas work.
    """

    def __init__(
        self,
        rows: Iterable[Row | RejectedRow],
        bytes_per_token: float = BYTES_PER_TOKEN,
        groups: KvGroups | None = None,
    ) -> None:
        self._rows = iter(rows)
        self._groups = groups or KvGroups()
        self._intakes: dict[int, Intake] = {}
        self._estimator = RowEstimator(bytes_per_token)
        self._waiting: Row | None = None
        self._cohorts: deque[deque[Row]] = deque()
        self._is_exhausted = False

    @property
    def num_in_flight(self) -> int:
        return sum(len(intake.rows) for intake in self._intakes.values())

    @property
    def is_done(self) -> bool:
        """Every row was answered, refused or given up."""
        return (
            self._is_exhausted
            and self._waiting is None
            and not self._cohorts
            and not any(intake.rows or intake.suspects for intake in self._intakes.values())
        )

    def join(self, replica: int, num_kv_tokens: int, max_rows: int) -> None:
        """A replica is ready for rows."""
        self._intakes[replica] = Intake(num_kv_tokens, max_rows)

    def lose(self, replica: int) -> list[Row]:
        """A replica died. Returns the rows that are given up, because they kill alone."""
        intake = self._intakes.pop(replica, None)
        if intake is None:
            return []
        if intake.suspects:
            self._cohorts.append(intake.suspects)
        rows = list(intake.rows.values())
        if intake.suspects is not None and len(rows) == 1:
            return rows
        half = (len(rows) + 1) // 2
        self._cohorts.extend(deque(part) for part in (rows[:half], rows[half:]) if part)
        return []

    def holds_suspects(self, replica: int) -> bool:
        intake = self._intakes.get(replica)
        return intake is not None and intake.suspects is not None

    def offers(self) -> Iterator[Offer | RejectedRow]:
        """Rows that some replica has room for now, and rows that no replica should see.

        The next row goes to the replica with most room, so none idles while another queues.
        """
        for replica, intake in self._intakes.items():
            yield from self._offer_suspects(replica, intake)
        while (row := self._next()) is not None:
            if isinstance(row, RejectedRow):
                yield row
                continue
            num_tokens = self._cost(row)
            takers = [
                replica
                for replica, intake in self._intakes.items()
                if intake.suspects is None and intake.has_room(num_tokens)
            ]
            if not takers:
                self._waiting = row
                return
            replica = max(takers, key=lambda replica: self._intakes[replica].free_tokens)
            yield self._hand(replica, row, num_tokens)

    def finish(self, replica: int, index: int, usage: TokenUsage | None) -> Row:
        """A replica answered a row. Returns the row."""
        intake = self._intakes[replica]
        del intake.reserved[index]
        row = intake.rows.pop(index)
        if usage is not None:
            self._estimator.learn(row, usage)
        return row

    def _offer_suspects(self, replica: int, intake: Intake) -> Iterator[Offer]:
        """The next rows of the cohort that a replica tries; an empty replica takes one up."""
        if not intake.rows and not intake.suspects:
            intake.suspects = self._cohorts.popleft() if self._cohorts else None
        while intake.suspects:
            num_tokens = self._cost(intake.suspects[0])
            if not intake.has_room(num_tokens):
                return
            yield self._hand(replica, intake.suspects.popleft(), num_tokens)

    def _cost(self, row: Row) -> int:
        """KV tokens that a row is expected to take, where layers may keep a window of it."""
        return self._groups.row_tokens(self._estimator.num_tokens(row))

    def _hand(self, replica: int, row: Row, num_tokens: int) -> Offer:
        self._intakes[replica].rows[row.index] = row
        self._intakes[replica].reserved[row.index] = num_tokens
        return Offer(replica, row)

    def _next(self) -> Row | RejectedRow | None:
        if self._waiting is not None:
            row, self._waiting = self._waiting, None
            return row
        following = next(self._rows, None)
        self._is_exhausted = following is None
        return following


def token_usage(body: Any) -> TokenUsage | None:
    """The ``usage`` of an OpenAI response body, or None where it has none."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens") or usage.get("input_tokens")  # of /v1/responses
    output = usage.get("completion_tokens") or usage.get("output_tokens")
    return TokenUsage(prompt or 0, output or 0)
