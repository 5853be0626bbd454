"""Students of several adapters: their files, and stock pipelines that switch between them."""

from __future__ import annotations

import json

import pytest
import torch

from fastdiff.export import EXPERTS_FILE, Experts, ExportOptions, StudentRecord, export_student, load_experts
from fastdiff.export.experts import read_experts
from fastdiff.export.lora import DIFFUSERS_FILE
from fastdiff.export.pipeline import Student
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import AdapterSpec, Roles
from fastdiff.models.sampler import SamplerSpec, sample
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.student import Student as StudentFolder

BY_STEP = ("expert_1", "expert_1", "student", "student")


class TwoExperts:
    """Two random adapters on one base, each serving two of four steps, and their export."""

    def __init__(self, source, tmp_path):
        self.source, self.folder = str(source), tmp_path / "student"
        self.teacher = Teacher.from_pretrained(self.source)
        spec = AdapterSpec(2, 3.0, ("to_q", "conv1"))
        self.roles = Roles(self.teacher.network, {"student": spec, "expert_1": spec})
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for role in ("student", "expert_1"):
                for parameter in self.roles.parameters(role):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        teacher = self.teacher
        self.denoiser = Denoiser(self.roles, teacher.family, teacher.schedule, teacher.prediction_type)
        self.sampler = SamplerSpec("ddim", (999, 749, 499, 249))
        self.experts = Experts(BY_STEP, {role: self.predict(role) for role in ("expert_1", "student")})
        self.cond = teacher.encode(["ab", "a red c"], teacher.default_resolution)

    def predict(self, role):
        return lambda x, t, cond: self.denoiser(x, t, cond, role)

    def export(self, **changes):
        teacher = self.teacher
        arguments = {"options": ExportOptions(pipeline=False), "experts": self.experts} | changes
        return export_student(
            self.folder,
            Student(teacher.pipeline, teacher.network, self.sampler, {"student": 1.0}),
            teacher,
            StudentRecord("phased_dmd", "lora", teacher.identity(), self.sampler),
            self.predict("student"),
            self.cond,
            lambda: Teacher.from_pretrained(self.source).pipeline,
            **arguments,
        )


@pytest.fixture
def two(tiny_sd_folder, tmp_path):
    return TwoExperts(tiny_sd_folder, tmp_path)


def test_every_file_is_written_and_loads_back(two):
    report = two.export()
    assert report.ok and report.max_error < 1e-5
    assert [check.name for check in report.checks] == [
        DIFFUSERS_FILE,
        "pytorch_lora_weights_kohya.safetensors",
        f"expert_1/{DIFFUSERS_FILE}",
        "expert_1/pytorch_lora_weights_kohya.safetensors",
        EXPERTS_FILE,
    ]
    assert read_experts(two.folder) == [
        {"weights": f"expert_1/{DIFFUSERS_FILE}", "times": [999.0, 749.0], "above": 499.0},
        {"weights": DIFFUSERS_FILE, "times": [499.0, 249.0], "above": -1.0},
    ]
    assert not (two.folder / "model_index.json").exists()
    card = (two.folder / "README.md").read_text()
    assert EXPERTS_FILE in card and "ComfyUI" not in card


def test_a_stock_pipeline_switches_as_the_trainer_does(two):
    two.export()
    pipeline = StudentFolder(two.folder).pipeline(device="cpu")
    z = torch.randn(2, *two.teacher.latent_shape(32), generator=torch.Generator().manual_seed(1))
    roles = iter(BY_STEP)
    with torch.no_grad():
        own = sample(
            two.sampler,
            lambda x, t, s: two.denoiser(x, t, two.cond, next(roles)),
            z,
            lambda k: None,
            two.teacher.schedule,
        )
    made, again = (
        pipeline(
            prompt_embeds=two.cond.tensors["prompt_embeds"],
            latents=z,
            output_type="latent",
            **StudentFolder(two.folder).call,
        ).images
        for _ in range(2)  # a second call begins with the first expert again
    )
    torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-5)
    assert torch.equal(made, again)

    seen = []
    pipeline.unet.register_forward_hook(lambda net, args, out: seen.append((int(args[1]), net.active_adapters())))
    pipeline(prompt_embeds=two.cond.tensors["prompt_embeds"], num_inference_steps=8, guidance_scale=0.0, latents=z)
    assert [adapters for _, adapters in seen] == [["expert_1"]] * 4 + [["expert_2"]] * 4
    assert [time for time, _ in seen][3:5] == [624, 499]  # at its bound the next one serves


@pytest.mark.slow
def test_exchanged_experts_do_not_pass_the_check(two, monkeypatch):
    from fastdiff.export import LoadBackError, bundle

    write = bundle.write_experts

    def exchanged(folder, *args):
        files = write(folder, *args)
        content = json.loads((folder / EXPERTS_FILE).read_text())
        first, second = content["experts"]
        first["weights"], second["weights"] = second["weights"], first["weights"]
        (folder / EXPERTS_FILE).write_text(json.dumps(content))
        return files

    monkeypatch.setattr(bundle, "write_experts", exchanged)
    with pytest.raises(LoadBackError, match=EXPERTS_FILE):
        two.export()
    assert not two.folder.exists()


def test_damage_is_named(two, tmp_path):
    with pytest.raises(ValueError, match="no whole pipeline"):
        two.export(options=ExportOptions())
    path = tmp_path / EXPERTS_FILE
    for content, error, named in [
        ('{"experts": [{"weights": "gone.safetensors", "above": 3}]}', FileNotFoundError, "gone.safetensors"),
        ('{"experts": [{"above": 3}]}', ValueError, "cannot be read"),
        ("{", ValueError, "cannot be read"),
        ('{"experts": []}', ValueError, "must fall"),
    ]:
        path.write_text(content)
        with pytest.raises(error, match=named):
            load_experts(None, tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/weights.safetensors", "weights.bin"])
def test_names_that_lead_out_or_are_no_safetensors_are_refused(tmp_path, name):
    (tmp_path / "experts.json").write_text(json.dumps({"experts": [{"weights": name, "above": 0.0}]}))
    with pytest.raises(ValueError, match=r"leads out of it|no safetensors"):
        read_experts(tmp_path)
