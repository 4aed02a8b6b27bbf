"""Row B4 of docs/models.md, kernel estimates, and what they share with mixtures: fits, saving, the command line."""

from __future__ import annotations

import math
import pathlib

import matplotlib.image
import numpy as np
import pytest
import sklearn.mixture
import sklearn.neighbors
import torch

from dgm_kernels import NoiseKey
from dgm_models import DensityUnavailable, create_model, from_pretrained, list_models
from dgm_models.__main__ import main
from dgm_models.data import Dataset, Split, digits
from dgm_models.mixtures import (
    KernelDensityEstimate,
    m_step,
    start,
)
from dgm_models.train import Settings, Trainer
from tests.test_mixtures import clusters, normal, vectors


def kde(shape: tuple[int, ...], bandwidth: float | str = "validation") -> KernelDensityEstimate:
    """A kernel estimate of continuous vectors in float64."""
    return create_model("kde", image_shape=shape, bandwidth=bandwidth, levels=None).double()


# B4: kernel density estimate


@pytest.mark.parametrize("dimensions", [1, 3])
def test_B4_the_density_is_scikit_learns(dimensions: int) -> None:
    data, x = clusters(80, dimensions), clusters(30, dimensions) + 0.3
    for bandwidth in (0.05, 0.7):
        model = kde((dimensions,), bandwidth)
        model.fit(data)
        peer = sklearn.neighbors.KernelDensity(bandwidth=bandwidth, rtol=1e-12, atol=0).fit(data.numpy())
        np.testing.assert_allclose(model.log_prob(x).numpy(), peer.score_samples(x.numpy()), rtol=1e-9, atol=1e-9)


def test_B4_rules_of_the_bandwidth() -> None:
    data = clusters(80, 1)
    for rule, exponent in (("scott", 80.0), ("silverman", 80 * 3 / 4)):
        model = kde((1,), rule)
        model.fit(data)
        expected = float(data.std(correction=0)) * exponent ** (-1 / 5)
        assert float(model.bandwidth) == pytest.approx(expected, rel=1e-12)
    wide = kde((3,), "scott")
    wide.fit(clusters(80))
    deviation = float(clusters(80).var(0, correction=0).mean()) ** 0.5
    assert float(wide.bandwidth) == pytest.approx(deviation * 80 ** (-1 / 7), rel=1e-12)


def test_B4_validation_chooses_the_bandwidth_that_explains_new_samples_best() -> None:
    model, data, validation = kde((2,)), clusters(200, 2), clusters(400, 2)[200:]
    losses = model.fit(data, validation)
    chosen = float(model.bandwidth)
    at = float(model.log_prob(validation).mean())
    assert at == pytest.approx(-2 * min(losses), rel=1e-12)
    for factor in (0.3, 0.8, 0.95, 1.05, 1.25, 3.0):
        model.bandwidth.fill_(chosen * factor)
        assert float(model.log_prob(validation).mean()) < at
    told: list[float] = []
    model = kde((2,))
    assert model.fit(data, validation, steps=6) == losses[:6]
    model = kde((2,))
    assert model.fit(data, validation, report=lambda loss: told.append(loss) or len(told) < 4) == losses[:4]
    kept = float(model.bandwidth)
    assert len(model.fit(data, validation)) == 1
    assert float(model.bandwidth) == kept, "the same data keep it"


def test_B4_samples_are_data_points_and_noise() -> None:
    model, data = kde((3,), 1e-3), clusters(12)
    model.fit(data)
    x = model.sample(6000, seed=1)
    distance, nearest = torch.cdist(x, data).min(1)
    assert float(distance.max()) < 0.01
    assert float((distance.square().mean() / 3).sqrt()) == pytest.approx(1e-3, rel=0.05)
    share = torch.bincount(nearest, minlength=12) / 6000
    torch.testing.assert_close(share, torch.full_like(share, 1 / 12), rtol=0, atol=0.02)


