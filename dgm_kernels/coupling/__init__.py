"""Invertible maps of normalizing flows, each with its log-determinant in the same pass, forward and inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core import layout, ops
from .._core.autocast import elementwise_dtype
from .._core.backends import select
from .._core.checks import check_batch, check_device, check_float
from . import op, reference
from .checks import check_domain, check_same, check_scale_map, check_spline
from .linear import actnorm, householder, invertible_conv1x1, permute_channels, triangular_linear
from .made import made_inverse
from .reference import SCALE_MAPS
from .region import Region, resolve

__all__ = [
    "SCALE_MAPS",
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "householder",
    "invertible_conv1x1",
    "logistic_log_prob",
    "made_inverse",
    "permute_channels",
    "rational_quadratic_spline",
    "standard_normal_log_prob",
    "triangular_linear",
]


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    *,
    mask: Tensor | str | None = None,
    scale_map: str = "exp",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Affine coupling layer with its log-determinant: ``y = b x + (1 - b) (x exp(s) + shift)``.

    ``s = scale_map(log_scale)``, ``logdet = sum of s`` over what is transformed (``b = 0``). The inverse is
    ``x = b y + (1 - b) (y - shift) exp(-s)`` and its logdet minus that. What ``shift`` and ``log_scale`` hold where
    ``b = 1`` does not count, NaN too. 16-bit tensors are worked on in float32. Differentiable to any order; saves its
    output in place of ``x`` (a 16-bit one has too few digits for that: then ``x``), and ``shift``, ``log_scale`` and
    the mask.

    Args:
        x: ``[batch, ...]``, such as ``[B, D]`` or ``[B, C, H, W]``; with ``inverse`` the y.
        shift: like ``x``; with a channel mask like the half that is transformed. A view, such as a half of a network's
            output, is read where it is.
        log_scale: like ``shift``.
        mask: b, that is what passes unchanged. None: nothing. A bool tensor that broadcasts to ``x``.
            ``"channels"``: the first half of dimension 1 (``"channels_flipped"``: the second half).
            ``"checkerboard"``: the pixels of even ``h + w`` (``"checkerboard_flipped"``: odd; on ``[B, D]``: the even
            or odd features).
        scale_map: ``"exp"``: s = a. ``"tanh"``: s = tanh(a). ``"sigmoid"``: exp(s) = sigmoid(a + 2), as in Glow.
            ``"softclip"``: s = a / (1 + abs(a) / ln 1000), as in zuko.
        inverse: computes x from y.

    Returns:
        y of the shape of ``x``, contiguous (dtype: PyTorch's promotion of the three), and logdet ``[batch]`` in float32
        (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, or dimension 1 is odd and cannot
            be split; the message names the argument.

    Source: Dinh et al., "Density estimation using Real NVP", 2017; Kingma and Dhariwal, "Glow", 2018.
    """
    check_scale_map(scale_map)
    region = _checked_region(x, shift, mask)
    check_same("log_scale", log_scale, shift.shape, x, "shift")
    return _affine(x, shift, log_scale, region, scale_map, inverse)


