"""The rest of the contract of attention: layouts, threads, compilation, autocast, transforms, memory."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import peak_memory
from dgm_kernels import attention, masks, positions, use_backend
from dgm_kernels.attention import op
from tests.attention_cases import (
    BACKENDS,
    CASES,
    NATIVE,
    SMALL_SIZE,
    SOME_CASES,
    AttentionCase,
    Size,
    finite,
)
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
    expanded_and_dense,
    in_every_layout,
    stacked,
    sum_of_sines,
)
from tests.gradients import with_grads

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)
CPU = torch.device("cpu")


def results(case: AttentionCase, operands: list[Tensor]) -> list[Tensor]:
    """The result and lse, and the gradients of q, k and v."""
    return with_grads(case.call, operands, 3)


# ---- opcheck.


def settings(**options: Any) -> tuple[Any, ...]:
    defaults: dict[str, Any] = dict.fromkeys(op.Settings._fields) | {
        "width": 0,
        "radius": 0,
        "interleaved": False,
        "first": 0,
        "scale": 0.3,
    }
    return tuple((defaults | options).values())


def opcheck_cases() -> dict[str, tuple[dict[str, Any], tuple[Any, ...]]]:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    leaves = lambda *tensors: [t.clone().requires_grad_() for t in tensors]  # noqa: E731
    region = (masks.causal(2) & masks.sliding_window(5)).region(6, 9)
    assert region is not None
    keep, bias = (torch.rand(2, 4, 6, 9) < 0.7), torch.randn(2, 4, 6, 9)
    slopes, rope = positions.alibi(4).slopes, positions.rotary(9, 8).table
    all_of_it = settings(bounds=region.bounds, keep=keep, bias=bias, slopes=slopes, rope=rope, interleaved=True)
    near = settings(bounds=region.bounds, width=3, radius=1)
    out, lse = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6)
    half = [t.bfloat16() for t in (q, k, v)]
    return {
        "plain": (op.attend, (q, k, v, *settings())),
        "with gradients": (op.attend, (*leaves(q, k, v), *settings())),
        "of some": (op.attend, (q, *leaves(k), v, *near)),
        "everything": (op.attend, (*leaves(q, k, v), *all_of_it)),
        "bfloat16": (op.attend, (*leaves(*half), *near)),
        "tokens first": (op.attend, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *settings(first=3))),
        "backward": (op.backward, (out, lse, q, k, v, out, lse, *all_of_it)),
        "backward without lse": (op.backward, (out.bfloat16(), None, *half, out.bfloat16(), lse, *near)),
        "jvp": (op.jvp, (q, k, v, q, k, v, out, lse, *all_of_it)),
        "jvp with gradients": (op.jvp, (*leaves(q, k, v, q, k, v), out, lse, *near)),
        "jvp bfloat16": (op.jvp, (*half, *half, out.bfloat16(), lse, *settings())),
        "decode": (op.decode, (q[:, :, :1].contiguous(), k, v, 1, 7, 0, 0, None, 6, 0.3)),
        "decode with slopes": (op.decode, (q[:, :, :1].contiguous(), k, v, 0, 9, 3, 1, slopes, 8, 0.3)),
    }


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", opcheck_cases())
def test_opcheck(backend, name):
    overloads, args = opcheck_cases()[name]
    torch.library.opcheck(overloads[backend], args)


# ---- Layouts, repeatability, threads.


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout, masks and biases too: the result and the gradients of contiguous operands."""
    operands = case.make(Size(2, 2, 5, 5, 4, 3))
    with use_backend(backend):
        expected = results(case, operands)
        for given in in_every_layout(operands):
            torch.testing.assert_close(results(case, given), expected, rtol=2e-5, atol=2e-5)


@on_every_backend
@some_cases
def test_expanded_operands(case, backend):
    """One sample, head, token or feature for all, without a copy of it in memory."""
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        for wide, dense in expanded_and_dense(operands):
            torch.testing.assert_close(results(case, wide), results(case, dense), rtol=2e-5, atol=2e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_inputs_unchanged_and_repeatable(case, dtype, backend):
    for size in (Size(2, 2, 33, 47, 17), Size(1, 2, 3, 59, 72, 40)):
        operands = case.make(size, dtype)
        with use_backend(backend):
            with assert_inputs_unchanged(*operands):
                results(case, operands)
            assert_bitwise_repeatable(lambda operands=operands: results(case, operands))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@some_cases
def test_the_number_of_threads_changes_no_bit(case, dtype, backend, thread_counts):
    """Many heads, one head of many queries, few queries of many keys: however the work is cut."""
    for size in (Size(6, 4, 70, 70, 16), Size(1, 1, 517, 517, 40), Size(1, 2, 3, 4001, 64)):
        operands = case.make(size, dtype)
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: results(case, operands), thread_counts)