def test_B4_grey_levels_are_kernels_around_the_middle_of_their_cells() -> None:
    model, data = create_model("kde", bandwidth=0.01), digits().train.x[:30]
    model.fit(data)
    assert torch.equal(model.data, ((data + 1) * 8).flatten(1) + 0.5)
    drawn = model.sample(40, seed=2)
    assert bool((drawn[:, None] == data).flatten(2).all(2).any(1).all()), "narrow kernels give the data back"
    wide = create_model("kde", bandwidth=3.0)
    wide.fit(data)
    levels = (wide.sample(40, seed=2) + 1) * 8
    assert torch.equal(levels, levels.round())
    assert set(levels.unique().tolist()) == set(range(17))


def test_B4_a_memorised_training_set_gives_new_samples_no_density() -> None:
    data = digits()
    bits = []
    for bandwidth in (2.0, 0.05):
        model = create_model("kde", bandwidth=bandwidth)
        model.fit(data.train.x)
        bits.append(float(model.bits_per_dim(model.elbo(data.test.x)).mean()))
    assert bits[0] < 4
    assert bits[1] > 100


def test_B4_no_data_no_density() -> None:
    model = create_model("kde")
    for call in (lambda: model.log_prob(digits().test.x), lambda: model.sample(1), lambda: model.loss(digits().test.x)):
        with pytest.raises(DensityUnavailable, match=r"it holds no data before fit\(x\)"):
            call()


@pytest.mark.parametrize("name", ["spherical", "diagonal", "full", "kde"])
def test_B1_B4_sample_i_of_a_seed_is_always_the_same(name: str) -> None:
    model = vectors(4, name) if name != "kde" else kde((3,), 0.5)
    model.fit(clusters(60))
    whole = model.sample(9, seed=5)
    torch.testing.assert_close(model.sample(9, seed=5, batch_size=2), whole)
    torch.testing.assert_close(model.sample(4, seed=5, first_sample=5), whole[5:])
    assert float((model.sample(9, seed=6) - whole).abs().amax(1).min()) > 1e-3


# Both: training, saving, the command line, refusals


@pytest.mark.parametrize("name", ["gaussian_mixture", "kde"])
def test_trainer_fits_saves_and_resumes(tmp_path: pathlib.Path, name: str) -> None:
    data = digits()
    data = Dataset(Split(data.train.x[:300], data.train.label[:300]), data.validation, data.test)
    options = {} if name == "kde" else {"components": 5, "restarts": 2, "dequantizations": 2}
    torch.manual_seed(0)
    trainer = Trainer(create_model(name, **options), data, Settings(steps=30), tmp_path)
    trainer.run(progress=False)
    assert 0 < trainer.step == len(trainer.losses) <= 30
    assert trainer.validation == [(trainer.step, trainer.validation_loss())]
    loaded = from_pretrained(tmp_path)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(trainer.averaged_model.state_dict()[key], value), key
    assert torch.equal(loaded.log_prob(data.test.x), trainer.model.log_prob(data.test.x))
    resumed = Trainer(loaded, data, Settings(steps=30), tmp_path)
    resumed.load()
    assert resumed.losses == trainer.losses
    resumed.run(progress=False)
    assert len(resumed.losses) <= trainer.step + 2, "it had converged"
    assert resumed.losses[-1] <= trainer.losses[-1] + 1e-3
    before = len(resumed.losses)
    resumed.train_step()
    assert len(resumed.losses) == before + 1


def test_trainer_stops_a_fit_after_so_many_minutes() -> None:
    torch.manual_seed(0)
    model = create_model("gaussian_mixture", components=5, dequantizations=1)
    trainer = Trainer(model, digits(), Settings(steps=30))
    trainer.run(minutes=1e-9, progress=False)
    assert trainer.step == 1
    trainer.run(until=1, progress=False)
    assert trainer.step == 1


