"""Whole runs through the command's own entry function; students are judged by stock diffusers."""

import json

import pytest
import torch
import yaml
from cli_helpers import SHORT
from safetensors.torch import load_file

from fastdiff import Student, distill
from fastdiff.cli import main
from fastdiff.engine.checkpoints import Checkpoints
from fastdiff.recipes import resolve
from fastdiff.recipes.student import load_pipeline


def picture(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt", **call).images


def test_lora_run_leaves_what_the_house_promises(lora_run):
    kept = {path.name for path in lora_run.iterdir()}
    assert kept == {"recipe.yaml", "checkpoints", "logs", "previews", "student"}
    files = {path.name for path in (lora_run / "student").iterdir()}
    assert {"model_index.json", "fastdiff.json", "README.md", "grid.png", "scheduler"} <= files
    assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"} <= files
    record = json.loads((lora_run / "student" / "fastdiff.json").read_text())
    assert record["load_back"]["ok"]
    assert record["load_back"]["max_error"] < 1e-5
    assert len(record["load_back"]["checks"]) == 3
    assert resolve({}, lora_run / "recipe.yaml").values["lora_rank"] == 4


def test_stock_diffusers_gives_one_picture_by_both_ways(lora_run, tiny_sd_folder):
    from diffusers import DiffusionPipeline, LCMScheduler

    folder = lora_run / "student"
    whole = DiffusionPipeline.from_pretrained(folder)
    adapted = DiffusionPipeline.from_pretrained(tiny_sd_folder)
    undistilled = picture(adapted, num_inference_steps=1, guidance_scale=0.0)
    adapted.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    adapted.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    first = picture(whole, num_inference_steps=1)
    assert whole.scheduler.timesteps.tolist() == [399]
    assert torch.allclose(first, picture(adapted, num_inference_steps=1, guidance_scale=0.0), atol=1e-5)
    assert not torch.allclose(first, undistilled, atol=1e-3)


def test_student_object(lora_run):
    student = Student(lora_run / "student")
    assert (student.kind, student.sampler.timesteps, student.record.method) == ("lora", (399,), "dmd2")
    assert picture(student.pipeline(), **student.call).shape == (1, 3, 32, 32)


def test_export_of_a_run_gives_the_same_lora(lora_run, tmp_path):
    assert main(["export", str(lora_run), "--output", str(tmp_path / "out"), "--format", "lora"]) == 0
    name = "pytorch_lora_weights.safetensors"
    assert not (tmp_path / "out" / "model_index.json").exists()
    own, again = (load_file(folder / name) for folder in (lora_run / "student", tmp_path / "out"))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[key], again[key]) for key in own)
    alone = picture(load_pipeline(tmp_path / "out"), num_inference_steps=1, guidance_scale=0.0)
    whole = picture(load_pipeline(lora_run / "student"), num_inference_steps=1)
    assert torch.allclose(alone, whole, atol=1e-5)


