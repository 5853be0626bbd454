"""Students that are told where their jump ends, through the command: stock diffusers samples them all the same."""

import json

import pytest
import torch
from cli_helpers import SHORT
from safetensors.torch import load_file
from tiny_transformers import build

from fastdiff.cli import main
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.student import call_settings, load_pipeline

FREEFLOW = ("--fake_score", "full", "--correct_every", "2")


@pytest.mark.parametrize(("method", "needs", "more"), [
    ("boot", "prompts", ()),
    ("freeflow", "prompts", FREEFLOW),
    ("meanflow", "images", ("--timesteps", "999", "499")),
    ("meanflow", "images", ("--timesteps", "999", "499", "--sampling", "jump")),
    ("ctm", "images", ("--num_inference_steps", "4", "--eta", "0.3")),
    ("ctm", "images", ("--num_inference_steps", "2", "--eta", "0")),
    ("apex", "images", ("--train_batch_size", "4", "--timesteps", "999", "499")),
    ("scm", "images", ()),
])  # fmt: skip
def test_runs_export_what_stock_diffusers_samples(
    method, needs, more, tiny_sd_folder, prompts_file, image_folder, tmp_path
):
    folder = tmp_path / "run"
    source = ("--prompts", prompts_file) if needs == "prompts" else ("--train_data_dir", image_folder)
    arguments = ["distill", "--method", method, "--teacher", tiny_sd_folder, *source, "--student", "full"]
    arguments += ["--output_dir", folder, "--learning_rate", "0.01", *SHORT, *more]
    assert main([str(argument) for argument in arguments]) == 0
    record = json.loads((folder / "student" / "fastdiff.json").read_text())
    assert record["load_back"]["ok"] and record["load_back"]["max_error"] < 1e-4
    pipeline = load_pipeline(folder / "student")
    slot = pipeline.unet.time_embedding.cond_proj
    assert slot is None or not slot.weight.any()  # the zeros that switch guidance off
    steps = len(record["sampler"]["timesteps"])
    moving = "jump" in more or (method == "ctm" and steps > 1)  # told another end at each step
    assert record["sampler"]["own_steps_only"] == moving
    if moving:
        with pytest.raises(RecipeError, match=f"where each of its {steps} steps ends"):
            call_settings(folder / "student", steps + 1)
    images = pipeline("a dog", num_inference_steps=steps, output_type="pt", generator=torch.Generator()).images
    assert images.isfinite().all()
    if method != "scm":
        trained = load_file(next((folder / "checkpoints").glob("step-2")) / "student.safetensors")
        assert trained["time_embedding.cond_proj.weight"].any()


def test_another_number_of_told_steps_is_another_export(tiny_sd_folder, image_folder, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    distil(tiny_sd_folder, image_folder, run, "--method", "ctm", "--num_inference_steps", "4", "--eta", "0")
    arguments = ["export", str(run), "--output", str(again), "--num_inference_steps"]
    assert main([*arguments, "2"]) == 0
    record = json.loads((again / "fastdiff.json").read_text())
    assert record["load_back"]["ok"] and record["sampler"]["own_steps_only"]
    assert record["sampler"]["timesteps"] == [999, 499] and call_settings(again)["num_inference_steps"] == 2
    assert main([*arguments, "0"]) == 2
    assert record == json.loads((again / "fastdiff.json").read_text())  # what was there is kept


def distil(teacher, images, folder, *more):
    arguments = [
        "distill",
        "--teacher",
        teacher,
        "--train_data_dir",
        images,
        "--student",
        "full",
        "--output_dir",
        folder,
    ]
    assert main([str(argument) for argument in [*arguments, "--learning_rate", "0.01", *SHORT, *more]]) == 0
    return json.loads((folder / "student" / "fastdiff.json").read_text())


@pytest.mark.slow
def test_a_flow_transformer_is_distilled_exported_and_gone_on_from(image_folder, tmp_path):
    """Told where to jump, and then where to jump from the student that came of it."""
    teacher = tmp_path / "teacher"
    build("stable_diffusion_3").save_pretrained(teacher)
    first = distil(teacher, image_folder, tmp_path / "a", "--method", "ctm", "--num_inference_steps", "2")
    assert first["load_back"]["ok"] and first["sampler"]["own_steps_only"]
    begun = ("--init_from", tmp_path / "a" / "student", "--method", "meanflow", "--timesteps", "999", "499")
    second = distil(teacher, image_folder, tmp_path / "b", *begun)
    assert second["load_back"]["ok"] and not second["sampler"]["own_steps_only"]
    trained = load_file(tmp_path / "b" / "checkpoints" / "step-2" / "student.safetensors")
    assert trained["timestep_slot.cond_proj.weight"].any()
    pipeline = load_pipeline(tmp_path / "b" / "student")
    settings = call_settings(tmp_path / "b" / "student")
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "height": 32, "width": 32}
    assert pipeline("a dog", **settings, **call).images.isfinite().all()
