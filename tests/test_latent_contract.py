"""The rest of the contract of the latent op: layouts, threads, compilation, transforms, dtypes, instruction sets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import NoiseKey, gaussian_sample_kl, importance_bound, importance_log_weights, use_backend
from dgm_kernels.latent import op
from tests.cases import BACKENDS, NATIVE
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_instruction_sets_agree,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    in_every_layout,
    stacked,
    strided_variants,
    tensors_of,
)
from tests.gradients import values_and_gradients
from tests.latent_cases import (
    CASES,
    CODE_CASE,
    IMPORTANCE_CASES,
    KEY,
    KL_CASES,
    SAMPLE_CASES,
    TRIL_CASE,
    LatentCase,
    make_codes,
    make_four,
    make_pair,
    make_tril,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def opcheck_cases() -> list[Any]:
    f32, key = torch.float32, KEY.op_args()
    tensors = NoiseKey(torch.tensor([3]), step=torch.arange(3), samples=torch.arange(3)).op_args()
    mu, log_var = make_pair((3, 5))
    grad = lambda *tensors: [t.detach().clone().requires_grad_() for t in tensors]  # noqa: E731
    given = (torch.randn(3, 5), *key[1:])
    many = (torch.randn(2, 3, 5), *key[1:])
    four, (m, factor), (x, codes) = make_four((3, 5)), make_tril((3, 5)), make_codes((6, 4, 3))
    indices = torch.tensor([0, 2, 1, 1, 0, 2])
    settings = (0.2, True, 0.5, -0.7)
    return [
        (op.sample, (*grad(mu, log_var), *key, *settings, f32)),
        (op.sample, (*grad(mu.half(), log_var), *tensors, 0.0, False, 0.0, 0.0, f32)),
        (op.sample, (*grad(mu, log_var), *given, *settings, f32)),
        (op.sample_backward, (mu, torch.randn(3), mu, log_var, *key, *settings)),
        (op.sample_backward, (None, torch.randn(3), mu.half(), log_var, *tensors, *settings)),
        (op.tril, (*grad(m, factor.nan_to_num(0.0)), *key, f32)),
        (op.tril_backward, (m, None, m, factor, *key)),
        (op.kl, (*grad(*four), 0.1)),
        (op.kl, (*grad(*four[:2]), None, None, 0.0)),
        (op.kl_backward, (torch.randn(3), *four[:3], None, 0.0)),
        (op.importance, (*grad(mu, log_var), *tensors, 2, True, f32)),
        (op.importance, (*grad(mu, log_var), *many, 2, False, f32)),
        (op.importance_backward, (torch.randn(2, 3, 5), torch.randn(2, 3), mu, log_var, *key, 2, False)),
        (op.quantize, (*grad(x, codes), f32)),
        (op.quantize_backward, (x, torch.randn(2), x.half(), codes, indices)),
    ]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("index", range(15))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: the outputs and gradients of contiguous operands."""
    operands = case.make(case.small)
    tolerance = 0.0 if backend in NATIVE else 2e-5
    with use_backend(backend):
        expected = values_and_gradients(case.call, operands)
        for given in in_every_layout(operands):
            actual = values_and_gradients(case.call, given)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@on_every_backend
