"""An SVG picture of boxes, arrows and text, in the colours of the documentation."""

from __future__ import annotations

from html import escape

INK, PAPER, LINE = "#1d2a2f", "#ffffff", "#6b7b80"
KEPT, SHARED, SLOTS, CACHE, OTHER = "#c9d1d3", "#7fbcc2", "#e0a63a", "#a9d8b8", "#e6eaeb"


class Picture:
    """An SVG under way. Sizes are in pixels at full size."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{LINE}"/>'
            "</marker></defs>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, *lines: str) -> None:
        """A rectangle with lines of text in its middle, the first of them bold."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3" '
            f'fill="{fill}" stroke="{LINE}" stroke-width="0.8"/>'
        )
        top = y + h / 2 - 8 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * number, line, bold=number == 0 and len(lines) > 1)

    def text(
        self, x: float, y: float, line: str, anchor: str = "middle", bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}"{weight}>'
            f"{escape(line)}</text>"
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4"{dash} '
            'marker-end="url(#tip)"/>'
        )

    @property
    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"
