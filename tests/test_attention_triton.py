"""The Triton kernels of the attention op in Triton's interpreter: no GPU."""

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from tests.attention_cases import CASES, EMPTY_SIZES, SOME_CASES, AttentionCase, Size, causal_case
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_parity,
    assert_passes_interpreted,
    in_every_layout,
)

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# One query and key, ragged, several tiles of queries and of keys, features that are padded and that come in parts.
SIZES = [Size(1, 4, 1, 1, 16), Size(2, 4, 5, 5, 3, 5), Size(1, 4, 36, 36, 17, 8), Size(1, 4, 70, 33, 16)]
HEAD_DIMS = [(16, 16), (64, 64), (72, 72), (72, 40), (128, 128), (256, 16), (1, 3)]


def all_results(case: AttentionCase, eager: bool, operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result, lse, their gradients by q, k and v, and their derivatives along a direction."""
    function = case.call_eager if eager else case.call
    given = [t if t.dtype == torch.bool else t.detach().to(dtype) for t in operands]
    leaves, rest = [t.clone().requires_grad_() for t in given[:3]], given[3:]
    out, lse = function(*leaves, *rest)
    seen = lse > -torch.inf
    weights = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y) for y in (out, lse)]
    total = (out * weights[0]).sum() + (torch.where(seen, lse, 0.0) * weights[1]).sum()
    grads = torch.autograd.grad(total, leaves)
    along = tuple(torch.sin(3 * t) for t in given[:3])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangents = torch.func.jvp(lambda *qkv: function(*qkv, *rest), tuple(given[:3]), along)
    return [t.detach() for t in (out, lse, *grads, *tangents)]


def check(case: AttentionCase, size: Size, dtype: torch.dtype = torch.float32, tiny: float = 2e-6) -> None:
    """At most twice as far off as eager."""
    operands = case.make(size, dtype)
    exact = all_results(case, True, operands, torch.float64)
    same = all_results(case, True, operands, dtype)
    with dgm.use_backend("triton"):
        actual = all_results(case, False, operands, dtype)
    for ours, theirs, best in zip(actual, same, exact, strict=True):
        largest = float(best[best.isfinite()].abs().max()) if best.isfinite().any() else 0.0
        assert_parity(ours, theirs, best, tiny * max(1.0, largest))


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_gradients_and_derivatives(self, case):
        for size in SIZES if case in SOME_CASES else SIZES[1:2]:
            check(case, size)

    @pytest.mark.parametrize("features", HEAD_DIMS, ids=str)
    def test_head_dims(self, features):
        check(causal_case_of(0), Size(1, 2, 19, 37, *features))

    @pytest.mark.parametrize("case", SOME_CASES, ids=str)
    def test_half_precision(self, case):
        """Not in bfloat16, which NumPy has no products of. The stored result is rounded, which m multiplies."""
        check(case, SIZES[1], torch.float16, 2 * 2**-10)

    @pytest.mark.parametrize("size", EMPTY_SIZES, ids=str)
    def test_empty(self, size):
        check(SOME_CASES[0], size)

    def test_strides(self):
        case = SOME_CASES[4]
        operands = case.make(Size(1, 2, 5, 6, 3))
        with dgm.use_backend("triton"):
            expected = all_results(case, False, operands, torch.float32)
            for given in in_every_layout(operands):
                actual = all_results(case, False, given, torch.float32)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_repeatable_and_inputs_unchanged(self):
        case = SOME_CASES[2]
        operands = case.make(SIZES[2])
        with dgm.use_backend("triton"), assert_inputs_unchanged(*operands):
            assert_bitwise_repeatable(lambda: all_results(case, False, operands, torch.float32), runs=2)

    @pytest.mark.parametrize(
        "options", [{}, {"mask": dgm.masks.raster_2d(7, 7, 2, include_self=True)}, {"alibi": True}]
    )
    def test_decoding(self, options):
        """One token and several, against the last rows of attention over all."""
        masks = [dgm.masks.causal(), *([options["mask"]] if "mask" in options else [])]
        bias = dgm.positions.alibi(4) if "alibi" in options else None
        q, k, v = torch.randn(2, 4, 49, 24), torch.randn(2, 2, 49, 24), torch.randn(2, 2, 49, 40)
        dense = torch.stack([mask.dense(49) for mask in masks]).all(0)
        expected = dgm.attention(q, k, v, mask=dense, bias=bias, enable_gqa=True)
        for tokens in (49, 30, 1):
            cache = dgm.KVCache(2, 2, 49, 24, value_dim=40)
            cache.append(k[:, :, :tokens], v[:, :, :tokens])
            for last in (1, min(5, tokens)):
                with dgm.use_backend("triton"):
                    actual = dgm.attention_decode(
                        q[:, :, tokens - last : tokens], cache, mask=options.get("mask"), bias=bias, enable_gqa=True
                    )
                torch.testing.assert_close(actual, expected[:, :, tokens - last : tokens], rtol=1e-4, atol=1e-5)


def causal_case_of(offset: int) -> AttentionCase:
    return AttentionCase("causal", mask=causal_case(offset))


def test_the_kernels_pass_interpreted():
    assert_passes_interpreted(__file__)
