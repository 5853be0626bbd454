"""Closed-form teachers behind the interface of real ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fastdiff.data.source import PromptData
from fastdiff.diffusion import (
    EDMSchedule,
    FlowSchedule,
    Gaussian,
    GaussianMixture,
    KernelTeacher,
    NoiseSchedule,
    TrigSchedule,
)
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.models.analytic import AnalyticTeacher, pretrain
from fastdiff.models.analytic_networks import AffinePerBin, PointNet
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import FullSpec, Roles

MEANS = torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
COVS = torch.stack([0.3 * torch.eye(2), torch.tensor([[0.5, 0.2], [0.2, 0.4]])]).double()


def denoiser_of(teacher: AnalyticTeacher) -> Denoiser:
    roles = Roles(teacher.network.double(), {"student": FullSpec(teacher.new_network(), torch.float64)})
    return Denoiser(roles, teacher.family, teacher.schedule, teacher.prediction_type, torch.float64)


def kernel_file(folder, groups=("an animal", "a plant"), **notes):
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    path = folder / "latents.safetensors"
    save_file({"latents": latents, "groups": torch.tensor([0, 0, 0, 1, 1, 1])}, path)
    path.with_suffix(".json").write_text(json.dumps({"groups": groups, **notes}))
    return path, latents


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize(
    "schedule", [None, FlowSchedule(3.0), EDMSchedule(), TrigSchedule()], ids=["vp", "flow", "edm", "trig"]
)
def test_the_network_is_the_exact_denoiser_in_every_parameterisation(kind, schedule: NoiseSchedule | None):
    teacher = AnalyticTeacher.mixture([0.3, 0.7], MEANS, COVS, schedule=schedule, prediction_type=kind)
    law, schedule = GaussianMixture([0.3, 0.7], MEANS, COVS), teacher.schedule
    cond, null = teacher.encode(["component 1", "component 0", ""], 1), teacher.null(1)
    assert cond.tensors["labels"].tolist() == [1, 0, -1] and null.tensors["labels"].tolist() == [-1]
    share = torch.tensor([0.1, 0.5, 0.9]).double()
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * share
    x = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = denoiser_of(teacher)(x, t, cond, "teacher", null, 2.0)
    with_label, without = (law.denoise(x, t, schedule, c.tensors["labels"]) for c in (cond, null.expand(3)))
    # Scaled, because x0 from noise divides by alpha, up to 80 here.
    torch.testing.assert_close(prediction.x0, without + 2 * (with_label - without), rtol=1e-8, atol=1e-9)


def test_gaussian_teacher():
    teacher = AnalyticTeacher.gaussian(MEANS[0], COVS[1])
    assert (teacher.adaptable, teacher.default_resolution, teacher.latent_shape(1)) == (False, 1, (2, 1, 1))
    x, t = torch.randn(4, 2, 1, 1).double(), torch.tensor([0.0, 100.0, 500.0, 999.0]).double()
    cond = teacher.encode(["a sample"] * 4, 1)
    exact = Gaussian(MEANS[0], COVS[1]).denoise(x, t, teacher.schedule)
    torch.testing.assert_close(denoiser_of(teacher)(x, t, cond, "teacher").x0, exact, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="resolution 1, got 32"):
        teacher.latent_shape(32)
    assert torch.equal(teacher.decode(x), x)


def test_kernel_teacher_from_files(tmp_path):
    path, latents = kernel_file(tmp_path, bandwidth=0.05)
    teacher = AnalyticTeacher.kernel(path)
    law = KernelTeacher(latents, torch.tensor([0, 0, 0, 1, 1, 1]), 0.05)
    cond = teacher.encode(["a plant", ""], 4)
    x, t = latents[:2].double(), torch.tensor([300.0, 700.0]).double()
    ours = denoiser_of(teacher)(x, t, cond, "teacher").x0
    torch.testing.assert_close(ours, law.denoise(x, t, teacher.schedule, torch.tensor([1, -1])), rtol=1e-8, atol=1e-9)
    assert teacher.latent_shape(4) == (2, 4, 4)
    assert AnalyticTeacher.kernel(path, 0.2).identity() != teacher.identity()
    assert AnalyticTeacher.kernel(path, 0.05).identity() == teacher.identity()
    with pytest.raises(ValueError, match="Did you mean 'a plant'"):
        teacher.encode(["a plan"], 4)


def test_kernel_files_that_do_not_fit(tmp_path):
    path, _ = kernel_file(tmp_path, groups=["an animal"])
    with pytest.raises(ValueError, match="groups"):
        AnalyticTeacher.kernel(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="captions"):
        AnalyticTeacher.kernel(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"latents\.json"):
        AnalyticTeacher.kernel(path)


def test_the_shipped_kernel_teacher():
    teacher = AnalyticTeacher.kernel()
    caption = next(iter(teacher.captions))
    cond = teacher.encode([caption, ""], teacher.default_resolution)
    x, t = torch.randn(2, *teacher.shape), torch.tensor([200.0, 999.0])
    eps = teacher.family.call(teacher.network, x, t, cond)
    assert eps.shape == x.shape and eps.isfinite().all()
    assert teacher.family.call(teacher.start, x, t, cond).shape == x.shape


def test_pretraining_approaches_the_exact_denoiser():
    teacher = AnalyticTeacher.mixture([0.5, 0.5], MEANS, COVS)
    first = pretrain(teacher.new_network(), teacher, 1)
    assert pretrain(teacher.start, teacher, 300) < 0.1 * first
    assert pretrain(teacher.new_network(), teacher, 1, learning_rate=1e-9) < 0.15 * first  # copies start there too


def test_affine_bins_fit_a_gaussian_exactly():
    """At the times of its bins an affine network represents the exact prediction."""
    teacher = AnalyticTeacher.gaussian(MEANS[0], COVS[1], start=AffinePerBin(2, [200.0, 700.0]))
    network, cond = denoiser_of(teacher), teacher.encode(["a sample"] * 64, 1)
    x, t = torch.randn(64, 2, 1, 1).double(), torch.tensor([200.0, 700.0]).repeat(32)
    with torch.no_grad():
        target = network(x, t, cond, "teacher").native.flatten(1)
        slopes, offsets = network.roles.parameters("student")
        for bin_number, time in enumerate((200.0, 700.0)):
            rows = t == time
            design = torch.cat([x[rows].flatten(1), torch.ones(int(rows.sum()), 1).double()], dim=1)
            solution = torch.linalg.lstsq(design, target[rows]).solution
            slopes[bin_number], offsets[bin_number] = solution[:2].T, solution[2]
        torch.testing.assert_close(network(x, t, cond, "student").native.flatten(1), target, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_a_method_runs_on_a_kernel_teacher_through_the_engine(tmp_path, gan_weight):
    path, _ = kernel_file(tmp_path)
    teacher = AnalyticTeacher.kernel(path, start=PointNet(32, 2, width=16))
    settings = Settings(
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        train_batch_size=2,
        student="full",
        fake_score="full",
        gradient_checkpointing=True,
        report_to="none",
    )
    config = DMD2Config(timesteps=(999, 499), student_update_every=1, gan_weight=gan_weight)
    data = PromptData(["an animal", "a plant"] * 4)
    trainer = Trainer(DMD2(config), teacher, data, settings)
    if gan_weight:
        with pytest.raises(ValueError, match="train_data_dir"):
            trainer.train()
        return
    before = [p.clone() for p in trainer.networks.parameters("student")]
    assert trainer.train() == "done"
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.networks.parameters("student")))


def test_closed_forms_take_no_adapters(tmp_path):
    teacher = AnalyticTeacher.gaussian(MEANS[0], COVS[1])
    with pytest.raises(ValueError, match="full"):
        Trainer(DMD2(DMD2Config()), teacher, PromptData(["a sample"]), Settings(output_dir=str(tmp_path)))
