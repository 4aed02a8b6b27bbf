"""Cases of the coupling op: flow layers with their log-determinants, base densities, MADE's inverse, memory."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench import flow_peers
from bench.compare import (
    Bars,
    Case,
    Contender,
    Setup,
    bars_at_two_threads,
    dtype_name,
    ours,
    size_name,
    variants,
)
from bench.flow_baselines import (
    chained,
    checked_step,
    inverse_by_passes,
    made,
    made_pass,
    plain_affine,
    plain_logistic,
    plain_normal,
    plain_spline,
    real_nvp,
    spelled_out_sums,
    training_step,
)
from bench.flow_peers import Function, Operands
from dgm_kernels import (
    affine_coupling,
    logistic_log_prob,
    made_inverse,
    rational_quadratic_spline,
    standard_normal_log_prob,
)
from dgm_kernels.nn import Reversible
from tests.coupling_cases import (
    FLAT_SHAPE,
    IMAGE_SHAPE,
    SCALE_MAPS,
    SMALL_SHAPE,
    SPLINE_BINS,
    SPLINE_SHAPE,
    unchanged,
)

Peers = Mapping[str, Callable[[], Function]]
NATIVES = ("cpp", "triton")
SPLINE_BOUND = 3.0
SPLINE_RAW = 0.25  # size of raw parameters: with large ones the rounding in one narrow bin is the error of all
MADE_LAYERS, MADE_FEATURES, MADE_HIDDEN, MADE_CHECKED = 5, 64, (256, 256), 16
FLOW_LAYERS, FLOW_FEATURES, FLOW_HIDDEN, FLOW_BATCH = 64, 64, 64, 2048


def forward(function: Function, operands: Sequence[Tensor], seeds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a flow layer gives: y and logdet."""
    return function(*operands)


