"""The latent op against float64, closed forms and torch.distributions."""

import math

import pytest
import torch
from torch import distributions as D

import dgm_kernels as dgm
from dgm_kernels import (
    NoiseKey,
    gaussian_kl,
    gaussian_sample_kl,
    importance_bound,
    importance_log_weights,
    lognormal_sample_kl,
    noise_like,
    use_backend,
    vector_quantize,
)
from tests.cases import BACKENDS, DTYPES, NATIVE
from tests.contract import tensors_of
from tests.latent_cases import (
    CASES,
    CODE_CASE,
    IMPORTANCE_CASES,
    KEY,
    SAMPLE_CASES,
    TRIL_CASE,
    eager_importance,
    eager_sample,
    make_codes,
    make_four,
    make_pair,
    make_tril,
)
from tests.latent_op import check_case

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def backend_of(request):
    """Runs a test that asks for a backend on it."""
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with use_backend(name or "auto"):
        yield


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, backend):
    for shape in case.shapes:
        check_case(backend, case, shape, dtype)


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_output(case, backend):
    for which in ((0,), (1,), (3,), (4,)):
        if which[0] < 2 or case is CODE_CASE:
            check_case(backend, case, case.small, which=which)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    shape = case.small if case in (TRIL_CASE, CODE_CASE) else (2, 3)
    operands = case.make(shape, torch.float64, grad=True)
    if case is TRIL_CASE:  # its gradient above the diagonal is 0, and NaN is no place for finite differences
        operands[1] = operands[1].detach().nan_to_num(0.0).requires_grad_()
    if case is CODE_CASE:  # straight-through is no derivative; see test_losses_of_codes
        function = lambda *t: dgm.vector_quantize(*t)[3:]  # noqa: E731
        losses = (lambda x: function(x, operands[1])[1], lambda e: function(operands[0], e)[0])
        assert all(torch.autograd.gradcheck(f, o) for f, o in zip(losses, operands, strict=True))
        return
    assert torch.autograd.gradcheck(case.call, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.call, operands)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_in_float32(case, backend):
    def curvature(operands):
        outputs = [o for o in tensors_of(case.call(*operands)) if o.requires_grad]
        total = sum(o.square().sum() for o in outputs)
        grads = torch.autograd.grad(total, operands, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), operands)

    operands = case.make(case.small, grad=True)
    actual = curvature(operands)
    with use_backend("reference"):
        expected = curvature([o.detach().double().requires_grad_() for o in operands])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


# ---- Samples


