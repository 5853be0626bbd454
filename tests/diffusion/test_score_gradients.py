"""Expected gradients of score losses for a linear generator x = A z + b of Gaussian data, against closed forms."""

import numpy as np
import pytest
import torch

from fastdiff.diffusion import (
    FlowSchedule,
    Gaussian,
    Prediction,
    discriminator_softplus,
    dmd_normaliser,
    generator_hinge,
    generator_softplus,
    mse,
    surrogate,
)

FLOW = FlowSchedule()


class Levels(FlowSchedule):
    """A process at one pair of levels that no standard schedule passes (the second golden scenario)."""

    def __init__(self, alpha, sigma):
        super().__init__()
        self.pair = alpha, sigma

    def alpha(self, t):
        return torch.full_like(t, self.pair[0])

    def sigma(self, t):
        return torch.full_like(t, self.pair[1])


# scenario: (alpha, sigma, mu, S, A, b); golden rows: objective -> (dA, db)
ONE = (0.6, 0.4, 0.7, 0.64, 1.1, -0.2)
ONE_GOLDEN = {
    "rkl": (0.3494685068, -0.8299180328),
    "soft_rkl": (0.3519040032, -0.5536407338),
    "js": (-0.0024354964, -0.2762772990),
    "fkl": (-0.0964494044, -0.5439892545),
    "sds": (1.0143442623, -0.8299180328),
}
TWO = (0.6, 0.8, 0.7, 0.64, 1.3, -0.2)
TWO_GOLDEN = {
    "rkl": (0.1628039773, -0.3722426471),
    "soft_rkl": (0.1353341174, -0.2338067531),
    "js": (0.0274698599, -0.1384358940),
    "fkl": (0.0259449044, -0.2595322012),
}


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def gauss_hermite(n=160):
    """All pairs (z, eps) of nodes, (n^2, 1) each, and their normalised weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, eps = torch.meshgrid(torch.from_numpy(nodes), torch.from_numpy(nodes), indexing="ij")
    weight = torch.outer(torch.from_numpy(weights), torch.from_numpy(weights)).flatten()
    return z.reshape(-1, 1), eps.reshape(-1, 1), weight / weight.sum()


class Scenario:
    def __init__(self, alpha, sigma, mu, S, A, b):
        self.schedule = Levels(alpha, sigma)
        self.alpha, self.sigma = alpha, sigma
        self.real = Gaussian(scalar([mu]), scalar([[S]]))
        self.fake = Gaussian(scalar([b]), scalar([[A * A]]))
        self.A, self.b = (scalar(v).requires_grad_(True) for v in (A, b))
        self.z, self.eps, self.weight = gauss_hermite()
        self.x = self.A * self.z + self.b
        self.x_t = self.schedule.add_noise(self.x, self.eps, 0.5)

    def predict(self, teacher):
        x_t = self.x_t.detach()
        return Prediction.from_x0(teacher.denoise(x_t, 0.5, self.schedule), x_t, 0.5, self.schedule)

    def logit(self):
        """log p/q at x_t; both densities are frozen, x_t carries the graph."""
        return self.real.log_prob(self.x_t, 0.5, self.schedule) - self.fake.log_prob(self.x_t, 0.5, self.schedule)

    def score_route(self, g):
        """Feed the quadrature weights through the surrogate, whose mean divides by the number of nodes."""
        return surrogate(self.x, g * self.weight[:, None] * len(self.weight))

    def gradients(self, loss):
        return [value.item() for value in torch.autograd.grad(loss, (self.A, self.b))]


@pytest.fixture(scope="module", params=[(ONE, ONE_GOLDEN), (TWO, TWO_GOLDEN)], ids=["I", "II"])
def scenario(request):
    values, golden = request.param
    return values, golden


def test_unnormalised_distribution_matching_is_the_reverse_kl(scenario):
    values, golden = scenario
    sc = Scenario(*values)
    gap = sc.predict(sc.fake).x0 - sc.predict(sc.real).x0
    assert sc.gradients(sc.score_route(sc.alpha**2 / sc.sigma**2 * gap)) == pytest.approx(golden["rkl"], abs=2e-10)


@pytest.mark.parametrize("row", ["soft_rkl", "js", "fkl"])
def test_weighted_score_gaps_are_f_divergences(scenario, row):
    values, golden = scenario
    sc = Scenario(*values)
    r = sc.logit().detach().exp()[:, None]
    h = {"soft_rkl": 1 / (1 + r), "js": r / (1 + r), "fkl": r}[row]
    gap = sc.predict(sc.fake).x0 - sc.predict(sc.real).x0
    assert sc.gradients(sc.score_route(h * sc.alpha**2 / sc.sigma**2 * gap)) == pytest.approx(golden[row], abs=2e-9)


@pytest.mark.parametrize("row", ["rkl", "soft_rkl", "js", "fkl"])
def test_generator_losses_with_the_optimal_discriminator(scenario, row):
    """-l is the reverse KL, softplus(-l) its softened form, -softplus(l) Jensen-Shannon, -exp(l) the forward KL."""
    values, golden = scenario
    sc = Scenario(*values)
    certain = torch.full((1,), 1e9, dtype=torch.float64)  # a real logit without loss
    loss = {
        "rkl": generator_hinge,
        "soft_rkl": generator_softplus,
        "js": lambda logit: -discriminator_softplus(certain, logit),
        "fkl": lambda logit: -logit.exp().mean(),
    }[row]
    per_sample = torch.func.vmap(loss)(sc.logit()[:, None])
    assert sc.gradients((sc.weight * per_sample).sum()) == pytest.approx(golden[row], abs=2e-9)


def test_sds_has_no_repulsion():
    sc = Scenario(*ONE)
    real = sc.predict(sc.real)
    fake_score = -sc.eps / sc.sigma  # the noise itself stands for the student's score
    gradients = sc.gradients(sc.score_route(sc.alpha * (fake_score - real.score)))
    assert gradients == pytest.approx(ONE_GOLDEN["sds"], abs=2e-10)


def sigma_points(d):
    """2n points in n = 2d dimensions with mean 0 and covariance I: quadratic expectations are exact batch means."""
    n = 2 * d
    points = n**0.5 * torch.cat([torch.eye(n), -torch.eye(n)]).double()
    return points[:, :d], points[:, d:]


@pytest.fixture
def linear(randn):
    root = 0.5 * randn(3, 3) + torch.eye(3, dtype=torch.float64)
    A = (randn(3, 3) + torch.eye(3, dtype=torch.float64)).requires_grad_(True)
    return randn(3), root @ root.T, A, randn(3).requires_grad_(True)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("objective", ["kl", "vsd", "sds"])
def test_score_gap_gradients_in_three_dimensions(linear, t, objective):
    mu, S, A, b = linear
    d, (z, eps) = 3, sigma_points(3)
    alpha, sigma = 1 - t, t
    x = z @ A.T + b
    x_t = FLOW.add_noise(x, eps, t).detach()
    real, fake = (
        Prediction.from_x0(law.denoise(x_t, t, FLOW), x_t, t, FLOW)
        for law in (Gaussian(mu, S), Gaussian(b.detach(), (A @ A.T).detach()))
    )
    scale = 1.0  # of the exact KL gradient
    if objective == "kl":
        g = alpha**2 / sigma**2 * (fake.x0 - real.x0)
    elif objective == "vsd":
        g, scale = sigma**2 * (real.eps - fake.eps), alpha * sigma * sigma**2 / alpha**2
    else:
        g = alpha * (-eps / sigma - real.score)
    dA, db = torch.autograd.grad(d * surrogate(x, g), (A, b))  # the surrogate averages over the d elements too
    total_r = alpha**2 * S + sigma**2 * torch.eye(3).double()
    total_f = alpha**2 * A @ A.T + sigma**2 * torch.eye(3).double()
    inverse_r, inverse_f = torch.linalg.inv(total_r), torch.linalg.inv(total_f)
    repulsion = 0.0 if objective == "sds" else inverse_f
    torch.testing.assert_close(db, (scale * alpha**2 * inverse_r @ (b - mu)).detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(dA, (scale * alpha**2 * (inverse_r - repulsion) @ A).detach(), rtol=1e-10, atol=1e-11)
    if objective == "kl":  # and the table row is the derivative of the divergence itself
        shift = alpha * (b - mu)
        kl = 0.5 * (
            torch.trace(inverse_r @ total_f)
            - d
            + shift @ inverse_r @ shift
            + torch.logdet(total_r)
            - torch.logdet(total_f)
        )
        expected = torch.autograd.grad(kl, (A, b))
        torch.testing.assert_close(dA, expected[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(db, expected[1], rtol=1e-10, atol=1e-11)


def test_the_normalised_gradient_vanishes_where_the_laws_agree(randn):
    """At b = mu, A A' = S every sample's gradient is zero, whatever the rotation in A."""
    root = 0.5 * randn(3, 3) + torch.eye(3, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(randn(3, 3))
    A, mu = root @ rotation, randn(3)
    x = randn(16, 3) @ A.T + mu
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    x_t = FLOW.add_noise(x, randn(16, 3), t)
    real = Gaussian(mu, root @ root.T).denoise(x_t, t, FLOW)
    fake = Gaussian(mu, A @ A.T).denoise(x_t, t, FLOW)
    assert ((fake - real) / dmd_normaliser(x, real)).abs().max() < 1e-11


def test_the_exact_denoiser_minimises_the_critic_loss(linear):
    """Its loss is tr(C - alpha^2 C Sigma^-1 C) / d; any other linear map loses more."""
    _, _, A, b = (value.detach() for value in linear)
    z, eps = sigma_points(3)
    t, C = 0.4, A @ A.T
    x = z @ A.T + b
    x_t = FLOW.add_noise(x, eps, t)
    total = 0.36 * C + 0.16 * torch.eye(3).double()
    best = torch.trace(C - 0.36 * C @ torch.linalg.inv(total) @ C) / 3
    denoised = Gaussian(b, C).denoise(x_t, t, FLOW)
    torch.testing.assert_close(mse(denoised, x), best, rtol=1e-11, atol=0)
    assert mse(1.01 * denoised, x) > best and mse(denoised + 0.01, x) > best
