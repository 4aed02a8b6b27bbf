"""Values of the coupling op against nflows, zuko and normflows on copied parameters, to 1e-6 in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels import (
    actnorm,
    additive_coupling,
    affine_coupling,
    invertible_conv1x1,
    logistic_log_prob,
    rational_quadratic_spline,
    standard_normal_log_prob,
    triangular_linear,
    use_backend,
)
from tests.cases import BACKENDS
from tests.coupling_cases import spline_operands

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("inverse", [False, True])


@pytest.fixture(autouse=True)
def float64() -> Any:
    """The peers create their parameters in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def check(backend: str, ours: Any, operands: Any, theirs: Any) -> None:
    """``ours(*operands)`` in float64 to 1e-6, and on a native backend in float32 to 1e-4 of size."""
    expected = [torch.as_tensor(t).detach() for t in theirs]
    with torch.no_grad():
        if backend == "reference":
            actual, tolerance = ours(*operands), 1e-6
        else:
            with use_backend(backend):
                actual, tolerance = ours(*(o.float() for o in operands)), 1e-4
    for a, e in zip(actual if isinstance(actual, tuple) else (actual,), expected, strict=True):
        torch.testing.assert_close(a.double(), e.expand(a.shape), rtol=tolerance, atol=tolerance)


def small_net(inputs: int, outputs: int, image: bool = False) -> nn.Module:
    layers = [nn.Conv2d(inputs, 16, 3, padding=1), nn.Conv2d(16, outputs, 3, padding=1)] if image else []
    layers = layers or [nn.Linear(inputs, 16), nn.Linear(16, outputs)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


class Unconditioned(nn.Module):
    """nflows calls its networks with a context."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


@both_ways
@on_every_backend
@pytest.mark.parametrize("image", [False, True])
class TestNflows:
    def test_affine_coupling(self, image, inverse, backend):
        coupling = pytest.importorskip("nflows.transforms.coupling")
        net = small_net(3, 6, image)
        transform = coupling.AffineCouplingTransform([0, 0, 0, 1, 1, 1], lambda *_: Unconditioned(net))
        x = torch.randn(5, 6, *((4, 3) if image else ()))
        shift, raw = net(x[:, :3]).chunk(2, 1)
        log_scale = torch.log(torch.sigmoid(raw + 2) + 1e-3)
        theirs = transform.inverse(x) if inverse else transform(x)
        ours = lambda *a: affine_coupling(*a, mask="channels", inverse=inverse)  # noqa: E731
        check(backend, ours, (x, shift, log_scale), theirs)

    def test_additive_coupling(self, image, inverse, backend):
        coupling = pytest.importorskip("nflows.transforms.coupling")
        net = small_net(3, 3, image)
        transform = coupling.AdditiveCouplingTransform([1, 1, 1, 0, 0, 0], lambda *_: Unconditioned(net))
        x = torch.randn(5, 6, *((4, 3) if image else ()))
        theirs = transform.inverse(x) if inverse else transform(x)
        ours = lambda *a: additive_coupling(*a, mask="channels_flipped", inverse=inverse)  # noqa: E731
        check(backend, ours, (x, net(x[:, 3:])), theirs)

    def test_actnorm(self, image, inverse, backend):
        normalization = pytest.importorskip("nflows.transforms.normalization")
        layer = normalization.ActNorm(6)
        x = 2 + 3 * torch.randn(5, 6, *((4, 3) if image else ()))
        layer(x)  # sets its parameters from the data
        theirs = layer.inverse(x) if inverse else layer(x)
        check(backend, lambda *a: actnorm(*a, inverse=inverse), (x, layer.shift, layer.log_scale), theirs)

    def test_spline_coupling(self, image, inverse, backend):
        coupling = pytest.importorskip("nflows.transforms.coupling")
        bins, bound = 5, 2.5
        net = small_net(3, 3 * (3 * bins - 1), image)
        transform = coupling.PiecewiseRationalQuadraticCouplingTransform(
            [0, 0, 0, 1, 1, 1], lambda *_: Unconditioned(net), bins, "linear", bound, min_bin_width=0.02
        )
        x = 2 * torch.randn(5, 6, *((4, 3) if image else ()))
        theirs = transform.inverse(x) if inverse else transform(x)
        raw = net(x[:, :3])
        raw = raw.unflatten(1, (3, -1)).movedim(2, -1)

        def ours(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
            parameters = raw.split((bins, bins, bins - 1), -1)  # views of the network's output
            y, logdet = rational_quadratic_spline(
                x[:, 3:], *parameters, bound=bound, min_bin_width=0.02, inverse=inverse
            )
            return torch.cat([x[:, :3], y], 1), logdet

        check(backend, ours, (x, raw), theirs)


@both_ways
@on_every_backend
@pytest.mark.parametrize("tails", ["linear", None])
@pytest.mark.parametrize("library", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"])
def test_spline_functions(library, tails, inverse, backend):
    splines = pytest.importorskip(library)
    for bins, bound, mins in ((8, 3.0, (1e-3, 1e-3, 1e-3)), (2, 1.0, (0.2, 0.1, 0.05)), (13, 4.5, (1e-3, 0.02, 1e-3))):
        x, w, h, d = (p.double() for p in spline_operands((50, 7), bins, tails, bound))
        names = dict(zip(("min_bin_width", "min_bin_height", "min_derivative"), mins, strict=True))
        if tails == "linear":
            theirs = splines.unconstrained_rational_quadratic_spline(
                x, w, h, d, inverse=inverse, tail_bound=bound, **names
            )
        else:
            ends = {"left": -bound, "right": bound, "bottom": -bound, "top": bound}
            theirs = splines.rational_quadratic_spline(x, w, h, d, inverse=inverse, **ends, **names)
        options = {"bound": bound, "tails": tails, "inverse": inverse, **names}
        expected = (theirs[0], theirs[1].sum(1))
        check(backend, lambda *a, o=options: rational_quadratic_spline(*a, **o), (x, w, h, d), expected)


def zuko_to_raw(shares: Tensor, least: float = 1e-3) -> Tensor:
    """Raw widths whose bins have these shares of the domain, each of which is above ``least``."""
    return torch.log((shares - least) / (1 - shares.shape[-1] * least))


@both_ways
@on_every_backend
class TestZuko:
    def test_spline(self, inverse, backend):
        transforms = pytest.importorskip("zuko.transforms")
        x, w, h, d = (p.double() for p in spline_operands((50, 7), 8, "linear", 5.0))
        spline = transforms.MonotonicRQSTransform(w, h, d, bound=5.0)
        widths, heights = (zuko_to_raw(knots.diff(dim=-1) / 10) for knots in (spline.horizontal, spline.vertical))
        derivatives = torch.log(torch.expm1(spline.derivatives[..., 1:-1] - 1e-3))
        y, ladj = (spline.inv if inverse else spline).call_and_ladj(x)
        ours = lambda *a: rational_quadratic_spline(*a, bound=5.0, inverse=inverse)  # noqa: E731
        check(backend, ours, (x, widths, heights, derivatives), (y, ladj.sum(1)))

    def test_affine(self, inverse, backend):
        transforms = pytest.importorskip("zuko.transforms")
        x, shift, scale = torch.randn(3, 9), torch.randn(3, 9), 5 * torch.randn(3, 9)
        affine = transforms.MonotonicAffineTransform(shift, scale)
        y, ladj = (affine.inv if inverse else affine).call_and_ladj(x)
        ours = lambda *a: affine_coupling(*a, scale_map="softclip", inverse=inverse)  # noqa: E731
        check(backend, ours, (x, shift, scale), (y, ladj.sum(1)))

    def test_coupling(self, inverse, backend):
        transforms = pytest.importorskip("zuko.transforms")
        x, keep = torch.randn(4, 6), torch.rand(6) < 0.5
        net = small_net(int(keep.sum()), 2 * int((~keep).sum()))
        coupling = transforms.CouplingTransform(
            lambda a: transforms.DependentTransform(
                transforms.MonotonicAffineTransform(*net(a).chunk(2, -1), slope=1e-3), 1
            ),
            keep,
        )
        theirs = (coupling.inv if inverse else coupling).call_and_ladj(x)
        full = torch.full((2, 4, 6), math.nan)  # what passes unchanged needs no parameters
        full[..., ~keep] = torch.stack(net(x[:, keep]).chunk(2, -1)).detach()
        ours = lambda *a: affine_coupling(*a, mask=keep, scale_map="softclip", inverse=inverse)  # noqa: E731
        check(backend, ours, (x, *full), theirs)

    def test_additive(self, inverse, backend):
        transforms = pytest.importorskip("zuko.transforms")
        x, shift = torch.randn(3, 9), torch.randn(3, 9)
        additive = transforms.AdditiveTransform(shift)
        y, ladj = (additive.inv if inverse else additive).call_and_ladj(x)
        check(backend, lambda *a: additive_coupling(*a, inverse=inverse), (x, shift), (y, ladj.sum(1)))


@both_ways
def test_triangular_and_lu_maps_of_zuko(inverse):
    transforms = pytest.importorskip("zuko.transforms")
    x = torch.randn(7, 5)
    w = 0.3 * torch.randn(5, 5) + torch.diag(torch.tensor([1.5, -1.2, 2.0, -1.1, 1.0]))
    triangular, lu = transforms.LULinearTransform(w.tril()), transforms.LULinearTransform(w)
    theirs = (triangular.inv if inverse else triangular).call_and_ladj(x)
    check("reference", lambda *a: triangular_linear(*a, inverse=inverse), (x, w), theirs)
    d = w.diagonal()  # of L there; here of U: L U = (L / d) (d U)
    operands = (x, w / d, d[:, None] * w, d.abs().log(), d.sign())
    ours = lambda *a: invertible_conv1x1(*a, torch.arange(5), inverse=inverse)  # noqa: E731
    check("reference", ours, operands, (lu.inv if inverse else lu).call_and_ladj(x))


@both_ways
@on_every_backend
class TestNormflows:
    @pytest.mark.parametrize("split", ["channel", "channel_inv"])
    @pytest.mark.parametrize("scale_map", ["exp", "sigmoid_inv", "sigmoid"])
    def test_affine_coupling_block(self, scale_map, split, inverse, backend):
        flows = pytest.importorskip("normflows.flows")
        net = small_net(3, 6, image=True)
        block = flows.AffineCouplingBlock(net, scale_map=scale_map, split_mode=split)
        x = torch.randn(4, 6, 3, 5)
        theirs = block.inverse(x) if inverse else block(x)
        parameters = net(x[:, :3] if split == "channel" else x[:, 3:])
        shift, raw = parameters[:, 0::2], parameters[:, 1::2]
        name = {"exp": "exp", "sigmoid_inv": "sigmoid", "sigmoid": "exp"}[scale_map]
        log_scale = -F.logsigmoid(raw + 2) if scale_map == "sigmoid" else raw  # it divides by the sigmoid
        mask = {"channel": "channels", "channel_inv": "channels_flipped"}[split]
        ours = lambda *a: affine_coupling(*a, mask=mask, scale_map=name, inverse=inverse)  # noqa: E731
        check(backend, ours, (x, shift, log_scale), theirs)

    @pytest.mark.parametrize("split", ["checkerboard", "checkerboard_inv"])
    def test_checkerboard(self, split, inverse, backend):
        """normflows' z1, which passes unchanged, are the odd pixels of "checkerboard"; one channel, for the board of
        the next one is the opposite there."""
        flows = pytest.importorskip("normflows.flows")
        net = small_net(1, 2, image=True)
        block = flows.AffineCouplingBlock(net, split_mode=split)
        x = torch.randn(3, 1, 4, 6)
        theirs = block.inverse(x) if inverse else block(x)
        (z1, z2), _ = flows.Split(split)(x)
        parameters = net(z1)
        zero = torch.zeros_like(z2)
        shift, _ = flows.Merge(split)([zero, parameters[:, 0::2]])
        log_scale, _ = flows.Merge(split)([zero, parameters[:, 1::2]])
        mask = "checkerboard_flipped" if split == "checkerboard" else "checkerboard"
        ours = lambda *a: affine_coupling(*a, mask=mask, inverse=inverse)  # noqa: E731
        check(backend, ours, (x, shift, log_scale), theirs)

    def test_masked_affine_flow(self, inverse, backend):
        flows = pytest.importorskip("normflows.flows")
        b = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
        t, s = small_net(5, 5), small_net(5, 5)
        flow = flows.MaskedAffineFlow(b, t, s)
        x = torch.randn(7, 5)
        theirs = flow.inverse(x) if inverse else flow(x)
        ours = lambda *a: affine_coupling(*a, mask=b.bool(), inverse=inverse)  # noqa: E731
        check(backend, ours, (x, t(b * x), s(b * x)), theirs)

    def test_actnorm(self, inverse, backend):
        flows = pytest.importorskip("normflows.flows")
        layer = flows.ActNorm((3, 1, 1))
        x = 1 + 2 * torch.randn(4, 3, 5, 2)
        layer(x)  # sets its parameters from the data
        theirs = layer.inverse(x) if inverse else layer(x)
        parameters = (p.detach().flatten() for p in (layer.t, layer.s))
        check(backend, lambda *a: actnorm(*a, inverse=inverse), (x, *parameters), theirs)


@on_every_backend
def test_standard_normal_of_nflows_and_normflows(backend):
    normal = pytest.importorskip("nflows.distributions.normal")
    distributions = pytest.importorskip("normflows.distributions")
    z = torch.randn(5, 2, 3)
    check(backend, standard_normal_log_prob, (z,), (normal.StandardNormal((2, 3)).log_prob(z),))
    check(backend, standard_normal_log_prob, (z,), (distributions.DiagGaussian((2, 3), trainable=False).log_prob(z),))


@on_every_backend
def test_logistic_of_nflows(backend):
    """nflows' sigmoid transform gives a uniform variable: its log-det is the logistic density."""
    nonlinearities = pytest.importorskip("nflows.transforms.nonlinearities")
    z = torch.randn(5, 6)
    _, logabsdet = nonlinearities.Sigmoid()(z)
    check(backend, logistic_log_prob, (z,), (logabsdet,))
