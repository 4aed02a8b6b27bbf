"""The Triton kernels of the latent op on a GPU."""

import pytest
import torch
from torch import Tensor

import dgm_kernels as dgm
from dgm_kernels import NoiseKey
from tests.contract import assert_bitwise_repeatable, assert_compiles, capture
from tests.gradients import values_and_gradients
from tests.latent_cases import CASES, CODE_CASE, IMPORTANCE_CASES, TRIL_CASE, LatentCase, make_pair
from tests.latent_op import check_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
DEVICE = "cuda"


def on_device(case: LatentCase, shape: tuple[int, ...]) -> list[Tensor]:
    return [operand.nan_to_num(0.0).to(DEVICE) for operand in case.make(shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    for shape in case.shapes:
        check_case("triton", case, shape, dtype, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeatable(case):
    operands = on_device(case, case.shapes[3])
    assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands))


@pytest.mark.parametrize("case", [*CASES[:2], IMPORTANCE_CASES[0], TRIL_CASE, CODE_CASE], ids=str)
def test_compiles(case):
    operands = [[o.requires_grad_() for o in on_device(case, shape)] for shape in case.sizes]
    assert_compiles(case.call, *operands, backend="aot_eager")


def test_a_graph_replays_with_new_noise():
    mu, log_var = (t.to(DEVICE) for t in make_pair((64, 20)))
    seed = torch.tensor([1], device=DEVICE)
    graph, (z, kl) = capture(lambda: dgm.gaussian_sample_kl(mu, log_var, NoiseKey(seed)))
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        expected = dgm.gaussian_sample_kl(mu, log_var, NoiseKey(value))
        assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])


def test_the_same_numbers_as_on_the_cpu():
    mu, log_var = make_pair((9, 333))
    key = NoiseKey(1 << 40, first_sample=(1 << 33) + 5)
    on_gpu = dgm.importance_log_weights(mu.to(DEVICE), log_var.to(DEVICE), key, samples=3)
    with dgm.use_backend("auto"):
        on_cpu = dgm.importance_log_weights(mu, log_var, key, samples=3)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)


def test_more_elements_than_32_bits_count():
    codes, rows = 2, (1 << 31) // 64 + 5
    if torch.cuda.mem_get_info()[0] < 6 * rows * 64 * 2:
        pytest.skip("needs the memory of six tensors of 2^31 16-bit elements")
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 1.0
    codebook = torch.tensor([[0.0], [1.0]], device=DEVICE).expand(codes, 64).contiguous()
    with torch.no_grad():
        found = dgm.vector_quantize(x, codebook.to(torch.bfloat16))
    assert found.counts.tolist() == [rows - 1, 1] and int(found.indices[-1]) == 1
    assert torch.equal(found.quantized[-1], x[-1])
