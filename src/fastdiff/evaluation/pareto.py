"""Retrieval against distance to real images, as a small SVG: what guidance trades one for the other."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from fastdiff.evaluation.row import Row

WIDTH, HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 170, 20, 45


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other row beats in both numbers: nearer to real images (`fid`) and better found (`retrieval`)."""
    measured = sorted(_measured(rows), key=lambda row: (row.fid, -row.retrieval))
    kept: list[Row] = []
    for row in measured:
        if not kept or row.retrieval > kept[-1].retrieval:
            kept.append(row)
    return kept


def pareto_svg(rows: Sequence[Row]) -> str:
    """All measured rows as points, the front as a line; the distance on a logarithmic axis. Empty without points.

    The floor has no prompt to be true to, so it is no contestant but a dashed line.
    """
    points = [row for row in _measured(rows) if row.name != "floor"]
    if not points:
        return ""
    x, y = _scale([row.fid for row in points], log=True), _scale([row.retrieval for row in points], log=False)

    def place(row: Row) -> tuple[float, float]:
        across, up = x(row.fid), y(row.retrieval)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, front(points)))
    marks = "\n".join(_mark(row, *place(row)) for row in points)
    return f"""<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="system-ui,sans-serif" font-size="12">
<polyline points="{line}" fill="none" stroke="#c33" stroke-dasharray="4 3"/>
{marks}
<text x="{_LEFT}" y="{HEIGHT - 12}">Frechet distance to the reference (log): left is better</text>
<text transform="translate(18 {HEIGHT - _BOTTOM}) rotate(-90)">R@1: up is better</text>
<path d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}" fill="none" stroke="#888"/></svg>"""


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.fid is not None and row.retrieval is not None]


def _scale(values: Sequence[float], log: bool):
    """Values to 0.05..0.95 of an axis."""

    def position(value: float) -> float:
        return math.log(max(value, 1e-9)) if log else value

    low, high = min(map(position, values)), max(map(position, values))
    span = high - low or 1.0
    return lambda value: 0.05 + 0.9 * (position(value) - low) / span


def _mark(row: Row, x: float, y: float) -> str:
    color = "#36c" if row.name.startswith("undistilled") else "#c33" if row.name.startswith("student") else "#333"
    w = f", w {row.guidance_scale:g}" if (row.guidance_scale or 0) > 1 else ""
    label = html.escape(f"{row.name} ({row.fid:.3g}, {row.retrieval:.2f}{w})")
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/><text x="{x + 7:.1f}" y="{y + 4:.1f}">{label}</text>'
    )
