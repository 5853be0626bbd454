import math

import pytest
import torch

from fastdiff.diffusion import (
    FlowSchedule,
    Gaussian,
    GaussianMixture,
    Prediction,
    Terminal,
    TrigSchedule,
    guide,
    heun,
    jump,
    lcm_grid,
    pf_velocity,
    renoise,
    trailing_grid,
)

MEAN = torch.tensor([0.7, -0.3, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.6, 0.0], [-0.2, 0.1, 0.5]], dtype=torch.float64)
COV = ROOT @ ROOT.T
SCALAR = Gaussian(torch.tensor([1.3]), torch.tensor([[0.49]], dtype=torch.float64))


@pytest.fixture(scope="module")
def teacher():
    return Gaussian(MEAN, COV)


def matrices(schedule, t):
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    return alpha, sigma, alpha**2 * COV + sigma**2 * torch.eye(3, dtype=torch.float64)


def test_denoiser_noise_and_score_have_the_matrix_form(teacher, process, randn):
    schedule, times = process
    for t in times:
        x = randn(4, 3)
        alpha, sigma, total = matrices(schedule, t)
        solved = torch.linalg.solve(total, (x - alpha * MEAN).T).T
        x0 = teacher.denoise(x, t, schedule)
        torch.testing.assert_close(x0, MEAN + alpha * solved @ COV, rtol=1e-11, atol=1e-11)
        prediction = Prediction.from_x0(x0, x, t, schedule)
        torch.testing.assert_close(prediction.eps, sigma * solved, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(teacher.score(x, t, schedule), -solved, rtol=1e-11, atol=1e-11)


def test_log_density_and_its_gradient(teacher, process, randn):
    schedule, times = process
    x = randn(5, 3).requires_grad_(True)
    density = teacher.log_prob(x, times, schedule)
    for b, t in enumerate(times):
        alpha, _, total = matrices(schedule, t)
        law = torch.distributions.MultivariateNormal(alpha * MEAN, total)
        torch.testing.assert_close(density[b], law.log_prob(x[b]), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(teacher.score(x, times, schedule).detach(), gradient, rtol=1e-10, atol=1e-10)


def test_any_sample_shape_and_precision(teacher, sd, randn):
    x = randn(2, 3)
    t = torch.tensor([10, 900])
    shaped = teacher.denoise(x.reshape(2, 3, 1, 1), t, sd, labels=torch.tensor([0, 5]))
    torch.testing.assert_close(shaped.reshape(2, 3), teacher.denoise(x, t, sd), rtol=0, atol=0)
    assert teacher.denoise(x.bfloat16(), t, sd).dtype == torch.float32
    with pytest.raises(ValueError, match="hold 4 numbers"):
        teacher.denoise(randn(2, 4), t, sd)


def test_flow_map_is_a_flow_with_the_right_ends(teacher, process, randn):
    schedule, times = process
    s, u, t = times[0].item(), times[2].item(), times[4].item()
    x = randn(4, 3)
    whole = teacher.flow_map(x, t, s, schedule)
    halves = teacher.flow_map(teacher.flow_map(x, t, u, schedule), u, s, schedule)
    torch.testing.assert_close(whole, halves, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(teacher.flow_map(x, t, t, schedule), x, rtol=1e-12, atol=1e-12)
    # pushing N(alpha_t mu, Sigma_t) gives N(alpha_s mu, Sigma_s)
    alpha_t, _, total_t = matrices(schedule, times[4])
    alpha_s, _, total_s = matrices(schedule, times[0])
    centre = (alpha_t * MEAN).expand(1, 3)
    torch.testing.assert_close(teacher.flow_map(centre, t, s, schedule)[0], alpha_s * MEAN, rtol=1e-12, atol=1e-12)
    slope = teacher.flow_map(centre + torch.eye(3, dtype=torch.float64), t, s, schedule) - alpha_s * MEAN
    torch.testing.assert_close(slope.T @ total_t @ slope, total_s, rtol=1e-10, atol=1e-10)
    clean = teacher.flow_map(centre + torch.eye(3, dtype=torch.float64), t, Terminal.CLEAN, schedule) - MEAN
    torch.testing.assert_close(clean.T @ total_t @ clean, COV, rtol=1e-10, atol=1e-10)


def test_flow_map_solves_the_ode(teacher, process, randn):
    schedule, times = process
    x, t = randn(4, 3), times[3]

    def path(s):
        return teacher.flow_map(x, t, s, schedule)

    for s in times[[1, 2]] + 0.1234 * (times[2] - times[1]):  # between the knots of a table
        point, slope = torch.func.jvp(path, (s,), (torch.ones_like(s),))
        prediction = Prediction.from_x0(teacher.denoise(point, s, schedule), point, s, schedule)
        torch.testing.assert_close(slope, pf_velocity(prediction), rtol=1e-10, atol=1e-10)


def test_consistency_function_is_constant_along_trajectories(teacher, process, randn):
    """The continuous-time consistency tangent: d/dt f*(x_t, t) along the ODE is zero."""
    schedule, times = process
    x, t = randn(5, 3), times
    prediction = Prediction.from_x0(teacher.denoise(x, t, schedule), x, t, schedule)

    def consistency(x, t):
        return teacher.flow_map(x, t, Terminal.CLEAN, schedule)

    _, tangent = torch.func.jvp(consistency, (x, t), (pf_velocity(prediction), torch.ones_like(t)))
    assert tangent.abs().max() < 1e-11
    torch.testing.assert_close(consistency(x, t), teacher.flow_map(x, t, Terminal.CLEAN, schedule), rtol=0, atol=0)


def test_velocity_of_a_flow(teacher, randn):
    x, t = randn(4, 3), 0.35
    eye = torch.eye(3, dtype=torch.float64)
    inverse = torch.linalg.inv((1 - t) ** 2 * COV + t**2 * eye)
    expected = -MEAN + (x - (1 - t) * MEAN) @ ((t * eye - (1 - t) * COV) @ inverse).T
    prediction = Prediction.from_x0(teacher.denoise(x, t, FlowSchedule()), x, t, FlowSchedule())
    torch.testing.assert_close(prediction.flow, expected, rtol=1e-12, atol=1e-12)


def test_one_euler_step_of_a_flow_from_noise_gives_the_mean(teacher, randn):
    x, flow = randn(4, 3), FlowSchedule()
    prediction = Prediction.from_x0(teacher.denoise(x, 1.0, flow), x, 1.0, flow)
    torch.testing.assert_close(jump(prediction, 0.0), MEAN.expand(4, 3), rtol=1e-14, atol=1e-14)


def test_ddim_factor(teacher, process, randn):
    schedule, times = process
    s, t = times[:-1], times[1:]
    x = randn(4, 3)
    landed = jump(Prediction.from_x0(teacher.denoise(x, t, schedule), x, t, schedule), s)
    _, basis = torch.linalg.eigh(COV)
    (alpha_t, _), (alpha_s, _) = schedule.levels(t, x), schedule.levels(s, x)
    factors = teacher.ddim_factors(t, s, schedule)
    expected = alpha_s * MEAN + (factors * ((x - alpha_t * MEAN) @ basis)) @ basis.T
    torch.testing.assert_close(landed, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("n", "golden"), [(25, 0.653647), (50, 0.676324), (100, 0.688422), (200, 0.694724)])
def test_discrete_consistency_optimum_on_the_lcm_grid(sd, n, golden):
    """mu = 1.3, s^2 = 0.49, 999 -> 0: the product of the DDIM factors; its exact limit is 0.701143."""
    t, s = (torch.tensor(ends, dtype=torch.float64) for ends in zip(*lcm_grid(n)))
    assert abs(SCALAR.ddim_factors(t, s, sd).prod().item() - golden) < 5.1e-7
    ends = torch.tensor([[1.3], [2.3]], dtype=torch.float64) * 1
    mapped = SCALAR.flow_map(ends, 999.0, Terminal.INDEX0, sd)
    assert abs((mapped[1] - mapped[0]).item() - 0.701143) < 5.1e-7


@pytest.mark.parametrize("schedule", [FlowSchedule(), TrigSchedule()], ids=["flow", "trig"])
@pytest.mark.parametrize(("order", "step"), [(2, "jump"), (3, "heun")])
def test_orders_of_the_consistency_residual(schedule, order, step):
    """f* after one teacher step against f* before it: O(h^2) for DDIM, O(h^3) for Heun."""
    x = torch.tensor([[-1.0], [0.2], [2.0]], dtype=torch.float64)

    def predict(x, t):
        return Prediction.from_x0(SCALAR.denoise(x, t, schedule), x, t, schedule)

    t, errors = torch.full((3,), 0.6, dtype=torch.float64), []
    for h in (0.1, 0.05, 0.025, 0.0125):
        landed = jump(predict(x, t), t - h) if step == "jump" else heun(predict, x, t, t - h)
        residual = SCALAR.flow_map(landed, t - h, Terminal.CLEAN, schedule)
        errors.append((residual - SCALAR.flow_map(x, t, Terminal.CLEAN, schedule)).norm().item())
    assert abs(math.log2(errors[-2] / errors[-1]) - order) < 0.1


def test_guided_gaussians_of_one_covariance_are_a_gaussian(process, randn):
    schedule, times = process
    null, cond, w = randn(3), randn(3), 7.5
    x = randn(5, 3)
    guided = guide(*(Gaussian(m, COV).denoise(x, times, schedule) for m in (null, cond)), w)
    expected = Gaussian(null + w * (cond - null), COV).denoise(x, times, schedule)
    torch.testing.assert_close(guided, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stochastic_consistency_sampling_keeps_the_law(teacher, sd, eta):
    """Exact flow map to an earlier time, then renoise: the output law is N(alpha_0 mu, Sigma_0) for any eta."""
    alpha, sigma = sd.alpha(999).item(), sd.sigma(999).item()
    mean = (alpha * MEAN).expand(1, 3)
    cov = alpha**2 * COV + sigma**2 * torch.eye(3, dtype=torch.float64)
    basis = torch.eye(3, dtype=torch.float64)
    for t, to in trailing_grid(4, terminal=Terminal.INDEX0):
        s = math.floor((1 - eta) * to)
        centre = teacher.flow_map(mean, t, s, sd)
        slope = teacher.flow_map(mean + basis, t, s, sd) - centre
        scale = renoise(torch.ones(1, 1).double(), s, to, torch.zeros(1, 1).double(), sd).item()
        fresh = renoise(torch.zeros(1, 1).double(), s, to, torch.ones(1, 1).double(), sd).item()
        mean, cov = scale * centre, scale**2 * slope.T @ cov @ slope + fresh**2 * basis
    alpha, sigma = sd.alpha(0).item(), sd.sigma(0).item()
    torch.testing.assert_close(mean[0], alpha * MEAN, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cov, alpha**2 * COV + sigma**2 * basis, rtol=1e-10, atol=1e-10)


def test_backward_simulation_moments(sd):
    """Student = exact posterior mean, indices 999, 749, 499, 249, first input N(0, 1); moments are exact by symmetry."""
    teacher = Gaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.64]], dtype=torch.float64))
    draws = 2 * torch.cat([torch.eye(4), -torch.eye(4)]).double()  # 8 points: mean 0, covariance I in 4 dimensions
    golden_means = (0.6979087675, 0.6999226388, 0.6999847254, 0.6999912758)
    golden_variances = (0.0019151970, 0.0228023831, 0.1023038142, 0.1901330524)
    x = draws[:, :1]
    for k, (t, to) in enumerate(trailing_grid(4)):
        x0 = teacher.denoise(x, t, sd)
        assert abs(x0.mean().item() - golden_means[k]) < 1e-10
        assert abs(x0.var(correction=0).item() - golden_variances[k]) < 1e-10
        if k < 3:
            x = sd.add_noise(x0, draws[:, k + 1 : k + 2], to)


