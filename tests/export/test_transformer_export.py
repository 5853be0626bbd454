"""Students of transformer families: what is exported is loaded back by stock diffusers and is the trainer's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_transformers import BUILDERS, build

from fastdiff.data import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.export.lora import DIFFUSERS_FILE, KOHYA_FILE
from fastdiff.methods import method_named
from fastdiff.models.teacher import Teacher
from fastdiff.recipes import resolve
from fastdiff.recipes.exporting import export_run
from fastdiff.recipes.student import call_settings, load_pipeline

QUICK = ("stable_diffusion_3", "flux")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (builder.__name__ for builder in BUILDERS)
]


FOUR_STEPS = {"method": "dmd2", "timesteps": [999, 749, 499, 249]}


def exported(name: str, folder, values=FOUR_STEPS):
    """A student with visible adapter weights, written and loaded back; raises where stock diffusers disagrees."""
    recipe = resolve(
        {
            "output_dir": str(folder / "run"),
            "resolution": 32,
            "lora_rank": 2,
            "report_to": "none",
            **values,
        }
    )
    cls = method_named(recipe.method)
    teacher = Teacher(build(name))
    trainer = Trainer(cls(recipe.build(cls.Config)), teacher, PromptData(["a"]), recipe.build(Settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.networks.parameters("student"):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer, export_run(trainer, recipe, folder / "student")


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_student_loads_back(name, tmp_path):
    trainer, student = exported(name, tmp_path)
    family = trainer.teacher.family
    report = student.record.load_back
    assert report["ok"] and len(report["checks"]) == (2 if family.loads_lora else 1)
    assert not (student.folder / KOHYA_FILE).exists()
    assert (student.folder / DIFFUSERS_FILE).exists() == family.loads_lora
    if family.loads_lora:
        keys = load_file(student.folder / DIFFUSERS_FILE)
        assert all(
            key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys
        )
    assert student.call["guidance_scale"] == (3.5 if name == "flux" else 0.0)
    # Only where the pipeline leaves a shifted grid to its scheduler do users pass the levels.
    assert ("sigmas" in student.call) == (name in ("stable_diffusion_3", "sana"))
    config = json.loads((student.folder / "scheduler" / "scheduler_config.json").read_text())
    assert not config.get("use_dynamic_shifting")


@pytest.mark.slow
def test_the_saved_scheduler_has_the_levels_of_the_trained_resolution(tmp_path):
    trainer, student = exported("flux", tmp_path)
    pipeline = load_pipeline(student.folder, device="cpu")
    pipeline("b", height=32, width=32, output_type="latent", **student.call)
    shift = trainer.networks.denoiser.schedule.shift
    assert shift != trainer.teacher.schedule.shift
    levels = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25)]
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*levels, 0.0], abs=1e-5)


def test_levels_that_are_passed_are_the_trained_ones(tmp_path):
    _, student = exported("stable_diffusion_3", tmp_path)
    pipeline = load_pipeline(student.folder, device="cpu")
    pipeline("b", height=32, width=32, output_type="latent", **student.call)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-5)
    assert "sigmas=[1, 0.9, 0.75, 0.5]" in (student.folder / "README.md").read_text()


def test_another_number_of_steps_is_evenly_spaced_and_shifted_as_the_trained_ones(tmp_path):
    """The stock grid of two steps would be 1 and almost 0, where the second call is lost."""
    _, student = exported("stable_diffusion_3", tmp_path)
    pipeline = load_pipeline(student.folder, device="cpu")
    call = call_settings(student.folder, steps=2)
    pipeline("b", height=32, width=32, output_type="latent", **call)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0], abs=1e-5)  # 1/2 under a shift of 3
    assert call_settings(student.folder, steps=1)["sigmas"] == [1]
    # A scheduler that stretches levels to the last trained one has no single step, and must not stretch others.
    path = student.folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift_terminal": 0.5}))
    for steps, levels in ((1, [1, 0]), (2, [1, 0.75, 0])):
        pipeline = load_pipeline(student.folder, device="cpu", num_inference_steps=steps)
        pipeline("b", height=32, width=32, output_type="latent", **call_settings(student.folder, steps=steps))
        assert pipeline.scheduler.sigmas.tolist() == pytest.approx(levels, abs=1e-5)


@pytest.mark.slow
def test_a_full_student_loads_back(tmp_path):
    _, student = exported("pixart_sigma", tmp_path, {"method": "lcm", "student": "full"})
    assert student.record.load_back["ok"] and student.kind == "full"


@pytest.mark.slow
def test_lora_files_alone_are_refused_where_no_pipeline_reads_them(tmp_path):
    trainer, _ = exported("pixart_sigma", tmp_path)
    recipe = resolve({"method": "dmd2", "output_dir": str(tmp_path / "run")})
    with pytest.raises(ValueError, match="PixArtSigmaPipeline of diffusers loads no LoRA"):
        export_run(trainer, recipe, tmp_path / "other", pipeline=False)


@pytest.mark.parametrize("values", [
    {"method": "meanflow", "timesteps": [999, 499]},
    {"method": "ctm", "num_inference_steps": 4, "eta": 0.0},
    {"method": "guidance_distillation", "guidance_range": [0.5, 1.5], "num_inference_steps": 2},
], ids=lambda values: values["method"])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_told_more_is_a_stock_transformer(name, values, tmp_path):
    trainer, student = exported(name, tmp_path, {"student": "full", **values})
    assert student.record.load_back["ok"]
    network, teacher = load_pipeline(student.folder).transformer, trainer.teacher.network
    assert type(network) is type(teacher)
    assert network.state_dict().keys() == teacher.state_dict().keys()
    assert trainer.networks.roles.state_dict("student")["timestep_slot.cond_proj.weight"].any()
    assert student.record.sampler.own_steps_only == (values["method"] == "ctm")
