"""Grid plans: how each layer of a model is split over the workers, by batch, space and features."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError, shown
from elbowroom.core.files import is_of_format, read_as, unversioned, versioned, write_json
from elbowroom.core.values import check_whole

_WHAT, _VERSION = "grid plan", 1
_MOST_PROCS = 1 << 20
_MOST = 10**15
_KEYS = {"outputs": "out", "inputs": "in"}
"""Names in the JSON form that are words of Python."""


@dataclass(frozen=True)
class LayerGrid:
    """Into how many parts one layer's work is split, along each of its axes.

    ``batch`` parts of the samples, ``space[k]`` parts of the k-th dimension of space, ``outputs``
    parts of the output features and ``inputs`` parts of the input features. Where their product is
    less than the number of workers, several compute the same. ``workers`` are the first of those
    that have the layer and how many they are; None is all. Raises InputError for parts that are no
    positive whole numbers.
    """

    name: str
    batch: int = 1
    space: tuple[int, ...] = ()
    outputs: int = 1
    inputs: int = 1
    workers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a layer is named {shown(self.name)}: give each layer a name")
        for what, parts in (
            ("batch", self.batch),
            ("out", self.outputs),
            ("in", self.inputs),
            *(("space", parts) for parts in self.space),
        ):
            check_whole(f"layer '{self.name}': {what}", parts, _MOST_PROCS, least=1)
        if self.workers is not None:
            if len(self.workers) != 2:
                raise InputError(f"layer '{self.name}': workers are the first, and how many")
            check_whole(f"layer '{self.name}': the first worker", self.workers[0], _MOST_PROCS)
            check_whole(f"layer '{self.name}': its workers", self.workers[1], _MOST_PROCS, least=1)

    def workers_of(self, procs: int) -> range:
        """The workers that have the layer, of ``procs``."""
        first, count = self.workers or (0, procs)
        return range(first, first + count)

    @property
    def size(self) -> int:
        """Workers that have different work."""
        return self.batch * math.prod(self.space) * self.outputs * self.inputs

    def __str__(self) -> str:
        space = "x".join(map(str, self.space)) or "1"
        return f"{self.batch} x {space} x {self.outputs} x {self.inputs}"

    def to_json(self) -> dict[str, Any]:
        data = {_KEYS.get(key, key): value for key, value in asdict(self).items()}
        workers = data.pop("workers")
        data["space"] = list(self.space)
        return data if workers is None else {**data, "workers": list(workers)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerGrid:
        names = {name: key for key, name in _KEYS.items()}
        found = {names.get(key, key): value for key, value in data.items()}
        workers = found.get("workers")
        return LayerGrid(
            **{
                **found,
                "space": tuple(found.get("space", ())),
                "workers": None if workers is None else tuple(workers),
            }
        )


@dataclass(frozen=True)
class GridPrediction:
    """What a planner expects of one iteration, for the worker that has the most to do.

    ``seconds`` is the whole iteration; ``compute_seconds`` its products alone, 0 where no rate was
    known; ``hidden_seconds`` is communication behind them. ``messages`` and ``num_bytes`` are what
    all workers send, but for the loss and a limit on the norm of gradients. ``memory_bytes`` is
    what a worker holds: weights, gradients, optimizer state and activations.
    """

    seconds: float = 0.0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    hidden_seconds: float = 0.0
    messages: int = 0
    num_bytes: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class GridPlan:
    """A grid for each layer that has weights; the others follow what they read.

    Args:
        procs: workers.
        batch: samples of a minibatch that it was made for.
        layers: at most one for each layer, by its name as traced.
        prediction: of the planner; nothing for a plan that was written by hand.

    A layer without weights may be named too: its output is then moved to that grid. Raises
    InputError for grids that do not fit the number of workers.

    """

    procs: int
    batch: int
    layers: tuple[LayerGrid, ...]
    prediction: GridPrediction = field(default_factory=GridPrediction)

    def __post_init__(self) -> None:
        check_whole("procs", self.procs, _MOST_PROCS, least=1)
        check_whole("batch", self.batch, _MOST, least=1)
        for name, count in Counter(layer.name for layer in self.layers).items():
            if count > 1:
                raise InputError(f"layer '{name}' has {count} grids: give it one")
        for layer in self.layers:
            workers = layer.workers_of(self.procs)
            if workers.stop > self.procs:
                raise InputError(
                    f"layer '{layer.name}' is on workers up to {workers.stop - 1}, and there are "
                    f"{self.procs}, from 0: give it others"
                )
            if len(workers) % layer.size:
                raise InputError(
                    f"layer '{layer.name}' is split {layer}, which needs {layer.size} workers, or "
                    f"a multiple, and there are {len(workers)}: give parts that divide them"
                )

    @cached_property
    def grid_of(self) -> dict[str, LayerGrid]:
        return {layer.name: layer for layer in self.layers}

    def __str__(self) -> str:
        return f"{len(self.layers)} layers on {self.procs} workers, batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        return {
            **versioned(_WHAT, _VERSION),
            "procs": self.procs,
            "batch": self.batch,
            "layers": [layer.to_json() for layer in self.layers],
            "prediction": asdict(self.prediction),
        }

    @staticmethod
    def from_json(data: Any) -> GridPlan:
        """Build a plan from its JSON form. Raises InputError for what ``to_json`` never writes."""
        data = unversioned(data, _WHAT, _VERSION)
        try:
            return GridPlan(
                data["procs"],
                data["batch"],
                tuple(LayerGrid.from_json(layer) for layer in data["layers"]),
                GridPrediction(**data.get("prediction", {})),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"no grid plan: {error}") from error


def is_grid_plan(path: Path) -> bool:
    """Whether a file says that it is a grid plan. Raises InputError if it cannot be read."""
    return is_of_format(path, _WHAT)


def read_grid_plan(path: str | Path) -> GridPlan:
    """Read a plan from a JSON file. Raises InputError."""
    return read_as(Path(path), GridPlan.from_json)


def write_grid_plan(path: Path, plan: GridPlan) -> None:
    """Write a JSON file that ``read_grid_plan`` reads. Raises OutputError."""
    write_json(path, plan.to_json())