@pytest.mark.parametrize("name", ["gaussian_mixture", "kde"])
def test_cli_fits_samples_and_evaluates(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert name in list_models()
    out = tmp_path / "run"
    args = ["train", name, "--out", str(out), "--steps", "5", "--device", "cpu", "--quiet"]
    if name == "gaussian_mixture":
        args += ["--set", "components=3", "--set", "restarts=1", "--set", "dequantizations=2"]
    assert main(args) == 0
    assert matplotlib.image.imread(out / "samples.png")[..., :3].std() > 0.01
    assert (out / "loss.png").exists()
    assert main(["train", name, "--out", str(out), "--resume", "--quiet"]) == 0
    picture = str(tmp_path / "s.png")
    assert main(["sample", "--from", str(out), "-n", "4", "--out", picture]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--from", str(out), "-k", "2"]) == 0
    assert capsys.readouterr().out.startswith("ELBO, validation set, mean of 200 samples: nats -")
    few = ["--set", "components=3", "--set", "restarts=1"] if name == "gaussian_mixture" else []
    assert main(["profile", name, "--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "p.json"), *few]) == 0


def test_mixtures_and_kernel_estimates_refuse_bad_input() -> None:
    for name, config, message in (
        ("gaussian_mixture", {"covariance": "tied"}, "covariance must be one of spherical, diagonal, full, got 'tied'"),
        ("gaussian_mixture", {"init": "random"}, "init must be one of same, variances, data, kmeans, got 'random'"),
        ("gaussian_mixture", {"components": 0}, "components must be a positive int, got 0"),
        ("gaussian_mixture", {"restarts": 0}, "restarts must be a positive int, got 0"),
        ("gaussian_mixture", {"dequantizations": 0}, "dequantizations must be a positive int, got 0"),
        ("gaussian_mixture", {"min_variance": 0.0}, "min_variance must be a positive finite number, got 0.0"),
        ("gaussian_mixture", {"tolerance": -1.0}, "tolerance must not be negative, got -1.0"),
        ("gaussian_mixture", {"tolerance": math.nan}, "tolerance must not be negative, got nan"),
        ("gaussian_mixture", {"level_noise": 2.0}, r"level_noise must be in \[0, 1\], got 2.0"),
        ("gaussian_mixture", {"levels": 1}, "levels must be at least 2, got 1"),
        ("kde", {"levels": 1}, "levels must be at least 2, got 1"),
        (
            "kde",
            {"bandwidth": "best"},
            "bandwidth must be a positive number or one of validation, scott, silverman, got",
        ),
        ("kde", {"bandwidth": 0.0}, "bandwidth must be a positive finite number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, **config)
    x = clusters(20)
    with pytest.raises(ValueError, match="components must be at most the 20 points to fit, got 21"):
        vectors(21).fit(x)
    with pytest.raises(ValueError, match="validation must be given: the bandwidth is to be chosen by it"):
        kde((3,)).fit(x)
    with pytest.raises(ValueError, match="x must hold at least one data point, got none"):
        kde((3,), 1.0).fit(x[:0])
    with pytest.raises(ValueError, match="x must not be one point only"):
        kde((3,), "scott").fit(x[:1])
    with pytest.raises(ValueError, match="x must lie on 17 equally spaced levels"):
        create_model("gaussian_mixture").fit(torch.full((3, 1, 8, 8), 0.3))
    with pytest.raises(ValueError, match="cond must be None: this gaussian_mixture is not conditional"):
        create_model("gaussian_mixture").loss(digits().test.x, cond=digits().test.label)
    r = torch.softmax(normal(20, 2), 1)
    for bad, message in (
        (r[:5], r"responsibilities must have shape \(N, K\) for points \(N, D\), got \(5, 2\) for \(20, 3\)"),
        (2 * r, "each row must sum to 1"),
        (torch.tensor([[1.0, 0.0]]).double().expand(20, 2), "leave no component without points"),
    ):
        with pytest.raises(ValueError, match=message):
            m_step(x, bad)
    with pytest.raises(ValueError, match="min_variance must be a positive finite number, got 0"):
        m_step(x, r, min_variance=0.0)
    with pytest.raises(ValueError, match="init must be one of same, variances, data, kmeans, got 'none'"):
        start("none", x, 2, "full", key=NoiseKey(0))
