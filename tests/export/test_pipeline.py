"""A student's pipeline folder is loaded by plain diffusers and samples as the trainer does."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from fastdiff.diffusion.prediction import Prediction
from fastdiff.export.loadback import LoadBackError, LoadBackReport, check_pipeline, make_probe
from fastdiff.export.pipeline import Student, save_pipeline
from fastdiff.export.weights import student_state
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import with_guidance_input
from fastdiff.models.roles import FullSpec, Roles
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher


def test_merged_adapter_loads_back(trained, tmp_path):
    folder = save_pipeline(trained.student, tmp_path / "student")
    check = check_pipeline(folder, trained.probe(), trained.sampler, trained.family)
    assert LoadBackReport((check,)).require_ok().max_error < 1e-5


def test_full_module_loads_back(tiny_sd, tmp_path):
    teacher = Teacher(tiny_sd)
    roles = Roles(teacher.network, {"student": FullSpec()})
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.mul_(0.9)
    sampler = SamplerSpec("lcm", (399,))
    student = Student(tiny_sd, roles.network("student"), sampler)
    denoiser = Denoiser(roles, teacher.family, teacher.schedule, teacher.prediction_type)
    probe = make_probe(
        lambda x, t, cond: denoiser(x, t, cond, "student"),
        teacher.encode(["ab"], 32),
        teacher.latent_shape(32),
        sampler,
        teacher.schedule,
        teacher.family,
    )
    folder = save_pipeline(student, tmp_path / "student")
    check = check_pipeline(folder, probe, sampler, teacher.family)
    assert LoadBackReport((check,)).require_ok().max_error < 1e-5


def test_one_step_at_399_needs_no_flag(trained_sd, tmp_path):
    student = Student(
        trained_sd.teacher.pipeline, trained_sd.student.network, SamplerSpec("lcm", (399,)), {"student": 1}
    )
    pipeline = DiffusionPipeline.from_pretrained(save_pipeline(student, tmp_path / "student"))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionPipeline

    def run(**call):
        return pipeline("ab", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images

    plain = run(num_inference_steps=1)
    pipeline.scheduler = LCMScheduler.from_config(trained_sd.teacher.pipeline.scheduler.config)
    assert torch.equal(run(timesteps=[399]), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_guidance_is_ignored(trained_sd, tmp_path, guidance_scale):
    pipeline = DiffusionPipeline.from_pretrained(save_pipeline(trained_sd.student, tmp_path / "student"))
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    call = {"prompt": "ab", "num_inference_steps": 2, "output_type": "pt"}
    guided = pipeline(**call, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0)).images
    free = pipeline(**call, guidance_scale=0.0, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(guided, free)
    assert rows == [1] * 4


def test_guidance_can_be_kept(trained_sd, tmp_path):
    folder = save_pipeline(trained_sd.student, tmp_path / "student", guidance_free=False)
    assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] is None
    check = check_pipeline(folder, trained_sd.probe(), trained_sd.sampler, trained_sd.family)
    assert not check.problems()


def test_a_student_with_guidance_keeps_it(trained_sd):
    sampler = SamplerSpec.trailing("ddim", 4, guidance_scale=3.0)
    assert not Student(trained_sd.teacher.pipeline, trained_sd.student.network, sampler).ignores_guidance()


def test_a_trained_guidance_embedding_is_fed_the_trained_scale(tiny_sd, tmp_path):
    teacher = Teacher(tiny_sd)
    network = with_guidance_input(teacher.network)
    with torch.no_grad():
        network.time_embedding.cond_proj.weight.normal_(0, 0.1)
    sampler = replace(SamplerSpec.lcm_grid(2), guidance_scale=4.0)
    embedding = tiny_sd.get_guidance_scale_embedding(torch.tensor([3.0]), embedding_dim=256)

    def predict(x, t, cond):
        native = teacher.family.call(network, x, t, cond, timestep_cond=embedding)
        return Prediction(native, "epsilon", x, t, teacher.schedule)

    probe = make_probe(predict, teacher.encode(["ab"], 32), (4, 16, 16), sampler, teacher.schedule, teacher.family)
    folder = save_pipeline(Student(tiny_sd, network, sampler), tmp_path / "student")
    assert not check_pipeline(folder, probe, sampler, teacher.family).problems()
    other = replace(sampler, guidance_scale=8.0)
    assert check_pipeline(folder, probe, other, teacher.family).problems()


def test_frozen_weights_are_not_copied(trained_sd):
    network = trained_sd.student.network
    owned = {tensor.data_ptr() for tensor in network.state_dict().values()}
    state = student_state(network, {"student": 1.0})
    new = [key for key, tensor in state.items() if tensor.data_ptr() not in owned]
    assert len(new) == 79  # as many as adapted modules
    assert all(key.endswith(".weight") for key in new)
    assert not any("base_layer" in key or "lora_" in key for key in state)


def test_teacher_is_left_as_it_was(trained_sd, tmp_path):
    pipeline = trained_sd.teacher.pipeline
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    network, scheduler = pipeline.unet, pipeline.scheduler
    save_pipeline(trained_sd.student, tmp_path / "student", dtype=torch.float16)
    assert pipeline.unet is network and pipeline.scheduler is scheduler
    assert all(torch.equal(before[key], value) for key, value in pipeline.unet.state_dict().items())
    assert pipeline.vae.dtype == torch.float32


def test_half_precision_network(trained_sd, tmp_path):
    folder = save_pipeline(trained_sd.student, tmp_path / "student", dtype=torch.float16)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    check = check_pipeline(folder, trained_sd.probe(), trained_sd.sampler, trained_sd.family, tolerance=5e-3)
    assert not check.problems()


def test_folder_holds_safetensors_only_and_no_local_paths(trained_sd, tmp_path):
    folder = save_pipeline(trained_sd.student, tmp_path / "student")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert not [path for path in files if path.suffix == ".json" and str(tmp_path) in path.read_text()]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_an_earlier_student_is_replaced_but_nothing_else(trained_sd, tmp_path):
    folder = save_pipeline(trained_sd.student, tmp_path / "student")
    (folder / "stale.txt").write_text("old")
    save_pipeline(trained_sd.student, folder)
    assert not (folder / "stale.txt").exists()
    other = tmp_path / "holiday"
    other.mkdir()
    (other / "photo.png").write_text("precious")
    with pytest.raises(FileExistsError, match="holiday"):
        save_pipeline(trained_sd.student, other)
    assert (other / "photo.png").exists()


@pytest.mark.parametrize("damage", ["drop", "change"])
def test_a_damaged_folder_is_noticed(trained_sd, tmp_path, damage):
    folder = save_pipeline(trained_sd.student, tmp_path / "student")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    key = "mid_block.resnets.0.conv1.weight"
    if damage == "drop":
        del weights[key]
    else:
        weights[key] = weights[key] * 1.01
    save_file(weights, path, metadata={"format": "pt"})
    check = check_pipeline(folder, trained_sd.probe(), trained_sd.sampler, trained_sd.family)
    with pytest.raises(LoadBackError, match="network output differs"):
        LoadBackReport((check,)).require_ok()


def test_an_impossible_sampler_leaves_nothing(trained_sd, tmp_path):
    sampler = SamplerSpec("lcm", (999, 625, 249))
    student = Student(trained_sd.teacher.pipeline, trained_sd.student.network, sampler, {"student": 1.0})
    with pytest.raises(ValueError, match="no stock LCM"):
        save_pipeline(student, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_beside_the_run_is_compared_on_the_cpu(trained_sd, tmp_path, monkeypatch):
    """A device that is full stands for a GPU; there and between devices more is allowed."""
    folder, placed = save_pipeline(trained_sd.student, tmp_path / "student"), []
    probe = replace(trained_sd.probe(), made_on=torch.device("cuda"), device=torch.device("cuda"))
    move = StableDiffusionPipeline.to

    def to(self, device):
        placed.append(torch.device(device).type)
        if placed[-1] == "cuda":
            raise torch.OutOfMemoryError("full")
        return move(self, device)

    monkeypatch.setattr(StableDiffusionPipeline, "to", to)
    check = check_pipeline(folder, probe, trained_sd.sampler, trained_sd.family)
    assert placed == ["cuda", "cpu", "cpu"] and check.tolerance == 1e-3 and check.sample_error < 1e-5
    assert probe.allowed(1e-5, torch.device("cuda")) == 1e-4
    assert probe.allowed(5e-2, torch.device("cpu")) == 5e-2
    assert trained_sd.probe().allowed(1e-5, torch.device("cpu")) == 1e-5


def test_answers_are_made_and_compared_without_tf32(trained_sd, monkeypatch):
    seen, call = [], trained_sd.denoiser.__class__.__call__

    def note(self, *args, **kwargs):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(trained_sd.denoiser.__class__, "__call__", note)
    before = torch.backends.cudnn.allow_tf32
    trained_sd.probe()
    assert set(seen) == {(False, False)} and torch.backends.cudnn.allow_tf32 == before
