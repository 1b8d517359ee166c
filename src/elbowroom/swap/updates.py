"""Updates of one parameter after the other, whose gradient and state come and leave again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn, optim

from elbowroom.core.errors import SwapError
from elbowroom.swap.away import Coming, Leaving, Place
from elbowroom.swap.link import Link


class Turn(NamedTuple):
    """One parameter to be updated, and its group."""

    parameter: nn.Parameter
    group: dict[str, Any]


class Updates:
    """An optimizer's updates and its state, one parameter at a time.

    Args:
        optimizer: its own code updates each parameter.
        link: where state goes.

    """

    def __init__(self, optimizer: optim.Optimizer, link: Link) -> None:
        self._optimizer = optimizer
        self._link = link

    def run(self) -> None:
        """Update each parameter that has a gradient.

        Raises SwapError, or TierFullError, that says how many were updated.
        """
        turns = [turn for turn in self._turns() if turn.parameter.grad is not None]
        num_updated = 0
        try:
            for number in self._run(turns):
                num_updated = number
        except SwapError as error:
            raise type(error)(
                f"{error} (the step updated {num_updated} of {len(turns)} parameters: go on from a "
                "checkpoint)"
            ) from error

    def bring_state(self) -> None:
        """Bring back all state. Raises SwapError."""
        for turn in self._turns():
            for place in self._places(turn):
                place.bring()

    def send_state(self) -> None:
        """Send away all state that is here. Raises TierFullError and SwapError."""
        leaving: list[Leaving] = []
        for turn in self._turns():
            _finish(leaving)
            leaving = _those([place.leave(self._link) for place in self._places(turn)])
        _finish(leaving)

    def _run(self, turns: list[Turn]) -> Iterator[int]:
        """Update one parameter after the other; yields how many were.

        While one is updated the link brings what the next needs. Before that is asked for, what
        the one before had here has left.
        """
        leaving: list[Leaving] = []
        coming = self._ask_back(turns[0]) if turns else {}
        for number, turn in enumerate(turns):
            _finish(leaving)
            following = self._ask_back(turns[number + 1]) if number + 1 < len(turns) else {}
            for each in coming.values():
                each.arrive()
            self._update(turn)
            leaving = self._send(turn, coming)
            coming = following
            yield number + 1
        _finish(leaving)

    def _ask_back(self, turn: Turn) -> dict[Any, Coming]:
        """What is coming back for an update, by key of the state; the gradient by None."""
        places = {place.key: place for place in self._places(turn)}
        places = {None: Place(turn.parameter), **places}
        coming = {key: place.come_back() for key, place in places.items()}
        return {key: each for key, each in coming.items() if each is not None}

    def _update(self, turn: Turn) -> None:
        """Have the optimizer's own code update one parameter."""
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        alone = {**turn.group, "params": [turn.parameter]}
        # Its step without PyTorch's wrapper, whose hooks are run once for all parameters.
        step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
        optimizer.param_groups = [alone]
        try:
            step(optimizer)
        finally:
            optimizer.param_groups = groups
        alone["params"] = turn.group["params"]
        if alone.keys() != turn.group.keys() or any(
            alone[key] is not value for key, value in turn.group.items()
        ):
            raise SwapError(
                f"{type(optimizer).__name__} changes its groups as it updates a parameter, so it "
                "cannot update one after the other: use it plainly"
            )

    def _send(self, turn: Turn, coming: dict[Any, Coming]) -> list[Leaving]:
        """Have a gradient that came back and all state leave; what was only read goes at once."""
        gradient = coming.pop(None, None)
        leaving = [gradient.leave(self._link)] if gradient is not None else []
        for place in self._places(turn):
            came = coming.pop(place.key, None)
            leaving.append(place.leave(self._link) if came is None else came.leave(self._link))
        return _those(leaving)

    def _turns(self) -> Iterator[Turn]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield Turn(parameter, group)

    def _places(self, turn: Turn) -> list[Place]:
        """Where a parameter's state is."""
        state = self._optimizer.state.get(turn.parameter, {})
        return [Place(state, key) for key, each in state.items() if isinstance(each, torch.Tensor)]


def _those(leaving: Iterable[Leaving | None]) -> list[Leaving]:
    return [each for each in leaving if each is not None]


def _finish(leaving: Iterable[Leaving]) -> None:
    for each in leaving:
        each.finish()
