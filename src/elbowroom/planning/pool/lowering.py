"""Lowering of action lists to tasks of the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.events import Task
from elbowroom.plans.pool import PoolShare
from elbowroom.plans.pool_actions import Action, Fetch, Release, Run, Ship, Wait

RESOURCES = ("compute", "out", "in")
"""Resources of each replica: its device, and the two directions of its link."""


class RankActions(NamedTuple):
    """Actions of one replica in one iteration: of its compute stream, and of its copies."""

    compute: tuple[Action, ...]
    copies: tuple[Fetch, ...]


@dataclass
class _Rank:
    """Tasks listed so far that the next actions of one replica refer to."""

    fetched: dict[int, list[int]] = field(default_factory=dict)
    first_piece: dict[int, int] = field(default_factory=dict)
    releases: list[int] = field(default_factory=list)
    lanes: dict[int, int] = field(default_factory=dict)
    num_acquired: int = 0


class Lowering:
    """Translation of actions into tasks: one handler per action, cost rules from ``cost``.

    Tasks must be listed after those that they wait for, while the two streams of a replica wait for
    each other in turns: fetches are listed as far as slots are free, then compute up to its next
    release.
    """

    def __init__(
        self,
        cost: CostModel,
        shares: Sequence[PoolShare],
        batches: Sequence[Batch],
        actions: Sequence[RankActions],
        joined: bool,
        copies_at_once: int | None,
    ) -> None:
        self.tasks: list[Task] = []
        self.last_tasks: list[list[int]] = []
        self.held: list[tuple[int, int, int, int]] = []
        self._cost = cost
        self._shares = shares
        self._batches = batches
        self._actions = actions
        self._joined = joined
        self.copies_at_once = copies_at_once or max(1, *(share.num_slots for share in shares))
        self._ranks = [_Rank() for _ in shares]
        self._shipped = {
            action.layer
            for of_rank in actions
            for action in of_rank.compute
            if isinstance(action, Ship)
        }
        self._parts = [self._part_seconds(batch) for batch in batches]
        self._waiting: dict[int, list[tuple[int, int]]] = {}
        self._compute: dict[type, Callable[[int, Action], None]] = {
            Run: self._run,
            Wait: self._wait,
            Release: self._release,
            Ship: self._ship,
        }

    def add_iteration(self) -> None:
        """Add an iteration of every replica, layer by layer so that owners come in order."""
        queues = [list(actions.copies) for actions in self._actions]
        compute = [list(actions.compute) for actions in self._actions]
        for layer in range(self._cost.model.num_layers):
            self._waiting.clear()
            for rank, queue in enumerate(queues):
                self._add_fetches(rank, queue)
                while compute[rank] and compute[rank][0].layer == layer:
                    action = compute[rank].pop(0)
                    self._compute[type(action)](rank, action)
            self._serve_joined(layer)
        for rank, queue in enumerate(queues):
            self._add_fetches(rank, queue)
            assert not queue and not compute[rank]
        self.last_tasks.append([self._add_tail(rank) for rank in range(len(self._shares))])

    def _add_fetches(self, rank: int, queue: list[Fetch]) -> None:
        """List fetches until one needs a slot whose release is not listed yet."""
        state, share = self._ranks[rank], self._shares[rank]
        while queue:
            fetch = queue[0]
            if fetch.layer not in state.fetched:
                before = state.num_acquired - share.num_slots
                if before >= len(state.releases):
                    return
                after = (state.releases[before],) if before >= 0 else ()
                state.lanes[fetch.layer] = state.num_acquired
                state.num_acquired += 1
                state.fetched[fetch.layer] = []
                state.first_piece[fetch.layer] = len(self.tasks)
            else:
                after = ()
            queue.pop(0)
            state.fetched[fetch.layer].append(len(self.tasks))
            self._fetch(rank, fetch, after)

    def _fetch(self, rank: int, fetch: Fetch, after: tuple[int, ...]) -> None:
        """Add a copy over both ends' links; it uses compute as well where that does the copying."""
        owner = self._shares[rank].owners[fetch.layer]
        link = self._cost.peer_link(len(self._shares))
        layer_bytes = self._cost.ffn_layer_bytes(fetch.layer)
        uses = [(self._resource(owner, "out"), 1.0), (self._resource(rank, "in"), 1.0)]
        if not self._cost.cluster.device.copies_overlap:
            uses.append((self._resource(rank, "compute"), 1.0))
        # A layer's latency is that of its first chunk: copies are issued ahead.
        latency = link.latency_seconds if fetch.chunk == 0 else 0.0
        seconds = layer_bytes / fetch.num_chunks / link.bandwidth.achieved
        lane = self._ranks[rank].lanes[fetch.layer] % self.copies_at_once
        self._add(str(fetch), self._copy_stream(rank, lane), seconds, tuple(uses), after, latency)

    def _run(self, rank: int, action: Action) -> None:
        assert isinstance(action, Run)
        if self._joined and action.part == "F" and action.layer in self._shipped:
            return  # the owner's rows go with the others', see _serve_joined
        attention, ffn = self._parts[rank]
        seconds = attention if action.part == "A" else ffn[action.layer]
        self._add_compute(rank, str(action), seconds)

    def _wait(self, rank: int, action: Action) -> None:
        self._add(str(action), rank, 0.0, after=tuple(self._ranks[rank].fetched[action.layer]))

    def _release(self, rank: int, action: Action) -> None:
        state = self._ranks[rank]
        state.releases.append(len(self.tasks))
        first = state.first_piece.pop(action.layer)
        self.held.append((rank, action.layer, first, len(self.tasks)))
        del state.fetched[action.layer]
        self._add(str(action), rank, 0.0)

    def _ship(self, rank: int, action: Action) -> None:
        """Add the trip of shipped rows: to the owner, its work on them, and back.

        Compute continues after that.
        """
        owner, rows = self._owner(rank, action), self._batches[rank].num_tokens
        sent = self._transfer(f"{action} out", rank, owner, rows, len(self.tasks) - 1)
        if self._joined:
            self._waiting.setdefault(action.layer, []).append((rank, sent))
            return
        seconds = self._parts[rank][1][action.layer]
        uses = ((self._resource(owner, "compute"), 1.0),)
        served = self._add(f"{action} for {rank}", None, seconds, uses, (sent,))
        self._answer(rank, action, served)

    def _serve_joined(self, layer: int) -> None:
        """Add one pass of the owner over its own rows and those of all who shipped the layer."""
        shipped = self._waiting.get(layer)
        if not shipped:
            return
        owner = self._shares[0].owners[layer]
        rows = sum(self._batches[rank].num_tokens for rank in {owner, *(r for r, _ in shipped)})
        seconds = self._cost.ffn_layer_seconds(layer, rows)
        uses = ((self._resource(owner, "compute"), 1.0),)
        after = tuple(sent for _, sent in shipped)
        served = self._add(f"S{layer} joined", owner, seconds, uses, after)
        for rank, _ in shipped:
            self._answer(rank, Ship(layer), served)

    def _answer(self, rank: int, action: Action, served: int) -> None:
        owner, rows = self._owner(rank, action), self._batches[rank].num_tokens
        back = self._transfer(f"{action} back", owner, rank, rows, served)
        self._add(str(action), rank, 0.0, after=(back,))

    def _transfer(self, name: str, source: int, target: int, rows: float, after: int) -> int:
        """Add the transfer of ``rows`` rows' hidden states over the link between two replicas."""
        link = self._cost.peer_link(len(self._shares))
        seconds = self._cost.hidden_bytes(rows) / link.bandwidth.achieved
        uses = ((self._resource(source, "out"), 1.0), (self._resource(target, "in"), 1.0))
        return self._add(name, None, seconds, uses, (after,), link.latency_seconds)

    def _add_tail(self, rank: int) -> int:
        """Add the head, sampling and scheduling: an iteration's work beside its layers."""
        cost = self._cost.iteration(self._batches[rank])
        return self._add_compute(rank, "head", cost.head + cost.engine)

    def _add_compute(self, rank: int, name: str, seconds: float) -> int:
        uses = ((self._resource(rank, "compute"), 1.0),)
        return self._add(name, rank, seconds, uses)

    def _add(
        self,
        name: str,
        stream: int | None,
        seconds: float,
        uses: tuple[tuple[int, float], ...] = (),
        after: tuple[int, ...] = (),
        latency: float = 0.0,
    ) -> int:
        self.tasks.append(Task(name, stream, seconds, uses, after, latency))
        return len(self.tasks) - 1

    def _part_seconds(self, batch: Batch) -> tuple[float, list[float]]:
        """Seconds of one layer's attention with collectives and small kernels, and of each FFN."""
        cost, num_layers = self._cost.iteration(batch), self._cost.model.num_layers
        outside = cost.head + cost.engine + cost.ffn
        ffn = [self._cost.ffn_layer_seconds(i, batch.num_tokens) for i in range(num_layers)]
        return (cost.total - outside) / num_layers, ffn

    def _owner(self, rank: int, action: Action) -> int:
        return self._shares[rank].owners[action.layer]

    def _copy_stream(self, rank: int, lane: int) -> int:
        return len(self._shares) + rank * self.copies_at_once + lane

    @staticmethod
    def _resource(rank: int, name: str) -> int:
        return len(RESOURCES) * rank + RESOURCES.index(name)