def additive_coupling(
    x: Tensor, shift: Tensor, *, mask: Tensor | str | None = None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Additive, volume-preserving coupling layer: ``y = x + (1 - b) shift``, logdet = 0.

    Args, returns and raises: as in :func:`affine_coupling`. Saves nothing but the mask.

    Source: Dinh et al., "NICE: Non-linear Independent Components Estimation", 2015.
    """
    return _affine(x, shift, None, _checked_region(x, shift, mask), "exp", inverse)


def _checked_region(x: Tensor, shift: Tensor, mask: Tensor | str | None) -> Region:
    check_batch("x", x)
    region = resolve(mask, x)
    if region.start is None or region.stop is None:
        check_same("shift", shift, x.shape, x, "x")
    else:
        check_same(
            "shift", shift, (x.shape[0], region.stop - region.start, *x.shape[2:]), x, "the transformed half of x"
        )
    return region


def _affine(
    x: Tensor, shift: Tensor, log_scale: Tensor | None, region: Region, scale_map: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    given = (x, shift) if log_scale is None else (x, shift, log_scale)
    dtype = elementwise_dtype(*given)
    backend = select(x.device, given, natives=op.BACKENDS)
    if backend == "reference":
        return reference.affine_coupling(x, shift, log_scale, region, scale_map, inverse, dtype)
    return ops.call(
        op.affine[backend],
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given),
        *(layout.rows(tensor) for tensor in given),
        *(() if log_scale is not None else (None,)),
        *region.op_args(x),
        SCALE_MAPS.index(scale_map),
        inverse,
        dtype,
    )


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float = 3.0,
    tails: str | None = "linear",
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic spline on ``[-bound, bound]`` with its log-determinant.

    Bin widths are ``2 bound (m + (1 - K m) softmax(widths))`` with m = ``min_bin_width``, heights likewise, derivatives
    at the knots ``min_derivative + softplus(derivatives)``. Within a bin of width w, height h, slope s = h / w and
    derivatives d0, d1, with xi = (x - x_k) / w::

        y = y_k + h (s xi^2 + d0 xi (1 - xi)) / (s + (d0 + d1 - 2 s) xi (1 - xi))

    The inverse solves the quadratic with its discriminant written as ``r^2 + 4 s^2 theta (1 - theta)``, with
    theta = (y - y_k) / h and r = d0 (1 - theta) - d1 theta, which rounding cannot make negative. float64 is computed in
    float64; 16-bit tensors in float32. Differentiable to any order; saves ``x`` and the three parameters.

    Args:
        x: ``[batch, ...]``; with ``inverse`` the y.
        widths: ``[*x.shape, K]``, unnormalised; K >= 2. Views of one network output are read where they are.
        heights: like ``widths``.
        derivatives: ``[*x.shape, K - 1]`` at the inner knots; without tails ``[*x.shape, K + 1]``.
        bound: half the width of the domain.
        tails: ``"linear"``: identity outside, and derivative 1 at the ends. None: there is no outside.
        inverse: computes x from y.
        min_bin_width: least width of a bin, as a share of the domain.
        min_bin_height: least height, likewise.
        min_derivative: least derivative at a knot.

    Returns:
        y like ``x`` (dtype: PyTorch's promotion of the four), and logdet ``[batch]`` in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; without tails also if an ``x``
            on the CPU is outside the domain (on a GPU, which is not awaited, and in compiled code the result is NaN).

    Source: Durkan et al., "Neural Spline Flows", 2019; the parametrisation is that of its authors' library nflows.
    """
    mins = (min_bin_width, min_bin_height, min_derivative)
    check_spline(x, widths, heights, derivatives, bound, tails, mins)
    if tails is None:
        check_domain(x, bound)
    given = (x, widths, heights, derivatives)
    dtype = elementwise_dtype(*given)
    refusal = f"a spline of more than {op.MAX_BINS} bins" if widths.shape[-1] > op.MAX_BINS else None
    backend = select(x.device, given, refusal, natives=op.BACKENDS)
    if backend == "reference":
        return reference.rational_quadratic_spline(*given, bound, tails is not None, mins, inverse, dtype)
    return ops.call(
        op.spline[backend],
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given),
        x.contiguous(),
        *map(layout.last_rows, given[1:]),
        float(bound),
        tails is not None,
        *map(float, mins),
        inverse,
        dtype,
    )


def standard_normal_log_prob(z: Tensor, logdet: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    """Log-density of a flow with a standard normal base: ``sum of log N(z; 0, 1) over the sample + logdet``.

    Args:
        z: ``[batch, ...]``.
        logdet: ``[batch]``, or several of them to be added up; None for the base density alone.

    Returns:
        ``[batch]`` in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
    """
    return _log_prob(z, logdet, logistic=False)


def logistic_log_prob(z: Tensor, logdet: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    """Log-density of a flow with a standard logistic base: ``sum of -z - 2 softplus(-z) over the sample + logdet``.

    Args, returns and raises: as in :func:`standard_normal_log_prob`.

    Source: Dinh et al., "NICE: Non-linear Independent Components Estimation", 2015, section 3.4.
    """
    return _log_prob(z, logdet, logistic=True)


def _log_prob(z: Tensor, logdet: Tensor | Sequence[Tensor] | None, logistic: bool) -> Tensor:
    check_batch("z", z)
    total = _total(logdet, z)
    given = (z,) if total is None else (z, total)
    backend = select(z.device, given, natives=op.BACKENDS)
    if backend == "reference":
        return reference.log_prob(z, total, logistic)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return ops.call(
        op.log_prob[backend], needs_grad, layout.rows(z), None if total is None else total.contiguous(), logistic
    )


def _total(logdet: Tensor | Sequence[Tensor] | None, z: Tensor) -> Tensor | None:
    if logdet is not None and not isinstance(logdet, (Tensor, Sequence)):
        raise TypeError(f"logdet must be a tensor or tensors, got {type(logdet).__name__}")
    terms = [] if logdet is None else [logdet] if isinstance(logdet, Tensor) else list(logdet)
    for term in terms:
        if not isinstance(term, Tensor):
            raise TypeError(f"logdet must be a tensor or tensors, got {type(term).__name__}")
        if term.shape != z.shape[:1]:
            raise ValueError(
                f"logdet must have the shape of the batch of z, {tuple(z.shape[:1])}, got {tuple(term.shape)}"
            )
        check_device("logdet", term, z, "z")
        check_float("logdet", term)
    return sum(terms[1:], terms[0]) if terms else None
