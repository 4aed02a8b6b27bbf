"""The Triton kernels of the norm op in Triton's interpreter, and what the compiler makes of them; needs no GPU."""

import os
from typing import Any

import pytest
import torch

import dgm_kernels as dgm
from dgm_kernels.norm import op
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_parity,
    assert_passes_interpreted,
    compiled_usage,
    in_every_layout,
)
from tests.gradients import values_and_gradients
from tests.norm_cases import CASES, GROUP_CASES, MODULATED_CASES, ROWS_CASES, NormCase

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# One program and several, ragged, short rows that share a tile, rows too long for one, several parts of a sample.
SHAPES = [(1, 3), (3, 59), (2, 3, 113), (2, 40, 7), (3, 1100), (1, 2, 4500)]
GROUP_SHAPES = [(1, 4), (3, 8, 5), (2, 6, 7, 9), (2, 4, 1031), (1, 2, 4500), (1, 12, 2, 500)]


def check_case(case: NormCase, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Values and gradients against float64: at most twice as far off as eager in float32, rounded once in 16 bits."""
    operands = [operand.to(dtype) for operand in case.make(shape)]
    exact = values_and_gradients(case.call_eager, [operand.double() for operand in operands])
    eager = [t.to(dtype) for t in values_and_gradients(case.call_eager, [operand.float() for operand in operands])]
    with dgm.use_backend("triton"):
        actual = values_and_gradients(case.call, [operand.to(device) for operand in operands])
    # A 16-bit h is rounded before it is normalised; the interpreter truncates what it stores in bfloat16.
    share = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert_parity(a.cpu(), e, x, tiny=share * max(1.0, float(x.abs().max()) if x.numel() else 1.0))


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_and_gradients(self, case):
        for shape in GROUP_SHAPES if case in GROUP_CASES else SHAPES:
            check_case(case, shape)
        for dtype in (torch.float16, torch.bfloat16):
            check_case(case, (2, 4, 23), dtype)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_empty(self, case):
        for shape in ((0, 4, 3), (2, 4, 0)) if case in GROUP_CASES else ((0, 4), (2, 0, 6)):
            operands = case.make(shape)
            with dgm.use_backend("triton"):
                actual = values_and_gradients(case.call, operands)
            for a, e in zip(actual, values_and_gradients(case.call_eager, operands), strict=True):
                assert a.shape == e.shape
                torch.testing.assert_close(a, torch.zeros_like(a), rtol=0, atol=0)

    @pytest.mark.parametrize("case", [ROWS_CASES[2], MODULATED_CASES[4], GROUP_CASES[3]], ids=str)
    def test_any_strides_unchanged_inputs_and_repeatable(self, case):
        operands = case.make((2, 4, 3, 5))
        with dgm.use_backend("triton"):
            expected = values_and_gradients(case.call, operands)
            for given in in_every_layout(operands):
                with assert_inputs_unchanged(*given):
                    actual = values_and_gradients(case.call, given)
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands), runs=2)

    def test_a_mean_far_from_zero_costs_no_digits(self):
        for size in (100, 5003):
            x = torch.randn(3, size) + 1e4
            exact = torch.nn.functional.layer_norm(x.double(), (size,))
            with dgm.use_backend("triton"):
                actual = dgm.layer_norm(x, (size,))
            # The mean is a float32, whose last digit is 1e-3 at 1e4; PyTorch's own result is as far off.
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-3)
            assert abs(float(actual.std()) - 1) < 1e-2

    def test_opcheck(self):
        x, w, s = torch.randn(3, 4, 6), torch.randn(6), torch.randn(3, 6)
        mean, rstd = torch.randn(12), torch.rand(12)
        f32 = torch.float32
        fast = ("test_schema", "test_faketensor")
        calls: list[Any] = [
            (op.rows, (x, x, s, w, w, s, s, 6, False, 1e-5, f32, f32)),
            (op.rows, (x, None, None, None, None, None, None, 6, True, 1e-5, f32, f32)),
            (op.rows_backward, (x, x, x, x, s, w, w, s, True, mean, rstd, 6, False)),
            (op.rows_backward, (x.half(), None, x.half(), None, None, w, None, None, False, mean[:0], rstd, 6, True)),
            (op.group_silu, (x, None, None, torch.randn(3, 4), None, 2, 1e-5, f32)),
            (op.group_silu_backward, (x, x.half(), w[:4], w[:4], None, s[:, :4], mean[:6], rstd[:6], 2)),
        ]
        for overloads, args in calls:
            torch.library.opcheck(overloads["triton"], args, test_utils=fast)


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreted one")
def test_interpreted_kernels_are_right():
    assert_passes_interpreted("tests/test_norm_triton.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "registers"),
    [("rows_modulated_bf16", 64), ("rows_backward_everything_4096_fp32", 128), ("group_silu_backward_fp32", 64)],
)
def test_compiles_for_a_gpu_without_spills(name, registers):
    from dgm_kernels.norm.triton import aot_specs

    usage = compiled_usage(aot_specs(), name)
    assert usage.spill_bytes == 0
    assert usage.registers <= registers
    assert usage.wide_loads > 0