@on_every_backend
@some_cases
def test_samples_do_not_depend_on_their_batch(case, backend):
    """Neither does a head on the heads beside it, nor a query on the queries beside it."""
    operands = case.make(Size(5, 2, 30, 30, 12))
    per_sample = [t.shape[0] == 5 and t.dim() == 4 for t in operands]
    alone = [t[2:3] if own else t for t, own in zip(operands, per_sample, strict=True)]
    with use_backend(backend):
        whole = results(case, operands)
        out, lse = case.call(*alone)
        torch.testing.assert_close([out, lse], [t[2:3] for t in whole[:2]], rtol=1e-5, atol=1e-6)
        q, k, v = operands[:3]
        noisy = q.clone()
        noisy[:, :, 7:] = torch.randn_like(noisy[:, :, 7:])
        changed = case.call(noisy, k, v, *operands[3:])[0]
        torch.testing.assert_close(changed[:, :, :7], whole[0][:, :, :7], rtol=0, atol=0)


@on_every_backend
def test_unusual_extents(backend):
    """Thousands of samples, heads, queries or keys, and a head of a thousand features."""
    for size in (
        *(Size(3000, 1, 2, 3, 4), Size(1, 3000, 2, 3, 4), Size(1, 1, 20000, 2, 3), Size(1, 1, 2, 20000, 3)),
        *(Size(1, 1, 3, 5, 1000), Size(1, 1, 3, 5, 4, 1000), Size(1, 1, 3, 5, 2100, 1500)),
    ):
        operands = AttentionCase("plain").make(size)
        exact = F.scaled_dot_product_attention(*(t.double() for t in operands))
        # Without a backend forced: what native kernels do not take is computed all the same.
        with use_backend("reference" if backend == "reference" else "auto"):
            torch.testing.assert_close(attention(*operands).double(), exact, rtol=1e-5, atol=2e-6)


# ---- torch.compile.

WIDE_ROPE = positions.rotary(64, 8)
COMPILED: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v: attention(q, k, v, return_lse=True),
    "scaled": lambda q, k, v: attention(q, k, v, scale=0.2),
    "causal": lambda q, k, v: attention(q, k, v, mask=masks.causal()),
    "window": lambda q, k, v: attention(q, k, v, mask=masks.sliding_window(4, 1) & masks.prefix(2)),
    "rope": lambda q, k, v: attention(q, k, v, rope=WIDE_ROPE, mask=masks.causal(-1), return_lse=True),
    "tokens first": lambda q, k, v: attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))),
    "three dimensions": lambda q, k, v: attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)),
    "gqa": lambda q, k, v: attention(torch.cat([q, q], 1), k, v, enable_gqa=True, mask=masks.causal()),
}


# No two sizes of a call are equal: torch.compile would expect them to stay so.
def compile_args(size: Size, grad: bool = True) -> list[Tensor]:
    return [t.requires_grad_(grad) for t in AttentionCase("plain").make(size)]


SMALL, LARGE = Size(5, 3, 9, 9, 8, 6), Size(7, 10, 13, 13, 8, 6)


# Tracing the reference takes seconds: of it one call with everything.
COMPILED_ON = [(name, backend) for name in COMPILED for backend in BACKENDS if backend in NATIVE or name == "rope"]


