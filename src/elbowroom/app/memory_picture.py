"""Memory over time as a picture: an SVG file that any browser shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from elbowroom.core.units import format_bytes

_WIDTH, _HEIGHT = 880, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 20, 44, 40
_MOST_LINES = 6
_INK, _LINE, _BUDGET = "#1d2a2f", "#c9d1d3", "#b3261e"
_STYLES = (
    'fill="#a9d8b8" stroke="none"',
    f'fill="none" stroke="{_INK}" stroke-width="1.2"',
)
"""How the first curve is drawn, as an area, and the one laid over it."""


class Curve(NamedTuple):
    """Bytes held over time: ``peaks[k]`` from ``times[k]`` to ``times[k + 1]`` seconds."""

    name: str
    times: Sequence[float]
    peaks: Sequence[int]


def memory_picture(
    title: str, curves: Sequence[Curve], static_bytes: int, budget_bytes: int | None
) -> str:
    """An SVG of one or two curves with the budget, if there is one, and what is always held."""
    most = max(budget_bytes or 0, *(max(curve.peaks) for curve in curves)) * 1.05
    seconds = max(curve.times[-1] for curve in curves) or 1.0
    scale = _Scale(seconds, most)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_axes(scale),
        *(_drawn(scale, *each) for each in zip(curves, _STYLES, strict=False)),
        _level(scale, static_bytes, f"static {format_bytes(static_bytes)}", _INK),
    ]
    if budget_bytes is not None:
        parts.append(_level(scale, budget_bytes, f"budget {format_bytes(budget_bytes)}", _BUDGET))
    parts += [*_legend(title, curves), "</svg>"]
    return "\n".join(parts) + "\n"


class _Scale(NamedTuple):
    """From seconds and bytes to places in the picture."""

    seconds: float
    num_bytes: float

    def x(self, seconds: float) -> float:
        return _LEFT + seconds / self.seconds * (_WIDTH - _LEFT - _RIGHT)

    def y(self, num_bytes: float) -> float:
        return _HEIGHT - _BOTTOM - num_bytes / self.num_bytes * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale) -> Iterator[str]:
    for num_bytes in _round_numbers(scale.num_bytes, 1024):
        y = scale.y(num_bytes)
        yield _line(_LEFT, y, _WIDTH - _RIGHT, y, _LINE)
        yield _text(_LEFT - 8, y + 4, format_bytes(round(num_bytes)), "end")
    for seconds in _round_numbers(scale.seconds, 10):
        yield _text(scale.x(seconds), _HEIGHT - _BOTTOM + 18, f"{seconds:.3g} s", "middle")


def _round_numbers(most: float, base: int) -> Iterator[float]:
    """Numbers from 0 to below ``most``, a few that are easy to read; ``base`` is of its units."""
    unit = float(base) ** math.floor(math.log(most, base))
    steps = [unit * factor / 10 for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)]
    step = next(step for step in steps if most / step <= _MOST_LINES)
    return (k * step for k in range(math.ceil(most / step)))


def _drawn(scale: _Scale, curve: Curve, style: str) -> str:
    """A curve of steps; an area goes down to the axis at both ends."""
    points = [(curve.times[0], 0)]
    for k, peak in enumerate(curve.peaks):
        points += [(curve.times[k], peak), (curve.times[k + 1], peak)]
    points.append((curve.times[-1], 0))
    path = " ".join(f"{scale.x(at):.1f},{scale.y(num_bytes):.1f}" for at, num_bytes in points)
    return f'<polyline points="{path}" {style}/>'


def _level(scale: _Scale, num_bytes: int, name: str, colour: str) -> str:
    y = scale.y(num_bytes)
    line = _line(_LEFT, y, _WIDTH - _RIGHT, y, colour, ' stroke-dasharray="5 4"')
    return line + _text(_WIDTH - _RIGHT, y - 5, name, "end", colour)


def _legend(title: str, curves: Sequence[Curve]) -> Iterator[str]:
    yield _text(_LEFT, 24, title, "start", weight="bold")
    x = _WIDTH - _RIGHT
    for curve, style in reversed(list(zip(curves, _STYLES, strict=False))):
        yield _text(x, 24, curve.name, "end")
        x -= 8 * len(curve.name) + 34
        yield f'<polyline points="{x},16 {x},20 {x + 26},20 {x + 26},16" {style}/>'
        x -= 16


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    places = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {places} stroke="{colour}" stroke-width="1"{more}/>'


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = _INK, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
