"""A folder a reader can open: metrics.json, grid.png and index.html; and a table for the terminal."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.evaluation.grid import draw_grid, save_picture
from fastdiff.evaluation.pareto import pareto_svg
from fastdiff.evaluation.row import Row, excess, score

COLUMNS = {
    "name": "model",
    "steps": "steps",
    "network_calls": "calls",
    "guidance_scale": "w",
    "solver": "solver",
    "fid": "FD",
    "excess": "excess",
    "score": "score",
    "fid_to_teacher": "FD to teacher",
    "kid": "KID x1000",
    "clip": "CLIP",
    "retrieval": "R@1",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "sharpness": "sharpness",
    "sharpness_ratio": "/ teacher",
    "seconds_per_image": "s / image",
}


def derived(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as dictionaries, with three more numbers each.

    excess: fid above the row named ``floor``; score: excess over that of the best ``undistilled-*`` row with at most
    as many network calls as the row (of the fewest calls, if none); sharpness_ratio: to the row named ``teacher``.
    """
    named = {row.name: row for row in rows}
    floor, teacher = named.get("floor"), named.get("teacher")
    lines = []
    for row in rows:
        baseline = _baseline(row, rows)
        sharp = teacher.sharpness if teacher else None
        lines.append(
            {
                **row.to_dict(),
                "excess": excess(row, floor) if floor else None,
                "score": score(row, floor, baseline) if floor and baseline else None,
                "sharpness_ratio": row.sharpness / sharp if row.sharpness is not None and sharp else None,
            }
        )
    return lines


def protocol_of(rows: Sequence[Row]) -> str:
    """The one protocol of all rows.

    Raises:
        ValueError: no rows, or rows of several protocols, which must not share a table.
    """
    names = sorted({row.protocol for row in rows})
    if len(names) != 1:
        raise ValueError(f"a table holds rows of one protocol, got {names or 'no rows'}")
    return names[0]


def format_table(rows: Sequence[Row], intervals: bool = True) -> str:
    """Rows as aligned text under the protocol's name; distances with half their 95 % interval."""
    protocol, lines = protocol_of(rows), derived(rows)
    shown = [c for c in COLUMNS if any(line.get(c) is not None for line in lines)]
    cells = [[COLUMNS[c] for c in shown]] + [[_cell(line, c, intervals) for c in shown] for line in lines]
    widths = [max(len(row[i]) for row in cells) for i in range(len(shown))]
    text = [
        "  ".join(value.ljust(w) if i == 0 else value.rjust(w) for i, (value, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    text.insert(1, "-" * len(text[0]))
    n = rows[0].settings.get("n")
    return "\n".join([f"protocol {protocol} (n = {n}; FD = Frechet distance)", *(line.rstrip() for line in text)])


def write_report(
    folder: str | Path,
    rows: Sequence[Row],
    grids: Sequence[tuple[str, Tensor]] = (),
    settings: dict[str, Any] | None = None,
    prompts: Sequence[str] = (),
) -> Path:
    """Writes ``metrics.json``, ``grid.png`` (if there are grids) and ``index.html`` into ``folder``.

    Args:
        folder: created if needed.
        rows: of one protocol.
        grids: (label, uint8 (N, 3, H, W)) for each model, same prompts and noise.
        settings: JSON facts shown at the end of the page and stored.
        prompts: captions of the grid's columns.

    Raises:
        ValueError: rows of several protocols, or grids of different lengths.
    """
    folder, settings = Path(folder), settings or {}
    content = {"protocol": protocol_of(rows), "rows": derived(rows), "settings": settings}
    picture = draw_grid(grids, prompts) if grids else None
    page = _page(rows, picture, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        save_picture(picture, folder / "grid.png")
    _write(folder / "metrics.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    _write(folder / "index.html", page)
    return folder / "index.html"


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    found = [r for r in rows if r.name.startswith("undistilled") and r.fid is not None]
    if not found:
        return None
    fewest = min(r.network_calls or 0 for r in found)
    budget = max(row.network_calls or 0, fewest)
    return min((r for r in found if (r.network_calls or 0) <= budget), key=lambda r: r.fid)


def _cell(line: dict[str, Any], column: str, intervals: bool) -> str:
    value = line.get(column)
    if value is None:
        return ""
    if isinstance(value, str) or column == "steps":
        return str(value)
    if column in ("network_calls", "guidance_scale"):
        return f"{value:g}"
    factor = 1000 if column == "kid" else 1
    interval = line["interval"].get(column)
    text = _digits(value * factor)
    return f"{text} ±{_digits((interval[1] - interval[0]) / 2 * factor)}" if interval and intervals else text


def _digits(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1400px;padding:0 1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}pre{background:#f6f6f6;padding:1em;
overflow:auto}.wide{overflow-x:auto}"""


def _page(rows: Sequence[Row], picture: Any, settings: dict[str, Any]) -> str:
    lines = derived(rows)
    guided = [line for line in lines if (line["guidance_scale"] or 0) > 1]
    tables = _table([line for line in lines if line not in guided])
    if guided:
        tables = f"<h2>Matched: no guidance</h2>{tables}<h2>Guided: each at its own w</h2>{_table(guided)}"
    plot = pareto_svg(rows)
    plot = f"<h2>Faithful to the caption against near to real images</h2>{plot}" if plot else ""
    shown_settings = {"run": settings, "measured": {row.name: row.settings for row in rows}}
    image = f'<h2>Same prompts, same noise</h2><img alt="grid" src="{_data_uri(picture)}">' if picture else ""
    name = html.escape(protocol_of(rows))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>fastdiff: {name}</title><style>{STYLE}</style>
<h1>Protocol {name}</h1>
<p>FD: Frechet distance to the protocol's reference; excess: above the floor; score: excess over that of the best
undistilled baseline with at most as many network calls; calls: network calls an image; w: guidance scale;
R@1: retrieval; ± half a 95&nbsp;% interval.</p>
{tables}
{plot}
{image}
<h2>Settings</h2><pre>{html.escape(json.dumps(shown_settings, indent=1))}</pre></html>
"""


def _table(lines: Sequence[dict[str, Any]]) -> str:
    shown = [c for c in COLUMNS if any(line.get(c) is not None for line in lines)]
    head = "".join(f"<th>{html.escape(COLUMNS[c])}</th>" for c in shown)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(line, c, True))}</td>" for c in shown) + "</tr>" for line in lines
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _data_uri(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
