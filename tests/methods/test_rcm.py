"""rCM (arXiv 2510.08431): sCM until the warm-up ends, then sCM and DMD2's gap side by side."""

from __future__ import annotations

import pytest
import torch
from flow_map_helpers import LAW, ConsistencyNetwork, Latents, sd_batch, settings, teacher_network
from method_helpers import SD, batch_of, context, denoiser_of, f64, spatial
from torch import nn

from fastdiff.diffusion import Gaussian
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods.dmd2 import DMD2, DMD2Config
from fastdiff.methods.rcm import RCM, RCMConfig
from fastdiff.methods.scm import SCM, SCMConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.teacher import Teacher


def method(**config) -> RCM:
    return RCM(RCMConfig(**{"guidance_scale": 1.0, "timesteps": (999,)} | config))


def setup(step: int, shift: float = 1.0):
    student = ConsistencyNetwork(SD, "epsilon", nn.Parameter(f64(0.2)))
    fake = ExactNetwork(Gaussian(LAW.mean + shift, LAW.cov), SD, "epsilon")
    denoiser = denoiser_of(teacher_network("epsilon"), student=student, fake_score=fake)
    batch = batch_of(8, 2, spatial(torch.randn(8, 2, generator=torch.Generator().manual_seed(0))).double())
    return denoiser, batch, context(denoiser, 8, step=step)


@pytest.mark.parametrize("timesteps", [(999,), (999, 499)])
def test_the_consistency_term_is_scms_and_the_other_dmd2s(timesteps):
    denoiser, batch, ctx = setup(2000)
    terms = method(consistency_weight=3.0, timesteps=timesteps).student_loss(batch, ctx)
    scm = SCM(SCMConfig(time_mean=0.7, time_std=1.6, tangent_warmup=1000)).student_loss(batch, ctx)
    dmd = DMD2(DMD2Config(guidance_scale=1.0, timesteps=timesteps)).student_loss(batch, ctx)
    expected = {"distribution_matching": dmd["distribution_matching"], "consistency": 3 * scm["consistency"]}
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        slopes = [torch.autograd.grad(one, denoiser.roles.parameters("student")) for one in (term, expected[name])]
        assert term > 1e-3 and slopes[0][0].abs() > 1e-3
        torch.testing.assert_close((term, *slopes[0]), (expected[name], *slopes[1]), rtol=1e-12, atol=0)


def test_the_score_term_rests_where_the_fake_score_is_the_teacher():
    _denoiser, batch, ctx = setup(2000, shift=0.0)
    assert method().student_loss(batch, ctx)["distribution_matching"] == 0


def test_the_warm_up_is_scm_alone_and_then_one_turn_in_five_is_the_students():
    rcm = method(tangent_warmup=10)
    assert [[update.name for update in rcm.updates(step)] for step in (0, 9)] == [["student"]] * 2
    names = [[update.name for update in rcm.updates(step)] for step in range(10, 16)]
    assert names == [["student"], *[["fake_score"]] * 4, ["student"]]
    _denoiser, batch, ctx = setup(5)
    (update,) = rcm.updates(5)
    scm = SCM(SCMConfig(time_mean=0.7, time_std=1.6, tangent_warmup=10)).student_loss(batch, ctx)
    found = update.loss(batch, ctx)
    assert set(found) == {"consistency"}
    torch.testing.assert_close(found["consistency"], scm["consistency"])


def test_the_student_alone_learns_in_its_turn(tiny_sd):
    rcm = method(guidance_scale=3.0, tangent_warmup=0)
    networks = build_networks(rcm, Teacher(tiny_sd), settings(student="lora", fake_score="lora"))
    update, *_ = rcm.updates(0)
    assert update.trains == ("student",) and rcm.needs() == "images"
    sum(update.loss(sd_batch(), context(networks.denoiser, 2)).values()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in networks.parameters("student"))
    assert all(p.grad is None for p in networks.parameters("fake_score"))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="consistency_weight"):
        RCMConfig(consistency_weight=-1.0)
    with pytest.raises(ValueError, match="time_std"):
        RCMConfig(time_std=0.0)


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path),
        student="full",
        fake_score="full",
        max_train_steps=4,
        train_batch_size=8,
        checkpointing_steps=4,
    )
    trainer = Trainer(method(tangent_warmup=2, student_update_every=2), teacher, data, run)
    trainer.train()
    assert trainer.step == 4
