"""Forward-mode derivatives of attention: values, one operand alone, gradients beside them as in MeanFlow training."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import peak_memory
from dgm_kernels import attention, masks, positions, use_backend
from tests.attention_cases import (
    BACKENDS,
    CASES,
    HEAD_DIMS,
    NATIVE,
    OPTION_CASES,
    PLAIN,
    SIZES,
    SMALL_SIZE,
    SOME_CASES,
    AttentionCase,
    Size,
    causal_case,
)
from tests.cases import DTYPES
from tests.contract import (
    assert_bitwise_repeatable,
    assert_parity,
    assert_threads_agree,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)


def cast(operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach() if t.dtype == torch.bool else t.detach().to(dtype) for t in operands]


def derivative(
    function: Callable[..., Any], operands: Sequence[Tensor], tangents: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Of the result and lse along the tangents of q, k and v; eager's by the math path, the only one that has it."""
    given, along = cast(operands, dtype), cast(tangents, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        primal, tangent = torch.func.jvp(lambda *qkv: function(*qkv, *given[3:]), tuple(given[:3]), tuple(along))
    return [*primal, *tangent]


def check_parity(case: AttentionCase, size: Size, dtype: torch.dtype, backend: str) -> None:
    operands = case.make(size, dtype)
    tangents = [torch.randn(t.shape).to(dtype) for t in operands[:3]]
    exact = derivative(case.call_eager, operands, tangents, torch.float64)
    eager = derivative(case.call_eager, operands, tangents, dtype)
    with use_backend(backend):
        actual = derivative(case.call, operands, tangents, dtype)
        plain = case.call(*cast(operands, dtype))
    # The result and lse are those of the call without a derivative, whose parity tests/test_attention.py asserts.
    torch.testing.assert_close(actual[:2], list(plain), rtol=0, atol=0)
    for ours, theirs, best, tiny in zip(actual[2:], eager[2:], exact[2:], slack(case, exact, dtype), strict=True):
        assert_parity(ours, theirs, best, tiny=tiny)


def slack(case: AttentionCase, exact: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """What may come on top of eager's error, for the tangents of the result and of lse.

    Kernels read the result and lse as they were stored, each rounded once: so is what they are multiplied by. With
    ``O' = P S' V - m O + P V'`` and ``P = exp(S - lse)``, the rounding of O counts m times, that of lse as a share. In
    16 bits rotated features are rounded, by each in its own way.
    """
    out, lse, tangent, mean = [t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0 for t in exact]
    share = 2 * torch.finfo(torch.float32).eps * lse  # the scores, computed twice, are rounded too
    of_result = torch.finfo(dtype).eps / 2 * mean * out if dtype != torch.float32 else 0.0
    turned = torch.finfo(dtype).eps / 2 if case.rope is not None and dtype != torch.float32 else 0.0
    tiny = [(1e-6 + turned) * max(1.0, value) for value in (tangent, mean)]
    return [tiny[0] + share * (tangent + mean * out) + of_result, tiny[1] + share * mean]


# ---- Values.


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    """The primal and the tangent, of the result and of lse."""
    for size in SIZES:
        check_parity(case, size, torch.float32, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_case
def test_parity_16_bits(case, dtype, backend):
    for size in (SIZES[0], *SIZES[3:6]):
        check_parity(case, size, dtype, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", HEAD_DIMS)
def test_parity_of_head_dims(features, dtype, backend):
    for case in SOME_CASES:
        for values in (features, 80):
            check_parity(case, Size(1, 2, 19, 37, features, values), dtype, backend)


@on_every_backend
@some_cases
def test_dual_numbers_are_func_jvp(case, backend):
    """Also in 16 bits; blind rows have the tangent 0, that of lse too."""
    for dtype in DTYPES:
        operands = case.make(Size(2, 2, 17, 17, 8), dtype)
        tangents = [torch.randn(t.shape).to(dtype) for t in operands[:3]]
        with use_backend(backend):
            expected = derivative(case.call, operands, tangents, dtype)
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, d) for t, d in zip(operands, tangents, strict=False)]
                outputs = [forward_ad.unpack_dual(y) for y in case.call(*duals, *operands[3:])]
        actual = [y.primal for y in outputs] + [y.tangent for y in outputs]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        blind = expected[1] == -torch.inf
        assert not expected[2][blind].any() and not expected[3][blind].any()


@on_every_backend
@some_cases
def test_tangents_of_some_operands_alone(case, backend):
    """Every subset of q, k and v: that of the others is 0."""
    operands = case.make(SMALL_SIZE)
    tangents = [torch.randn(t.shape) for t in operands[:3]]
    with use_backend(backend):
        for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            full = [d if index in chosen else torch.zeros_like(d) for index, d in enumerate(tangents)]
            expected = derivative(case.call, operands, full, torch.float32)

            def of_some(*some: Tensor, chosen: tuple[int, ...] = chosen) -> Any:
                given = list(operands)
                for index, value in zip(chosen, some, strict=True):
                    given[index] = value
                return case.call(*given)

            primals, along = (tuple(t[index] for index in chosen) for t in (operands, tangents))
            primal, tangent = torch.func.jvp(of_some, primals, along)
            torch.testing.assert_close([*primal, *tangent], expected)


@on_every_backend
def test_tangents_of_any_layout(backend):
    """Expanded, transposed, with gaps, and of q, k and v that lie otherwise than they do."""
    operands = [torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3)]
    tangents = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    tangents[0] = torch.randn(2, 3, 1, 8).expand(2, 3, 5, 8)
    with use_backend(backend):
        expected = derivative(PLAIN.call, operands, [t.contiguous() for t in tangents], torch.float32)
        for arrange in (
            lambda t: t,
            lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
            lambda t: torch.full((*t.shape, 2), torch.nan)[..., 0].copy_(t),
        ):
            actual = derivative(PLAIN.call, operands, [arrange(t) for t in tangents], torch.float32)
            torch.testing.assert_close(actual, expected)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable(dtype, backend):
    operands = AttentionCase("causal", mask=causal_case(0)).make(Size(2, 2, 70, 70, 24), dtype)
    tangents = [torch.randn(t.shape) for t in operands]
    with use_backend(backend):
        assert_bitwise_repeatable(lambda: derivative(PLAIN.call, operands, tangents, dtype))


@pytest.mark.parametrize("backend", NATIVE)
def test_the_number_of_threads_changes_no_bit(backend, thread_counts):
    operands = SOME_CASES[2].make(Size(2, 4, 259, 259, 24))
    tangents = [torch.randn(t.shape) for t in operands]
    with use_backend(backend):
        assert_threads_agree(lambda: derivative(SOME_CASES[2].call, operands, tangents, torch.float32), thread_counts)


@pytest.mark.parametrize("backend", NATIVE)
def test_memory_is_linear(backend):
    """Of 4096 tokens: the result, its tangent and lse, and no matrix of scores, which would be 64 MB."""
    operands = [torch.randn(1, 1, 4096, 16) for _ in range(3)]

    def run() -> Any:
        return torch.func.jvp(lambda *qkv: attention(*qkv, mask=masks.causal()), tuple(operands), tuple(operands))

    with use_backend(backend):
        run()
        assert peak_memory(run, torch.device("cpu")) < 4 << 20


# ---- Tangents of what else has some.


@pytest.mark.parametrize("case", [case for case in OPTION_CASES if sum(case.differentiable) > 3], ids=str)
def test_tangents_of_masks_and_biases(case):
    """Without a backend forced they are not lost: along the bias alone, and along everything."""
    operands = case.make(Size(1, 2, 7, 7, 8))
    tangents = [torch.randn(t.shape) for t in operands]

    def along(function: Callable[..., Any], first: int, dtype: torch.dtype) -> list[Tensor]:
        given, directions = cast(operands, dtype), cast(tangents, dtype)
        chosen = [i for i in range(first, len(given)) if case.differentiable[i]]

        def of_chosen(*values: Tensor) -> Any:
            changed = dict(zip(chosen, values, strict=True))
            return function(*(changed.get(i, t) for i, t in enumerate(given)))

        with sdpa_kernel(SDPBackend.MATH):
            _, tangent = torch.func.jvp(
                of_chosen, tuple(given[i] for i in chosen), tuple(directions[i] for i in chosen)
            )
        return [t.double() for t in tangent]

    for first in (0, 3):
        expected = along(case.call_eager, first, torch.float64)
        assert expected[0].abs().max() > 0.01
        torch.testing.assert_close(along(case.call, first, torch.float32), expected, rtol=1e-4, atol=1e-5)


def test_tangents_of_slopes_and_of_a_rotary_table():
    """By the reference, which is chosen for them."""
    q, k, v = (torch.randn(1, 2, 7, 8) for _ in range(3))
    slopes, table = positions.alibi(2).slopes, positions.rotary(7, 8).table
    for function, value in (
        (lambda s: attention(q, k, v, bias=positions.ALiBi(s)), slopes),
        (lambda t: attention(q, k, v, rope=positions.Rotary(t)), table),
    ):
        direction = torch.randn(value.shape)
        _, tangent = torch.func.jvp(function, (value,), (direction,))
        step = 1e-2 * direction
        difference = (function(value + step) - function(value - step)) / 2e-2
        assert tangent.abs().max() > 0.01
        torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-3)


