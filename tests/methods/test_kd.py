"""Regression on ODE pairs (arXiv 2101.02388): on a linear teacher it is linear least squares."""

from __future__ import annotations

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64
from straight_helpers import FLOW, KINDS, LAW, A, Free, noise, pairs, stock_samples
from trajectory_helpers import orders

from fastdiff.diffusion import Prediction, solve, teacher_times
from fastdiff.methods.kd import KD, KDConfig
from fastdiff.models.analytic import ExactNetwork


def teacher_pairs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    z = noise(rows)

    def exact(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, SD), x, t, SD)

    return z, solve(exact, z, teacher_times(SD, 8))


def newton(student: Free, z: torch.Tensor, x0: torch.Tensor, **config) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The minimum of the quadratic loss in (slope, offset), and the rank of its Hessian."""
    method = KD(KDConfig(**config))
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=student)

    def value(flat: torch.Tensor) -> torch.Tensor:
        parts = {"slope": flat[:4].reshape(2, 2), "offset": flat[4:]}
        names = {f"{name}": part for name, part in parts.items()}
        for name, part in names.items():
            del student._parameters[name]
            setattr(student, name, part)
        try:
            return method.student_loss(pairs(z, x0), context(denoiser, len(z)))["regression"]
        finally:
            for name in names:
                delattr(student, name)
                student._parameters[name] = torch.nn.Parameter(parts[name].detach())

    here = torch.cat([student.slope.detach().flatten(), student.offset.detach()])
    gradient = torch.autograd.functional.jacobian(value, here)
    hessian = torch.autograd.functional.hessian(value, here)
    best = here - torch.linalg.pinv(hessian, hermitian=True) @ gradient
    return best[:4].reshape(2, 2), best[4:], int(torch.linalg.matrix_rank(hessian, tol=1e-10, hermitian=True))


def test_least_squares_recover_the_teachers_map_from_three_pairs_in_two_dimensions():
    z, x0 = teacher_pairs(3)
    slope, offset, rank = newton(Free(torch.eye(2), torch.zeros(2)), z, x0)
    assert rank == 6
    fresh, expected = (part[3:] for part in teacher_pairs(20))
    torch.testing.assert_close(fresh @ slope.T + offset, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [8, 7], ids=["8", "7_which_does_not_divide_1000"])
@pytest.mark.parametrize("case", KINDS)
def test_pairs_made_on_the_way_are_those_of_a_store(case, steps):
    schedule, kind = KINDS[case]
    student = Free(0.5 * torch.eye(2), torch.zeros(2), schedule=schedule, kind=kind)
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    z = noise(4).float().double()
    stored = solve(
        lambda x, t: Prediction.from_x0(LAW.denoise(x, t, schedule), x, t, schedule), z, teacher_times(schedule, steps)
    )
    one, online = KD(KDConfig()), KD(KDConfig(online_steps=steps))
    assert (one.needs(), online.needs()) == ("pairs", "prompts")
    expected = one.student_loss(pairs(z, stored), context(denoiser, 4))["regression"]
    ctx = context(denoiser, 4, {"online/noise": z[:, :, None, None]})
    found = online.student_loss(batch_of(4, 2), ctx)["regression"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_residual_of_the_exact_map_is_of_first_order_in_the_teachers_step():
    """On a flow, where the ODE's own map from plain noise is x0 = mean + A z."""
    found, student = [], Free(A, LAW.mean, FLOW, "flow")
    denoiser = denoiser_of(ExactNetwork(LAW, FLOW, "flow"), FLOW, "flow", student=student)
    for steps in (5, 10, 20, 40):
        terms = KD(KDConfig(online_steps=steps)).student_loss(batch_of(64, 2), context(denoiser, 64))
        found.append(terms["regression"].item())
    assert orders(found) == pytest.approx([1] * 3, abs=0.1)
    assert orders(found)[-1] == pytest.approx(1, abs=0.03)


def test_guidance_belongs_to_pairs_made_on_the_way():
    with pytest.raises(ValueError, match="guidance_scale is of online_steps"):
        KDConfig(guidance_scale=2.0)


def test_two_pairs_do_not_determine_the_map():
    z, x0 = teacher_pairs(2)
    assert newton(Free(torch.eye(2), torch.zeros(2)), z, x0)[2] == 4


def test_pairs_that_do_not_belong_together_give_the_mean():
    """An exact design: every sample is paired with every noise."""
    z, x0 = teacher_pairs(6)
    slope, offset, _ = newton(Free(torch.eye(2), torch.ones(2)), z.repeat_interleave(6, 0), x0.repeat(6, 1))
    torch.testing.assert_close(slope, torch.zeros(2, 2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(offset, x0.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [999, 399])
@pytest.mark.parametrize("case", KINDS)
def test_the_loss_is_zero_at_the_map_and_stock_samplers_run_it(case, start):
    schedule, kind = KINDS[case]
    z = noise(8)
    x0 = LAW.mean + z @ A.T
    method, student = KD(KDConfig(start_timestep=start)), Free(A, LAW.mean, schedule, kind)
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    value = method.student_loss(pairs(z, x0), context(denoiser, 8))["regression"]
    assert value < 1e-22
    if start == 999 or kind != "flow":
        with torch.no_grad():
            found = stock_samples(method.sampler(), student, z, kind)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-6)


def test_terms_of_decoded_samples_are_added():
    class Counting:
        def distance(self, a, b):
            return (a - b).abs().flatten(1).sum(1)

    z = noise(3)
    x0 = LAW.mean + z @ A.T
    student = Free(A, LAW.mean + f64([0.1, 0.0]))
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=student)
    ctx = context(denoiser, 3)
    ctx.scorer, ctx.decode = Counting(), lambda x: 2 * x
    terms = KD(KDConfig(perceptual_weight=3.0)).student_loss(pairs(z, x0), ctx)
    assert terms["perceptual"].item() == pytest.approx(3 * 2 * 0.1, rel=1e-9)
    assert terms["regression"].item() == pytest.approx(0.005, rel=1e-9)
    terms["perceptual"].backward()
    assert student.offset.grad.abs().max() > 0