def forward_backward(function: Function, operands: Sequence[Tensor], seeds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What training needs of a layer: y, logdet and the gradients of the operands, for given gradients of the two."""
    with torch.enable_grad():
        outputs = function(*operands)
        return *outputs, *torch.autograd.grad(outputs, operands, seeds)


def layer_case(
    setup: Setup,
    name: str,
    fused: Function,
    plain: Function,
    make_operands: Callable[[], Sequence[Tensor]],
    *,
    compiled: Function | None = None,
    train: bool = False,
    peers: Peers | None = None,
    convert: Callable[..., Operands] | None = None,
    missing: Mapping[str, str] | None = None,
    **fields: Any,
) -> Case:
    """A layer: `fused` against `plain`, which is what a user writes, and peers.

    torch.compile gets `compiled` if that is given. A peer takes the same x and, where `convert` has its name, other
    parameters in place of the operands behind x.
    """
    call = forward_backward if train else forward

    def make_inputs() -> SimpleNamespace:
        operands = tuple(operand.to(setup.device).requires_grad_(train) for operand in make_operands())
        x, *raw = operands
        seeds = (torch.randn_like(x), torch.randn(len(x), device=setup.device)) if train else ()
        converted = convert(*raw) if convert else {}
        return SimpleNamespace(operands=operands, seeds=seeds, peers={name: (x, *p) for name, p in converted.items()})

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        operands = tuple(t.detach().double().requires_grad_(train) for t in i.operands)
        return call(plain, operands, [seed.double() for seed in i.seeds])

    contenders, without = ours(lambda i: call(fused, i.operands, i.seeds), setup, NATIVES)
    baselines = variants(compiled or plain, setup) | {"eager": plain}
    for baseline, function in baselines.items():
        contenders[baseline] = Contender(lambda i, f=function: call(f, i.operands, i.seeds))
    found, absent = installed(peers or {})
    for peer, function in found.items():
        contenders[peer] = Contender(lambda i, f=function, p=peer: call(f, i.peers.get(p, i.operands), i.seeds))
    without |= absent | dict(missing or {})
    return Case(name, make_inputs, contenders, reference, missing=without, grad=train, **fields)


def installed(peers: Peers) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that can be imported, and why others cannot."""
    found, missing = {}, {}
    for name, build in peers.items():
        try:
            found[name] = build()
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return found, missing


def affine(
    setup: Setup,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    scale_map: str = "tanh",
    mask: str | None = None,
    inverse: bool = False,
    train: bool = False,
    peers: bool = False,
    bars: Bars = bars_at_two_threads,
) -> Case:
    """An affine layer, with RealNVP's tanh of the log-scale unless asked otherwise.

    What must move: x, shift, log_scale and y; backward the gradient of y, x, log_scale and the gradients of x and
    log_scale (that of shift is that of y). A checkerboard leaves out no cache line of shift and log_scale.
    """
    keep = None if mask is None else unchanged(mask, (1, *shape[1:])).to(setup.device, dtype)

    def fused(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, shift, log_scale, mask=mask, scale_map=scale_map, inverse=inverse)

    def plain(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return plain_affine(x, shift, log_scale, mask=keep, scale_map=scale_map, inverse=inverse)

    def make_operands() -> Sequence[Tensor]:
        x = torch.randn(shape).to(dtype)
        output = torch.randn(shape[0], 2, *shape[1:]).to(dtype)  # of a network: shift and log-scale of every sample
        output[:, 1] = -output[:, 1].abs()  # nflows has no scales above 1.001
        return x, *output.unbind(1)

    def convert(shift: Tensor, log_scale: Tensor) -> Operands:
        return flow_peers.affine_parameters(shift, SCALE_MAPS[scale_map](log_scale.double()))

    elements = torch.Size(shape).numel()
    words = [*["inverse"] * inverse, *["forward+backward"] * train, *[mask] * (mask is not None)]
    available = {"nflows": partial(flow_peers.nflows_affine, shape[1]), "zuko": flow_peers.zuko_affine}
    return layer_case(
        setup,
        " ".join(["affine", scale_map, *words, size_name(shape), dtype_name(dtype)]),
        fused,
        plain,
        make_operands,
        train=train,
        peers=available if peers else {},
        convert=convert if peers else None,
        bytes=(9 if train else 4) * elements * dtype.itemsize,
        flops=(12 if train else 5) * elements,
        bars=bars(setup),
    )


def spline(setup: Setup, *, inverse: bool = False, train: bool = False, bars: Bars = bars_at_two_threads) -> Case:
    """A rational-quadratic spline with linear tails. What must move: x, y, the raw parameters, and their gradients."""
    parameters = 3 * SPLINE_BINS - 1

    def fused(x: Tensor, *raw: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, *raw, bound=SPLINE_BOUND, inverse=inverse)

    def plain(x: Tensor, *raw: Tensor) -> tuple[Tensor, Tensor]:
        return plain_spline(x, *raw, bound=SPLINE_BOUND, inverse=inverse)

    def compiled(x: Tensor, *raw: Tensor) -> tuple[Tensor, Tensor]:
        return plain_spline(x, *raw, bound=SPLINE_BOUND, inverse=inverse, sums=spelled_out_sums)

    def make_operands() -> Sequence[Tensor]:
        sizes = (SPLINE_BINS, SPLINE_BINS, SPLINE_BINS - 1)
        return torch.randn(SPLINE_SHAPE), *(SPLINE_RAW * torch.randn(*SPLINE_SHAPE, size) for size in sizes)

    elements = torch.Size(SPLINE_SHAPE).numel()
    words = [*["inverse"] * inverse, *["forward+backward"] * train]
    peers: dict[str, Callable[[], Function]] = {"nflows": partial(flow_peers.nflows_spline, SPLINE_BOUND, inverse)}
    if not train:
        peers["zuko"] = partial(flow_peers.zuko_spline, SPLINE_BOUND, inverse)
    return layer_case(
        setup,
        " ".join(["spline", *words, size_name(SPLINE_SHAPE), f"{SPLINE_BINS} bins fp32"]),
        fused,
        plain,
        make_operands,
        compiled=compiled,
        train=train,
        peers=peers,
        convert=None if train else flow_peers.spline_parameters,
        missing={"zuko": "its gradients are those of other parameters"} if train else {},
        bytes=(4 + 3 * parameters if train else 2 + parameters) * elements * 4,
        # Exponentials, sums and comparisons of the bins, two softplus, the rational function and its logarithm.
        flops=(3 if train else 1) * elements * (6 * SPLINE_BINS + 36),
        bars=bars(setup),
    )


def log_prob(setup: Setup, name: str, fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Case:
    """A base density of z plus the log-determinant of the flow."""
    batch, elements = FLAT_SHAPE[0], torch.Size(FLAT_SHAPE).numel()
    return layer_case(
        setup,
        f"{name} log_prob {size_name(FLAT_SHAPE)} fp32",
        fused,
        plain,
        lambda: (torch.randn(FLAT_SHAPE), torch.randn(batch)),
        bytes=(elements + 2 * batch) * 4,
        flops=3 * elements,
    )


def maf_inverse(setup: Setup, batch: int, bars: Bars = bars_at_two_threads) -> Case:
    """Sampling from a masked autoregressive flow; `compile` compiles a pass, since all of them are 320 passes.

    What must be done: one pass, with the weights that count.
    """
    torch.manual_seed(0)
    networks = [made(MADE_FEATURES, MADE_HIDDEN, bool(i % 2), setup.device) for i in range(MADE_LAYERS)]
    masked = [network.masked() for network in networks]
    wide = [network.double() for network in masked]
    batches = -(-MADE_CHECKED // batch)  # the first is timed, all are checked: the error of one sample says little

    def fused(z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z[:, 0])
        for network in networks:
            z, logdet = made_inverse(z, *network, scale_map="softclip")
            total = total + logdet
        return z, total

    def of_first(inverse: Function) -> Function:
        return lambda z: inverse(z[0])

    def of_all(inverse: Function) -> Function:
        return lambda z: tuple(torch.cat(parts) for parts in zip(*map(inverse, z), strict=True))

    contenders, missing = ours(of_first(fused), setup, natives=("cpp",), check=of_all(fused))
    found, absent = installed({"zuko": partial(flow_peers.zuko_maf, networks)})
    steps = variants(made_pass, setup).items()
    others = {name: partial(inverse_by_passes, step, networks=masked) for name, step in steps} | found
    contenders |= {name: Contender(of_first(inverse), of_all(inverse)) for name, inverse in others.items()}
    weights = sum(int(mask.sum()) for network in networks for mask in network.masks())
    return Case(
        f"MADE inverse {batch}x{MADE_FEATURES}, {MADE_LAYERS} layers fp32",
        lambda: torch.randn(batches, batch, MADE_FEATURES, device=setup.device),
        contenders,
        lambda z: inverse_by_passes(made_pass, z.flatten(0, 1).double(), wide),
        bytes=(2 * batch * MADE_FEATURES + weights) * 4,
        flops=2 * batch * weights,
        bars=bars(setup),
        missing=missing | absent,
    )


def reversible(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """A training step of a deep RealNVP: its peak memory with activations rebuilt backwards, against a plain chain."""
    sizes = FLOW_LAYERS, FLOW_FEATURES, FLOW_HIDDEN

    torch.manual_seed(0)
    layers = real_nvp(plain_affine, *sizes).to(setup.device)
    chain = real_nvp(affine_coupling, *sizes).to(setup.device)
    chain.load_state_dict(layers.state_dict())
    wide = copy.deepcopy(layers).double()
    deep, plain = Reversible(chain), partial(chained, layers)
    contenders, missing = ours(
        partial(training_step, deep, chain), setup, NATIVES, check=partial(checked_step, deep, chain)
    )
    contenders["eager"] = Contender(partial(training_step, plain, layers), partial(checked_step, plain, layers))
    missing["compile"] = "compiling the networks would be what is measured"
    weights = sum(parameter.numel() for parameter in layers.parameters())
    return Case(
        f"RealNVP step {FLOW_LAYERS} layers, {FLOW_BATCH}x{FLOW_FEATURES} fp32",
        lambda: torch.randn(FLOW_BATCH, FLOW_FEATURES, device=setup.device),
        contenders,
        lambda x: checked_step(partial(chained, wide), wide, x.double()),
        bytes=(FLOW_BATCH * FLOW_FEATURES + 2 * weights) * 4,
        flops=6 * FLOW_BATCH * weights,
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "affine": partial(
        affine, shape=FLAT_SHAPE, peers=True, bars=partial(bars_at_two_threads, eager=8, compile=2, nflows=6, zuko=6)
    ),
    "affine-inverse": partial(affine, shape=FLAT_SHAPE, inverse=True),
    "affine-train": partial(
        affine, shape=FLAT_SHAPE, train=True, bars=partial(bars_at_two_threads, eager=5, compile=2)
    ),
    "affine-image": partial(
        affine, shape=IMAGE_SHAPE, mask="checkerboard", bars=partial(bars_at_two_threads, eager=8, compile=2)
    ),
    "affine-exp": partial(affine, shape=FLAT_SHAPE, scale_map="exp"),
    "affine-bf16": partial(affine, shape=FLAT_SHAPE, dtype=torch.bfloat16),
    "affine-small": partial(affine, shape=SMALL_SHAPE),
    "spline": partial(spline, bars=partial(bars_at_two_threads, eager=20, compile=6, nflows=20, zuko=15)),
    "spline-inverse": partial(spline, inverse=True, bars=partial(bars_at_two_threads, eager=15, compile=5)),
    "spline-train": partial(spline, train=True, bars=partial(bars_at_two_threads, eager=10, compile=3)),
    "made": partial(maf_inverse, batch=1024, bars=partial(bars_at_two_threads, eager=25, zuko=20)),
    "made-1": partial(maf_inverse, batch=1, bars=partial(bars_at_two_threads, eager=1)),
    "normal": partial(log_prob, name="normal", fused=standard_normal_log_prob, plain=plain_normal),
    "logistic": partial(log_prob, name="logistic", fused=logistic_log_prob, plain=plain_logistic),
    "reversible": partial(reversible, bars=partial(bars_at_two_threads, memory=10)),
}


def test_coupling(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