@on_every_backend
def test_z_is_mu_and_sigma_times_the_noise_of_the_key(backend):
    mu, log_var = make_pair((40, 3, 7))
    keys = (
        KEY,
        NoiseKey(torch.tensor([1 << 40]), step=torch.tensor(3)),
        NoiseKey(2**64 - 1, samples=torch.randint(1 << 50, (40,)), step=torch.randint(99, (40,))),
        NoiseKey(7, first_sample=2**32 - 20),
    )
    for key in keys:
        eps = noise_like(mu, key)
        z, _ = gaussian_sample_kl(mu, log_var, key)
        torch.testing.assert_close(z, mu + torch.exp(log_var / 2) * eps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lognormal_sample_kl(mu, log_var, key)[0], z.exp(), rtol=1e-5, atol=1e-6)
        given, _ = gaussian_sample_kl(mu, log_var, eps)
        torch.testing.assert_close(z, given, rtol=1e-5, atol=1e-6)
        many, _ = importance_log_weights(mu, log_var, key, samples=2)
        torch.testing.assert_close(many[0], z, rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("case", [*SAMPLE_CASES, *IMPORTANCE_CASES, TRIL_CASE], ids=str)
def test_a_sample_does_not_depend_on_its_batch(case, backend):
    """Row by row, in any order, with another number of draws: the same bits."""
    operands = case.make((9, 22))
    key = NoiseKey(3)
    calls = {
        TRIL_CASE: lambda k, m, f: gaussian_sample_kl(m, noise=k, scale_tril=f),
        IMPORTANCE_CASES[0]: lambda k, m, v: importance_log_weights(m, v, k, samples=4),
        IMPORTANCE_CASES[1]: lambda k, m, v: importance_log_weights(m, v, k, samples=4, log_normal=True),
        SAMPLE_CASES[2]: lambda k, m, v: lognormal_sample_kl(m, v, k),
    }
    call = calls.get(case, lambda k, m, v: gaussian_sample_kl(m, v, k))
    whole = call(key, *operands)
    dim = 1 if case in IMPORTANCE_CASES else 0
    parts = [call(NoiseKey(3, first_sample=i), *(o[i : i + 4] for o in operands)) for i in (0, 4, 8)]
    order = torch.randperm(9)
    turned = call(NoiseKey(3, samples=order), *(o[order] for o in operands))
    for i, all_rows in enumerate(whole):
        exact = backend in NATIVE
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(torch.cat([p[i] for p in parts], dim), all_rows, **tolerance)
        torch.testing.assert_close(turned[i], all_rows.index_select(dim, order), **tolerance)


@on_every_backend
def test_draws_are_steps_of_the_key(backend):
    mu, log_var = make_pair((5, 12))
    z, ratio = importance_log_weights(mu, log_var, KEY, samples=5)
    fewer = importance_log_weights(mu, log_var, KEY, samples=2)
    assert torch.equal(fewer[0], z[:2]) and torch.equal(fewer[1], ratio[:2])
    later = importance_log_weights(mu, log_var, KEY.at(KEY.step + 3), samples=2)
    assert torch.equal(later[0], z[3:])


@on_every_backend
def test_a_fresh_seed_comes_from_the_generator_and_is_the_same_in_the_backward_pass(backend):
    mu, log_var = (t.requires_grad_() for t in make_pair((4, 50)))
    torch.manual_seed(3)
    z, _ = gaussian_sample_kl(mu, log_var)
    assert not torch.equal(z, gaussian_sample_kl(mu, log_var)[0])
    torch.manual_seed(3)
    assert torch.equal(z, gaussian_sample_kl(mu, log_var)[0])
    (to_log_var,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(to_log_var, 0.5 * (z - mu).detach(), rtol=1e-4, atol=1e-5)


@on_every_backend
def test_a_seed_that_was_written_to_is_noticed(backend):
    mu, log_var = (t.requires_grad_() for t in make_pair((4, 5)))
    seed = torch.tensor([4])
    z, _ = gaussian_sample_kl(mu, log_var, NoiseKey(seed))
    seed += 1
    if backend != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


@on_every_backend
def test_gradient_of_given_noise(backend):
    mu, log_var = (t.requires_grad_() for t in make_pair((4, 5)))
    eps = torch.randn(4, 5, requires_grad=True)
    if backend == "reference":
        (grad,) = torch.autograd.grad(gaussian_sample_kl(mu, log_var, eps)[0].sum(), eps)
        torch.testing.assert_close(grad, torch.exp(log_var / 2).detach())
    else:
        with pytest.raises(ValueError, match="given noise"):
            gaussian_sample_kl(mu, log_var, eps)
    with use_backend("auto"):
        (grad,) = torch.autograd.grad(importance_log_weights(mu, log_var, eps[None], samples=1)[1].sum(), eps)
    z = eager_sample(mu, log_var, eps)[0]
    torch.testing.assert_close(grad, (eps - z * torch.exp(log_var / 2)).detach())


@on_every_backend
def test_given_noise_against_eager(backend):
    for dtype in (torch.float32, torch.bfloat16):
        mu, log_var = make_pair((6, 50))
        eps = torch.randn(6, 50).to(dtype)
        for ours, theirs in zip(
            gaussian_sample_kl(mu, log_var, eps), eager_sample(mu, log_var, eps.float()), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        eps = torch.randn(3, 6, 50).to(dtype)
        ours = importance_log_weights(mu, log_var, eps, samples=3)
        for a, b in zip(ours, eager_importance(mu, log_var, eps.float()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


# ---- Closed forms


@on_every_backend
def test_kl_against_distributions(backend):
    mu, log_var, m, b = (t.double() for t in make_four((4, 7)))
    normal = lambda mean, log: D.Normal(mean, torch.exp(log / 2))  # noqa: E731
    standard = normal(torch.zeros(()).double(), torch.zeros(()).double())
    with use_backend("reference"):
        exact = D.kl_divergence(normal(mu, log_var), standard).sum(1)
        torch.testing.assert_close(gaussian_sample_kl(mu, log_var)[1], exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gaussian_kl(mu, log_var), exact, rtol=1e-12, atol=1e-12)
        two = D.kl_divergence(normal(mu, log_var), normal(m, b)).sum(1)
        torch.testing.assert_close(gaussian_kl(mu, log_var, m, b), two, rtol=1e-12, atol=1e-12)
    single = [t.float() for t in (mu, log_var, m, b)]
    torch.testing.assert_close(gaussian_kl(*single).double(), two, rtol=1e-5, atol=1e-5)
    one_prior = gaussian_kl(single[0], single[1], single[2][0], single[3][:1])
    expected = D.kl_divergence(normal(mu, log_var), normal(m[0], b[:1])).sum(1)
    torch.testing.assert_close(one_prior.double(), expected, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_kl_of_variances_near_one_keeps_its_digits(backend):
    """0.5 (exp(v) - 1 - v) is v^2 / 4 where v is small: eager's terms cancel there."""
    mu, log_var = torch.zeros(2, 100), torch.full((2, 100), 1e-3)
    exact = 100 * 0.5 * (math.expm1(float(log_var[0, 0])) - float(log_var[0, 0]))
    for kl in (gaussian_sample_kl(mu, log_var, KEY)[1], gaussian_kl(mu, log_var)):
        torch.testing.assert_close(kl, torch.full((2,), exact), rtol=1e-3, atol=0)


@on_every_backend
def test_lognormal_against_distributions(backend):
    mu, log_var = make_pair((4, 7))
    z, kl = lognormal_sample_kl(mu, log_var, KEY, prior_mu=0.3, prior_log_var=0.9)
    posterior = D.LogNormal(mu.double(), torch.exp(log_var.double() / 2))
    prior = D.LogNormal(torch.tensor(0.3).double(), torch.tensor(math.exp(0.45)).double())
    torch.testing.assert_close(kl.double(), D.kl_divergence(posterior, prior).sum(1), rtol=1e-5, atol=1e-5)
    draws, ratio = importance_log_weights(mu, log_var, KEY, samples=3, log_normal=True)
    prior = D.LogNormal(torch.zeros(()).double(), torch.ones(()).double())
    exact = (prior.log_prob(draws.double()) - posterior.log_prob(draws.double())).sum(2)
    torch.testing.assert_close(ratio.double(), exact, rtol=1e-4, atol=1e-4)
    assert (z > 0).all()


@on_every_backend
def test_full_covariance_against_distributions(backend):
    mu, factor = make_tril((3, 8))
    z, kl = gaussian_sample_kl(mu, noise=KEY, scale_tril=factor)
    factor = factor.nan_to_num(0.0).double()
    posterior = D.MultivariateNormal(mu.double(), scale_tril=factor)
    prior = D.MultivariateNormal(torch.zeros(8).double(), torch.eye(8).double())
    torch.testing.assert_close(kl.double(), D.kl_divergence(posterior, prior), rtol=1e-5, atol=1e-5)
    eps = noise_like(mu, KEY).double()
    torch.testing.assert_close(z.double(), mu + torch.einsum("bij,bj->bi", factor, eps), rtol=1e-5, atol=1e-5)


@on_every_backend
def test_full_covariance_of_a_diagonal_is_the_diagonal_form(backend):
    mu, log_var = make_pair((3, 20))
    factor = torch.diag_embed(torch.exp(log_var / 2))
    full, diagonal = gaussian_sample_kl(mu, noise=KEY, scale_tril=factor), gaussian_sample_kl(mu, log_var, KEY)
    for a, b in zip(full, diagonal, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_free_bits_bound_every_element(backend):
    mu = torch.tensor([[0.0, 3.0], [0.1, 0.0]], requires_grad=True)
    log_var = torch.zeros(2, 2, requires_grad=True)
    _, kl = gaussian_sample_kl(mu, log_var, KEY, free_bits=0.25)
    torch.testing.assert_close(kl, torch.tensor([0.25 + 4.5, 0.5]))
    (to_mu,) = torch.autograd.grad(kl.sum(), mu)
    assert to_mu.tolist() == [[0.0, 3.0], [0.0, 0.0]]
    torch.testing.assert_close(gaussian_kl(mu, log_var, free_bits=0.25), kl)


@on_every_backend
def test_extreme_variances(backend):
    log_var = torch.tensor([[-300.0, 300.0, -float("inf"), float("nan"), 100.0]])
    mu = torch.ones(1, 5)
    z, _ = gaussian_sample_kl(mu, log_var, torch.ones(1, 5))
    expected = 1 + torch.exp(log_var / 2)
    torch.testing.assert_close(z, expected, equal_nan=True, rtol=1e-5, atol=0)
    kl = torch.cat([gaussian_kl(mu[:, i : i + 1], log_var[:, i : i + 1]) for i in range(5)])
    exact = 0.5 * (torch.exp(log_var[0]) - log_var[0])
    torch.testing.assert_close(kl, exact, equal_nan=True, rtol=1e-5, atol=0)


# ---- Importance-weighted bound


def linear_gaussian(batch=4, latents=2, pixels=3):
    """p(z) = N(0, 1), p(x | z) = N(W z, s^2): the evidence and the posterior are known."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(pixels, latents, generator=generator).double()
    x, s = torch.randn(batch, pixels, generator=generator).double(), 0.7
    covariance = weight @ weight.T + s**2 * torch.eye(pixels).double()
    evidence = D.MultivariateNormal(torch.zeros(pixels).double(), covariance).log_prob(x)
    posterior = torch.linalg.inv(torch.eye(latents).double() + weight.T @ weight / s**2)
    mean = x @ weight @ posterior / s**2
    log_likelihood = lambda z: D.Normal(z.double() @ weight.T, s).log_prob(x).sum(-1)  # noqa: E731
    return evidence, posterior, mean, log_likelihood


@on_every_backend
def test_C5_the_bound_is_the_evidence_for_the_exact_posterior_and_any_number_of_draws(backend):
    evidence, posterior, mean, log_likelihood = linear_gaussian(latents=1)
    log_var = posterior.log().expand_as(mean)
    for samples in (1, 2, 7):
        z, ratio = importance_log_weights(mean.float(), log_var.float(), KEY, samples=samples)
        bound = importance_bound(log_likelihood(z).float() + ratio)
        torch.testing.assert_close(bound.double(), evidence, rtol=1e-4, atol=1e-4)


@on_every_backend
def test_C5_the_bound_rises_with_the_draws_to_the_evidence(backend):
    evidence, _, mean, log_likelihood = linear_gaussian()
    mu = mean.float().repeat(100, 1, 1)
    log_var = torch.full_like(mu, -0.5)
    means = []
    for samples in (1, 5, 25):
        z, ratio = importance_log_weights(mu.flatten(0, 1), log_var.flatten(0, 1), KEY, samples=samples)
        weights = log_likelihood(z.view(samples, *mu.shape)).float() + ratio.view(samples, *mu.shape[:2])
        means.append(importance_bound(weights).mean(0))
    assert (means[0] + 0.05 < means[1]).all() and (means[1] < means[2]).all()
    z, ratio = importance_log_weights(mean.float(), log_var[0], KEY, samples=1000)
    bound = importance_bound(log_likelihood(z).float() + ratio)
    torch.testing.assert_close(bound.double(), evidence, rtol=0, atol=0.1)


def test_the_bound_and_its_gradient():
    weights = torch.randn(5, 3, requires_grad=True)
    bound = importance_bound(weights)
    torch.testing.assert_close(bound, weights.exp().mean(0).log())
    (grad,) = torch.autograd.grad(bound.sum(), weights)
    torch.testing.assert_close(grad, torch.softmax(weights, 0))
    assert importance_bound(torch.full((4, 2), -1e4)).tolist() == [-1e4, -1e4]
    assert importance_bound(torch.zeros(4, 2, dtype=torch.bfloat16)).dtype == torch.float32


# ---- Vector quantisation


@on_every_backend
def test_the_nearest_code_is_chosen(backend):
    for sizes in ((300, 7, 50), (97, 64, 513), (5, 300, 3)):
        x, codebook = make_codes(sizes)
        out = vector_quantize(x, codebook)
        distances = torch.cdist(x.double(), codebook.double()).square()
        chosen = distances.gather(1, out.indices[:, None])[:, 0]
        assert (chosen - distances.min(1).values <= 1e-5 * (1 + distances.min(1).values)).all()
        assert torch.equal(out.quantized, codebook[out.indices])
        assert torch.equal(out.counts, torch.bincount(out.indices, minlength=sizes[2]))
        torch.testing.assert_close(out.codebook_loss.double(), chosen.mean() / sizes[1], rtol=1e-5, atol=0)


@on_every_backend
def test_of_equal_codes_the_first_is_taken(backend):
    codebook = torch.randn(5, 6)[[0, 1, 2, 1, 3, 1, 4] * 10]
    x = codebook[[1, 3, 5, 41, 4]]
    assert vector_quantize(x, codebook).indices.tolist() == [1, 1, 1, 6, 4]


@on_every_backend
def test_codes_far_from_zero(backend):
    """A common offset of 1e4 leaves float32 three digits of a distance, but changes no choice."""
    x, codebook = torch.randn(50, 4).mul(64).round(), torch.randn(20, 4).mul(64).round()
    near = vector_quantize(x, codebook).indices
    far = vector_quantize(x + 2**14, codebook + 2**14).indices
    distances = torch.cdist(x.double(), codebook.double()).square()
    assert (distances.gather(1, far[:, None]) <= distances.gather(1, near[:, None]) * (1 + 1e-3)).all()


@on_every_backend
def test_shapes_of_codes(backend):
    x, codebook = torch.randn(2, 3, 4, 5), torch.randn(6, 5)
    out = vector_quantize(x, codebook)
    assert out.quantized.shape == x.shape and out.indices.shape == (2, 3, 4) and out.indices.dtype == torch.int64
    assert out.counts.sum() == 24
    one = vector_quantize(x[0, 0, 0], codebook)
    assert one.indices.dim() == 0 and torch.equal(one.quantized, out.quantized[0, 0, 0])
    none = vector_quantize(x[:0], codebook)
    assert none.quantized.shape == (0, 3, 4, 5) and none.counts.sum() == 0 and none.codebook_loss.isnan()
    permuted = vector_quantize(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), codebook)
    assert torch.equal(permuted.quantized, out.quantized)


@on_every_backend
def test_straight_through(backend):
    x, codebook = (t.requires_grad_() for t in make_codes((6, 4, 3)))
    g = torch.randn(6, 4)
    to_x, to_codes = torch.autograd.grad(
        vector_quantize(x, codebook).quantized, (x, codebook), g, allow_unused=True, materialize_grads=True
    )
    assert torch.equal(to_x, g) and not to_codes.any()


@on_every_backend
def test_losses_of_codes(backend):
    """Each loss has a gradient to its own operand alone."""
    x, codebook = (t.requires_grad_() for t in make_codes((40, 6, 5)))
    out = vector_quantize(x, codebook)
    chosen = codebook.detach()[out.indices]
    factor = 2 / x.numel()
    grads = torch.autograd.grad(out.codebook_loss, (x, codebook), retain_graph=True, materialize_grads=True)
    expected = torch.zeros(5, 6).index_add_(0, out.indices, factor * (chosen - x.detach()))
    torch.testing.assert_close(grads[1], expected)
    assert not grads[0].any()
    grads = torch.autograd.grad(out.commitment_loss, (x, codebook), materialize_grads=True)
    torch.testing.assert_close(grads[0], factor * (x.detach() - chosen))
    assert not grads[1].any()


# ---- Bad input

BAD = [
    (lambda: gaussian_sample_kl([1.0], torch.ones(1)), TypeError, "mu must be a tensor"),
    (lambda: gaussian_sample_kl(torch.ones(2, 3)), ValueError, "exactly one of log_var and scale_tril.*neither"),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3), torch.ones(2, 3), scale_tril=torch.ones(2, 3, 3)),
        ValueError,
        "exactly one of log_var and scale_tril.*both",
    ),
    (lambda: gaussian_sample_kl(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"log_var must have .*\(2, 4\)"),
    (lambda: gaussian_sample_kl(torch.ones(2).int(), torch.ones(2)), TypeError, "mu must be a floating-point"),
    (lambda: gaussian_sample_kl(torch.ones(()), torch.ones(())), ValueError, "mu must have a batch"),
    (lambda: gaussian_sample_kl(torch.ones(2), torch.ones(2), 3), TypeError, "noise must be a NoiseKey"),
    (lambda: gaussian_sample_kl(torch.ones(2), torch.ones(2), torch.ones(3)), ValueError, "noise must have the shape"),
    (lambda: gaussian_sample_kl(torch.ones(2), torch.ones(2), free_bits=-1), ValueError, "free_bits must be at least"),
    (lambda: gaussian_sample_kl(torch.ones(2), torch.ones(2), free_bits="a"), TypeError, "free_bits must be a number"),
    (
        lambda: gaussian_sample_kl(torch.ones(2), torch.ones(2), NoiseKey(1, samples=torch.arange(3))),
        ValueError,
        "noise.samples must have 2 entries",
    ),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3), scale_tril=torch.ones(2, 3, 2)),
        ValueError,
        r"scale_tril must have shape.*\(2, 3, 2\)",
    ),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3), scale_tril=torch.zeros(2, 3, 3)),
        ValueError,
        "scale_tril must have a positive diagonal, got 0",
    ),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3), scale_tril=torch.full((2, 3, 3), math.nan)),
        ValueError,
        "scale_tril must have a positive diagonal, got nan",
    ),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3), scale_tril=torch.eye(3).expand(2, 3, 3), free_bits=1.0),
        ValueError,
        "free_bits must be 0 with scale_tril",
    ),
    (
        lambda: gaussian_sample_kl(torch.ones(2, 3, 1), scale_tril=torch.ones(2, 3, 3)),
        ValueError,
        r"mu must have shape \[batch, D\]",
    ),
    (lambda: lognormal_sample_kl(torch.ones(2), torch.ones(2), prior_mu=math.inf), ValueError, "prior_mu must be fin"),
    (lambda: lognormal_sample_kl(torch.ones(2), torch.ones(2), prior_log_var=None), TypeError, "prior_log_var must"),
    (lambda: gaussian_kl(torch.ones(2), torch.ones(2), torch.ones(3)), ValueError, "prior_mu must broadcast"),
    (lambda: gaussian_kl(torch.ones(2), torch.ones(2), None, 0.0), TypeError, "prior_log_var must be a tensor or"),
    (lambda: importance_log_weights(torch.ones(2), torch.ones(2), samples=0), ValueError, "samples must be at least 1"),
    (lambda: importance_log_weights(torch.ones(2), torch.ones(2), samples=1.5), TypeError, "samples must be an int"),
    (
        lambda: importance_log_weights(torch.ones(2), torch.ones(2), torch.ones(2), samples=3),
        ValueError,
        r"noise must have shape \[samples",
    ),
    (lambda: importance_bound(torch.ones(0, 2)), ValueError, "log_weights must hold at least one draw"),
    (lambda: vector_quantize(torch.ones(2, 3), torch.ones(4, 2)), ValueError, r"codebook must have shape \[codes, 3\]"),
    (lambda: vector_quantize(torch.ones(2, 3), torch.ones(0, 3)), ValueError, "codebook must hold at least one code"),
    (lambda: vector_quantize(torch.ones(2, 3).int(), torch.ones(4, 3)), TypeError, "x must be a floating-point"),
    (lambda: vector_quantize(torch.ones(()), torch.ones(4, 3)), ValueError, "x must have a dimension of features"),
    (lambda: vector_quantize(torch.ones(2, 3), None), TypeError, "codebook must be a tensor"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()
