"""Rows F1, F2, F3 and F6 of docs/models.md: forward process, training, bound, schedules and denoisers of ``ddpm``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, Schedule, add_noise, noise_like, tables
from dgm_models import DensityUnavailable, create_model
from dgm_models.data import digits
from dgm_models.ddpm import DDPM, MLP, UNet
from dgm_models.ddpm.bound import discretized_normal_log_prob, importance_weighted
from dgm_models.train import Settings, Trainer
from tests.ddpm_models import gaussian_data, gaussian_model, small_model

SCHEDULES = {"linear": Schedule.linear(100, 1e-3, 0.2), "cosine": Schedule.cosine(100)}


# F1: forward step, marginal, posterior


@pytest.mark.parametrize("name", SCHEDULES)
def test_F1_posterior_matches_the_closed_form(name: str) -> None:
    schedule = SCHEDULES[name]
    ax, a0, variance = (tables.ddpm(schedule).rows64.flip(0)[:, i] for i in (4, 5, 8))
    beta, alpha, bar = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(variance**2, (1 - before) / (1 - bar) * beta, **close)
    torch.testing.assert_close(ax, alpha.sqrt() * (1 - before) / (1 - bar), **close)
    torch.testing.assert_close(a0, before.sqrt() * beta / (1 - bar), **close)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [1, 30, 80])
def test_F1_posterior_is_bayes_rule(name: str, t: int) -> None:
    schedule, x_t, x0 = SCHEDULES[name], -0.4, 0.9
    bar, beta = schedule.alphas_cumprod, schedule.betas[t]
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)  # values of x_{t-1}
    prior = torch.distributions.Normal(bar[t - 1].sqrt() * x0, (1 - bar[t - 1]).sqrt())
    step = torch.distributions.Normal((1 - beta).sqrt() * grid, beta.sqrt())
    weight = torch.softmax(prior.log_prob(grid) + step.log_prob(torch.tensor(x_t, dtype=torch.float64)), 0)
    mean = (weight * grid).sum()
    row = tables.ddpm(schedule).rows64[len(schedule) - 1 - t]
    torch.testing.assert_close(row[4] * x_t + row[5] * x0, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(row[8] ** 2, (weight * (grid - mean) ** 2).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_F1_marginal_is_the_composition_of_the_forward_steps(name: str) -> None:
    schedule = SCHEDULES[name]
    factor, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t, beta in enumerate(schedule.betas):
        factor, variance = (1 - beta).sqrt() * factor, (1 - beta) * variance + beta
        torch.testing.assert_close(factor, schedule.alpha_t[t])
        torch.testing.assert_close(variance.sqrt(), schedule.sigma_t[t])


def test_F1_add_noise_draws_from_the_marginal() -> None:
    model, n = small_model(), 200_000
    t = torch.full((n,), 7)
    noisy = add_noise(torch.full((n, 1), 0.5), model.training_table, t, NoiseKey(4))
    assert abs(float(noisy.mean()) - 0.5 * model.schedule.alpha_t[7]) < 5 * model.schedule.sigma_t[7] / n**0.5
    assert abs(float(noisy.std()) / model.schedule.sigma_t[7] - 1) < 5 / (2 * n) ** 0.5


# F2: training, sampling, the bound


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_F2_loss_is_the_squared_error_of_the_target(prediction: str) -> None:
    model = gaussian_model(prediction=prediction)
    x, key = gaussian_data(20_000), NoiseKey(5, step=3)
    noise = noise_like(x, NoiseKey(5, step=3, stream=7))
    uniform = noise_like(x[:, :1].float(), NoiseKey(5, step=3, stream=2), distribution="uniform")[:, 0]
    t = (uniform * 100).ceil().long().clamp(1, 100) - 1
    assert torch.bincount(t, minlength=100).sub(200).abs().max() < 5 * 200**0.5, "all times are equally likely"
    alpha, sigma = (v[t][:, None] for v in (model.schedule.alpha_t, model.schedule.sigma_t))
    target = {"eps": noise, "x0": x, "v": alpha * noise - sigma * x}[prediction]
    output = model.denoiser(alpha * x + sigma * noise, t.double())
    torch.testing.assert_close(model.loss(x, key=key), (output - target).square().mean())
    # The optimal denoiser's expected error is the variance of x_0 given x_t, in the units of the target.
    a, s = model.schedule.alpha_t, model.schedule.sigma_t
    left = 0.7**2 * s**2 / (a**2 * 0.7**2 + s**2)
    expected = (left * {"eps": (a / s) ** 2, "x0": 1.0, "v": 1 / s**2}[prediction]).mean()
    torch.testing.assert_close(model.loss(x, key=key), expected, rtol=0.03, atol=0)


def test_F2_loss_is_a_function_of_the_key() -> None:
    model, x = small_model(), digits().train.x[:32]
    assert torch.equal(model.loss(x, key=NoiseKey(1, step=2)), model.loss(x, key=NoiseKey(1, step=2)))
    assert not torch.equal(model.loss(x, key=NoiseKey(1, step=2)), model.loss(x, key=NoiseKey(1, step=3)))
    torch.manual_seed(3)
    first = model.loss(x)
    torch.manual_seed(3)
    assert torch.equal(first, model.loss(x))


def test_F2_training_learns() -> None:
    torch.manual_seed(0)
    model = create_model("ddpm", width=16, timesteps=100)
    trainer = Trainer(model, digits(), Settings(steps=150, batch_size=64, ema=0.9, warmup=20, validate_every=150))
    assert trainer.validation_loss() == pytest.approx(1.0, abs=0.03), "the new network predicts 0"
    before = model.elbo(digits().validation.x[:50], times=30).mean()
    trainer.run(progress=False)
    assert trainer.validation[-1][1] < 0.35
    after = trainer.averaged_model.elbo(digits().validation.x[:50], times=30).mean()
    assert after > before + 50


def expected_terms(model: DDPM, mean: float, std: float) -> tuple[float, float, float]:
    """The terms of the bound of an optimal model, averaged over the data, worked out by hand for one element."""
    a, s = model.schedule.alpha_t, model.schedule.sigma_t
    left = std**2 * s**2 / (a**2 * std**2 + s**2)  # variance of x_0 given x_t
    snr = (a / s) ** 2
    reconstruction = -0.5 * math.log(2 * math.pi * s[0] ** 2) - left[0] / (2 * s[0] ** 2)
    prior = (a[-1] ** 2 * (std**2 + mean**2) + s[-1] ** 2 - 1) / 2 - s[-1].log()
    return float(reconstruction), float(prior), float((0.5 * (snr[:-1] - snr[1:]) * left[1:]).sum())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_F2_elbo_of_gaussian_data(prediction: str, schedule: str) -> None:
    model, x = gaussian_model(prediction=prediction, schedule=schedule), gaussian_data(4000)
    terms = model.elbo_terms(x)
    for term, expected in zip(terms, expected_terms(model, 0.3, 0.7), strict=True):
        assert abs(float(term.mean()) - 2 * expected) < 5 * float(term.std()) / 4000**0.5
    torch.testing.assert_close(model.elbo(x), terms.reconstruction - terms.prior_kl - terms.transitions_kl)


def test_F2_elbo_approaches_the_entropy() -> None:
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.7**2)
    gaps = []
    for timesteps in (10, 100, 1000):  # equal steps in log(snr): every step of the chain gets finer
        bar = torch.linspace(8, -9, timesteps, dtype=torch.float64).sigmoid()
        betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
        model = gaussian_model(schedule=betas.tolist())
        reconstruction, prior, transitions = expected_terms(model, 0.3, 0.7)
        gaps.append(reconstruction - prior - transitions + entropy)
    assert gaps[0] < gaps[1] < gaps[2] < 0, "a finer chain is tighter, and none exceeds the log-likelihood"
    assert gaps[2] > -0.05
    x = gaussian_data(1000)
    difference = model.elbo(x, times=100) - torch.distributions.Normal(0.3, 0.7).log_prob(x).sum(1)
    assert abs(float(difference.mean()) - 2 * gaps[2]) < 5 * float(difference.std()) / 1000**0.5


def test_F2_elbo_does_not_depend_on_the_parametrisation() -> None:
    x = gaussian_data(20)
    by_eps, by_x0, by_v = (gaussian_model(prediction=p).elbo(x) for p in ("eps", "x0", "v"))
    torch.testing.assert_close(by_eps, by_x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_v, by_x0, rtol=1e-6, atol=1e-6)


def test_F2_elbo_from_some_times_is_unbiased() -> None:
    model, x = gaussian_model(timesteps=40), gaussian_data(1).expand(4000, 2)
    every, some = model.elbo(x), model.elbo(x, times=3, seed=1)
    error = (every.var() / 4000 + some.var() / 4000) ** 0.5
    assert abs(float(every.mean() - some.mean())) < 5 * float(error)


def model_log_prob(model: DDPM, x: Tensor, mean: float, std: float) -> Tensor:
    """Exact log-density of ancestral sampling with the optimal denoiser: a chain of Gaussians, element by element."""
    table = tables.ddpm(model.schedule, prediction="x0")
    alpha, sigma = (v.flip(0) for v in (model.schedule.alpha_t, model.schedule.sigma_t))
    shrink = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    m, v = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for row in range(len(table)):
        ax, a0, an = (table.rows64[row, i] for i in (4, 5, 8))
        gain = ax + a0 * shrink[row]
        noise = an**2 if row < len(table) - 1 else sigma[-1] ** 2  # p(x_0 | x_1) has the variance beta_1
        m, v = gain * m + a0 * mean * (1 - shrink[row] * alpha[row]), gain**2 * v + noise
    return torch.distributions.Normal(m, v.sqrt()).log_prob(x).sum(1)


def test_F2_elbo_importance_weighted_rises_to_the_log_probability() -> None:
    model = gaussian_model(schedule=[0.1, 0.3, 0.4, 0.5], elements=1)
    x = gaussian_data(1, elements=1).expand(2000, 1)
    exact = float(model_log_prob(model, x[:1], 0.3, 0.7))
    closed, *weighted = (model.elbo(x, k=k, seed=k) for k in (1, 2, 8, 64))
    means = [float(bound.mean()) for bound in (closed, *weighted)]
    assert exact - means[0] > 0.2, "the case leaves room to see the bound rise"
    assert means[0] < means[1] < means[2] < means[3]
    assert means[3] == pytest.approx(exact, abs=0.01)


def test_F2_elbo_importance_weighted_agrees_with_the_closed_form_for_one_path() -> None:
    """The mean of log p/q over paths is the closed-form bound."""
    model, x = gaussian_model(schedule=[0.1, 0.3, 0.4, 0.5]), gaussian_data(1).expand(20_000, 2)
    closed, one_path = model.elbo(x), importance_weighted(model, x, 1, None, seed=0, first_sample=0)
    error = (closed.var() / 20_000 + one_path.var() / 20_000) ** 0.5
    assert abs(float(closed.mean() - one_path.mean())) < 5 * float(error) < 0.1


def test_F2_elbo_of_grey_levels_is_a_probability() -> None:
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    for mean in (-3.0, -1.0, 0.03, 0.7, 1.2):
        for scale in (0.01, 0.1, 2.0):
            log_prob = discretized_normal_log_prob(levels, torch.full_like(levels, mean), scale, 17)
            assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    # Far tails in float32: log(Phi(-93.75) - Phi(-106.25)), where both numbers underflow.
    expected = -(93.75**2) / 2 - math.log(93.75 * math.sqrt(2 * math.pi))
    for mean in (-1.0, 1.0):
        far = discretized_normal_log_prob(torch.tensor([0.0]), torch.tensor([mean]), 0.01, 17)
        assert float(far) == pytest.approx(expected, rel=1e-4)


def test_F2_elbo_of_grey_levels_of_a_perfect_model_is_zero() -> None:
    model = small_model(image_shape=(3,), prediction="x0", levels=3, timesteps=200)
    answer = torch.tensor([[-1.0, 0.0, 1.0]])
    model.denoiser.forward = lambda x, time, label: answer.expand_as(x)
    terms = model.elbo_terms(answer)
    assert float(terms.transitions_kl) == 0.0
    assert float(terms.reconstruction) == pytest.approx(0.0, abs=1e-6)
    wrong = model.elbo(torch.tensor([[-1.0, 0.0, 0.0]]))
    assert float(wrong) < -10


def test_F2_elbo_refuses_bad_input() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="x must lie on 17 equally spaced levels"):
        model.elbo(torch.full((1, 1, 8, 8), 0.03))
    with pytest.raises(ValueError, match="k must be a positive int, got 0"):
        model.elbo(torch.zeros(1, 1, 8, 8), k=0)
    with pytest.raises(ValueError, match="times must be None with k > 1"):
        model.elbo(torch.zeros(1, 1, 8, 8), k=2, times=3)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\), got \(1, 64\)"):
        model.elbo(torch.zeros(1, 64))
    with pytest.raises(DensityUnavailable, match=r"integral over all paths.*elbo"):
        model.log_prob(torch.zeros(1, 1, 8, 8))


def test_F2_ancestral_sampling_matches_its_exact_distribution() -> None:
    model = gaussian_model(schedule=[0.1, 0.3, 0.4, 0.5], elements=1)
    x = model.sample(20_000, seed=2)
    spread = x + model.schedule.sigma_t[0] * noise_like(x, NoiseKey(77))  # the last step adds no noise
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    density = model_log_prob(model, z, 0.3, 0.7).exp()
    found = ((spread[:, 0] - z).abs() < 0.05).double().mean(1) / 0.1
    assert float((found - density).abs().max()) < 0.04


def test_F2_condition_dropout_hides_the_class() -> None:
    x, label = digits().train.x[:64], digits().train.label[:64]
    key = NoiseKey(0)
    always, never = small_model(num_classes=10, cond_dropout=1.0), small_model(num_classes=10, cond_dropout=0.0)
    never.load_state_dict(always.state_dict())
    assert torch.equal(always.loss(x, label, key=key), never.loss(x, None, key=key))
    assert not torch.equal(never.loss(x, label, key=key), never.loss(x, None, key=key))


def test_F2_condition_refuses_bad_input() -> None:
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="cond must be None: num_classes was not given"):
        small_model().loss(x, torch.tensor([0, 1]))
    model = small_model(num_classes=3)
    with pytest.raises(ValueError, match=r"cond must hold classes in \[0, 3\), got \[0, 3\]"):
        model.loss(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cond must be int64 of shape \(2,\)"):
        model.loss(x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="guidance must be 1 without cond"):
        model.sample(2, guidance=3.0)


# F3: schedules

N = 50


def rising(formula: object) -> list[float]:
    return [formula(n) for n in range(1, N + 1)]  # type: ignore[operator]


@pytest.mark.parametrize(
    "formula", [lambda n: math.sin(n / N), lambda n: math.log(1 + n / N)], ids=["sin(n/N)", "ln(1+n/N)"]
)
def test_F3_valid_schedules_work(formula: object) -> None:
    betas = rising(formula)
    model = small_model(schedule=betas)
    assert len(model.schedule) == N
    expected = math.prod(1 - beta for beta in betas)
    assert float(model.schedule.alphas_cumprod[-1]) == pytest.approx(expected, rel=1e-9)
    assert model.sample(2).isfinite().all()
    assert model.loss(torch.zeros(4, 1, 8, 8), key=NoiseKey(0)).isfinite()


@pytest.mark.parametrize(
    ("betas", "reason"),
    [
        (rising(lambda n: 1 - 1 / n), r"betas\[0\] = 0: the step adds no noise"),
        (rising(lambda n: -math.cos(math.pi * n / N)), r"betas\[0\] = -0.998\d*: a variance cannot be negative"),
        ([0.1, 1.0], r"betas\[1\] = 1: alphas_cumprod becomes 0: no signal is left"),
        ([0.1, 0.2, 1.5], r"betas\[2\] = 1.5: sqrt\(1 - beta\) is the root of a negative number"),
    ],
    ids=["1-1/n", "-cos(pi n/N)", "1", "above 1"],
)
def test_F3_other_betas_are_refused_with_the_reason(betas: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        create_model("ddpm", schedule=betas)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_F3_named_schedules_end_in_noise(timesteps: int) -> None:
    """The linear one as well, whatever the number of times: its betas are scaled by 1000 / T."""
    linear, cosine = (small_model(schedule=name, timesteps=timesteps).schedule for name in ("linear", "cosine"))
    assert 1e-5 < float(linear.alphas_cumprod[-1]) < 5e-5
    assert float(cosine.alphas_cumprod[-1]) < 1e-5
    for t in (timesteps // 4, timesteps // 2):
        root = [math.cos((share + 0.008) / 1.008 * math.pi / 2) for share in ((t + 1) / timesteps, 0)]
        assert float(cosine.alphas_cumprod[t]) == pytest.approx((root[0] / root[1]) ** 2, rel=1e-9)


def test_F3_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be 'linear', 'cosine', 'scaled_linear' or a list of betas"):
        small_model(schedule="quadratic")
    with pytest.raises(ValueError, match="timesteps must be a positive int, got 0"):
        small_model(timesteps=0)


# F6: denoisers


def randomised(net: nn.Module) -> nn.Module:
    """Noise on all parameters: the last layer of a new U-Net is zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_F6_unet_every_output_sees_every_input(multipliers: tuple[int, ...]) -> None:
    net = randomised(UNet((2, 8, 4), 8, 1, multipliers)).double()
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, torch.tensor([3.0], dtype=torch.float64)), x)
    assert int((jacobian == 0).sum()) == 0


