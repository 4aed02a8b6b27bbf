"""Gate, mixture of discretized logistics and categorical distribution: values, gradients and the contract of an op."""

import pytest
import torch
from torch import Tensor

from dgm_kernels import categorical_log_prob, discretized_logistic_mixture, gated_activation, use_backend
from tests.cases import DTYPES
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_close_by_size,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_parity,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    expanded_and_dense,
    in_every_layout,
    results_of_instruction_sets,
    stacked,
    strided_variants,
)
from tests.pixel_cases import (
    BACKENDS,
    CASES,
    CATEGORICAL_CASES,
    EMPTY_SIZES,
    GATE_CASES,
    MIXTURE_CASES,
    NATIVE,
    SIZES,
    SMALL_SIZE,
    PixelCase,
    opcheck_cases,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
in_16_bits = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)


# ---- Values and gradients


def check_parity(case: PixelCase, size: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """At most twice as far off as eager on the same numbers: for native backends in float32, rounded to the result."""
    operands = case.make(size, dtype)
    with use_backend(backend):
        actual = case.results(case.call, operands)
    wide = operands if backend == "reference" else [o.float() if o.is_floating_point() else o for o in operands]
    exact = case.results(case.call_eager, [o.double() if o.is_floating_point() else o for o in operands])
    eager = [e.to(a.dtype) for e, a in zip(case.results(case.call_eager, wide), actual, strict=True)]
    for a, e, x in zip(actual, eager, exact, strict=True):
        rounding = max(1e-6, 0.5 * torch.finfo(a.dtype).eps)
        assert_parity(a, e, x, tiny=rounding * max(1.0, float(x.abs().max()) if x.numel() else 0.0))


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    for size in SIZES:
        check_parity(case, size, torch.float32, backend)


@on_every_backend
@in_16_bits
@every_case
def test_parity_16_bits(case, dtype, backend):
    for size in SIZES[1:6]:
        check_parity(case, size, dtype, backend)


@every_case
def test_float64(case):
    """The reference, against the formula as a user writes it."""
    operands = case.make(SMALL_SIZE, torch.float64)
    torch.testing.assert_close(case.results(case.call, operands), case.results(case.call_eager, operands))


@on_every_backend
@every_case
def test_empty_sizes(case, backend):
    for size in EMPTY_SIZES:
        operands = case.make(size)
        with use_backend(backend):
            actual = case.results(case.call, operands)
        expected = case.results(case.call_eager, operands)
        assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
        torch.testing.assert_close(actual, expected)  # the sums of nothing over the pixels are 0


@every_case
def test_gradcheck_and_gradgradcheck(case):
    operands = case.make((2, 3), torch.float64)
    operands = [o.requires_grad_(o.is_floating_point()) for o in operands]  # of x in a mixture too
    if case in MIXTURE_CASES:  # steps across the ends of the range are no derivative
        operands[0] = (0.9 * operands[0]).detach()
        operands[0].requires_grad_("colours" in case.name and "levels" not in case.name)
    assert torch.autograd.gradcheck(case.call, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.call, operands, fast_mode=True)


@on_every_backend
@every_case
def test_second_derivatives_in_float32(case, backend):
    """The gradient of a sum of squares of gradients."""

    def second(function, operands: list[Tensor]) -> list[Tensor]:
        leaves = [o.detach().requires_grad_(i in case.differentiable) for i, o in enumerate(operands)]
        wanted = [leaves[i] for i in case.differentiable]
        first = torch.autograd.grad(function(*leaves).sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        actual = second(case.call, operands)
    expected = second(case.call_eager, [o.double() if o.is_floating_point() else o for o in operands])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * max(1.0, float(e.abs().max())))


@on_every_backend
@every_case
def test_incoming_gradients_of_any_layout(case, backend):
    operands = case.make(SMALL_SIZE, grad=True)
    with use_backend(backend):
        y = case.call(*operands)
        leaves = [operands[i] for i in case.differentiable]
        for gradient in (torch.randn_like(y), torch.ones(()).expand_as(y)):
            expected = torch.autograd.grad(y, leaves, gradient.clone(), retain_graph=True)
            for variant in (gradient, *strided_variants(gradient)):
                actual = torch.autograd.grad(y, leaves, variant, retain_graph=True)
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("case", GATE_CASES[1:4], ids=str)
def test_only_one_operand_needs_a_gradient(case, backend):
    for wanted in (0, 1):
        operands = case.make(SMALL_SIZE)
        operands[wanted].requires_grad_()
        with use_backend(backend):
            case.call(*operands).square().sum().backward()
        exact = [o.detach().double() for o in operands]
        exact[wanted].requires_grad_()
        case.call_eager(*exact).square().sum().backward()
        torch.testing.assert_close(operands[wanted].grad.double(), exact[wanted].grad, rtol=1e-4, atol=1e-5)
        assert operands[1 - wanted].grad is None


@on_every_backend
def test_a_gradient_of_x_in_a_mixture(backend):
    """No native kernel has it: such a call takes the reference, and says so where another backend is forced."""
    x, parameters = MIXTURE_CASES[0].make(SMALL_SIZE)
    x.requires_grad_()
    discretized_logistic_mixture(x, parameters).sum().backward()
    assert bool(x.grad.abs().sum() > 0)
    if backend != "reference":
        with use_backend(backend), pytest.raises(ValueError, match="x with a gradient"):
            discretized_logistic_mixture(x, parameters)


# ---- Layouts, threads, repeatability


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: what contiguous operands give."""
    tolerance = 0.0 if backend in NATIVE else 1e-5
    for size in ((3, 2, 5), (2, 5)):
        operands = case.make(size)
        with use_backend(backend):
            expected = case.results(case.call, operands)
            for given in in_every_layout(operands):
                torch.testing.assert_close(case.results(case.call, given), expected, rtol=tolerance, atol=tolerance)


@on_every_backend
@every_case
def test_expanded_operands(case, backend):
    """One value for all entries of a dimension, without a copy of it in memory."""
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        for wide, dense in expanded_and_dense(operands):
            actual, expected = case.results(case.call, wide), case.results(case.call, dense)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@on_every_backend
@every_case
def test_inputs_unchanged_and_repeatable(case, backend):
    operands = case.make((2, 7, 9))
    with use_backend(backend):
        with assert_inputs_unchanged(*operands):
            case.results(case.call, operands)
        assert_bitwise_repeatable(lambda: case.results(case.call, operands))


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Few long samples, many short ones: however the work is cut."""
    for size in ((2, 60, 50), (999, 2), (1, 20000)):
        if max(o.numel() for o in case.draw((1, 1))) * size[-1] > 4_000_000:
            continue
        operands = case.make(size)
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: case.results(case.call, operands), thread_counts)


