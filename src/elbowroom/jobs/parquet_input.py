"""Rows of a Parquet file as the JSON lines of a batch file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from elbowroom.core.errors import InputError, shown
from elbowroom.jobs.parquet import explained_table, load_arrow
from elbowroom.jobs.request_fields import FIELDS
from elbowroom.jobs.rows import CHAT, COMPLETIONS
from elbowroom.jobs.strict_json import load_any_json

_TEXTS = ("custom_id", "method", "url")
_URLS = {"messages": CHAT, "prompt": COMPLETIONS}
"""Endpoints of rows without a ``url``, by the field that they have; the first counts."""

_PANDAS_INDEX = "__index_level_"
"""Beginning of the names of columns that pandas writes beside those of the data."""

_BATCH_ROWS = 256
_BUFFER_BYTES = 1024**2

_dumps = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))

_Converter = Callable[[Any], Any]
"""Makes what Python has of an Arrow value what it would have of the same value in JSON."""


def read_lines(path: Path) -> Iterator[bytes]:
    """The rows of a file, each as one line, a few hundred lines at a time.

    The same file gives the same lines in every run. Memory does not grow with the file or its row
    groups. A row that is no request becomes a line that is none. Raises InputError for a file that
    is damaged, and for columns that no request has.
    """
    arrow = load_arrow(path)
    with explained_table(path, arrow), arrow.base.OSFile(str(path)) as source:
        table = arrow.parquet.ParquetFile(source, buffer_size=_BUFFER_BYTES)
        converters = _Columns(path, table.schema_arrow, arrow.base.types).converters()
        for batch in table.iter_batches(_BATCH_ROWS, columns=list(converters)):
            columns = [
                map(convert, batch.column(name).to_pylist()) for name, convert in converters.items()
            ]
            rows = (dict(zip(converters, row, strict=True)) for row in zip(*columns, strict=True))
            yield b"".join(map(_line, rows))


def _line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a batch file. A column that is null is as if it were not there."""
    given = {name: value for name, value in row.items() if value is not None}
    head = {"method": "POST", **{name: given.pop(name) for name in _TEXTS if name in given}}
    body: Any = given.get("body") if "body" in row else given
    text = None
    if isinstance(body, str) and isinstance(data := load_any_json(body.encode()), dict):
        text = body.replace("\n", " ")  # these are between tokens: strings in JSON have none
        body = data
    if "url" not in head:
        fields = body if isinstance(body, dict) else _URLS  # no body: then that is what is wrong
        found = (url for name, url in _URLS.items() if fields.get(name) is not None)
        head["url"] = next(found, None)
    if text is None:
        return f"{_dumps({**head, 'body': body})}\n".encode()
    return f'{_dumps(head)[:-1]},"body":{text}}}\n'.encode()


class _Columns:
    """Columns of a table, which make requests or are refused by name.

    ``types`` is ``pyarrow.types``.
    """

    def __init__(self, path: Path, schema: Any, types: Any) -> None:
        self._path = path
        self._types = types
        self._fields = [field for field in schema if not field.name.startswith(_PANDAS_INDEX)]

    def converters(self) -> dict[str, _Converter]:
        """Converters of all columns, by name. Raises InputError for what no request has."""
        kinds = {field.name: field.type for field in self._fields}
        if len(kinds) < len(self._fields):
            self._refuse("has several columns of one name: rename them")
        if "custom_id" not in kinds:
            self._refuse("has no column 'custom_id': add one, with an id for each row")
        known = {*_TEXTS, *self._fields_of_body(kinds)}
        for name, kind in kinds.items():
            if name not in known:
                body = "stands beside 'body'" if "body" in kinds else "is no field of its requests"
                self._refuse(f"has a column {shown(name)}, which {body}: leave it out")
            if name in _TEXTS and not (self._is_text(kind) or self._types.is_null(kind)):
                self._refuse(f"has {kind} in column '{name}': write strings")
            if name == "messages" and self._is_text(kind):
                self._refuse(
                    "has text in column 'messages': write lists of structs, or whole bodies as "
                    "JSON text in a column 'body'"
                )
        return {name: self._converter(name, kind) for name, kind in kinds.items()}

    def _fields_of_body(self, kinds: Mapping[str, Any]) -> frozenset[str]:
        """Columns that may stand beside the id. Raises InputError where no body can be made."""
        if "body" in kinds:
            return frozenset({"body"})
        if "url" in kinds:
            return frozenset().union(*FIELDS.values())
        for name, url in _URLS.items():
            if name in kinds:
                return FIELDS[url]
        self._refuse("has no column 'body', 'messages' or 'prompt': add one, or 'url' and fields")

    def _converter(self, name: str, kind: Any) -> _Converter:
        """Converter of a column or what is inside it. Raises InputError for what JSON has not."""
        types = self._types
        kind = getattr(kind, "storage_type", kind)  # of an extension, such as JSON text
        if types.is_struct(kind):
            inner = {each.name: self._converter(f"{name}.{each.name}", each.type) for each in kind}
            if len(inner) < kind.num_fields:
                self._refuse(f"has several fields of one name in {shown(name)}: rename them")
            return partial(_struct, inner)
        if types.is_map(kind) and self._is_text(kind.key_type):
            return partial(_map, self._converter(f"{name}.*", kind.item_type))
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return partial(_list, self._converter(f"{name}[]", kind.value_type))
        is_number = types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind)
        if is_number or self._is_text(kind) or types.is_boolean(kind) or types.is_null(kind):
            return _same
        self._refuse(f"has {kind} in {shown(name)}, which JSON has not: write strings or numbers")

    def _is_text(self, kind: Any) -> bool:
        types = self._types
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(
            types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        )

    def _refuse(self, problem: str) -> NoReturn:
        raise InputError(f"{self._path} {problem}")


def _same(value: Any) -> Any:
    return value


def _struct(inner: Mapping[str, _Converter], value: Mapping[str, Any] | None) -> Any:
    """A struct without the fields that are null: it has those of all rows, and null for others."""
    if value is None:
        return None
    return {
        name: convert(each) for name, convert in inner.items() if (each := value[name]) is not None
    }


def _map(convert: _Converter, value: list[tuple[str, Any]] | None) -> Any:
    return None if value is None else {name: convert(each) for name, each in value}


def _list(convert: _Converter, value: list[Any] | None) -> Any:
    return None if value is None else [convert(each) for each in value]
