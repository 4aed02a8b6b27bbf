"""The rest of the contract of the density op: layouts, threads, memory, compilation, transforms, instruction sets."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.timing import peak_memory
from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_em_statistics, mixture_log_prob, mmd, use_backend
from dgm_kernels.density import op
from tests.cases import BACKENDS, NATIVE
from tests.contract import (
    assert_bitwise_repeatable,
    assert_close_by_size,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_instruction_sets_agree,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    expanded_and_dense,
    in_every_layout,
    stacked,
    strided_variants,
    tangents_of,
)
from tests.density_cases import (
    CASES,
    DENOISER_CASES,
    DIFFERENTIABLE_CASES,
    EM_CASES,
    KDE_CASES,
    MIXTURE_CASES,
    MMD_CASES,
    DensityCase,
    Sizes,
    as_tuple,
)
from tests.gradients import with_grads

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_native = pytest.mark.parametrize("backend", NATIVE)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def results(case: DensityCase, operands: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the operands that have one on every backend."""
    return with_grads(case.call, operands, case.trained)


def _overload_arguments() -> list[Any]:
    n, m, d = 7, 5, 3
    x, y, offset, grad = torch.randn(n, d), torch.randn(m, d), torch.randn(m), torch.randn(n)
    shared, spherical, diagonal = 0.5 + torch.rand(1), 0.5 + torch.rand(m), 0.5 + torch.rand(m, d)
    full, q = torch.diag_embed(diagonal) + torch.randn(m, d, d).tril(-1), 0.5 + torch.rand(n)
    leaves = lambda *tensors: [tensor.clone().requires_grad_() for tensor in tensors]  # noqa: E731
    calls: list[Any] = []
    for inv, shift, number in ((shared, torch.zeros(1), q), (spherical, offset, None), (diagonal, offset, None)):
        lx, ly, linv, lshift = leaves(x, y, inv, shift)
        calls.append((op.log_prob, (lx, ly, linv, number, lshift, False)))
    lx, ly, linv, lshift = leaves(x, y, full, offset)
    calls += [
        (op.log_prob, (lx, ly, linv, None, lshift, True)),
        (op.log_prob, (x, y, diagonal, None, offset, True)),
        (op.moments, (grad, grad, x, y, spherical, None, offset)),
        (op.moments, (grad, grad, x, y, diagonal, None, offset)),
        (op.moments, (grad, grad, x, y, full, None, offset)),
        (op.grad_x, (grad, grad, x, y, shared, q, torch.zeros(1))),
        (op.grad_x, (grad, grad, x, y, full, None, offset)),
        (op.mean, (x.clone().requires_grad_(), y, q, offset)),
        (op.mean_grad, (x, grad, x, grad, x, y, q, offset)),
        (op.kernel_sum, (*leaves(x, y), 0, [0.5, 2.0], False)),
        (op.kernel_sum, (*leaves(x, x), 1, [0.3, 1.0, 3.0], True)),
        (op.kernel_sum_grad, (x, y, 0, [0.5, 2.0], False)),
        (op.kernel_sum_grad, (x, x, 1, [0.3, 1.0, 3.0], True)),
    ]
    return calls


@on_native
@pytest.mark.parametrize("index", range(16))
def test_opcheck(backend, index):
    overloads, args = _overload_arguments()[index]
    torch.library.opcheck(overloads[backend], args)


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: the outputs and gradients of contiguous operands."""
    operands = case.make(Sizes(9, 5, 3))
    with use_backend(backend):
        expected = results(case, operands)
        for given in in_every_layout(operands):
            # Products and sums by PyTorch around the kernels depend on the layout.
            assert_close_by_size(results(case, given), expected, 2e-6)


@on_native
@pytest.mark.parametrize("case", [*MIXTURE_CASES, *KDE_CASES, *DENOISER_CASES], ids=str)
def test_the_layout_of_points_and_means_changes_no_bit(case, backend):
    operands = case.make(Sizes(9, 5, 3))
    with use_backend(backend):
        expected = as_tuple(case.call(*operands))
        for index in range(2):
            for variant in strided_variants(operands[index]):
                actual = as_tuple(case.call(*operands[:index], variant, *operands[index + 1 :]))
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
@every_case
def test_expanded_operands(case, backend):
    """One point, one mean or one number for all, without a copy of it in memory."""
    operands = case.make(Sizes(9, 5, 3))
    with use_backend(backend):
        indices = [i for i, name in enumerate(case.names) if name not in ("weights", "covariance", "scale_tril")]
        for wide, dense in expanded_and_dense(operands, indices):
            actual, expected = as_tuple(case.call(*wide)), as_tuple(case.call(*dense))
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@on_every_backend
@every_case
def test_inputs_unchanged_and_repeatable(case, backend):
    operands = case.make(Sizes(113, 31, 3))
    with use_backend(backend):
        with assert_inputs_unchanged(*operands):
            results(case, operands)
        assert_bitwise_repeatable(lambda: results(case, operands))


@on_native
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Many points and few components, the other way round, and many of both: however the work is cut."""
    for sizes in (Sizes(1023, 3, 2), Sizes(3, 1023, 2), Sizes(700, 300, 5)):
        if case.is_full and sizes.features == 5:
            sizes = Sizes(300, 50, 5)
        operands = case.make(sizes)
        # Gradients of responsibilities are products by PyTorch, whose order of summing depends on the threads.
        tolerance = 2e-6 if case.options.get("return_responsibilities") else 0.0
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: results(case, operands), thread_counts, tolerance)


