"""The attention op on a CUDA device: values, gradients, derivatives, graphs, no waiting for the device."""

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from tests.attention_cases import CASES, SOME_CASES, AttentionCase, Size
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_parity,
    capture,
    strided_variants,
)

pytestmark = pytest.mark.gpu
SIZES = (Size(2, 4, 113, 203, 17), Size(1, 4, 70, 70, 72, 40), Size(1, 4, 256, 256, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(case: AttentionCase, eager: bool, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result, lse and the gradients of q, k and v."""
    given = [t if t.dtype == torch.bool else t.detach().to(dtype) for t in operands]
    leaves = [t.clone().requires_grad_() for t in given[:3]]
    out, lse = (case.call_eager if eager else case.call)(*leaves, *given[3:])
    weights = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out)
    return [t.detach() for t in (out, lse, *torch.autograd.grad(out, leaves, weights))]


def on_device(case: AttentionCase, size: Size, dtype: torch.dtype) -> list[Tensor]:
    return [operand.cuda() for operand in case.make(size, dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype):
    for size in SIZES:
        operands = on_device(case, size, dtype)
        exact, same = results(case, True, operands, torch.float64), results(case, True, operands, dtype)
        with dgm.use_backend("triton"):
            actual = results(case, False, operands, dtype)
        for ours, theirs, best in zip(actual, same, exact, strict=True):
            largest = float(best[best.isfinite()].abs().max()) if best.isfinite().any() else 0.0
            rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            assert_parity(ours, theirs, best, rounding * max(1.0, largest))


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_repeatable(case):
    operands = on_device(case, SIZES[2], torch.bfloat16)
    assert_bitwise_repeatable(lambda: results(case, False, operands, torch.bfloat16))


def test_a_graph_replays_with_new_operands():
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda") for _ in range(3))
    mask = dgm.masks.causal()
    dgm.attention(q, k, v, mask=mask)  # the bounds of the mask are made once
    graph, out = capture(lambda: dgm.attention(q, k, v, mask=mask))
    q.normal_()
    graph.replay()
    torch.testing.assert_close(out, dgm.attention(q, k, v, mask=mask), rtol=0, atol=0)


def test_decoding_is_the_last_row():
    q, k, v = (torch.randn(2, heads, 777, 64, device="cuda") for heads in (8, 2, 2))
    cache = dgm.KVCache(2, 2, 800, 64, device="cuda")
    cache.append(k, v)
    expected = dgm.attention(q, k, v, mask=dgm.masks.causal(), enable_gqa=True)[:, :, -1:]
    actual = dgm.attention_decode(q[:, :, -1:], cache, enable_gqa=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_derivative_along_a_direction():
    q, k, v = (torch.randn(1, 2, 130, 64, device="cuda") for _ in range(3))
    along = tuple(torch.randn_like(t) for t in (q, k, v))
    _, actual = torch.func.jvp(lambda *t: dgm.attention(*t, mask=dgm.masks.causal(-1)), (q, k, v), along)
    wide, directions = tuple(t.double() for t in (q, k, v)), tuple(t.double() for t in along)
    _, expected = torch.func.jvp(lambda *t: dgm.attention(*t, mask=dgm.masks.causal(-1)), wide, directions)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_any_strides_and_addresses():
    q, k, v = (torch.randn(2, 3, 70, 40, device="cuda") for _ in range(3))
    expected = dgm.attention(q, k, v, mask=dgm.masks.causal())
    for variant in strided_variants(q):
        actual = dgm.attention(variant, k, v, mask=dgm.masks.causal())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_zero_sizes():
    for shape in ((0, 4, 16, 64), (2, 4, 0, 64)):
        q = torch.randn(shape, device="cuda", requires_grad=True)
        out = dgm.attention(q, q, q)
        assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_compiles():
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dgm.attention(q, k, v, mask=dgm.masks.causal())

    small, large = (
        [torch.randn(2, 4, length, 64, device="cuda", requires_grad=True) for _ in range(3)] for length in (70, 130)
    )
    assert_compiles(causal, small, large)


def test_autocast():
    operands = [torch.randn(2, 4, 70, 64, device="cuda") for _ in range(3)]
    eager = torch.nn.functional.scaled_dot_product_attention
    assert_autocast_like(dgm.attention, eager, operands, device_type="cuda")


def test_more_than_2_to_the_31_elements():
    """The last heads of a batch of 2^31 elements and a few, against those heads alone."""
    heads = (1 << 31) // (1024 * 64) + 2
    if torch.cuda.mem_get_info()[0] < 10 * heads * 1024 * 64:
        pytest.skip("needs 10 bytes an element of free memory")
    q = torch.empty(1, heads, 1024, 64, dtype=torch.bfloat16, device="cuda").normal_()
    k, v = (torch.randn(1, 1, 1024, 64, device="cuda").bfloat16() for _ in range(2))
    out = dgm.attention(q, k, v, enable_gqa=True)
    assert torch.equal(out[:, -2:], dgm.attention(q[:, -2:].contiguous(), k, v, enable_gqa=True))