@pytest.mark.parametrize(
    "net", [UNet((1, 4, 4), 8, 2, (1, 2), num_classes=3), MLP((1, 4, 4), 16, 2, num_classes=3)], ids=["unet", "mlp"]
)
def test_F6_denoisers_depend_on_time_and_class_and_not_on_the_batch(net: nn.Module) -> None:
    net = randomised(net).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    time, label = torch.tensor([0.0, 5.0, 900.0], dtype=torch.float64), torch.tensor([0, 1, 3])
    output = net(x, time, label)
    assert output.shape == x.shape
    for row in range(3):
        torch.testing.assert_close(net(x[[row]], time[[row]], label[[row]])[0], output[row])
    assert ((net(x, time + 1, label) - output).abs().flatten(1).amax(1) > 1e-4).all()
    assert ((net(x, time, (label + 1) % 4) - output).abs().flatten(1).amax(1) > 1e-4).all()


def test_F6_unet_starts_at_zero_and_is_differentiable() -> None:
    net = UNet((1, 8, 8), 16, 1)
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    assert torch.equal(net(x, time), torch.zeros_like(x))
    randomised(net)(x, time).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


def test_F6_denoisers_refuse_bad_sizes() -> None:
    with pytest.raises(ValueError, match="height and width must divide by 4"):
        create_model("ddpm", image_shape=(1, 8, 6), multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="width must be a multiple of 8"):
        create_model("ddpm", width=12)
    with pytest.raises(ValueError, match=r"images of shape \(channels, height, width\), got \(64,\)"):
        create_model("ddpm", image_shape=(64,))
    with pytest.raises(TypeError, match="image_shape must be a sequence of positive ints, got 8"):
        create_model("ddpm", image_shape=8)
    with pytest.raises(ValueError, match=r"image_shape\[1\] must be a positive int, got 0"):
        create_model("ddpm", denoiser="mlp", image_shape=(1, 0, 8))
    with pytest.raises(TypeError, match="multipliers must be a sequence of positive ints, got 2"):
        create_model("ddpm", multipliers=2)
    with pytest.raises(ValueError, match="width must be even, got 7"):
        create_model("ddpm", denoiser="mlp", width=7)
    with pytest.raises(ValueError, match="denoiser must be 'unet' or 'mlp', got 'dit'"):
        create_model("ddpm", denoiser="dit")
    with pytest.raises(ValueError, match="prediction must be one of eps, x0, v, got 'score'"):
        create_model("ddpm", prediction="score")


def test_models_run_on_the_reference_backend_too() -> None:
    """The same training step and samples, to rounding, whatever backend computes the ops."""
    model, x = small_model(), digits().train.x[:16]
    loss, samples = model.loss(x, key=NoiseKey(3)), model.sample(4, sampler="ddpm")
    with dgm_kernels.use_backend("reference"):
        torch.testing.assert_close(model.loss(x, key=NoiseKey(3)), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.sample(4, sampler="ddpm"), samples, rtol=1e-4, atol=1e-4)
