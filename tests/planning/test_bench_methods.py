"""`fastdiff bench methods`: what is trained of a method, and what a step of it takes."""

import json

import pytest

from fastdiff.cli import bench
from fastdiff.methods import method_named
from fastdiff.planning.measure_methods import combinations, measure


def test_every_kind_of_student_meets_every_kind_of_critic():
    assert combinations(method_named("dmd2")) == [
        ("lora", "lora"),
        ("lora", "full"),
        ("full", "lora"),
        ("full", "full"),
    ]
    assert combinations(method_named("lcm")) == [("lora", None), ("full", None)]
    assert combinations(method_named("ctm")) == [("full", None)]


def test_a_step_is_weighed_and_timed_and_kept_by_its_kinds(tmp_path, capsys):
    kept = tmp_path / "methods.json"
    command = ["methods", "--method", "ctm", "--size", "tiny", "--pairs", "1", "--batch", "1"]
    assert bench.main([*command, "--output", str(kept)]) == 0
    row = json.loads(kept.read_text("utf-8"))["ctm-tiny-full"]
    assert row["peak"] > 4 * row["weights"]  # at the least the frozen base is there, in float32
    assert row["step_seconds"] > 0
    assert row["bare_seconds"] > 0
    assert "ctm" in capsys.readouterr().out


def test_a_failed_process_is_told():
    with pytest.raises(RuntimeError, match="no-such-method"):
        measure("no-such-method", ("full", None), "tiny", 1, 1)
