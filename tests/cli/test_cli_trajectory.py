"""Stages of trajectory methods through the command, and students whose samplers are new: judged by stock diffusers."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdiff import Student
from fastdiff.cli import main

COMMON = {"train_batch_size": 2, "max_train_steps": 1, "report_to": "none", "validation_samples": 0, "lora_rank": 2}

RUNS = {
    "tscd": {
        "fake_score": "lora",
        "stages": [
            {"name": "first", "num_segments": 2},
            {"name": "last", "init_from": "first", "num_segments": 1, "num_inference_steps": 2, "score_weight": 1.0},
        ],
    },
    "progressive": {
        "stages": [
            {"name": "first", "num_inference_steps": 2, "guidance_scale": 2.0},
            {"name": "last", "init_from": "first", "num_inference_steps": 1, "stage_teacher": "previous"},
        ],
    },
    "tcm": {
        "stages": [{"name": "first", "method": "lcm", "guidance_scale": 2.0}, {"name": "last", "init_from": "first"}],
    },
    "tcd": {"num_inference_steps": 2, "eta": 0.3},
    "ctm": {"num_inference_steps": 2, "eta": 1.0, "student": "full"},
    "pcm": {"num_phases": 2},
    "scott": {"num_inference_steps": 2},
    "rcm": {"timesteps": [999, 499], "tangent_warmup": 0, "fake_score": "lora"},
    "perflow": {"solver_steps": 2},
    "guidance_distillation": {"num_inference_steps": 2, "guidance_scale": 3.0},
}
SAMPLERS = {
    "tscd": ("DDIMScheduler", [999, 499]),
    "progressive": ("DDIMScheduler", [999]),
    "tcd": ("TCDScheduler", [999, 499]),
    "tcm": ("LCMScheduler", [999]),
    "ctm": ("LCMScheduler", [999, 499]),
    "pcm": ("DDIMScheduler", [999, 499]),
    "scott": ("LCMScheduler", [999, 499]),
    "rcm": ("LCMScheduler", [999, 499]),
    "perflow": ("DDIMScheduler", [999, 749, 499, 249]),
    "guidance_distillation": ("DDIMScheduler", [999, 499]),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_run_exports_what_stock_diffusers_loads(method, tiny_sd_folder, image_folder, tmp_path):
    own = {"method": method, "teacher": str(tiny_sd_folder), "train_data_dir": str(image_folder)}
    recipe = (
        own | {"output_dir": str(tmp_path / "run"), "student": "lora", "learning_rate": 0.01} | COMMON | RUNS[method]
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", "--config", str(tmp_path / "recipe.yaml")]) == 0
    stages = [stage["name"] for stage in RUNS[method].get("stages", ())]
    folders = [tmp_path / "run" / f"stage-{n}-{name}" for n, name in enumerate(stages, 1)] or [tmp_path / "run"]
    record = json.loads((folders[-1] / "student" / "fastdiff.json").read_text())
    assert record["load_back"]["ok"] and record["load_back"]["max_error"] < 1e-4
    student = Student(folders[-1] / "student")
    pipeline = student.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dog", generator=torch.Generator().manual_seed(0), output_type="pt", **student.call).images
    assert image.isfinite().all()
    kind, times = SAMPLERS[method]
    assert (type(pipeline.scheduler).__name__, pipeline.scheduler.timesteps.tolist()) == (kind, times)
    assert student.call.get("eta") == RUNS[method].get("eta") or method == "ctm"
    if stages:
        first, last = (load_file(folder / "student" / "pytorch_lora_weights.safetensors") for folder in folders)
        moved = max((first[name] - last[name]).abs().max().item() for name in first)
        assert 0 < moved < 0.5  # the last stage goes on from the first one's weights
