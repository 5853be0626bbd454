"""The command that tells how much of a network's derivative in time is ripples of its time embedding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "eval/time_ripples.py"


def test_the_embedded_teachers_derivative_is_mostly_ripples(tmp_path):
    output = tmp_path / "ripples.json"
    subprocess.run([sys.executable, SCRIPT, "--count", "4", "--output", output], check=True, capture_output=True)
    rows = {row["index"]: row for row in json.loads(output.read_text())["rows"]}
    row = rows[899]
    assert row["0.0"] > row["2.0"] > 1.5 * row["8.0"]
    assert abs(row["16.0"] / row["40.0"] - 1) < 0.2