@on_native
def test_what_else_is_in_the_batch_changes_no_bit(backend):
    """A point's density and posterior mean are those of a call on it with fewer others."""
    means, scale = torch.randn(113, 16), 0.5 + torch.rand(113, 16)
    x = torch.randn(1023, 16)
    calls = (
        lambda x: mixture_log_prob(x, means, scale=scale),
        lambda x: mixture_log_prob(x, means, scale=scale[:, 0], return_responsibilities=True),
        lambda x: kde_log_prob(x, means, 0.5),
        lambda x: empirical_denoiser(x, means, 0.8, 1.5),
    )
    with use_backend(backend):
        for call in calls:
            whole = as_tuple(call(x))
            for part in (slice(0, 1), slice(5, 64), slice(1000, 1023)):
                for actual, expected in zip(as_tuple(call(x[part])), whole, strict=True):
                    torch.testing.assert_close(actual, expected[part], rtol=2e-6, atol=2e-6)


PAIRS = 3000
LINEAR_CASES = (*(c for c in MIXTURE_CASES if not c.options), *EM_CASES, *KDE_CASES, *DENOISER_CASES, *MMD_CASES)


@on_native
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_memory_is_linear(case, backend):
    """The peak of a call, forward and backward, is far below the matrix of all pairs, 36 MB."""
    sizes = Sizes(PAIRS, PAIRS, 4)
    operands = case.make(sizes)
    with use_backend(backend):
        peak = peak_memory(functools.partial(results, case, operands), torch.device("cpu"))
    assert peak < 0.1 * 4 * PAIRS**2, f"{peak / 2**20:.1f} MiB"


COMPILED = (
    *MIXTURE_CASES[:1],
    *MIXTURE_CASES[4:6],
    *MIXTURE_CASES[8:],
    *KDE_CASES[:1],
    *DENOISER_CASES[5:],
    *MMD_CASES[:3:2],
)


@on_native
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_once_for_two_sizes(case, backend):
    grad = case not in DENOISER_CASES
    small, large = case.make(Sizes(5, 4, 3), grad=grad), case.make(Sizes(9, 7, 6), grad=grad)
    if not grad:
        small[0].requires_grad_()
        large[0].requires_grad_()
    with use_backend(backend):
        assert_compiles(case.call, small, large, backend="aot_eager")


@pytest.mark.parametrize("case", [MIXTURE_CASES[4], MIXTURE_CASES[6], DENOISER_CASES[6], MMD_CASES[0]], ids=str)
def test_the_reference_compiles(case):
    with use_backend("reference"):
        small, large = case.make(Sizes(5, 4, 3), grad=True), case.make(Sizes(9, 7, 6), grad=True)
        assert_compiles(case.call, small, large, backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_a_mixture_model_compiles_with_inductor(backend):
    """Features of a network and a mixture over them, in one graph."""
    net = nn.Linear(3, 2)
    means, log_scale, logits = torch.randn(5, 2), 0.1 * torch.randn(5, 2), torch.randn(5)

    def loss(x: Tensor, means: Tensor, log_scale: Tensor, logits: Tensor) -> Tensor:
        return -mixture_log_prob(net(x), means, scale=log_scale.exp(), logits=logits).mean()

    def args(batch: int) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in (torch.randn(batch, 3), means, log_scale, logits)]

    with use_backend(backend):
        assert_compiles(loss, args(4), args(9))


@pytest.mark.parametrize("case", EM_CASES[:3], ids=str)
@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_statistics_compile(case, backend):
    with use_backend(backend):
        assert_compiles(case.call, case.make(Sizes(5, 4, 3)), case.make(Sizes(9, 7, 6)), backend="aot_eager")