def test_sample_writes_a_picture_a_prompt(lora_run, tmp_path, capsys):
    arguments = ["sample", str(lora_run / "student"), "--prompt", "A red apple!", "dog", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-red-apple-0.png", "dog-1.png"]


def test_a_run_is_not_mixed_with_another(lora_run, tiny_sd_folder, prompts_file, fails):
    common = ("distill", "--teacher", tiny_sd_folder, "--prompts", prompts_file, "--output_dir", lora_run, *SHORT)
    assert "--resume_from_checkpoint latest" in fails(*common)


def test_checkpoint_of_another_method(lora_run, tiny_sd_folder, image_folder, tmp_path, fails):
    message = fails(
        *("distill", "--method", "lcm", "--teacher", tiny_sd_folder, "--data", image_folder, "--rank", "4"),
        *("--output_dir", tmp_path / "run", "--resume_from_checkpoint", lora_run / "checkpoints" / "step-2", *SHORT),
    )
    assert "method 'dmd2', this run has 'lcm'" in message


def test_lcm_full_from_images(tiny_sd_folder, image_folder, tmp_path):
    from diffusers import DiffusionPipeline

    run = tmp_path / "run"
    arguments = ["distill", "--method", "lcm", "--student", "full", "--teacher", str(tiny_sd_folder)]
    assert main([*arguments, "--train_data_dir", str(image_folder), "--output_dir", str(run), *SHORT]) == 0
    pipeline = DiffusionPipeline.from_pretrained(run / "student")
    assert picture(pipeline, num_inference_steps=4).isfinite().all()
    assert pipeline.scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert not (run / "student" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
def test_python_with_objects(tiny_sd, tmp_path):
    student = distill(
        tiny_sd,
        "dmd2",
        ["a dog", "a cat"],
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        train_batch_size=2,
        lora_rank=2,
        lora_alpha=8,
        report_to="none",
    )
    assert student.record.load_back["max_error"] < 1e-5


@pytest.mark.slow
def test_cache_then_train_without_encoders(tiny_sd_folder, image_folder, tmp_path, fails):
    cached = tmp_path / "cache"
    arguments = ["cache", "--teacher", str(tiny_sd_folder), "--data", str(image_folder), "--output", str(cached)]
    assert main([*arguments, "--shard_size", "2"]) == 0
    before = {path.name: path.read_bytes() for path in cached.iterdir()}
    (cached / "index.json").write_text(_forget_last_shard(cached))
    assert main([*arguments, "--shard_size", "2", "--encode_batch_size", "1"]) == 0
    again = {path.name: path.read_bytes() for path in cached.iterdir()}
    assert before.keys() == again.keys()
    shards = [name for name in before if name.startswith("shard")]
    assert len(shards) == 3
    for name in shards:
        (tmp_path / "old").write_bytes(before[name])
        old, new = load_file(tmp_path / "old"), load_file(cached / name)
        assert all(torch.allclose(old[key].float(), new[key].float(), atol=1e-5) for key in old)
    run = ["distill", "--method", "lcm", "--student", "full", "--teacher", str(tiny_sd_folder), "--data", str(cached)]
    assert main([*run, "--w_min", "1", "--w_max", "3", "--output_dir", str(tmp_path / "run"), *SHORT]) == 0
    assert Student(tmp_path / "run" / "student").call == {"num_inference_steps": 4, "guidance_scale": 3.0}


def _forget_last_shard(folder):
    index = json.loads((folder / "index.json").read_text())
    last = index["shards"].pop()
    index["count"] -= last["count"]
    index["next_position"] -= last["count"]
    index["complete"] = False
    return json.dumps(index)


@pytest.mark.slow
def test_stages_start_from_each_other_and_resume_in_the_middle(tiny_sd_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "remove", lambda *_: None)  # what a stage begins with is looked at
    recipe = {
        "pretrained_teacher_model": str(tiny_sd_folder),
        "data": str(image_folder),
        "output_dir": str(tmp_path / "out"),
        "student": "full",
        "fake_score": "full",
        "train_batch_size": 2,
        "max_train_steps": 1,
        "report_to": "none",
        "stages": [
            {"name": "scores"},
            {"name": "still", "init_from": "scores", "gan_weight": 0.1, "max_train_steps": 0},
            {"name": "lcm", "method": "lcm", "teacher_from": "scores", "max_train_steps": 0},
        ],
    }
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", "--config", str(tmp_path / "stages.yaml")]) == 0
    scores, still, lcm = (tmp_path / "out" / name for name in ("stage-1-scores", "stage-2-still", "stage-3-lcm"))
    weights = [load_file(run / "student/unet/diffusion_pytorch_model.safetensors") for run in (scores, still, lcm)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert all(torch.equal(weights[0][key], weights[2][key]) for key in weights[2])
    critics = [
        load_file(run / "checkpoints" / name / "fake_score.safetensors")
        for run, name in ((scores, "step-1"), (still, "untrained"))
    ]
    assert all(torch.equal(critics[0][key], critics[1][key]) for key in critics[0])
    assert Student(lcm / "student").record.teacher["source"] == str(scores / "student")
    made = (scores / "student" / "fastdiff.json").stat().st_mtime_ns
    import shutil

    shutil.rmtree(lcm)
    again = ["distill", "--config", str(tmp_path / "out" / "recipe.yaml"), "--resume_from_checkpoint", "latest"]
    assert main(again) == 0
    assert (scores / "student" / "fastdiff.json").stat().st_mtime_ns == made
    assert (lcm / "student" / "fastdiff.json").is_file()


@pytest.mark.slow
def test_sdxl_in_bfloat16(tiny_sdxl_folder, prompts_file, tmp_path):
    arguments = ["distill", "--teacher", str(tiny_sdxl_folder), "--prompts", str(prompts_file), "--rank", "4"]
    more = ["--mixed_precision", "bf16", "--cast_teacher_unet", "--timesteps", "999", "749", "499", "249"]
    assert main([*arguments, *more, "--output_dir", str(tmp_path / "run"), *SHORT]) == 0
    assert len(Student(tmp_path / "run" / "student").sampler) == 4
