"""Leaderboard rows: which baseline they are held against, their file, and intervals over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiff.evaluation.leaderboard import (
    METRICS,
    Entry,
    markdown,
    mean_and_half_width,
    metrics_of,
    read_entries,
    score_against,
    summary,
    write_entries,
)
from fastdiff.evaluation.row import Row

BOARD = Path(__file__).resolve().parents[2] / "eval" / "leaderboard.json"
SETTINGS = {"protocol": "p"}


def row(name, fid, calls=1.0, **values):
    numbers = dict.fromkeys(METRICS, 1.0) | {"fid": fid} | values
    return Row(name=name, steps=1, network_calls=calls, settings=SETTINGS, **numbers)


ROWS = [
    row("floor", 2.0, None),
    row("teacher", 12.0, 50.0, retrieval=0.5),
    row("undistilled-1", 82.0, 1.0),
    row("undistilled-1-matched", 102.0, 1.0),
    row("undistilled-4", 22.0, 4.0),
    row("undistilled-4-matched", 42.0, 4.0),
]


def entry(recipe="a", seed=0, fid=12.0, calls=1.0, table="matched", **changes) -> Entry:
    student = row("student", fid, calls)
    score, baseline = score_against(student, ROWS, table)
    values = {
        "method": "dmd2",
        "family": "distribution matching",
        "recipe": recipe,
        "teacher": "t",
        "table": table,
        "student_kind": "full",
        "steps": 1,
        "seed": seed,
        "network_calls": calls,
        "train_network_passes": 5e6,
        "train_seconds": 60.0,
        "peak_memory_mib": 900.0,
        "metrics": metrics_of(student),
        "teacher_metrics": metrics_of(ROWS[1]),
        "baseline_metrics": metrics_of(baseline),
        "score": score,
        "protocol": "p",
        "command": "c",
        "commit": "0",
    }
    return Entry(**(values | changes))


@pytest.mark.parametrize(
    ("calls", "table", "baseline"), [(1, "matched", 102), (1, "guided", 82), (3, "guided", 82), (4, "matched", 42)]
)
def test_a_student_is_held_against_the_best_baseline_of_its_table_at_no_more_calls(calls, table, baseline):
    found = entry(calls=calls, table=table)
    assert found.baseline_metrics["fid"] == baseline
    assert found.score == pytest.approx((12 - 2) / (baseline - 2))


def test_one_shipped_lora_of_tscd_beats_the_undistilled_teacher_at_every_number_of_steps():
    entries = [one for one in read_entries(BOARD) if one.method == "tscd"]
    assert sorted((one.steps, one.seed) for one in entries) == [(n, seed) for n in (1, 2, 4, 8) for seed in (0, 1, 2)]
    assert len({(one.seed, one.train_seconds) for one in entries}) == 3  # a run of each seed serves all steps
    assert all(one.metrics["fid"] < one.baseline_metrics["fid"] for one in entries)


def test_a_student_cheaper_than_every_baseline_is_refused():
    with pytest.raises(ValueError, match=r"at most 0\.5 network calls"):
        entry(calls=0.5)


def test_rows_are_read_back_in_a_stable_order(tmp_path):
    path = tmp_path / "new" / "board.json"
    assert read_entries(path) == []
    entries = [entry("b", 1), entry("a", 2), entry("b", 0)]
    write_entries(path, entries)
    assert [found.key for found in read_entries(path)] == [("a", 2, 1), ("b", 0, 1), ("b", 1, 1)]
    assert read_entries(path)[2].metrics["fid"] == 12.0


def test_intervals_are_students_t_over_seeds():
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))  # t(0.975, 2 degrees) = 4.302653
    assert mean_and_half_width([5.0]) == (5.0, None)


def test_the_table_has_a_line_a_recipe_with_ratios_to_the_teacher():
    entries = [entry("a", seed, fid) for seed, fid in enumerate([10.0, 12.0, 14.0])] + [entry("b", 0, 6.0)]
    lines = {line["recipe"]: line for line in summary(entries)}
    assert lines["a"]["seeds"] == 3 and lines["a"]["numbers"]["fid"][0] == 12.0
    assert lines["a"]["numbers"]["retrieval / teacher"][0] == 2.0
    text = markdown(entries)
    assert text.index("| b (full)") < text.index("| a (full)")  # best first
    assert "0.1 ± 0.05" in text