@on_every_backend
@every_case
def test_autocast_changes_nothing(case, backend):
    """Distances in bfloat16 would be no distances: all is in float32, as PyTorch does with ``logsumexp`` and ``cdist``.

    The bits are those without autocast; a network's output in bfloat16 is taken as it is.
    """
    operands = case.make(Sizes(9, 5, 3), grad=case.differentiable and case not in DENOISER_CASES)
    with use_backend(backend):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = as_tuple(case.call(*operands))
            leaves = [operand for operand in operands if operand.requires_grad]
            seeds = [torch.ones_like(output) for output in outputs]
            results.append([*outputs, *(torch.autograd.grad(outputs, leaves, seeds) if leaves else ())])
        assert [t.dtype for t in results[1]] == [torch.float32] * len(results[1])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        net = nn.Linear(3, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = net(operands[0])
            assert hidden.dtype == torch.bfloat16
            outputs = as_tuple(case.call(hidden, *operands[1:]))
        first = torch.bfloat16 if case in DENOISER_CASES else torch.float32
        assert [t.dtype for t in outputs] == [first, *[torch.float32] * (len(outputs) - 1)]


@every_case
def test_vmap(case):
    """Over an added dimension of every operand; over that of x alone."""
    sizes = Sizes(6, 5, 3)
    operands = stacked(lambda: case.make(sizes, torch.float64))
    assert_vmap(case.call, operands)
    assert_vmap_of_one(case.call, operands, 0)
    if case in EM_CASES:
        return  # sums over the points, which are not exact to more digits than the tolerance
    single = case.make(sizes)  # float32, which a native backend would take outside of vmap
    assert_vmap(case.call, [torch.stack([single[0], 2 * single[0]]), *single[1:]], (0, *[None] * (len(single) - 1)))


@pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=str)
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd."""
    assert_functional_transforms(case.call_free, case.make(Sizes(6, 5, 3), torch.float64))


def test_the_divergence_of_the_score():
    """The Jacobian of the exact denoiser in one call, by vmap over jacrev: symmetric, and its trace Tweedie's."""
    x, data = torch.randn(6, 3).double(), torch.randn(5, 3).double()
    alpha, sigma = 0.8, 0.6
    denoise = lambda x: empirical_denoiser(x, data, alpha, sigma)  # noqa: E731
    jacobians = torch.func.vmap(torch.func.jacrev(denoise))(x)
    torch.testing.assert_close(jacobians, jacobians.mT)
    r = torch.softmax(-0.5 * ((x[:, None] - alpha * data) / sigma).square().sum(2), 1)
    centred = data - (r @ data)[:, None]
    covariance = torch.einsum("nm,nmd,nme->nde", r, centred, centred)
    torch.testing.assert_close(jacobians, alpha / sigma**2 * covariance)


@pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=str)
def test_forward_mode_in_float32(case):
    """Dual numbers take the reference by themselves."""
    operands = case.make(Sizes(6, 5, 3))
    tangents = [torch.randn_like(operand) for operand in operands]
    if "covariance" in case.names:  # eager's Cholesky factor reads one triangle
        tangents[case.names.index("covariance")] += tangents[case.names.index("covariance")].mT.clone()
    actual, expected = tangents_of(case.call, case.call_eager, operands, tangents)
    assert_close_by_size(actual, expected, 1e-4)


ISA_SCRIPT = """
from tests.density_cases import CASES, DENOISER_CASES, Sizes, as_tuple
outputs = []
for case in CASES:
    for sizes in (Sizes(59, 31, 3), Sizes(33, 70, 33)):
        leaves = case.make(sizes, grad=case.differentiable)
        if case in DENOISER_CASES:
            leaves[1:] = [leaf.detach() for leaf in leaves[1:]]
        result = as_tuple(case.call(*leaves))
        if case.differentiable:
            sum(r.square().sum() for r in result).backward()
        outputs.append([t.detach() for t in result] + [leaf.grad for leaf in leaves if leaf.grad is not None])
"""


@on_native
def test_instruction_sets_agree(backend, tmp_path):
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=5e-5, others=5e-5)


@on_every_backend
def test_a_python_scalar_and_a_tensor_are_the_same_number(backend):
    x, data = torch.randn(9, 3), torch.randn(5, 3)
    with use_backend(backend):
        for bandwidth in (torch.tensor(0.5), torch.tensor(0.5).half(), torch.tensor(0.5, requires_grad=True)):
            expected = kde_log_prob(x, data, 0.5)
            torch.testing.assert_close(kde_log_prob(x, data, bandwidth).detach(), expected, rtol=1e-6, atol=1e-6)
        expected = empirical_denoiser(x, data, 0.5, 0.25)
        for alpha, sigma in ((torch.tensor(0.5), 0.25), (0.5, torch.full((9,), 0.25))):
            torch.testing.assert_close(empirical_denoiser(x, data, alpha, sigma), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(mmd(x, data, bandwidth=1), mmd(x, data, bandwidth=[1.0]))


@on_every_backend
def test_statistics_of_many_points_keep_their_digits(backend):
    """20 000 points: the sums over points are as exact as those of float64 to 1e-5."""
    x, means, scale = torch.randn(20_000, 2), torch.randn(3, 2), 0.5 + torch.rand(3, 2)
    with use_backend(backend):
        actual = mixture_em_statistics(x, means, scale=scale)
    with use_backend("reference"):
        exact = mixture_em_statistics(x.double(), means.double(), scale=scale.double())
    for a, e in zip(actual, exact, strict=True):
        size = float(e.abs().max())
        torch.testing.assert_close(a.double() / size, e / size, rtol=0, atol=5e-6)
    assert float(actual.counts.sum()) == pytest.approx(20_000, rel=1e-6)