def test_gradients_and_noise_of_any_strides(backend):
    mu, log_var = make_pair((6, 5, 4), grad=True)
    eps, grad = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    with use_backend(backend):
        z, kl = gaussian_sample_kl(mu, log_var, eps)
        expected = torch.autograd.grad([z, kl], [mu, log_var], [grad, torch.ones(())[None].expand(6)])
        for other_eps, other in zip(strided_variants(eps), strided_variants(grad), strict=True):
            z, kl = gaussian_sample_kl(mu, log_var, other_eps)
            actual = torch.autograd.grad([z, kl], [mu, log_var], [other, torch.ones(6)])
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
@every_case
def test_inputs_unchanged_and_repeatable(case, backend):
    operands = [o.nan_to_num(0.0) for o in case.make(case.shapes[2])]
    with use_backend(backend):
        with assert_inputs_unchanged(*operands):
            values_and_gradients(case.call, operands)
        assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands))


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Few long samples, many short ones: however the work is cut."""
    shapes = {TRIL_CASE: ((40, 40), (1, 90)), CODE_CASE: ((2000, 40, 5), (400, 70, 33))}
    for shape in shapes.get(case, ((2, 30000), (4001, 11))):
        operands = case.make(shape)
        with use_backend(backend):
            run = lambda operands=operands: values_and_gradients(case.call, operands)  # noqa: E731
            assert_threads_agree(run, thread_counts)


COMPILED = (*SAMPLE_CASES[1::2], KL_CASES[1], IMPORTANCE_CASES[0], TRIL_CASE, CODE_CASE)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_once_for_two_sizes(case, backend):
    operands = [[o.detach().nan_to_num(0.0).requires_grad_() for o in case.make(shape)] for shape in case.sizes]
    with use_backend(backend):
        assert_compiles(case.call, *operands, backend="aot_eager")


@pytest.mark.parametrize("case", [SAMPLE_CASES[0], CODE_CASE], ids=str)
def test_the_reference_compiles(case):
    operands = [case.make(shape, grad=True) for shape in case.sizes]
    with use_backend("reference"):
        assert_compiles(case.call, *operands, backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_an_autoencoder_compiles_with_inductor(backend):
    """Encoder, sample and KL, decoder, in one graph, the seed on the device."""
    encoder, decoder = nn.Linear(8, 8), nn.Linear(4, 8)

    def loss(x: Tensor, seed: Tensor) -> Tensor:
        mu, log_var = encoder(x).chunk(2, 1)
        z, kl = gaussian_sample_kl(mu, log_var, NoiseKey(seed), free_bits=0.1)
        return (kl + (decoder(z) - x).square().sum(1)).mean()

    args = lambda batch: [torch.randn(batch, 8, requires_grad=True), torch.tensor([batch])]  # noqa: E731
    with use_backend(backend):
        assert_compiles(loss, args(3), args(9))


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_the_importance_bound_compiles_with_a_seed_of_its_own(backend):
    def bound(mu: Tensor, log_var: Tensor) -> Tensor:
        z, ratio = importance_log_weights(mu, log_var, samples=3)
        return importance_bound(ratio - z.square().sum(2)).mean()

    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    mu, log_var = make_pair((4, 5), grad=True)
    with use_backend(backend):
        values = [float(compiled(mu, log_var)) for _ in range(3)]
        compiled(mu, log_var).backward()
    assert len(set(values)) == 3
    assert mu.grad.isfinite().all() and log_var.grad.isfinite().all()


@on_every_backend
def test_autocast_promotes(backend):
    """A network's output in bfloat16: z in bfloat16, the KL in float32."""
    net = nn.Linear(6, 10)
    x = torch.randn(3, 6)

    def ours(x: Tensor) -> Any:
        mu, log_var = net(x).chunk(2, 1)
        assert mu.dtype == torch.bfloat16
        return gaussian_sample_kl(mu, log_var, KEY)[1]

    def eager(x: Tensor) -> Any:
        mu, log_var = net(x).float().chunk(2, 1)
        return -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)

    with use_backend(backend):
        assert_autocast_like(ours, eager, (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert gaussian_sample_kl(*net(x).chunk(2, 1), KEY)[0].dtype == torch.bfloat16


@on_every_backend
@every_case
def test_mixed_dtypes_promote(case, backend):
    first, *rest = case.make(case.small)
    expected = tensors_of(case.call(first.bfloat16().float(), *rest))
    with use_backend(backend):
        actual = tensors_of(case.call(first.bfloat16(), *rest))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@every_case
def test_vmap(case):
    """Over an added dimension of every operand; over that of the first alone. The key is the same for all."""
    operands = stacked(lambda: case.make(case.small))
    assert_vmap(case.call, operands)
    assert_vmap_of_one(case.call, operands, 0)


@every_case
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd."""
    operands = [o.nan_to_num(0.0) for o in case.make(case.small, torch.float64)]
    assert_functional_transforms(case.call, operands)


ISA_SCRIPT = """
from tests.gradients import values_and_gradients
from tests.latent_cases import CASES
outputs = []
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16):
        outputs.append(values_and_gradients(case.call, case.make(case.shapes[2], dtype)))
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=1e-5, others=1e-2)


@pytest.mark.parametrize("case", [SAMPLE_CASES[0], IMPORTANCE_CASES[0], TRIL_CASE], ids=str)
def test_neither_z_nor_noise_is_saved(case: LatentCase) -> None:
    """What autograd keeps is mu, log_var or scale_tril, and no memory of the outputs."""
    operands = case.make((4, 8), grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z, _ = case.call(*operands)
    if NATIVE:
        assert {t.data_ptr() for t in saved} == {o.data_ptr() for o in operands}
    assert z.data_ptr() not in {t.data_ptr() for t in saved}
