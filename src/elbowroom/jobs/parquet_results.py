"""Results as a Parquet file: a column for each thing that is looked up, and the whole as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError
from elbowroom.jobs.dispatcher import token_usage
from elbowroom.jobs.parquet import explained_table, load_arrow

COLUMNS = {
    **{"custom_id": "string", "id": "string", "status_code": "int32"},
    **{"response": "string", "error": "string", "text": "string", "finish_reason": "string"},
    **{"prompt_tokens": "int64", "completion_tokens": "int64"},
}
"""Columns and their Arrow types. ``response``, the body, and ``error`` are JSON text."""

_GROUP_BYTES = 16 * 1024**2
"""Result lines that become one row group, at least."""

_BATCH_ROWS = 1024


def table_parts(path: Path, lines: Iterator[bytes]) -> Iterator[bytes]:
    """Contents of a Parquet file named ``path``, with a row for each of some result lines.

    Raises InputError without pyarrow.
    """
    arrow = load_arrow(path)
    schema = arrow.base.schema(list(COLUMNS.items()))
    sink = _Sink()
    with arrow.parquet.ParquetWriter(sink, schema) as writer:
        for group in _groups(lines):
            writer.write_batch(arrow.base.RecordBatch.from_pylist(group, schema))
            yield sink.take()
    yield sink.take()


def table_ids(path: Path) -> Iterator[str]:
    """The ``custom_id`` of every row of a Parquet file of results. Raises InputError."""
    arrow = load_arrow(path)
    with explained_table(path, arrow), arrow.base.OSFile(str(path)) as source:
        table = arrow.parquet.ParquetFile(source)
        names = ["custom_id", "response", "error"]
        if missing := [name for name in names if name not in table.schema_arrow.names]:
            raise InputError(f"{path} has no column '{missing[0]}': it holds no results")
        number = 0
        for batch in table.iter_batches(_BATCH_ROWS, columns=names):
            ids, *kinds = (batch.column(name) for name in names)
            is_empty = [kind.is_null().to_pylist() for kind in kinds]
            for custom_id, *empty in zip(ids.to_pylist(), *is_empty, strict=True):
                number += 1
                if not isinstance(custom_id, str):
                    raise InputError(f"{path}, row {number} has no custom_id: it is no result")
                if all(empty):
                    raise InputError(
                        f"{path}, row {number} has neither a response nor an error: it is no result"
                    )
                yield custom_id


class _Sink(io.RawIOBase):
    """File that keeps what is written to it until that is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._num_bytes += len(part)
        return len(part)

    def tell(self) -> int:
        return self._num_bytes

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _groups(lines: Iterator[bytes]) -> Iterator[list[dict[str, Any]]]:
    """Rows of result lines, in groups of about 16 MiB."""
    group: list[dict[str, Any]] = []
    num_bytes = 0
    for line in lines:
        group.append(_row(json.loads(line)))
        num_bytes += len(line)
        if num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """Columns of one result; those that it does not have are null."""
    response, error = result["response"], result["error"]
    row = {"custom_id": result["custom_id"], "id": result["id"], "error": _json_text(error)}
    if response is not None:
        body = response["body"]
        choice = next(_objects(body, "choices"), {})
        row |= {
            "status_code": response["status_code"],
            "response": _json_text(body),
            "text": _string(_text(body, choice)),
            "finish_reason": _string(choice.get("finish_reason")),
        }
        if (usage := token_usage(body)) is not None:
            row |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.output_tokens}
    return row


def _text(body: Any, choice: dict[str, Any]) -> Any:
    """Text of the first choice, or all output text of an answer of /v1/responses."""
    if "message" in choice or "text" in choice:
        message = choice.get("message")
        return message.get("content") if isinstance(message, dict) else choice.get("text")
    parts = (part for item in _objects(body, "output") for part in _objects(item, "content"))
    texts = [str(part.get("text")) for part in parts if part.get("type") == "output_text"]
    return "".join(texts) if texts else None


def _objects(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """The objects in a list that is a field of a body, which may be anything."""
    items = value.get(name) if isinstance(value, dict) else None
    if isinstance(items, list):
        yield from (item for item in items if isinstance(item, dict))


def _json_text(value: Any) -> str | None:
    """JSON as result lines have it: half a surrogate pair is a \\u escape."""
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def _string(value: Any) -> str | None:
    """A text as UTF-8 can hold it: half a surrogate pair becomes U+FFFD. None for no text."""
    if not isinstance(value, str):
        return None
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
