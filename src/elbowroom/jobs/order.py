"""Order in which rows are offered: long outputs first, rows that share a prefix together."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np

from elbowroom.jobs.rows import RejectedRow, Row

PREFIX_BYTES = 16 * 1024
"""Bytes of a prompt's beginning that are compared with other prompts."""

_NUM_LEVELS = 12
LEVEL_BYTES = tuple(
    round(64 * (PREFIX_BYTES / 64) ** (level / (_NUM_LEVELS - 1))) for level in range(_NUM_LEVELS)
)
"""Prefix lengths 64, 106, 175 ... 16384: a shared prefix is found to 60 % of its length or more."""

_NO_LIMIT = 255  # the bucket of rows whose output has no limit; 10**18 tokens are in bucket 60
_PROMPT_KEYS = ("tools", "documents", "messages", "prompt", "input")  # as chat templates order them
_TOKEN_ID_BYTES = 4
_END = object()

Indices = np.ndarray[Any, np.dtype[np.uint32]]


class OrderBuilder:
    """Builder of the order to work on rows: sees every row once, in input order.

    Rows with the longest output limits (by powers of two) come first, so that the end of a run is
    short. Rows with similar limits that share a prefix come together, so that the engine finds it
    in its cache: within those that share 64 bytes, those that share 106, and so on. A group comes
    where its first row would; otherwise rows keep the input order.

    Keeps 49 bytes per row. Different prefixes with the same 32-bit hash come together too, which
    does no harm.
    """

    def __init__(self) -> None:
        self._buckets = array("B")
        self._hashes = array("I")  # rows x levels

    def visit(self, row: Row | RejectedRow) -> None:
        """Take the next row. One that no engine will see comes last."""
        if isinstance(row, Row):
            self.add(prompt_prefix(row.body), row.output_limit)
        else:
            self.add(b"", 0)

    def add(self, prefix: bytes, output_limit: float) -> None:
        """Take the next row: the beginning of its prompt, its most output tokens (or infinity)."""
        bucket = _NO_LIMIT if math.isinf(output_limit) else int(output_limit).bit_length()
        self._buckets.append(bucket)
        append, num_bytes, start = self._hashes.append, len(prefix), 0
        crc = bucket  # equal prefixes in different buckets are no group
        for end in LEVEL_BYTES:
            if start < num_bytes:
                crc = crc32(prefix[start:end], crc)
            append(crc)
            start = end

    def order(self) -> Indices:
        """The indices of all rows. Sorts by the finest level first; later sorts keep its order."""
        hashes = np.frombuffer(self._hashes, np.uint32).reshape(-1, _NUM_LEVELS)
        order = np.arange(len(hashes), dtype=np.uint32)
        for level in reversed(range(_NUM_LEVELS)):
            order = _sorted_by(_first_rows(hashes[:, level]), order)
        return _sorted_by(_NO_LIMIT - np.frombuffer(self._buckets, np.uint8), order)


def prompt_prefix(body: dict[str, Any]) -> bytes:
    """Beginning of a request's prompt, as far as a chat template's input tells.

    Takes any JSON value anywhere, and looks at no more of it than goes into ``PREFIX_BYTES``.
    """
    prefix = bytearray()
    for piece in _pieces([body[key] for key in _PROMPT_KEYS if body.get(key) is not None]):
        prefix += piece
        prefix += b"\0"
        if len(prefix) >= PREFIX_BYTES:
            break
    return bytes(prefix[:PREFIX_BYTES])


def _pieces(value: Any) -> Iterator[bytes]:
    """The keys and leaves of a JSON value, depth first, and an empty one for each list or object.

    Works without recursion, so at any depth. Every step yields something, so a caller that stops
    early has read little.
    """
    stack = [iter((value,))]
    while stack:
        inner = next(stack[-1], _END)
        if inner is _END:
            stack.pop()
        elif isinstance(inner, str):
            yield inner[:PREFIX_BYTES].encode("utf-8", "surrogatepass")
        elif isinstance(inner, dict):
            stack.append(chain.from_iterable(_role_first(inner).items()))
            yield b""
        elif isinstance(inner, list):
            ids = _token_ids(inner)
            stack.append(iter(inner if ids is None else ()))
            yield ids or b""
        else:
            yield (f"{inner:x}" if isinstance(inner, int) else str(inner)).encode()


def _role_first(value: dict[str, Any]) -> dict[str, Any]:
    """A message with its role first, whatever the order in the file."""
    if "role" not in value:
        return value
    return {"role": value["role"], "content": value.get("content"), **value}


def _token_ids(values: list[Any]) -> bytes | None:
    """A list of token ids as bytes, 4 each; None if it is something else."""
    if not values or not isinstance(values[0], int):
        return None
    try:
        return array("i", values[: PREFIX_BYTES // _TOKEN_ID_BYTES]).tobytes()
    except (TypeError, OverflowError):
        return None


def _first_rows(hashes: Indices) -> Indices:
    """The first row with the same hash, for each row."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first.astype(np.uint32)[group]


def _sorted_by(keys: np.ndarray[Any, Any], order: Indices) -> Indices:
    """The order, sorted by the keys of its rows; rows with equal keys keep their order."""
    return order[np.argsort(keys[order], kind="stable")]