@on_every_backend
@every_case
def test_samples_do_not_depend_on_their_batch(case, backend):
    """Sample by sample the bits are those of the batch (the reference: PyTorch's sums may be cut differently)."""
    operands = case.make((5, 13))
    if any(o.shape[0] != 5 for o in operands):
        return  # levels first: there is no batch dimension to take samples from
    tolerance = 0.0 if backend in NATIVE else 1e-6
    with use_backend(backend):
        together = case.results(case.call, operands)[0]
        for sample in range(5):
            alone = case.call(*(o[sample : sample + 1] for o in operands))
            torch.testing.assert_close(alone, together[sample : sample + 1], rtol=tolerance, atol=tolerance)


# ---- torch.library, torch.compile, autocast, transforms


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("index", range(len(opcheck_cases())))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


SOME_CASES = (*GATE_CASES[1::3], *MIXTURE_CASES[:3:2], *CATEGORICAL_CASES[:1], CATEGORICAL_CASES[5])


@on_every_backend
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_compiles_once_for_two_sizes(case, backend):
    with use_backend(backend):
        assert_compiles(
            case.call, case.make((4, 5, 6), grad=True), case.make((7, 8, 11), grad=True), backend="aot_eager"
        )


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_compiles_with_inductor(backend):
    """Gate and mixture behind a layer, in one graph."""
    weight = torch.randn(30, 4, 1)

    def loss(x: Tensor, hidden: Tensor) -> Tensor:
        return -discretized_logistic_mixture(x, torch.nn.functional.conv1d(gated_activation(hidden), weight)).mean()

    def args(batch: int) -> list[Tensor]:
        return [MIXTURE_CASES[0].make((batch, 5))[0], torch.randn(batch, 8, 5, requires_grad=True)]

    with use_backend(backend):
        assert_compiles(loss, args(6), args(7))


