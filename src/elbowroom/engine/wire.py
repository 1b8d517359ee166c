"""Messages between the runner and a replica: typed, as JSON behind a length, over a socket pair."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from elbowroom.core.errors import shown
from elbowroom.plans.pool import RunPlan
from elbowroom.pool.stats import PoolStats

_LENGTH = struct.Struct("<I")


class MessageError(ValueError):
    """Received data that is no message of this version. The text says what differs."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a replica: its number in the plan, and where its group meets."""

    plan: RunPlan
    replica: int
    run_dir: str


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A row to answer. ``id`` comes back with the answer; None is no limit."""

    id: int
    url: str
    body: dict[str, Any]
    request_id: str
    max_seconds: float | None
    max_prompt_tokens: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """The last message to a replica, which then says ``Stopped`` and ends."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Announcement of a replica that takes rows. Resident bytes are weights and slots, measured."""

    num_kv_tokens: int
    resident_bytes: int
    start_seconds: float


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """Answer of the engine to a row: a result, or an HTTP error."""

    id: int
    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Failure of a row that broke one of our limits, which only the replica could tell."""

    id: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a replica since its start. ``kv_cache_usage`` is between 0 and 1."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    pool: PoolStats


@dataclass(frozen=True, slots=True)
class Stopped:
    """The last counters of a replica that ends as it was told to."""

    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """Reason why a replica ends without having been told to."""

    error: str


ToReplica = Start | RowRequest | Stop
FromReplica = Ready | RowAnswer | RowFailure | Stats | Stopped | Failed
Message = ToReplica | FromReplica


class _Field(NamedTuple):
    """Type of a field, and the JSON types that it takes; none where it is built, or anything."""

    kind: Any
    accepted: tuple[type, ...]


def _fields(cls: type) -> dict[str, _Field]:
    """Fields of a message, looked up once: there are two messages for every row."""
    return {name: _Field(kind, _accepted(kind)) for name, kind in get_type_hints(cls).items()}


def _accepted(kind: Any) -> tuple[type, ...]:
    if kind in (Any, RunPlan) or is_dataclass(kind):
        return ()
    types = (dict,) if get_origin(kind) is dict else get_args(kind) or (kind,)
    return (*types, int) if float in types else types  # JSON may have 1 for 1.0


_CLASSES: dict[str, type[Message]] = {cls.__name__: cls for cls in get_args(Message)}
_FIELDS = {cls: _fields(cls) for cls in (*_CLASSES.values(), PoolStats)}


class Channel:
    """One end of a socket pair. Nothing listens: the pair is handed down when a process starts."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def over(sock: socket.socket) -> Channel:
        reader, writer = await asyncio.open_connection(sock=sock)
        return Channel(reader, writer)

    def send(self, message: Message) -> None:
        """Queue a message. Never blocks; ``drain`` waits until the peer has read enough.

        A message to a peer that is gone is dropped: ``receive`` tells that it is.
        """
        if self._writer.is_closing():
            return
        data = encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def drain(self) -> None:
        with suppress(ConnectionError):  # its end is seen by ``receive``
            await self._writer.drain()

    async def receive(self) -> Message | None:
        """Receive the next message; None when the peer is gone. Raises MessageError."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            data = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return decode(data)

    def close(self) -> None:
        self._writer.close()


def encode(message: Message) -> bytes:
    """Encode a message as JSON: its fields, and the name of its class as ``type``."""
    text = _ENCODER.encode({"type": type(message).__name__, **_plain(message)})
    return text.encode("utf-8", "surrogatepass")  # half of a pair may stand in an answer


def decode(data: bytes) -> Message:
    """Decode what ``encode`` wrote. Raises MessageError for anything else."""
    try:
        loaded = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {error}") from error
    name = loaded.pop("type", None) if isinstance(loaded, dict) else None
    if not isinstance(name, str) or name not in _CLASSES:
        raise MessageError(f"no message of this version: {shown(name or loaded)}")
    message: Message = _build(_CLASSES[name], loaded)
    return message


def _plain(value: Any) -> dict[str, Any]:
    """JSON form of a plan, or fields of a message; ``json`` asks again for values inside."""
    if isinstance(value, RunPlan):
        return value.to_json()
    if type(value) not in _FIELDS:
        raise TypeError(f"{type(value).__name__} cannot be part of a message")
    return {name: getattr(value, name) for name in _FIELDS[type(value)]}


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain)


def _build(cls: type[Any], data: Any) -> Any:
    """Build a dataclass from exactly its fields. Raises MessageError."""
    fields = _FIELDS[cls]
    if not isinstance(data, dict) or data.keys() != fields.keys():
        raise MessageError(f"{cls.__name__} has {', '.join(fields)}, not {shown(data)}")
    for name, (kind, accepted) in fields.items():
        if kind is RunPlan:
            data[name] = _plan(data[name])
        elif accepted and not isinstance(data[name], accepted):
            wanted = " or ".join(dict.fromkeys(each.__name__ for each in accepted))
            raise MessageError(f"{cls.__name__}.{name} is {wanted}, not {shown(data[name])}")
        elif not accepted and kind is not Any:
            data[name] = _build(kind, data[name])
    return cls(**data)


def _plan(data: Any) -> RunPlan:
    try:
        return RunPlan.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"Start has a plan, not {type(error).__name__}: {error}") from error
