"""Actions of a training pipeline, and schedules: each worker's actions in order.

A minibatch is what passes the pipe as one. A schedule counts its minibatches through from 0; in a
flushed schedule these are the microbatches. Workers are numbered stage by stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline_shape import Pipe


@dataclass(frozen=True)
class _OwnAction:
    """Action of one worker alone. Text form: letters, stage, minibatch, such as ``F1.5``."""

    letters: ClassVar[str]
    stage: int
    minibatch: int

    def __str__(self) -> str:
        return f"{self.letters}{self.stage}.{self.minibatch}"


@dataclass(frozen=True)
class _PeerAction(_OwnAction):
    """Action with another worker. Text form: also an arrow and its number, as in ``SA1.5>4``."""

    arrow: ClassVar[str]
    worker: int

    def __str__(self) -> str:
        return f"{super().__str__()}{self.arrow}{self.worker}"


@dataclass(frozen=True)
class Forward(_OwnAction):
    """Compute a stage's outputs and keep what its backward needs. Text form: ``F1.5``."""

    letters = "F"


@dataclass(frozen=True)
class Backward(_OwnAction):
    """Add a minibatch's gradients to the stage's. Text form: ``B1.5``.

    It uses the weights of its forward, unless the rule for weight versions says otherwise.
    """

    letters = "B"


@dataclass(frozen=True)
class SendActivation(_PeerAction):
    """Begin to send a stage's outputs to a worker of the next stage. Text form: ``SA1.5>4``."""

    letters, arrow = "SA", ">"


@dataclass(frozen=True)
class RecvActivation(_PeerAction):
    """Wait for the outputs of a worker of the previous stage. Text form: ``RA1.5<0``."""

    letters, arrow = "RA", "<"


@dataclass(frozen=True)
class SendGradient(_PeerAction):
    """Begin to send gradients of the inputs to the previous stage. Text form: ``SG1.5>0``."""

    letters, arrow = "SG", ">"


@dataclass(frozen=True)
class RecvGradient(_PeerAction):
    """Wait for the gradients of a stage's outputs. Text form: ``RG1.5<4``."""

    letters, arrow = "RG", "<"


@dataclass(frozen=True)
class Reduce(_OwnAction):
    """Average gradients over all replicas of a stage, for all minibatches since the last reduce.

    ``minibatch`` is the last of them. All replicas take part, even one that had none of these
    minibatches: it contributes no gradient and gets the average. Text form: ``M1.5`` (mean).
    """

    letters = "M"


@dataclass(frozen=True)
class Update(_OwnAction):
    """Make an optimizer step with the gradients since the last one.

    ``minibatch`` is the last one counted. Text form: ``U1.5``.
    """

    letters = "U"


Compute = Forward | Backward
Send = SendActivation | SendGradient
Recv = RecvActivation | RecvGradient
PipelineAction = Compute | Send | Recv | Reduce | Update

_OWN: tuple[type[Compute | Reduce | Update], ...] = (Forward, Backward, Reduce, Update)
_PEER: tuple[type[Send | Recv], ...] = (SendActivation, RecvActivation, SendGradient, RecvGradient)
_NUMBER = "(0|[1-9][0-9]*)"
_TEXT = re.compile(rf"([A-Z]+){_NUMBER}\.{_NUMBER}(?:([<>]){_NUMBER})?")


def parse_action(text: str) -> PipelineAction:
    """Parse an action, the inverse of ``str``. Raises ValueError for any other text."""
    match = _TEXT.fullmatch(text)
    if match is not None:
        letters, stage, minibatch, arrow, worker = match.groups()
        for own in _OWN:
            if own.letters == letters and arrow is None:
                return own(int(stage), int(minibatch))
        for peer in _PEER:
            if (peer.letters, peer.arrow) == (letters, arrow):
                return peer(int(stage), int(minibatch), int(worker))
    raise ValueError(f"'{text}' is not an action of a pipeline such as F1.5 or SA1.5>4")


class Message(NamedTuple):
    """An activation or a gradient sent between two workers. ``stage`` is the sender's."""

    source: int
    target: int
    is_activation: bool
    stage: int
    minibatch: int

    @property
    def send(self) -> Send:
        """The action by which the sender sends this message."""
        kind = SendActivation if self.is_activation else SendGradient
        return kind(self.stage, self.minibatch, self.target)

    @property
    def recv(self) -> Recv:
        """The action by which the receiver waits for this message."""
        if self.is_activation:
            return RecvActivation(self.stage + 1, self.minibatch, self.source)
        return RecvGradient(self.stage - 1, self.minibatch, self.source)


def message_of(worker: int, action: Send | Recv) -> Message:
    """The message that ``worker`` sends or receives with ``action``."""
    is_activation = isinstance(action, SendActivation | RecvActivation)
    if isinstance(action, Send):
        return Message(worker, action.worker, is_activation, action.stage, action.minibatch)
    stage = action.stage - 1 if is_activation else action.stage + 1
    return Message(action.worker, worker, is_activation, stage, action.minibatch)


@dataclass(frozen=True)
class Schedule(Pipe):
    """The actions of every worker of a pipe, for ``num_minibatches`` minibatches.

    ``actions`` has one list for each worker. ``planning.pipeline.schedule_check`` checks that the
    lists fit together. Raises InputError for stages without workers, for no minibatches, and when
    there is not one list for each worker.
    """

    num_minibatches: int
    actions: tuple[tuple[PipelineAction, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches < 1:
            raise InputError(f"{self.num_minibatches} minibatches train nothing: give at least 1")
        if len(self.actions) != self.num_workers:
            raise InputError(f"{len(self.actions)} lists for {self.num_workers} workers")

    def __str__(self) -> str:
        """Text form: the stages and the number of minibatches, then one line for each worker."""
        stages = "-".join(map(str, self.replicas))
        lines = (" ".join(map(str, actions)) for actions in self.actions)
        return "\n".join((f"{stages} x {self.num_minibatches}", *lines))

    @staticmethod
    def parse(text: str) -> Schedule:
        """Parse a schedule, the inverse of ``str``. Raises InputError for any other text."""
        head, *lines = text.split("\n")
        match = re.fullmatch(rf"({_NUMBER}(?:-{_NUMBER})*) x {_NUMBER}", head)
        if match is None:
            raise InputError(f"no schedule: '{head[:80]}' is not such as '3-1 x 12'")
        try:
            return Schedule(
                replicas=tuple(map(int, match.group(1).split("-"))),
                num_minibatches=int(match.groups()[-1]),
                actions=tuple(_parse_actions(line.split(" ")) for line in lines),
            )
        except ValueError as error:
            raise InputError(f"no schedule: {error}") from error


def _parse_actions(texts: Iterable[str]) -> tuple[PipelineAction, ...]:
    return tuple(parse_action(text) for text in texts if text)
