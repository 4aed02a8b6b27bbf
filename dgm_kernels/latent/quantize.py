"""Vector quantisation: the nearest code, its straight-through gradient, usage counts and both losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core import layout, ops
from .._core.autocast import elementwise_dtype
from .._core.backends import select
from . import op, reference
from .checks import check_codes


class VectorQuantized(NamedTuple):
    """What :func:`vector_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    counts: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def vector_quantize(x: Tensor, codebook: Tensor) -> VectorQuantized:
    """Replaces every vector by the nearest code: ``e = codebook[argmin_k |x - e_k|^2]``.

    Distances are computed as ``|e|^2 / 2 - x.e``, with x and e shifted by the mean of the codes: the code that is
    chosen is within rounding of the nearest. Of codes at the same distance the first is taken. The matrix of distances
    is never in memory. Saves x, the codebook and the indices; differentiable to any order.

    Args:
        x: ``[..., D]``. Features of images have to be permuted to the end.
        codebook: ``[K, D]``.

    Returns:
        A named tuple:

        - quantized: the codes in the shape of ``x`` (dtype: PyTorch's promotion of the two). Straight-through: its
          gradient goes to ``x`` as it is.
        - indices: int64 ``[...]``.
        - counts: int64 ``[K]``, how often each code was chosen.
        - codebook_loss: mean of ``(sg(x) - e)^2`` over all elements, float32 (float64 for float64); gradient to the
          codebook alone.
        - commitment_loss: mean of ``(x - sg(e))^2``, the same number; gradient to ``x`` alone. Of no elements both are
          NaN, the mean of nothing.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", 2017.
    """
    check_codes(x, codebook)
    dtype = elementwise_dtype(x, codebook)
    rows = x.reshape(-1, x.shape[-1])
    backend = select(x.device, (x, codebook), natives=op.BACKENDS)
    if backend == "reference":
        quantized, indices, counts, losses = reference.quantize(rows, codebook, dtype)
    else:
        grad = torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)
        operands = (layout.rows(rows), codebook.contiguous())
        quantized, indices, counts, losses = ops.call(op.quantize[backend], grad, *operands, dtype)
    codebook_loss, commitment_loss = losses.unbind()
    return VectorQuantized(quantized.view(x.shape), indices.view(x.shape[:-1]), counts, codebook_loss, commitment_loss)
