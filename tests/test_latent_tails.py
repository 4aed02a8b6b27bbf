"""Priors so narrow that float32 does not hold their precision."""

import pytest
import torch

from dgm_kernels import gaussian_kl, lognormal_sample_kl, use_backend
from tests.cases import BACKENDS

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def backend_of(request):
    """Runs a test that asks for a backend on it."""
    name = request.node.callspec.params.get("backend")
    with use_backend(name or "auto"):
        yield


@on_every_backend
@pytest.mark.parametrize("prior_log_var", [-60.0, -100.0, -170.0, -300.0])
def test_the_same_narrow_distribution_has_no_divergence(backend, prior_log_var):
    mu = torch.tensor([[0.5, -2.0]], requires_grad=True)
    log_var = torch.full((1, 2), prior_log_var, requires_grad=True)
    prior = mu.detach().clone().requires_grad_(), log_var.detach().clone().requires_grad_()
    kl = gaussian_kl(mu, log_var, *prior)
    assert kl.tolist() == [0.0]
    for grad in torch.autograd.grad(kl.sum(), (mu, log_var, *prior)):
        assert grad.tolist() == [[0.0, 0.0]]


@on_every_backend
def test_a_mean_near_that_of_a_narrow_prior(backend):
    """The distance is a tenth of the prior's deviation, e^-50: its square and the precision are out of range."""
    distance = torch.tensor([[0.1, -0.1]]) * torch.exp(torch.tensor(-50.0))
    log_var = torch.full((1, 2), -100.0)
    kl = gaussian_kl(distance, log_var, torch.zeros(1, 2), log_var)
    torch.testing.assert_close(kl, torch.tensor([0.01]), rtol=1e-5, atol=0)


@on_every_backend
def test_a_narrow_prior_far_away(backend):
    kl = gaussian_kl(torch.ones(1, 1), torch.full((1, 1), -100.0), None, torch.full((1, 1), -100.0))
    assert kl.tolist() == [float("inf")]


@on_every_backend
@pytest.mark.parametrize("prior_log_var", [-60.0, -30.0, -10.0, 8.0])
def test_a_log_normal_prior_of_any_width(backend, prior_log_var):
    """The posterior is a little wider, its mean half a deviation away: KL and gradients are those of unit variances."""
    sigma = torch.exp(torch.tensor(prior_log_var / 2))
    mu = (torch.tensor([[0.5, -0.5]]) * sigma).requires_grad_()
    log_var = torch.full((1, 2), prior_log_var + 1.0, requires_grad=True)
    _, kl = lognormal_sample_kl(mu, log_var, torch.zeros(1, 2), prior_log_var=prior_log_var)
    torch.testing.assert_close(kl, torch.tensor([torch.e - 2 + 0.25]), rtol=1e-5, atol=0)
    to_mu, to_log_var = torch.autograd.grad(kl.sum(), (mu, log_var))
    torch.testing.assert_close(to_mu * sigma, torch.tensor([[0.5, -0.5]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(to_log_var, torch.full((1, 2), 0.5 * (torch.e - 1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [-800.0, -80.5, 81.0])
def test_a_number_for_the_prior_that_leaves_float32(value):
    with pytest.raises(ValueError, match=r"prior_log_var must be in \[-80, 80\], got"):
        lognormal_sample_kl(torch.ones(2, 3), torch.ones(2, 3), prior_log_var=value)
