"""The interface that every model shares: registry, sampling contract, saving, training loop, pictures, command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
import re

import matplotlib.image
import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import Tensor, nn

import dgm_models
from dgm_kernels import NoiseKey, noise_like
from dgm_models import DensityUnavailable, GenerativeModel, create_model, from_pretrained, list_models, plots
from dgm_models.__main__ import main
from dgm_models.data import DIGITS_LEVELS, Dataset, Split, digits
from dgm_models.train import CHECKPOINT_FILE, Settings, Trainer
from tests.command_line import run

TINY = {"denoiser": "mlp", "width": 16, "depth": 1, "timesteps": 10}


class Shift(GenerativeModel):
    """The smallest model: standard normal noise around a learnt mean; its samples show which noise they used."""

    model_name = "shift"
    conditional = True

    def __init__(self, elements: int = 3) -> None:
        super().__init__()
        self.sample_shape = (elements,)
        self.mean = nn.Parameter(torch.zeros(elements))
        self.dropout = nn.Dropout(0.5)

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        return {"fit": (x - self.mean).square().mean(), "size": 0.1 * self.mean.square().sum()}

    def _sample(self, n: int, seed: int, cond: Tensor | None, first_sample: int) -> Tensor:
        noise = noise_like(torch.empty(n, *self.sample_shape), NoiseKey(seed, first_sample))
        return self.dropout(self.mean + noise + (0 if cond is None else cond[:, None]))


# Registry


def test_list_models_filters_by_shell_pattern() -> None:
    assert "ddpm" in list_models()
    assert list_models("dd*m") == ["ddpm"]
    assert list_models("*no such model*") == []
    assert list_models() == sorted(list_models())


def test_create_model_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*ddpm.*, got 'dppm'"):
        create_model("dppm")
    with pytest.raises(TypeError, match="ddpm has no option 'with'; its options are image_shape, denoiser, width"):
        create_model("ddpm", **{"with": 3})


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a model named 'ddpm' is registered already: DDPM"):
        dgm_models.register_model("ddpm")(Shift)


# Interface


def test_loss_is_the_sum_of_its_parts() -> None:
    model, x = Shift(), torch.randn(5, 3)
    nn.init.constant_(model.mean, 2.0)
    parts = model.loss_parts(x)
    assert parts["size"].item() == pytest.approx(0.1 * 3 * 4)
    assert model.loss(x).item() == pytest.approx(parts["fit"].item() + 1.2, rel=1e-6)
    assert torch.equal(model(x), model.loss(x))


def test_loss_compiles_without_a_break() -> None:
    model, x = create_model("ddpm", width=8, timesteps=20), torch.randn(3, 1, 8, 8)
    nn.init.normal_(model.denoiser.outward.weight, std=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key=NoiseKey(0)), model(x, key=NoiseKey(0)))


def test_samples_do_not_depend_on_the_batch_size_or_on_who_draws_them() -> None:
    model = create_model("ddpm", width=16, timesteps=20, num_classes=10).double()
    nn.init.normal_(model.denoiser.outward.weight, std=0.1)
    cond = torch.arange(7)
    whole = model.sample(7, seed=5, cond=cond)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.sample(7, seed=5, cond=cond, batch_size=2), whole, **close)
    parts = [model.sample(3, seed=5, cond=cond[:3]), model.sample(4, seed=5, cond=cond[3:], first_sample=3)]
    torch.testing.assert_close(torch.cat(parts), whole, **close)
    assert (model.sample(7, seed=6, cond=cond) - whole).abs().amax((1, 2, 3)).min() > 0.1, "another seed, other samples"
    assert torch.equal(model.sample(7, seed=5, cond=cond), whole)


def test_samples_in_float32_agree_over_batch_sizes() -> None:
    model = create_model("ddpm", width=16, timesteps=20)
    nn.init.normal_(model.denoiser.outward.weight, std=0.1)
    torch.testing.assert_close(model.sample(5, batch_size=1), model.sample(5), rtol=1e-4, atol=1e-4)


def test_sampling_happens_in_evaluation_mode_and_gives_the_mode_back() -> None:
    model = Shift().train()
    expected = noise_like(torch.empty(4, 3), NoiseKey(1, first_sample=9)) + 2
    assert torch.equal(model.sample(4, seed=1, cond=2, first_sample=9), expected), "dropout is off, cond is spread"
    assert model.training
    assert not model.eval().training
    ((label, last),) = model.trajectory(4, seed=1, cond=2, first_sample=9)
    assert label == "sample"
    assert torch.equal(last, expected)


def test_numpy_integers_are_ints(tmp_path: pathlib.Path) -> None:
    three = np.int64(3)
    model = create_model("ddpm", **{**TINY, "timesteps": np.int64(10)}, num_classes=np.int32(10))
    expected = model.sample(3, seed=3, cond=3, first_sample=3, sampler="ddim", steps=3, batch_size=3)
    options = {"sampler": "ddim", "steps": three, "batch_size": three}
    assert torch.equal(model.sample(three, seed=three, cond=three, first_sample=three, **options), expected)
    assert len(model.trajectory(three, cond=three, frames=three)) == 3
    x = digits().test.x[:2]
    assert torch.equal(model.elbo(x, k=np.int64(2), seed=three), model.elbo(x, k=2, seed=3))
    settings = Settings(steps=three, batch_size=np.int32(5), validate_every=three, seed=three)
    trainer = Trainer(model, digits(), settings, tmp_path)
    trainer.run(progress=False)
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 3
    assert from_pretrained(tmp_path).config == model.config


def test_the_config_holds_arrays_as_lists() -> None:
    """The mixin drops what JSON cannot hold: the model would be saved with another schedule."""
    betas = [0.125, 0.25]
    for schedule in (np.array(betas), torch.tensor(betas), [np.float32(b) for b in betas]):
        model = create_model("ddpm", **TINY, schedule=schedule)
        assert model.config["schedule"] == betas
        assert model.schedule.betas.tolist() == betas
    with pytest.raises(TypeError, match="schedule must be a JSON value, an array or a tensor, got set"):
        create_model("ddpm", **TINY, schedule={0.1, 0.2})


def test_sample_refuses_bad_input() -> None:
    model = Shift()
    for n in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="n must be a positive int"):
            model.sample(n)
    with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
        model.sample(2, batch_size=0)
    with pytest.raises(ValueError, match=r"cond must have one entry for each of the 2 samples, got shape \(3,\)"):
        model.sample(2, cond=torch.zeros(3))
    with pytest.raises(TypeError, match="cond must be a tensor or an int, got str"):
        model.sample(2, cond="3")
    with pytest.raises(ValueError, match="cond must be None: this ddpm is not conditional"):
        create_model("ddpm", **TINY).sample(2, cond=3)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\), got -1"):
        model.sample(2, seed=-1)


def test_loss_refuses_bad_input() -> None:
    model = create_model("ddpm", **TINY)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\), got \(2, 8, 8\)"):
        model.loss(torch.zeros(2, 8, 8))
    with pytest.raises(TypeError, match=r"x must hold floating-point numbers, got torch\.uint8"):
        model.loss(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        model.loss([0.0])


def test_density_unavailable_says_why() -> None:
    with pytest.raises(DensityUnavailable, match="shift has no density that can be computed"):
        Shift().log_prob(torch.zeros(1, 3))
    with pytest.raises(DensityUnavailable, match="shift has no lower bound of its density"):
        Shift().elbo(torch.zeros(1, 3))


def test_bits_per_dim_of_a_uniform_distribution() -> None:
    model = create_model("ddpm", **TINY)
    nats = torch.tensor([-64 * math.log(17)])  # each of 64 pixels has one of 17 levels
    assert float(model.bits_per_dim(nats)) == pytest.approx(math.log2(17))


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_round_trip(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    model = create_model("ddpm", width=8, multipliers=(1, 1), timesteps=10, num_classes=4).to(dtype)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == "ddpm"
    assert config["multipliers"] == [1, 1]
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.dtype == dtype
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.sample(2, seed=3, cond=1), model.sample(2, seed=3, cond=1))


def test_load_refuses_what_was_not_saved_by_a_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"path must hold a saved model, but there is no config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path must be a folder, or a repository .* got 'nobody/nothing'"):
        from_pretrained("nobody/nothing", local_files_only=True)
    create_model("ddpm", **TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 2}))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        from_pretrained(tmp_path)


# Data


def test_digits_are_split_as_documented() -> None:
    data = digits()
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(1797)
    for part, chosen in (("train", order[:1200]), ("validation", order[1200:1400]), ("test", order[1400:])):
        split = data.split(part)
        assert np.array_equal((split.x.numpy().reshape(len(split), 64) + 1) * 8, images[chosen])
        assert np.array_equal(split.label.numpy(), labels[chosen])
    assert len(data.test) == 397
    assert data.train.x.unique().numel() == DIGITS_LEVELS
    assert (float(data.train.x.min()), float(data.train.x.max())) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="name must be 'train', 'validation' or 'test', got 'valid'"):
        data.split("valid")


# Training


def tiny_trainer(out: pathlib.Path | None = None, **settings: object) -> Trainer:
    torch.manual_seed(0)
    model = create_model("ddpm", **TINY, num_classes=10)
    return Trainer(model, digits(), Settings(**{"steps": 12, "batch_size": 500, "validate_every": 5, **settings}), out)


def assert_same_state(a: Trainer, b: Trainer) -> None:
    assert (a.step, a.losses, a.validation) == (b.step, b.losses, b.validation)
    for name in ("model", "average"):
        for key, value in getattr(a, name).state_dict().items():
            assert torch.equal(value, getattr(b, name).state_dict()[key]), (name, key)
    for p, q in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    whole = tiny_trainer()
    whole.run(progress=False)
    stopped = tiny_trainer(tmp_path)
    stopped.run(until=5, progress=False)
    resumed = tiny_trainer(tmp_path)
    nn.init.zeros_(resumed.model.denoiser.inward.weight)
    resumed.load()
    assert resumed.step == 5
    resumed.run(progress=False)
    assert_same_state(resumed, whole)
    assert resumed.step == 12
    assert [step for step, _ in resumed.validation] == [5, 10, 12]


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, second, other = tiny_trainer(), tiny_trainer(), tiny_trainer(seed=1)
    for trainer in (first, second, other):
        trainer.run(until=3, progress=False)
    assert_same_state(first, second)
    assert first.losses != other.losses


def test_an_epoch_visits_every_sample_once_in_a_new_order() -> None:
    trainer = tiny_trainer(batch_size=100)
    epochs = [[trainer.batch(step)[0] for step in range(12 * e, 12 * (e + 1))] for e in (0, 1)]
    rows = [torch.cat(epoch).flatten(1) for epoch in epochs]
    assert not torch.equal(rows[0], rows[1])
    everything = sorted(map(tuple, digits().train.x.flatten(1).tolist()))
    assert all(sorted(map(tuple, r.tolist())) == everything for r in rows)
    x, label = trainer.batch(30)
    index = (digits().train.x == x[0]).flatten(1).all(1).nonzero()[0]
    assert int(digits().train.label[index]) == int(label[0])


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = Settings(steps=100, warmup=10, lr=0.5)
    assert settings.learning_rate(0) == pytest.approx(0.05)
    assert settings.learning_rate(10) == pytest.approx(0.5)
    assert settings.learning_rate(55) == pytest.approx(0.25)
    assert settings.learning_rate(100) == pytest.approx(0.0, abs=1e-9)


def test_averaged_weights_are_an_exponential_moving_average() -> None:
    trainer = tiny_trainer(ema=0.5)
    expected = None
    for step in range(1, 4):
        trainer.run(until=step, progress=False)
        weight = trainer.model.denoiser.inward.weight.detach().clone()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(trainer.averaged_model.denoiser.inward.weight, expected)


def test_gradients_are_clipped() -> None:
    far = Split(torch.full((50, 3), 1000.0), torch.zeros(50))
    trainer = Trainer(Shift(), Dataset(far, far, far), Settings(steps=1, clip_grad=0.25))
    trainer.run(progress=False)
    assert float(trainer.model.mean.grad.norm()) == pytest.approx(0.25, rel=1e-4)


def test_training_stops_when_the_loss_is_not_finite() -> None:
    trainer = tiny_trainer()
    nn.init.constant_(trainer.model.denoiser.outward.bias, math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss is no longer finite at step .*; try a smaller lr"):
        trainer.run(progress=False)


def test_settings_refuse_bad_values() -> None:
    for name, value in (
        ("steps", 0),
        ("seed", -1),
        ("warmup", 0.5),
        ("batch_size", 1.5),
        ("lr", 0.0),
        ("clip_grad", math.nan),
        ("ema", 1.0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be "):
            Settings(**{name: value})


def test_load_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f"out must hold a {CHECKPOINT_FILE}"):
        tiny_trainer(tmp_path).load()


# Pictures


def pixels(path: pathlib.Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3].mean(-1)


def test_image_grid_draws_what_it_is_given(tmp_path: pathlib.Path) -> None:
    images = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 0.0, 5.0)])
    plots.image_grid(images, tmp_path / "grid.png", columns=3)
    picture = pixels(tmp_path / "grid.png")
    middle = picture[len(picture) // 2]
    thirds = [middle[int(len(middle) * f)] for f in (1 / 6, 1 / 2, 5 / 6)]
    np.testing.assert_allclose(thirds, [0.0, 0.5, 1.0], atol=0.01)
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1 or 3, height, width\), got \(3, 4, 4\)"):
        plots.image_grid(images[:, 0], tmp_path / "grid.png")


def test_trajectory_has_a_row_a_sample_and_a_column_a_frame(tmp_path: pathlib.Path) -> None:
    dark, light = torch.full((2, 1, 4, 4), -1.0), torch.full((2, 1, 4, 4), -0.2)
    light[1] = 0.6
    plots.trajectory([("t = 1", dark), ("t = 0", light)], tmp_path / "steps.png")
    picture = pixels(tmp_path / "steps.png")
    height, width = picture.shape
    rows, columns = (int(height * 0.4), int(height * 0.8)), (int(width * 0.25), int(width * 0.75))
    found = [[picture[r, c] for c in columns] for r in rows]
    np.testing.assert_allclose(found, [[0.0, 0.4], [0.0, 0.8]], atol=0.01)
    with pytest.raises(ValueError, match="frames must not be empty"):
        plots.trajectory([], tmp_path / "steps.png")


# Command line


def config_options(config: dict[str, object]) -> list[str]:
    return [part for key, value in config.items() for part in ("--set", f"{key}={value}")]


def test_cli_end_to_end(tmp_path: pathlib.Path) -> None:
    assert run("list", "dd*") == (0, "ddpm\n")
    out, options = tmp_path / "run", ["--steps", 8, "--batch-size", 100, "--seed", 3, "--device", "cpu"]
    status, text = run("train", "ddpm", "--out", out, *options, *config_options({**TINY, "num_classes": 10}))
    assert status == 0, text
    assert "step 8 of 8, validation loss" in text
    assert json.loads((out / "config.json").read_text())["num_classes"] == 10
    assert json.loads((out / "training.json").read_text())["seed"] == 3
    for name in ("samples.png", "trajectory.png", "loss.png"):
        assert pixels(out / name).std() > 0.01, f"{name} is blank"

    status, text = run("train", "ddpm", "--out", out, "--steps", 9)
    assert status == 2
    assert "--resume continues it, --overwrite replaces it" in text
    status, text = run("train", "ddpm", "--out", out, "--resume", "--steps", 10, "--quiet", "--device", "cpu")
    assert (status, text.split(",")[0]) == (0, "step 10 of 10")

    picture = tmp_path / "new.png"
    status, text = run("sample", "--from", out, "-n", 4, "--sampler", "ddim", "--steps", 5, "--out", picture)
    assert status == 0, text
    assert pixels(picture).std() > 0.01
    assert pixels(tmp_path / "new_trajectory.png").std() > 0.01

    status, text = run("evaluate", "--from", out, "--set", "times=4", "--device", "cpu")
    assert (status, text.split("nats")[0]) == (0, "ELBO, validation set, mean of 200 samples: "), text
    result = tmp_path / "result.json"
    status, text = run("evaluate", "--from", out, "--split", "test", "--out", result, "--device", "cpu")
    assert (status, text.split(",")[0]) == (0, "ELBO"), text
    values = json.loads(result.read_text())
    data = digits().test
    expected = from_pretrained(out).elbo(data.x, cond=data.label).mean()
    assert values["nats"] == pytest.approx(float(expected), rel=1e-5)
    assert values["bits_per_dim"] == pytest.approx(-float(expected) / 64 / math.log(2), rel=1e-5)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_cli_profile(tmp_path: pathlib.Path, what: str) -> None:
    trace = tmp_path / "trace.json"
    options = ["--what", what, "--steps", 2, "--batch-size", 4, "--out", trace, "--device", "cpu"]
    status, text = run("profile", "ddpm", *options, *config_options(TINY))
    assert status == 0, text
    assert "aten::addmm" in text
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names


def test_cli_makes_the_folders_it_writes_to(tmp_path: pathlib.Path) -> None:
    create_model("ddpm", **TINY).save_pretrained(tmp_path / "model")
    picture, result = tmp_path / "new" / "s.png", tmp_path / "other" / "result.json"
    status, text = run("sample", "--from", tmp_path / "model", "-n", 2, "--out", picture, "--device", "cpu")
    assert status == 0, text
    assert picture.exists()
    status, text = run("evaluate", "--from", tmp_path / "model", "--out", result, "--device", "cpu")
    assert status == 0, text
    assert result.exists()


def test_cli_samples_of_a_hub_model_go_to_the_current_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dgm_models.__main__.from_pretrained", lambda source: create_model("ddpm", **TINY))
    status, text = run("sample", "--from", "user/repo", "-n", 2, "--device", "cpu")
    assert status == 0, text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["samples.png", "samples_trajectory.png"]


def test_cli_reports_errors(tmp_path: pathlib.Path) -> None:
    status, text = run("train", "ddpm", "--out", tmp_path, "--set", "depth=0", "--set", "denoiser=mlp")
    assert (status, text) == (2, "python -m dgm_models train: error: depth must be a positive int, got 0\n")
    assert run("train", "ddpm", "--out", tmp_path, "--resume")[0] == 2
    diverging = ["--lr", 1e30, "--steps", 5, "--batch-size", 100, "--quiet", "--device", "cpu"]
    status, text = run("train", "ddpm", "--out", tmp_path / "run", *diverging, *config_options(TINY))
    assert status == 2
    expected = r"python -m dgm_models train: error: the loss is no longer finite at step \d+; try a smaller lr\n"
    assert re.fullmatch(expected, text), text
    status, text = run("sample", "--from", tmp_path / "nowhere")
    assert status == 2
    assert "nowhere" in text
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as text:
        main(["train", "ddpm", "--set", "depth"])
    assert "expected key=value, got 'depth'" in text.getvalue()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as text:
        main(["train", "ddpm", "--device", "cuda:99"])
    assert "error: argument --device: cannot use 'cuda:99': " in text.getvalue().splitlines()[-1]


def test_cli_reports_what_the_model_and_the_disk_refuse(tmp_path: pathlib.Path) -> None:
    create_model("ddpm", **TINY).save_pretrained(tmp_path)
    sample = ["sample", "--from", tmp_path, "-n", 2, "--device", "cpu"]
    status, text = run(*sample, "--set", "foo=1")
    assert status == 2
    assert text.startswith("python -m dgm_models sample: error: sample with sampler 'ddpm' has no option 'foo'; its ")
    status, text = run(*sample, "--out", tmp_path / "config.json" / "s.png")
    assert status == 2
    assert re.fullmatch(r"python -m dgm_models sample: error: .*config\.json.*\n", text), text