@on_every_backend
@every_case
def test_autocast(case, backend):
    """Autocast changes nothing: what a 16-bit layer gives is taken as it is, and log-probabilities are float32."""
    for dtype in (torch.float32, torch.bfloat16):
        operands = case.make(SMALL_SIZE, dtype)
        with use_backend(backend):
            expected = case.call(*operands)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(case.call(*operands), expected, rtol=0, atol=0)
            assert expected.dtype == (dtype if case.one_dtype else torch.float32)


@on_every_backend
def test_autocast_promotes_a_condition(backend):
    """A layer's bfloat16 output with a float32 condition: float32, as PyTorch adds them."""
    x, condition = GATE_CASES[1].make(SMALL_SIZE)
    with use_backend(backend):
        assert_autocast_like(gated_activation, GATE_CASES[1].call_eager, (x.bfloat16(), condition))


@every_case
def test_vmap(case):
    operands = stacked(lambda: case.make((2, 5)))
    assert_vmap(case.call, operands)
    assert_vmap_of_one(case.call, operands, 0)


@every_case
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd."""
    operands = case.make((2, 3), torch.float64)
    wanted = [operands[i] for i in case.differentiable]

    def call(*wanted: Tensor) -> Tensor:
        given = dict(zip(case.differentiable, wanted, strict=True))
        return case.call(*(given.get(i, o) for i, o in enumerate(operands)))

    assert_functional_transforms(call, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_tensors_give_shapes(case):
    operands = [o.to("meta") for o in case.make(SMALL_SIZE)]
    y = case.call(*operands)
    expected = case.call_eager(*case.make(SMALL_SIZE))
    assert y.device.type == "meta" and y.shape == expected.shape and y.dtype == expected.dtype


def test_what_takes_no_gradient_records_none():
    for case in (GATE_CASES[1], MIXTURE_CASES[0], CATEGORICAL_CASES[0]):
        assert not case.call(*case.make(SMALL_SIZE)).requires_grad
        with torch.no_grad():
            assert not case.call(*case.make(SMALL_SIZE, grad=True)).requires_grad


@pytest.mark.parametrize("function", [gated_activation, categorical_log_prob])
def test_torch_fx_records_the_call(function):
    graph = torch.fx.symbolic_trace(lambda x, y: function(x, y)).graph
    assert function in [node.target for node in graph.nodes if node.op == "call_function"]


ISA_SCRIPT = """
from tests.pixel_cases import CASES
outputs = [CASES[index].results(CASES[index].call, operands) for index, operands in torch.load(sys.argv[1])]
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    """On the same operands: PyTorch's own random numbers differ a little between instruction sets."""
    sizes = ((3, 38), (2, 7, 9), (70,))
    made = [(i, case.make(size, dtype)) for i, case in enumerate(CASES) for dtype in DTYPES for size in sizes]
    torch.save(made, tmp_path / "operands")
    results = results_of_instruction_sets(ISA_SCRIPT, tmp_path, str(tmp_path / "operands"))
    for outputs in results.values():
        for ours, theirs in zip(outputs, results["default"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert_close_by_size(a, b, max(1e-5, torch.finfo(a.dtype).eps))
