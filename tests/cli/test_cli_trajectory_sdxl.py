"""Trajectory methods of an SDXL teacher, and students that are told their guidance: judged by stock diffusers."""

import json

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fastdiff import Student
from fastdiff.cli import main

COMMON = {"train_batch_size": 2, "max_train_steps": 2, "report_to": "none", "validation_samples": 0, "lora_rank": 2}
RUNS = {
    "tscd": {
        "student": "lora",
        "fake_score": "lora",
        "num_segments": 1,
        "num_inference_steps": 2,
        "score_weight": 1.0,
    },
    "ctm": {"student": "full", "num_inference_steps": 2},
    "meanflow": {"student": "full", "timesteps": [999, 499], "sampling": "jump"},
}
TOLD_GUIDANCE = {"lcm": "tiny_sdxl_folder", "guidance_distillation": "tiny_sd_folder"}

pytestmark = pytest.mark.slow


def distil(method, teacher, images, folder, **own):
    """The student of a run from images; it is checked that its files load back as what was trained."""
    recipe = {"method": method, "teacher": str(teacher), "train_data_dir": str(images), "output_dir": str(folder)}
    config = folder.parent / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe | COMMON | {"learning_rate": 0.01} | own))
    assert main(["distill", "--config", str(config)]) == 0
    record = json.loads((folder / "student" / "fastdiff.json").read_text())
    assert record["load_back"]["ok"] and record["load_back"]["max_error"] < 1e-4
    return Student(folder / "student"), record


def picture(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found = pipeline("a dog", generator=generator, output_type="pt", height=32, width=32, **call).images
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("method", RUNS)
def test_an_sdxl_student_is_sampled_by_the_stock_pipeline(method, tiny_sdxl_folder, image_folder, tmp_path):
    student, record = distil(method, tiny_sdxl_folder, image_folder, tmp_path / "run", **RUNS[method])
    assert record["sampler"]["own_steps_only"] == (method != "tscd")  # told another end at each step
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    found = picture(pipeline, **student.call)
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]
    teacher = DiffusionPipeline.from_pretrained(tiny_sdxl_folder)
    teacher.scheduler = pipeline.scheduler
    assert not torch.allclose(found, picture(teacher, num_inference_steps=2, guidance_scale=1.0), atol=1e-3)


@pytest.mark.parametrize("method", TOLD_GUIDANCE)
def test_a_student_that_is_told_its_guidance_follows_the_stock_argument(method, image_folder, tmp_path, request):
    own = {"student": "full", "guidance_range": [2.0, 6.0], "num_inference_steps": 2}
    student, _ = distil(method, request.getfixturevalue(TOLD_GUIDANCE[method]), image_folder, tmp_path / "run", **own)
    assert student.call == {"num_inference_steps": 2, "guidance_scale": 4.0}
    weights = load_file(tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["time_embedding.cond_proj.weight"].any()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    weak, strong = (picture(pipeline, num_inference_steps=2, guidance_scale=scale) for scale in (2.0, 6.0))
    assert not torch.allclose(weak, strong, atol=1e-4)
    assert batches == [1] * 4  # one call a step, without an unconditional half
