"""The models from the shell: ``python -m dgm_models list | train | sample | evaluate | profile``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import create_model, from_pretrained, list_models
from .data import Dataset, digits
from .model import DensityUnavailable, GenerativeModel, check_options
from .registry import model_class
from .train import CHECKPOINT_FILE, SETTINGS_FILE, Settings, Trainer

TRAJECTORY_ROWS = 8
SOURCE_HELP = "folder of a trained model, or its id on the Hugging Face Hub"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (DensityUnavailable, FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _list(args: argparse.Namespace) -> None:
    print("\n".join(list_models(args.pattern)))


def _train(args: argparse.Namespace) -> None:
    from . import plots

    out = args.out or pathlib.Path("runs") / args.model
    trainer = _resumed(args, out) if args.resume else _new(args, out)
    trainer.run(minutes=args.minutes, progress=not args.quiet)
    model = trainer.averaged_model.eval()
    cond = _classes(None, model, 64)
    options = {"seed": trainer.settings.seed}
    plots.loss_curve(trainer.losses, trainer.validation, out / "loss.png")
    plots.image_grid(model.sample(64, cond=cond, **options), out / "samples.png")
    rows = None if cond is None else cond[:TRAJECTORY_ROWS]
    plots.trajectory(model.trajectory(TRAJECTORY_ROWS, cond=rows, **options), out / "trajectory.png")
    loss = f", validation loss {trainer.validation[-1][1]:.4f}" if trainer.validation else ""
    print(f"step {trainer.step} of {trainer.settings.steps}{loss}; wrote {out}")


def _new(args: argparse.Namespace, out: pathlib.Path) -> Trainer:
    if (out / CHECKPOINT_FILE).exists() and not args.overwrite:
        raise ValueError(f"{out} holds a run: --resume continues it, --overwrite replaces it")
    settings = Settings(
        **{**model_class(args.model).default_settings, **_given(args, "steps", "batch_size", "lr", "seed")}
    )
    torch.manual_seed(settings.seed)
    model = create_model(args.model, **dict(args.set)).to(args.device)
    data = _digits(model)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, data, settings, out)
    trainer.save()
    return trainer


def _resumed(args: argparse.Namespace, out: pathlib.Path) -> Trainer:
    if not (out / CHECKPOINT_FILE).exists():
        raise ValueError(f"--resume needs a run in {out}, but there is no {CHECKPOINT_FILE}")
    if args.set or args.seed is not None:
        raise ValueError("--set and --seed belong to a new run; --resume keeps those of the run")
    settings = json.loads((out / SETTINGS_FILE).read_text()) | _given(args, "steps", "batch_size", "lr")
    model = from_pretrained(out).to(args.device)
    trainer = Trainer(model, _digits(model), Settings(**settings), out)
    trainer.load()
    return trainer


def _sample(args: argparse.Namespace) -> None:
    from . import plots

    model = from_pretrained(args.source).to(args.device)
    options = {"seed": args.seed, **_given(args, "sampler", "steps", "guidance"), **dict(args.set)}
    cond = _classes(args.classes, model, args.n)
    folder = args.source if args.source.is_dir() else pathlib.Path()  # a model of the Hub has none
    out = args.out or folder / "samples.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    images = model.sample(args.n, cond=cond, first_sample=args.first_sample, batch_size=args.batch_size, **options)
    plots.image_grid(images, out)
    steps_out = out.with_name(f"{out.stem}_trajectory{out.suffix}")
    rows = min(args.n, TRAJECTORY_ROWS)
    few = None if cond is None else cond[:rows]
    plots.trajectory(model.trajectory(rows, cond=few, first_sample=args.first_sample, **options), steps_out)
    print(f"wrote {out} and {steps_out}")


def _evaluate(args: argparse.Namespace) -> None:
    model = from_pretrained(args.source).to(args.device)
    options = dict(args.set)
    check_options(f"elbo of {model.model_name}", model.elbo, ("x", "k", "cond"), options)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    split = _digits(model).split(args.split)
    x = split.x.to(args.device)
    cond = split.label.to(args.device) if model.conditional else None
    name = "log-likelihood" if model.exact_likelihood else "ELBO"
    with torch.no_grad():
        nats = model.elbo(x, args.k, cond, **options)  # the exact one where the model has it
    bits = model.bits_per_dim(nats)
    error = 1 / math.sqrt(len(x))
    result = {
        "split": args.split,
        "samples": len(x),
        "quantity": name,
        "nats": float(nats.mean()),
        "nats_standard_error": float(nats.std()) * error,
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_standard_error": float(bits.std()) * error,
    }
    values = (
        "nats {nats:.2f} +- {nats_standard_error:.2f}, bits/dim {bits_per_dim:.3f} +- {bits_per_dim_standard_error:.3f}"
    )
    print(f"{name}, {args.split} set, mean of {len(x)} samples: {values.format(**result)}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _profile(args: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = create_model(args.model, **dict(args.set)).to(args.device)
    trainer = Trainer(model, _digits(model), Settings(steps=2 * args.steps, batch_size=args.batch_size))
    options = _given(args, "sampler")
    if "steps" in inspect.signature(model._sample).parameters:
        options["steps"] = args.steps
    work: dict[str, Callable[[], object]] = {
        "train": lambda: [trainer.train_step() for _ in range(args.steps)],
        "sample": lambda: model.sample(args.batch_size, **options),
    }
    work[args.what]()  # warm up
    activities = [ProfilerActivity.CPU]
    if args.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work[args.what]()
    sort_by = f"self_{args.device.type}_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=args.rows, max_name_column_width=48))
    out = args.out or pathlib.Path("runs") / f"profile_{args.model}_{args.what}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out))
    print(f"wrote {out}: open it in chrome://tracing or ui.perfetto.dev")


def _digits(model: GenerativeModel) -> Dataset:
    """The digits, as black and white if the model has 2 levels; no model of other levels can take them."""
    return digits() if model.levels is None else digits(model.levels)


def _classes(classes: list[int] | None, model: GenerativeModel, n: int) -> Tensor | None:
    """The given classes over and over; for a conditional model without any, all its classes."""
    if classes is None:
        if not model.conditional:
            return None
        classes = list(range(model.config["num_classes"]))
    return torch.tensor(classes).repeat(math.ceil(n / len(classes)))[:n]


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that stand on the command line; the others keep the defaults of what they are for."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value  # a bare word is a string


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:  # PyTorch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dgm_models", description="Deep generative models.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str, *, set_help: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if set_help:
            default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            sub.add_argument("--device", type=_device, default=default, help=f"default: {default}")
            sub.add_argument("--set", type=_assignment, action="append", default=[], metavar="KEY=VALUE", help=set_help)
            sub.add_argument("--out", type=pathlib.Path)
        return sub

    listing = command("list", _list, "the names of the models")
    listing.add_argument("pattern", nargs="?", default="*", help='such as "*pixel*"')
    _add_train(command("train", _train, "train a model on the digits", set_help="an option of the model"))
    _add_sample(
        command("sample", _sample, "draw samples and trajectories as pictures", set_help="an option of sample()")
    )
    _add_evaluate(command("evaluate", _evaluate, "log-likelihood or its bound", set_help="an option of elbo()"))
    _add_profile(command("profile", _profile, "where the time goes", set_help="an option of the model"))
    return parser


def _add_train(sub: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    sub.add_argument("model", choices=list_models())
    for name, kind in (("steps", int), ("batch-size", int), ("lr", float), ("seed", int)):
        sub.add_argument(
            f"--{name}", type=kind, help=f"default: that of the model, or {defaults[name.replace('-', '_')]}"
        )
    sub.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; --resume goes on")
    sub.add_argument("--resume", action="store_true", help="continue the run in --out")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_sample(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--from",
        dest="source",
        type=pathlib.Path,
        required=True,
        help="folder of a trained model, or its id on the Hub",
    )
    sub.add_argument("-n", type=int, default=64)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--first-sample", type=int, default=0, help="index of the first one; a process draws its own range"
    )
    sub.add_argument("--batch-size", type=int, help="how many at a time; changes nothing else")
    sub.add_argument("--sampler", help="default: that of the model")
    sub.add_argument("--steps", type=int, help="of the sampler")
    sub.add_argument("--guidance", type=float, help="strength of classifier-free guidance")
    sub.add_argument("--classes", type=int, nargs="+", help="classes to draw in turn, for a conditional model")


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--from",
        dest="source",
        type=pathlib.Path,
        required=True,
        help="folder of a trained model, or its id on the Hub",
    )
    sub.add_argument("--split", choices=("validation", "test"), default="validation")
    sub.add_argument("-k", type=int, default=1, help="draws of the bound, for a model without an exact likelihood")


def _add_profile(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", choices=list_models())
    sub.add_argument("--what", choices=("train", "sample"), default="train")
    sub.add_argument("--steps", type=int, default=20, help="training or sampling steps to profile")
    sub.add_argument("--batch-size", type=int, default=64)
    sub.add_argument("--sampler", help="for --what sample")
    sub.add_argument("--rows", type=int, default=15, help="rows of the table")


if __name__ == "__main__":
    sys.exit(main())
