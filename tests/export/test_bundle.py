"""One call writes everything a student folder holds, or nothing."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, TCDScheduler
from export_helpers import Trained
from huggingface_hub import ModelCard

from fastdiff.diffusion import teacher_times
from fastdiff.export import ExportOptions, License, LoadBackError, StudentRecord, export_student, read_record
from fastdiff.methods import TSCD, TSCDConfig
from fastdiff.models.sampler import SamplerSpec


def export(trained, folder, fresh, predict=None, **options):
    def own(x, t, cond):
        return trained.denoiser(x, t, cond, "student")

    teacher = trained.teacher
    return export_student(
        folder,
        trained.student,
        teacher,
        StudentRecord("dmd2", "lora", teacher.identity(), trained.sampler),
        predict or own,
        teacher.encode(["ab"], teacher.default_resolution),
        fresh(teacher.pipeline),
        ExportOptions(**options),
    )


def test_whole_folder(trained, fresh, tmp_path):
    grid = tmp_path / "samples.png"
    grid.write_bytes(b"png")
    report = export(trained, tmp_path / "student", fresh, license=License("apache-2.0"), grid=grid)
    assert report.checks[0].name == "pipeline" and len(report.checks) == 3
    assert report.max_error < 1e-5
    folder = tmp_path / "student"
    names = {path.name for path in folder.iterdir()}
    assert {"model_index.json", "unet", "scheduler", "fastdiff.json", "README.md", "grid.png"} <= names
    assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"} <= names
    assert read_record(folder).load_back["ok"] is True
    assert read_record(folder).sampler == trained.sampler
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"student", "samples.png"}


def test_lora_alone_keeps_its_scheduler(trained_sd, fresh, tmp_path):
    report = export(trained_sd, tmp_path / "student", fresh, pipeline=False)
    assert len(report.checks) == 2
    assert {path.name for path in (tmp_path / "student").iterdir()} == {
        *("scheduler", "fastdiff.json", "README.md"),
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"),
    }


@pytest.mark.parametrize(("eta", "kind"), [(0.0, DDIMScheduler), (0.3, TCDScheduler)])
def test_a_unified_lora_serves_all_numbers_of_steps_with_its_stock_scheduler(tiny_sd, fresh, tmp_path, eta, kind):
    """The last stage of TSCD: one file for 1 to 8 steps, at the trailing times that it was trained at."""
    trained = Trained(tiny_sd, TSCD(TSCDConfig(num_segments=1, num_inference_steps=4, eta=eta)).sampler())
    export(trained, tmp_path / "student", fresh, pipeline=False)
    pipeline = fresh(tiny_sd)()
    pipeline.load_lora_weights(tmp_path / "student")
    pipeline.scheduler = kind.from_pretrained(tmp_path / "student", subfolder="scheduler")
    for steps in (1, 2, 4, 8):
        image = pipeline("ab", num_inference_steps=steps, guidance_scale=0.0, eta=eta, output_type="pt").images
        assert image.isfinite().all()
        times = teacher_times(trained.teacher.schedule, steps)[:-1]
        assert pipeline.scheduler.timesteps.tolist() == [int(t) for t in times]


def test_half_precision_has_its_own_tolerance(trained_sd, fresh, tmp_path):
    report = export(trained_sd, tmp_path / "student", fresh, network_dtype=torch.float16, lora_dtype=torch.bfloat16)
    assert 1e-5 < report.max_error < 5e-2


def test_a_student_that_does_not_load_back_is_not_written(trained_sd, fresh, tmp_path):
    def other(x, t, cond):
        return trained_sd.denoiser(x, t, cond, "teacher")

    with pytest.raises(LoadBackError, match="network output differs"):
        export(trained_sd, tmp_path / "student", fresh, predict=other)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_from_disk_leaves_no_path_behind(tiny_sd_folder, tmp_path, fresh):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    export(Trained(pipeline, SamplerSpec("lcm", (399,))), tmp_path / "student", fresh)
    for path in (tmp_path / "student").rglob("*.json"):
        assert str(tiny_sd_folder) not in path.read_text(), path.name
