"""The Triton kernels of the norm op on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.contract import assert_autocast_like, assert_bitwise_repeatable, assert_compiles, capture
from tests.gradients import values_and_gradients
from tests.norm_cases import CASES, GROUP_CASES, MODULATED_CASES, ROWS_CASES, NormCase
from tests.test_norm_triton import GROUP_SHAPES, SHAPES, check_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
DEVICE = "cuda"
KERNELS = [ROWS_CASES[0], ROWS_CASES[3], MODULATED_CASES[4], GROUP_CASES[3]]


def on_device(case: NormCase, shape: tuple[int, ...], grad: bool = False) -> list[Tensor]:
    return [operand.to(DEVICE).requires_grad_(grad) for operand in case.make(shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    large = [(4, 64, 32, 32), (2, 8, 128, 128)] if case in GROUP_CASES else [(4, 256, 1152), (1, 3, 20000)]
    for shape in [*(GROUP_SHAPES if case in GROUP_CASES else SHAPES), *large]:
        if min(shape[1:]) > 2 or dtype == torch.float32:
            check_case(case, shape, dtype, DEVICE)


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_repeatable(case):
    operands = on_device(case, (4, 64, 30, 34))
    assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands))


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_compiles(case):
    small, large = on_device(case, (3, 4, 6), grad=True), on_device(case, (5, 8, 10), grad=True)
    assert_compiles(case.call, small, large)


@pytest.mark.parametrize("case", [*ROWS_CASES[:2], *MODULATED_CASES, *GROUP_CASES], ids=str)
def test_autocast_is_eagers(case):
    """PyTorch normalises in float32 there, whatever comes in."""
    operands = [operand.to(torch.bfloat16) for operand in on_device(case, (2, 4, 6))]
    if case in GROUP_CASES:  # the yardstick of the tests is made of single operations: that of users is F.group_norm
        x = operands[0]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert case.call(*operands).dtype == torch.nn.functional.group_norm(x, 2).dtype
        return
    assert_autocast_like(case.call, case.call_eager, operands, device_type=DEVICE)


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_cuda_graph(case):
    operands = on_device(case, (2, 4, 6, 8))
    graph, captured = capture(lambda: case.call(*operands))
    for operand in operands:
        operand.copy_(torch.randn_like(operand))
    graph.replay()
    expected = case.call(*operands)
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
