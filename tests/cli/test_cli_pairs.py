"""From pairs to exported students through the command line: what one folder of pairs serves."""

import json

import pytest
import torch
import yaml
from cli_helpers import SHORT

from fastdiff import Student
from fastdiff.cli import main

STUDENTS = ("full", pytest.param("lora", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def pairs_folder(tiny_sd_folder, prompts_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "tiny"
    command = ["pairs", "--teacher", str(tiny_sd_folder), "--prompts", str(prompts_file), "--count", "4"]
    assert main([*command, "--num_inference_steps", "2", "--guidance_scale", "2", "--output", str(folder)]) == 0
    return folder


def run(tmp_path, teacher, pairs, **recipe) -> None:
    content = {"pretrained_teacher_model": str(teacher), "data": str(pairs), "output_dir": str(tmp_path / "run")}
    content |= {"validation_samples": 2, "validation_steps": 1000, "lora_rank": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | recipe))
    assert main(["distill", "--config", str(tmp_path / "recipe.yaml"), *SHORT]) == 0


def test_a_one_step_student_from_an_earlier_index(tmp_path, tiny_sd_folder, pairs_folder):
    """Exported and compared by stock diffusers: the start is baked in."""
    run(tmp_path, tiny_sd_folder, pairs_folder, method="kd", start_timestep=399, student="full")
    from diffusers import DiffusionPipeline

    student = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    student.scheduler.set_timesteps(1)
    assert student.scheduler.timesteps.tolist() == [399]


@pytest.mark.parametrize("student", STUDENTS)
def test_slimflow_is_guided_by_its_first_stage(tmp_path, tiny_sd_folder, pairs_folder, student):
    stages = [
        {"name": "reflow", "objective": "reflow", "anneal_steps": 1},
        {"name": "distill", "init_from": "reflow", "objective": "distill"},
    ]
    run(tmp_path, tiny_sd_folder, pairs_folder, method="slimflow", student=student, stages=stages)
    from safetensors.torch import load_file

    before = load_file(tmp_path / "run" / "stage-1-reflow" / "checkpoints" / "step-2" / "student.safetensors")
    guide = load_file(tmp_path / "run" / "stage-2-distill" / "checkpoints" / "step-2" / "guide.safetensors")
    renamed = {name.replace(".guide.weight", ".student.weight"): tensor for name, tensor in guide.items()}
    assert renamed.keys() == before.keys() and all((renamed[n] == before[n]).all() for n in before)
    assert (tmp_path / "run" / "stage-2-distill" / "student" / "fastdiff.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["full", "lora"])
def test_one_reflow_trained_better_is_sampled_by_stock_diffusers(tmp_path, tiny_sd_folder, pairs_folder, student):
    run(tmp_path, tiny_sd_folder, pairs_folder, method="rfpp", student=student, num_inference_steps=2)
    found = Student(tmp_path / "run" / "student")
    record = json.loads((found.folder / "fastdiff.json").read_text())
    assert record["load_back"]["ok"] and record["load_back"]["max_error"] < 1e-4
    pipeline = found.pipeline()
    images = pipeline("a dog", generator=torch.Generator().manual_seed(0), output_type="pt", **found.call).images
    assert images.isfinite().all()
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]


@pytest.mark.slow
def test_instaflow_in_two_stages(tmp_path, tiny_sd_folder, pairs_folder):
    stages = [
        {"name": "reflow", "objective": "reflow"},
        {"name": "distill", "init_from": "reflow", "objective": "distill"},
    ]
    run(tmp_path, tiny_sd_folder, pairs_folder, method="rectified_flow", student="lora", stages=stages)
    assert (tmp_path / "run" / "stage-2-distill" / "student" / "fastdiff.json").is_file()


@pytest.mark.slow
def test_lightnings_three_phases(tmp_path, tiny_sd_folder, pairs_folder):
    stages = [
        {"name": "squares", "objective": "mse", "teacher_steps": 4},
        {"name": "seen", "init_from": "squares", "objective": "conditional", "stage_teacher": "previous"},
        {"name": "free", "init_from": "seen", "objective": "unconditional", "stage_teacher": "kept"},
    ]
    stages[0]["num_inference_steps"], common = 4, {"num_inference_steps": 2, "teacher_steps": 2}
    run(tmp_path, tiny_sd_folder, pairs_folder, method="lightning", student="lora", stages=stages, **common)
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    kept = [
        load_file(folder / name / "checkpoints" / "step-2" / "previous.safetensors")
        for name in ("stage-2-seen", "stage-3-free")
    ]
    assert all((kept[0][name] == kept[1][name]).all() for name in kept[0])
    assert (folder / "stage-3-free" / "student" / "fastdiff.json").is_file()
