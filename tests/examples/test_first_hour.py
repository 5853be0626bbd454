"""The example that users run first: a few steps of it, and what its page says."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "first_hour.py"


@pytest.mark.slow
def test_the_page_says_what_held(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    arguments = ["--teacher", "embedded", "--output_dir", str(folder), "--max_train_steps", "8"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--train_batch_size", "2", "--lora_rank", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "report:" in capsys.readouterr().out
    text = (folder / "report" / "README.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line}
    assert rows["three roles share one frozen base"] == "**held**"
    assert next(value for name, value in rows.items() if name.startswith("stock diffusers loads")) == "**held**"
    assert rows["a 24 GB card is enough"] in ("cannot be told here", "**held**")
    assert "batch 2, 8 steps" in text and "`student/score_gap`" in text and "`loss/fake_score/" in text
    assert (folder / "report" / "grid.png").stat().st_size > 1000
    assert (folder / "student" / "pytorch_lora_weights.safetensors").is_file()
