"""Two phases as stages of one recipe, from the command to a stock pipeline that switches between both."""

import json

import pytest
import torch
import yaml

from fastdiff import Student
from fastdiff.cli import main
from fastdiff.export.experts import read_experts

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tiny_sd_folder, prompts_file, tmp_path):
    values = {
        "method": "phased_dmd",
        "pretrained_teacher_model": str(tiny_sd_folder),
        "data": str(prompts_file),
        "output_dir": str(tmp_path / "out"),
        "guidance_scale": 1.0,
        "timesteps": [999, 499],
        "phase_steps": [1, 1],
        "student_update_every": 1,
        "lora_rank": 2,
        "lora_target_modules": ["to_q", "conv1"],
        "learning_rate": 1.0e-2,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "validation_samples": 0,
        "report_to": "none",
        "stages": [{"name": "one", "phase": 1}, {"name": "two", "phase": 2, "init_from": "one"}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_phases_become_one_student_of_two_experts(recipe, tmp_path):
    assert main(["distill", "--config", str(recipe)]) == 0
    first, second = tmp_path / "out" / "stage-1-one", tmp_path / "out" / "stage-2-two"
    assert (first / "student" / "model_index.json").is_file()  # a single adapter, which serves all steps
    folder = second / "student"
    assert not (folder / "model_index.json").exists()
    assert [expert["times"] for expert in read_experts(folder)] == [[999.0], [499.0]]
    load_back = json.loads((folder / "fastdiff.json").read_text())["load_back"]
    assert load_back["ok"] and load_back["checks"][-1]["name"] == "experts.json"
    student = Student(folder)
    generator = torch.Generator().manual_seed(0)
    made = student.pipeline(device="cpu")("a dog", generator=generator, output_type="pt", **student.call).images
    assert made.shape == (1, 3, 32, 32)
    again = tmp_path / "again"
    assert main(["export", str(second), "--output", str(again)]) == 0
    assert read_experts(again) == read_experts(folder)


def test_two_full_students_are_refused_when_the_second_begins(recipe, fails):
    message = fails("distill", "--config", recipe, "--student", "full")
    assert "2 full networks" in message and "--student lora" in message


def test_a_later_phase_alone_asks_for_the_earlier_run(recipe, fails):
    values = yaml.safe_load(recipe.read_text())
    values |= {"phase": 2, "stages": []}
    recipe.write_text(yaml.safe_dump(values))
    assert "--init_from" in fails("distill", "--config", recipe)
