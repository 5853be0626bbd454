"""Rows, tables and the report folder."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from fastdiff.evaluation import Row, excess, format_table, score, write_report
from fastdiff.evaluation.grid import draw_grid
from fastdiff.evaluation.report import derived

SETTINGS = {"protocol": "tiny/random-tower", "n": 12}


def row(name, fid, calls=None, **more):
    return Row(name, network_calls=calls, fid=fid, settings=SETTINGS, **more)


@pytest.fixture
def rows():
    return [
        row("floor", 2.0),
        row("teacher", 4.0, 50, sharpness=0.02, interval={"fid": (3.5, 4.5)}),
        row("undistilled-1", 22.0, 1),
        row("undistilled-4", 12.0, 4),
        row("student", 6.0, 1, sharpness=0.025, kid=float("nan")),
    ]


def test_excess_and_score(rows):
    assert excess(rows[4], rows[0]) == 4 and score(rows[4], rows[0], rows[2]) == pytest.approx(0.2)
    assert excess(rows[4], rows[0], "clip") is None
    with pytest.raises(ValueError, match="not comparable"):
        excess(Row("x", fid=1.0, settings={"protocol": "another"}), rows[0])


def test_each_row_meets_the_best_baseline_within_its_calls(rows):
    scores = {line["name"]: line["score"] for line in derived(rows)}
    assert scores["student"] == pytest.approx(0.2) and scores["teacher"] == pytest.approx(0.2)
    assert scores["undistilled-1"] == scores["undistilled-4"] == 1 and scores["floor"] == 0


def test_table_names_its_protocol_and_interval(rows):
    text = format_table(rows)
    first, head, rule, *lines = text.splitlines()
    assert "tiny/random-tower" in first and "n = 12" in first
    assert "FID" not in text and "FD" in head and set(rule) == {"-"}
    assert len(lines) == 5 and "4.000 ±0.500" in lines[1] and "1.250" in lines[4]


def test_rows_of_two_protocols_share_no_table(rows):
    with pytest.raises(ValueError, match="rows of one protocol"):
        format_table([*rows, Row("x", settings={"protocol": "another"})])


def test_report_folder(rows, tmp_path):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    folder = tmp_path / "report"
    write_report(folder, rows, [("teacher", images), ("student", images)], {"seed": 7}, ["a", "<b>", "ü ☃"])
    content = json.loads((folder / "metrics.json").read_text())
    assert content["protocol"] == "tiny/random-tower" and content["settings"] == {"seed": 7}
    assert [line["name"] for line in content["rows"]] == [r.name for r in rows]
    keys = (
        "name steps network_calls guidance_scale solver fid fid_to_teacher kid clip retrieval precision recall "
        "diversity sharpness seconds_per_image interval"
    )
    assert all(key in line for line in content["rows"] for key in keys.split())
    assert content["rows"][4]["kid"] is None
    page = (folder / "index.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("<pre>")[0] and "undistilled-4" in page
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "index.html", "metrics.json"]


def test_rows_survive_json(rows):
    again = Row.from_dict(json.loads(json.dumps(rows[1].to_dict())))
    assert again == rows[1]


def test_grid_shows_every_image(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 32, 32)
    picture = draw_grid([("one", colours), ("two", colours.flip(0))], cell=64)
    counts = {colour: number for number, colour in picture.getcolors(1 << 20)}
    assert counts[(255, 0, 0)] == counts[(0, 255, 0)] == 2 * 64 * 64
    assert isinstance(picture, Image.Image)
    with pytest.raises(ValueError, match="rows of one length"):
        draw_grid([("one", colours), ("two", colours[:1])])


def test_infinities_of_scheduler_configs_become_null():
    """DPM-Solver's config holds -inf, which JSON has no word for."""
    row = Row(
        name="a", fid=float("nan"), settings={"protocol": "p", "scheduler": {"lambda_min_clipped": -float("inf")}}
    )
    content = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert content["fid"] is None and content["settings"]["scheduler"] == {"lambda_min_clipped": None}
