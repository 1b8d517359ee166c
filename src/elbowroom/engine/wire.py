"""Messages between the runner and a replica: JSON behind a length, over a socket pair."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")


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
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def drain(self) -> None:
        with suppress(ConnectionError):  # its end is seen by ``receive``
            await self._writer.drain()

    async def receive(self) -> Message | None:
        """The next message, or None when the peer is gone."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            data = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        message: Message = json.loads(data.decode("utf-8", "surrogatepass"))
        return message

    def close(self) -> None:
        self._writer.close()
