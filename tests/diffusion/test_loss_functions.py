import math

import pytest
import torch

from fastdiff.diffusion import (
    discriminator_hinge,
    discriminator_softplus,
    dmd_normaliser,
    generator_hinge,
    generator_softplus,
    mse,
    pseudo_huber,
    surrogate,
)


def test_mse_and_pseudo_huber(randn):
    a, b = randn(3, 4), randn(3, 4)
    torch.testing.assert_close(mse(a, b), ((a - b) ** 2).sum() / 12, rtol=1e-14, atol=0)
    expected = (((a - b) ** 2 + 0.25).sqrt() - 0.5).mean()
    torch.testing.assert_close(pseudo_huber(a, b, 0.5), expected, rtol=1e-13, atol=0)
    assert pseudo_huber(a, a).item() == 0.0


def test_pseudo_huber_does_not_cancel_near_its_optimum():
    """d^2 / (2 c) for |d| << c, also in float32 where sqrt(d^2 + c^2) - c would be zero."""
    a = torch.full((5,), 1e-8)
    torch.testing.assert_close(pseudo_huber(a, torch.zeros(5), 1e-3).item(), 1e-16 / 2e-3, rtol=1e-5, atol=0)


def test_losses_are_computed_in_float32():
    a = torch.full((4096,), 1.0).bfloat16()
    b = torch.full((4096,), 1.0078125).bfloat16()
    assert mse(a, b).dtype == torch.float32
    assert mse(a, b).item() == 0.0078125**2
    assert generator_softplus(a).dtype == torch.float32


def test_surrogate_has_the_gradient_asked_for(randn):
    x, g = randn(3, 2, 2).requires_grad_(True), randn(3, 2, 2)
    loss = surrogate(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / 12, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss, 0.5 * g.square().mean(), rtol=1e-12, atol=0)
    weight = torch.tensor(2.0, requires_grad=True)
    surrogate(x.detach(), g * weight)  # the gradient term is stopped
    assert not surrogate(x.detach(), g * weight).requires_grad


def test_dmd_normaliser(randn):
    x, real = randn(3, 2, 4), randn(3, 2, 4)
    m = dmd_normaliser(x.requires_grad_(True), real)
    assert m.shape == (3, 1, 1) and not m.requires_grad
    torch.testing.assert_close(m[1, 0, 0], (x[1] - real[1]).abs().sum().detach() / 8, rtol=1e-14, atol=0)
    assert dmd_normaliser(real, real).unique().tolist() == [1e-5]
    # the form of the released code: (p_real - p_fake) / mean|p_real| with p = x - D
    fake = randn(3, 2, 4)
    p_real, p_fake = x - real, x - fake
    released = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close((fake - real) / m, released, rtol=1e-12, atol=1e-12)


def test_adversarial_values():
    zero, real, fake = torch.zeros(4, 1), torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    assert abs(generator_softplus(zero).item() - math.log(2)) < 1e-7
    assert abs(discriminator_softplus(zero, zero).item() - 2 * math.log(2)) < 1e-6
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3.0))) / 2
    assert abs(generator_softplus(fake).item() - expected) < 1e-6
    assert abs(generator_hinge(fake).item() - 1.25) < 1e-7
    # relu(1 + fake) = (1.5, 0), relu(1 - real) = (0, 2)
    assert abs(discriminator_hinge(real, fake).item() - (0.75 + 1.0)) < 1e-7
    expected = (
        sum(math.log1p(math.exp(v)) for v in (0.5, -3.0)) / 2 + sum(math.log1p(math.exp(-v)) for v in (2.0, -1.0)) / 2
    )
    assert abs(discriminator_softplus(real, fake).item() - expected) < 1e-6


def test_the_optimal_cross_entropy_logit_is_the_log_ratio():
    """With densities p, q on points, the minimiser of E_q sp(l) + E_p sp(-l) is log(p / q)."""
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    logits = (p / q).log().requires_grad_(True)
    losses = torch.func.vmap(discriminator_softplus, in_dims=(0, None))  # each point alone as real, with no fakes
    none = torch.full((1,), -1e9, dtype=torch.float64)
    real = (p * losses(logits[:, None], none)).sum()
    fake = (q * torch.func.vmap(lambda logit: discriminator_softplus(-none, logit))(logits[:, None])).sum()
    (gradient,) = torch.autograd.grad(real + fake, logits)
    assert gradient.abs().max() < 1e-15


def test_errors():
    with pytest.raises(ValueError, match="positive"):
        pseudo_huber(torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="equal shape"):
        mse(torch.zeros(2, 1), torch.zeros(2))