# ---- Gradients beside forward mode.


def network(x: Tensor, time: Tensor, weights: Sequence[Tensor], act: Callable[..., Tensor]) -> Tensor:
    """One layer of attention with its projections, and time added to its input."""
    hidden = x + time[:, None, None].sin()
    q, k, v = (hidden @ weights[0]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return act(q, k, v).transpose(1, 2).flatten(2) @ weights[1]


def eager_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def meanflow_gradients(act: Callable[..., Tensor], dtype: torch.dtype, detach: bool) -> list[Tensor]:
    """Of ``(u - sg(v - (t - r) du/dt))^2``, as MeanFlow trains: du/dt by jvp, the gradient through u beside it."""
    generator = torch.Generator().manual_seed(3)
    x, velocity = (torch.randn(3, 11, 16, generator=generator).to(dtype) for _ in range(2))
    t = torch.rand(3, generator=generator).to(dtype)
    shapes = ((16, 48), (16, 16))
    weights = [(torch.randn(s, generator=generator) / 4).to(dtype).requires_grad_() for s in shapes]
    u, slope = torch.func.jvp(lambda x, t: network(x, t, weights, act), (x, t), (velocity, torch.ones_like(t)))
    target = velocity - 0.5 * (slope.detach() if detach else slope)
    loss = (u - target).square().mean()
    loss.backward()
    return [loss.detach(), slope.detach(), *(w.grad for w in weights if w.grad is not None)]


@on_every_backend
@pytest.mark.parametrize("detach", [True, False])
def test_meanflow(detach, backend):
    """Gradients of parameters through the primal, and through the tangent too."""
    with use_backend(backend):
        actual = meanflow_gradients(lambda *qkv: attention(*qkv, mask=masks.causal()), torch.float32, detach)
    expected = meanflow_gradients(eager_causal, torch.float64, detach)
    assert len(actual) == 4
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@on_every_backend
@some_cases
def test_gradients_of_the_primal_and_of_the_tangent(case, backend):
    """Each by itself and both together, of q, k, v and of their tangents."""
    operands, size = case.make(SMALL_SIZE), len(SOME_CASES[0].names)
    tangents = [torch.randn(t.shape) for t in operands[:size]]

    def grads(function: Callable[..., Any], dtype: torch.dtype, parts: slice) -> list[Tensor]:
        given, along = cast(operands, dtype), cast(tangents, dtype)
        leaves = [t.requires_grad_() for t in (*given[:size], *along)]
        with sdpa_kernel(SDPBackend.MATH):
            primal, tangent = torch.func.jvp(
                lambda *qkv: function(*qkv, *given[size:]), *map(tuple, (given[:size], along))
            )
        outputs = [y.masked_fill(y == -torch.inf, 0.0) for y in (*primal, *tangent)][parts]
        loss = sum((y * torch.linspace(-1, 2, y.numel()).view(y.shape).to(dtype)).sin().sum() for y in outputs)
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    for parts in (slice(0, 2), slice(2, 3), slice(3, 4), slice(0, 4)):
        with use_backend(backend):
            actual = grads(case.call, torch.float32, parts)
        for a, e in zip(actual, grads(case.call, torch.float64, parts), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def derivative_in_graph(function: Callable[..., Any], leaves: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """The result and its tangent, by torch.func.jvp: dual numbers of PyTorch's softmax do not run backward."""
    with sdpa_kernel(SDPBackend.MATH):
        primal, tangent = torch.func.jvp(lambda *qkv: function(*qkv)[0], tuple(leaves), tuple(tangents))
    return [primal, tangent]


@on_every_backend
def test_dual_numbers_that_need_gradients(backend):
    """``loss.backward()`` within a dual level, of primal and tangent."""
    operands = PLAIN.make(SMALL_SIZE)
    tangents = [torch.randn(t.shape) for t in operands]
    leaves = [t.clone().requires_grad_() for t in operands]
    with use_backend(backend), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, tangents, strict=True)]
        primal, tangent = forward_ad.unpack_dual(PLAIN.call(*duals)[0])
        (primal.sin().sum() + tangent.square().sum()).backward()
    wide = [t.double().requires_grad_() for t in operands]
    primal, tangent = derivative_in_graph(PLAIN.call_eager, wide, [d.double() for d in tangents])
    expected = torch.autograd.grad(primal.sin().sum() + tangent.square().sum(), wide)
    torch.testing.assert_close([t.grad.double() for t in leaves], list(expected), rtol=1e-4, atol=1e-4)


@on_every_backend
def test_functional_meanflow(backend):
    """``torch.func.grad`` of a loss that has a jvp in it, and a jvp of a gradient; some operands are constant."""
    x, velocity, k = (torch.randn(2, 2, 7, 8) for _ in range(3))

    def loss(w: Tensor, x: Tensor, velocity: Tensor, k: Tensor, act: Callable[..., Tensor]) -> Tensor:
        u, slope = torch.func.jvp(lambda x: act(x * w, k, x), (x,), (velocity,))
        return (u + slope).square().mean()

    def exact(w: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return loss(w, x.double(), velocity.double(), k.double(), F.scaled_dot_product_attention)

    w = torch.rand(8)
    expected = torch.func.grad(exact)(w.double())
    with use_backend(backend):
        actual = torch.func.grad(loss)(w, x, velocity, k, attention)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
        gradient = torch.func.grad(lambda x: attention(x, k, k).square().sum())
        _, actual = torch.func.jvp(gradient, (x,), (velocity,))
    of_squares = lambda x: F.scaled_dot_product_attention(x, k.double(), k.double()).square().sum()  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.hvp(of_squares, x.double(), velocity.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@on_every_backend
def test_learned_biases_within_a_jvp(backend):
    """A table that a bias is looked up in has its gradient, or a native backend that is forced refuses."""
    x, table = torch.randn(1, 2, 7, 8), torch.randn(2, 13, requires_grad=True)
    index = torch.arange(7)[:, None] - torch.arange(7) + 6

    def run() -> Tensor:
        u, slope = torch.func.jvp(lambda x: attention(x, x, x, bias=table[:, index]), (x,), (x.sin(),))
        return (u + slope).square().sum()

    if backend in NATIVE:
        with use_backend(backend), pytest.raises(ValueError, match="bias with a derivative"):
            run()
        return
    (actual,) = torch.autograd.grad(run(), table)
    step = torch.randn(2, 13, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            table.add_(sign * 1e-2 * step)
            ends.append(run())
            table.sub_(sign * 1e-2 * step)
    torch.testing.assert_close((actual * step).sum(), (ends[0] - ends[1]) / 2e-2, rtol=1e-2, atol=1e-2)


@on_every_backend
def test_no_graph_without_gradients(backend):
    """Under no_grad, and of operands that need none."""
    operands = PLAIN.make(SMALL_SIZE)
    with use_backend(backend):
        for leaves, context in (
            (operands, torch.enable_grad()),
            ([t.clone().requires_grad_() for t in operands], torch.no_grad()),
        ):
            with context:
                primal, tangent = torch.func.jvp(lambda *qkv: attention(*qkv), tuple(leaves), tuple(operands))
            assert not primal.requires_grad and not tangent.requires_grad


# ---- With other transforms, which the reference takes.


def test_an_exact_divergence():
    """The trace of the Jacobian, by a jvp for each direction, by vmap over them, and by reverse mode."""
    x = torch.randn(1, 1, 3, 4)
    flow = lambda x: attention(x, x.sin(), x.cos(), mask=masks.causal())  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x), x.double()).view(12, 12)
    basis = torch.eye(12).view(12, *x.shape)
    one_by_one = sum((torch.func.jvp(flow, (x,), (e,))[1] * e).sum() for e in basis)
    together = torch.func.vmap(lambda e: (torch.func.jvp(flow, (x,), (e,))[1] * e).sum())(basis).sum()
    for trace in (one_by_one, together):
        torch.testing.assert_close(trace.double(), jacobian.trace(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jacfwd(flow)(x).view(12, 12).double(), jacobian, rtol=1e-4, atol=1e-5)


def test_a_jvp_of_a_jvp_and_of_a_gradient():
    """Second derivatives in forward mode, and forward over reverse: Hessian times vector."""
    x, along = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    total = lambda x: attention(x, x, x).square().sum()  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        exact = lambda x: F.scaled_dot_product_attention(x, x, x).square().sum()  # noqa: E731
        wide, direction = x.double(), along.double()
        _, expected = torch.autograd.functional.hvp(exact, wide, direction)
    _, actual = torch.func.jvp(torch.func.grad(total), (x,), (along,))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    of_jvp = torch.func.grad(lambda x: torch.func.jvp(total, (x,), (along,))[1])(x)
    torch.testing.assert_close(of_jvp.double(), expected, rtol=1e-4, atol=1e-4)
    inner = lambda x: torch.func.jvp(total, (x,), (along,))[1]  # noqa: E731
    _, twice = torch.func.jvp(inner, (x,), (along,))
    torch.testing.assert_close(twice.double(), (expected * direction).sum(), rtol=1e-4, atol=1e-3)