@pytest.mark.parametrize(("name", "backend"), COMPILED_ON)
def test_compiles_once_for_two_sizes(name, backend):
    """Another batch, other heads and lengths; forward and backward."""
    with use_backend(backend):
        assert_compiles(COMPILED[name], compile_args(SMALL), compile_args(LARGE), backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
@pytest.mark.parametrize(
    "mask",
    [masks.raster_2d(3, 4, 1), masks.document([5, 0, 7]), masks.neighborhood_2d(3, 4, 1) & masks.causal()],
    ids=str,
)
def test_compiles_with_masks_of_a_picture(mask, backend):
    """For its number of tokens, with ALiBi of its number of heads; two sizes of the batch."""
    alibi = positions.alibi(2)
    with use_backend(backend):
        args = [compile_args(Size(batch, 2, 12, 12, 8)) for batch in (5, 7)]
        run = lambda q, k, v: attention(q, k, v, mask=mask, bias=alibi, return_lse=True)  # noqa: E731
        assert_compiles(run, *args, backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_compiles_with_tensors_as_masks(backend):
    """A bool mask, and a bias beside it, of two sizes; q, k and v of queries and keys of other lengths."""

    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, mask=seen, bias=bias)

    args = []
    for size in (Size(4, 3, 7, 9, 8, 5), Size(6, 10, 11, 13, 8, 5)):
        scores = (size.batch, 1, size.queries, size.keys)
        args.append([*compile_args(size), torch.rand(scores) < 0.8, torch.randn(size.heads, 1, size.keys)])
    with use_backend(backend):
        assert_compiles(run, *args, backend="aot_eager")


@pytest.mark.parametrize("backend", NATIVE)
def test_compiles_with_inductor(backend):
    """With what surrounds it in one graph."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(attention(F.relu(q), k, v.sin(), mask=masks.causal(), rope=WIDE_ROPE))

    with use_backend(backend):
        assert_compiles(run, compile_args(SMALL), compile_args(LARGE))


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_autocast_in_compiled_code(backend):
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, mask=masks.causal()).float()

    with use_backend(backend):
        assert_compiles(run, compile_args(SMALL), compile_args(LARGE), backend="aot_eager")


# ---- Autocast.


def under_autocast(case: AttentionCase, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result, lse and the gradients of q, k and v."""
    leaves = [operand.detach().requires_grad_() for operand in operands[:3]]
    with torch.autocast("cpu", dtype=dtype):
        out, lse = case.call(*leaves, *operands[3:])
    return [out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)]


@on_every_backend
@every_case
def test_autocast_casts_as_sdpa_does(case, backend):
    """q, k and v, also of a mix, in dtype and bit as if cast by hand; gradients in the dtype of each; lse float32."""
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            mixed = [operands[0].to(dtype), operands[1].to(dtype).float(), *operands[2:]]
            with torch.autocast("cpu", dtype=dtype):
                assert case.call(*operands)[0].dtype == case.call_eager(*operands)[0].dtype == dtype
            leaves = [t.clone().requires_grad_() for t in mixed[:3]]
            out, lse = case.call(*(t.to(dtype) for t in leaves), *operands[3:])
            expected = [out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)]
            assert [t.dtype for t in expected] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
            torch.testing.assert_close(under_autocast(case, mixed, dtype), expected, rtol=0, atol=0)


@on_every_backend
@some_cases
def test_second_derivatives_and_tangents_under_autocast(case, backend):
    """Of a call under autocast: bit by bit those of operands that were cast by hand."""
    operands = case.make(SMALL_SIZE)
    tangents = tuple(torch.randn(t.shape) for t in operands[:3])

    def run(enabled: bool) -> list[Tensor]:
        def function(*qkv: Tensor) -> Tensor:
            given = qkv if enabled else (t.bfloat16() for t in qkv)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return case.call(*given, *operands[3:])[0].float()

        leaves = [t.clone().requires_grad_() for t in operands[:3]]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        out, moved = torch.func.jvp(function, tuple(leaves), tangents)
        of_moved = torch.autograd.grad((out * moved).sum(), leaves)
        return [t.detach() for t in (*first, *second, moved, *of_moved)]

    with use_backend(backend):
        torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_autocast_leaves_float64_alone(case):
    """As that of SDPA does."""
    operands = [t if t.dtype == torch.bool else t.double() for t in case.make(SMALL_SIZE)]
    run = lambda *operands: case.call(*operands)[0]  # noqa: E731
    assert_autocast_like(run, lambda *operands: case.call_eager(*operands)[0], operands)


# ---- Transforms.


@every_case
def test_vmap(case):
    """Over an added dimension of every operand, in front and at the back; of each operand alone."""
    operands = stacked(lambda: case.make(Size(2, 2, 4, 4, 4, 3)))
    assert_vmap(case.call, operands)
    assert_vmap(case.call, [t.movedim(0, -1) for t in operands], (-1,) * len(operands))
    for mapped in range(len(operands)):
        assert_vmap_of_one(case.call, operands, mapped)


