"""The example that users run first: a few steps of it, and what its page says."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "first_hour.py"


def _run(teacher, folder, monkeypatch):
    """The page of a run of 8 steps, and its claims with what came of them."""
    arguments = ["--teacher", str(teacher), "--output_dir", str(folder), "--max_train_steps", "8"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--train_batch_size", "2", "--lora_rank", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    text = (folder / "report" / "README.md").read_text()
    return text, {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line}


def test_flags_that_come_apart_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--lora_rank", "4", "--resolution"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--name value, got --lora_rank 4 --resolution" in capsys.readouterr().err


def test_a_plan_alone_trains_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(folder), "--plan_only", "--lora_rank", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "planned: 0." in capsys.readouterr().out and not folder.exists()


@pytest.mark.slow
def test_an_sdxl_teacher_goes_the_way_of_the_large_one(tiny_sdxl_folder, tmp_path, monkeypatch):
    """The published SDXL recipe: four steps, two text encoders, time ids, bfloat16."""
    text, rows = _run(tiny_sdxl_folder, tmp_path / "run", monkeypatch)
    assert rows["three roles share one frozen base"] == "**held**"
    assert rows["stock diffusers loads the student back (steps at t = [999, 749, 499, 249])"] == "**held**"
    assert f"`{tiny_sdxl_folder}`, 32 pixels, batch 2, 8 steps" in text and "`loss/fake_score/" in text
    assert "`student/score_gap`" not in text  # two readings are no band
    assert (tmp_path / "run" / "report" / "grid.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_page_says_what_held(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    text, rows = _run("embedded", folder, monkeypatch)
    assert "report:" in capsys.readouterr().out
    assert rows["three roles share one frozen base"] == "**held**"
    assert next(value for name, value in rows.items() if name.startswith("stock diffusers loads")) == "**held**"
    assert rows["a 24 GB card is enough"] in ("cannot be told here", "**held**")
    assert "batch 2, 8 steps" in text and "`student/score_gap`" in text and "`loss/fake_score/" in text
    assert (folder / "report" / "grid.png").stat().st_size > 1000
    assert (folder / "student" / "pytorch_lora_weights.safetensors").is_file()
