"""The trade between distance to real images and retrieval."""

from __future__ import annotations

from fastdiff.evaluation.pareto import front, pareto_svg
from fastdiff.evaluation.row import Row


def row(name, fid, retrieval, w=1.0):
    return Row(name=name, fid=fid, retrieval=retrieval, guidance_scale=w, settings={"protocol": "p"})


ROWS = [row("teacher", 15.0, 0.35), row("teacher <guided>", 19.0, 0.5, 3.0), row("undistilled-1", 100.0, 0.2)]


def test_the_front_holds_what_nothing_beats_in_both_numbers():
    better = row("student", 14.0, 0.4)
    names = [found.name for found in front([*ROWS, better])]
    assert names == ["student", "teacher <guided>"]
    assert front([row("unmeasured", None, 0.9)]) == []


def test_the_picture_names_every_row_but_the_floor_and_is_safe_html():
    picture = pareto_svg([*ROWS, row("floor", 3.0, 0.6)])
    assert picture.count("<circle") == 3 and "floor" not in picture
    assert "teacher &lt;guided&gt; (19, 0.50, w 3)" in picture
    assert pareto_svg([]) == ""
