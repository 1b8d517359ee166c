"""JSON of untrusted rows: no NaN, no lone surrogates, and no nesting that crashes a parser."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from elbowroom.core.errors import shown

MAX_DEPTH = 128
"""Most lists and objects inside one another.

Python's own limit depends on how deep its caller is, so a row near it could be read here and then
fail where it is sent on.
"""


class RejectionError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def load_json(line: bytes) -> Any:
    try:
        data = _DECODER.decode(line.decode("utf-8"))
        if _may_be_deep(line) and _is_deeper_than(data, MAX_DEPTH):
            reject("invalid_json", f"nested more than {MAX_DEPTH} deep: flatten it")
        if b"\\u" in line and b"\\ud" in line.lower():  # half of a pair is no character
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        return data
    except UnicodeEncodeError:
        reject("invalid_utf8", "a \\u escape is half of a surrogate pair: write both halves")
    except UnicodeDecodeError as error:
        reject("invalid_utf8", f"not UTF-8 at byte {error.start}: save the file as UTF-8")
    except RecursionError:
        reject("invalid_json", f"nested more than {MAX_DEPTH} deep: flatten it")
    except json.JSONDecodeError as error:
        reject("invalid_json", f"not valid JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        reject("invalid_json", f"not valid JSON: {error}")


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {shown(text)} is not finite")


def _finite(text: str) -> float:
    """Parse a float. Refuses 1e999, which is valid JSON but cannot be written again downstream."""
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def _may_be_deep(data: bytes) -> bool:
    """Cheap first test of nesting: False for nearly every line, which has too few brackets."""
    return data.count(b"[") + data.count(b"{") > MAX_DEPTH


def _is_deeper_than(data: Any, depth: int) -> bool:
    layer = [data]
    for _ in range(depth + 1):
        containers = [value for value in layer if isinstance(value, (dict, list))]
        layer = []
        for value in containers:
            layer.extend(value.values() if isinstance(value, dict) else value)
        if not containers:
            return False
    return True


def reject(code: str, message: str) -> NoReturn:
    raise RejectionError(code, message)
