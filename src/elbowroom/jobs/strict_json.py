"""JSON of untrusted rows: no NaN, no lone surrogates, and no nesting that crashes a parser."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from elbowroom.core.errors import shown

MAX_DEPTH = 128
"""Most lists and objects inside one another.

It is checked before a line is parsed. Python's own limit depends on how deep its caller is: a line
near it could be read once and fail the next time, or where it is sent on.
"""

_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+"?', re.DOTALL)
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class RejectionError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def load_json(line: bytes) -> Any:
    """Parse a line. Raises RejectionError that says what is wrong with it."""
    if is_deep(line):
        reject("invalid_json", f"nested more than {MAX_DEPTH} deep: flatten it")
    try:
        data = _DECODER.decode(line.decode("utf-8"))
        if b"\\u" in line and b"\\ud" in line.lower():  # half of a pair is no character
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        return data
    except UnicodeEncodeError:
        reject("invalid_utf8", "a \\u escape is half of a surrogate pair: write both halves")
    except UnicodeDecodeError as error:
        reject("invalid_utf8", f"not UTF-8 at byte {error.start}: save the file as UTF-8")
    except json.JSONDecodeError as error:
        reject("invalid_json", f"not valid JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        reject("invalid_json", f"not valid JSON: {error}")


def load_any_json(text: bytes) -> Any:
    """Parse what ``load_json`` may refuse: NaN, half characters. None if even so it is no JSON."""
    if is_deep(text):
        return None
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def is_deep(text: bytes) -> bool:
    """Whether lists and objects in JSON, also in what is cut off, are nested too deep."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:  # nearly every line
        return False
    chars = np.frombuffer(_STRING.sub(b"", text), np.uint8)
    return bool(_STEPS[chars].cumsum(dtype=np.int64).max(initial=0) > MAX_DEPTH)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {shown(text)} is not finite")


def _finite(text: str) -> float:
    """Parse a float. Refuses 1e999, which is valid JSON but cannot be written again downstream."""
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def reject(code: str, message: str) -> NoReturn:
    raise RejectionError(code, message)