def test_samples_have_the_moments(teacher):
    points = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    drawn = teacher.sample(points)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((drawn - MEAN).T @ (drawn - MEAN) / 6, COV, rtol=1e-12, atol=1e-12)


def test_mixture_score_denoiser_and_density_agree(process, randn):
    schedule, times = process
    covariances = torch.stack([COV, 0.1 * torch.eye(3, dtype=torch.float64)])
    mixture = GaussianMixture([1.0, 3.0], torch.stack([MEAN, -2 * MEAN]), covariances)
    x = randn(5, 3).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, times, schedule).sum(), x)
    torch.testing.assert_close(mixture.score(x, times, schedule).detach(), gradient, rtol=1e-9, atol=1e-9)
    x0 = mixture.denoise(x, times, schedule)
    prediction = Prediction.from_x0(x0, x, times, schedule)
    torch.testing.assert_close(prediction.score.detach(), gradient, rtol=1e-7, atol=1e-7)


def test_mixture_density_labels_and_limits(sd, randn):
    covariances = torch.stack([COV, 0.1 * torch.eye(3, dtype=torch.float64)])
    mixture = GaussianMixture([1.0, 3.0], torch.stack([MEAN, -2 * MEAN]), covariances)
    x, t = randn(4, 3), torch.full((4,), 300)
    parts = [part.log_prob(x, t, sd).exp() for part in mixture.components]
    torch.testing.assert_close(mixture.log_prob(x, t, sd).exp(), 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-11, atol=0)
    labels = torch.tensor([0, 1, -1, -1])
    labelled, free = mixture.denoise(x, t, sd, labels), mixture.denoise(x, t, sd)
    torch.testing.assert_close(labelled[0], mixture.components[0].denoise(x, t, sd)[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(labelled[1], mixture.components[1].denoise(x, t, sd)[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(labelled[2:], free[2:], rtol=0, atol=0)
    assert mixture.denoise(1e4 * x, torch.zeros(4), sd).isfinite().all()  # far out every density underflows
    single = GaussianMixture([2.0], MEAN[None], COV[None])
    torch.testing.assert_close(single.denoise(x, t, sd), Gaussian(MEAN, COV).denoise(x, t, sd), rtol=1e-13, atol=1e-13)


def test_mixture_samples_pick_components_by_weight():
    means = torch.tensor([[-10.0], [10.0]])
    mixture = GaussianMixture([1.0, 3.0], means, torch.ones(2, 1, 1))
    u = (torch.arange(8) + 0.5) / 8
    drawn = mixture.sample(torch.zeros(8, 1), u)
    assert drawn[:, 0].tolist() == [-10.0] * 2 + [10.0] * 6
    labels = torch.tensor([1, 1, 0, 0, -1, -1, -1, -1])
    assert mixture.sample(torch.zeros(8, 1), u, labels)[:4, 0].tolist() == [10.0, 10.0, -10.0, -10.0]


def test_errors():
    with pytest.raises(ValueError, match="definite"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="give"):
        Gaussian(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture([1.0, -1.0], torch.zeros(2, 1), torch.ones(2, 1, 1))