@some_cases
def test_functional_transforms(case):
    """torch.func's gradient, directional derivative and per-sample gradients are those of autograd."""
    operands = case.make(Size(2, 2, 4, 4, 4), torch.float64)
    qkv, rest = operands[:3], operands[3:]
    call = finite(lambda *qkv: case.call(*qkv, *rest))
    expected = assert_functional_transforms(call, qkv)
    total = lambda *qkv: sum_of_sines(call(*qkv))  # noqa: E731
    _, pull = torch.func.vjp(total, *qkv)
    torch.testing.assert_close(pull(torch.ones((), dtype=torch.float64)), expected)
    each = torch.func.vmap(torch.func.grad(lambda q: total(q, *qkv[1:])))(torch.stack([qkv[0]] * 3))
    torch.testing.assert_close(each, expected[0].expand(3, *expected[0].shape))


def test_what_takes_no_gradient_records_none():
    case = SOME_CASES[2]
    operands = case.make(SMALL_SIZE, grad=True)
    for backend in BACKENDS:
        with use_backend(backend), torch.no_grad():
            out, lse = case.call(*operands)
            assert not out.requires_grad and not lse.requires_grad
        with use_backend(backend), torch.inference_mode():
            torch.testing.assert_close(case.call(*operands), case.call_eager(*operands))


@on_every_backend
def test_a_mask_first_seen_in_inference_mode_serves_training(backend):
    """What is kept of a mask must not be an inference tensor."""
    mask = masks.sliding_window(3, 2) & masks.causal(1)  # of no other test
    q = torch.randn(1, 1, 23, 4)
    with use_backend(backend):
        with torch.inference_mode():
            expected = attention(q, q, q, mask=mask)
        leaf = q.clone().requires_grad_()
        out = attention(leaf, q, q, mask=mask)
        out.sum().backward()
    assert torch.equal(out.detach(), expected) and leaf.grad is not None


def test_meta_tensors_give_shapes():
    """Without values: for models built on the meta device."""
    for case in CASES:
        given = case.make(SMALL_SIZE)
        for actual, expected in zip(case.call(*(t.to("meta") for t in given)), case.call(*given), strict=True):
            assert actual.device.type == "meta" and actual.shape == expected.shape and actual.dtype == expected.dtype


# ---- Instruction sets, memory.

ISA_SCRIPT = """
from tests.attention_cases import CASES, SIZES, Size
from tests.test_attention_decode import CASES as DECODING, decoded
outputs = []
for case in CASES[::3]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (SIZES[0], SIZES[3]):
            leaves = [t.requires_grad_(i < 3) for i, t in enumerate(case.make(size, dtype))]
            y, lse = case.call(*leaves)
            (y.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()).backward()
            tangents = tuple(torch.randn(t.shape).to(dtype) for t in leaves[:3])
            with torch.no_grad():
                moved = torch.func.jvp(lambda *qkv: case.call(*qkv, *leaves[3:]), tuple(leaves[:3]), tangents)[1]
            outputs.append([y.detach(), lse.detach(), *moved] + [leaf.grad for leaf in leaves[:3]])
for case in DECODING[::2]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        outputs.append([decoded(case, case.make(Size(2, 4, 24, 24, 17, 9), dtype), [9] + [1] * 15)])
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    """Forward, backward, in forward mode and decoding."""
    # Of a 16-bit call lse, in float32, comes from 16-bit numbers too.
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=1e-5, others=2e-2, by_first=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_memory_is_linear(backend):
    """16384 tokens take less than 1 GB, forward and backward; twice the tokens take twice the memory."""

    def peak(tokens: int) -> int:
        q, k, v = (torch.randn(1, 1, tokens, 16).requires_grad_() for _ in range(3))

        def run() -> None:
            attention(q, k, v, mask=masks.sliding_window(200, 200), bias=positions.alibi(1)).sum().backward()

        run()
        return peak_memory(run, CPU)

    with use_backend(backend):
        peaks = [peak(tokens) for tokens in (4096, 8192, 16384)]
        q, k, v = (torch.randn(1, 1, 16384, 16) for _ in range(3))
        plain = peak_memory(lambda: attention(q, k, v), CPU)
    assert max(*peaks, plain) < 1e9
    for fewer, more in itertools.pairwise(peaks):
        assert more < 2.2 * fewer


@pytest.mark.parametrize("backend", NATIVE)
def test_masks_that_broadcast_are_not_expanded(backend):
    """Padding of keys and a bias of one row for 4096 queries: no matrix of either."""
    q, k, v = (torch.randn(1, 4, 2048, 16) for _ in range(3))
    seen, bias = torch.rand(1, 1, 1, 2048) < 0.9, torch.randn(4, 1, 2048)
    with use_backend(backend):
        assert peak_memory(lambda: attention(q, k, v, mask=seen, bias=bias), CPU) < 4 << 20
