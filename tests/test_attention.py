"""Attention: values against the definition, shapes of every kind, positions, dropout."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import NoiseKey, attention, masks, noise_like, positions, use_backend
from tests.attention_cases import (
    BACKENDS,
    CASES,
    CAUSAL,
    EMPTY_SIZES,
    HEAD_DIMS,
    NATIVE,
    PLAIN,
    SIZES,
    SOME_CASES,
    AttentionCase,
    Size,
    eager,
    grid,
)
from tests.cases import DTYPES
from tests.contract import assert_parity, max_error

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- The yardstick itself.


def angle(case: AttentionCase, position: int, pair: int, turned: int, width: int) -> float:
    """By which pair r of the features turns at a position: ``position base^(-2 r / d)``."""
    assert case.rope is not None
    if "2d" not in case.rope:
        return position * 10000.0 ** (-2 * pair / turned)
    half = turned // 4
    place = position // width if pair < half else position % width
    return place * 10000.0 ** (-2 * (pair % half) / (turned // 2))


def rotated(case: AttentionCase, x: list[float], position: int, tokens: int) -> list[float]:
    """Features turned pair by pair."""
    if case.rope is None:
        return x
    turned = len(x) // 2 if "partial" in case.rope else len(x)
    result = list(x)
    for r in range(turned // 2):
        first, second = (2 * r, 2 * r + 1) if "interleaved" in case.rope else (r, r + turned // 2)
        phi = angle(case, position, r, turned, grid(tokens)[1])
        result[first] = x[first] * math.cos(phi) - x[second] * math.sin(phi)
        result[second] = x[first] * math.sin(phi) + x[second] * math.cos(phi)
    return result


def by_pairs(case: AttentionCase, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One exponential for each query and key that it sees."""
    named = dict(zip(case.names, operands, strict=True))
    q, k, v = operands[:3]
    (batch, heads, queries, features), keys = q.shape, k.shape[2]
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    matrices = {name: named[name].expand(batch, heads, queries, keys) for name in case.names[3:]}
    scale, tokens = case.scale or features**-0.5, max(queries, keys)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        turned = rotated(case, q[b, h, i].tolist(), i, tokens)
        exponentials: dict[int, float] = {}
        for j in range(keys):
            key = rotated(case, k[b, h // case.groups, j].tolist(), j, tokens)
            score = scale * sum(x * y for x, y in zip(turned, key, strict=True))
            if case.mask is not None and not case.mask.sees(i, j, queries, keys):
                continue
            if case.bias == "alibi":
                score -= 2.0 ** (-8 * (h + 1) / heads) * abs(i - j)
            for matrix in matrices.values():
                entry = matrix[b, h, i, j].item()
                score += entry if matrix.dtype != torch.bool else (0.0 if entry else -math.inf)
            exponentials[j] = math.exp(score)
        total = sum(exponentials.values())
        for j, share in exponentials.items():
            if total:
                out[b, h, i] += share / total * v[b, h // case.groups, j]
        lse[b, h, i] = math.log(total) if total else -math.inf
    return out, lse


@every_case
def test_the_eager_yardstick_is_the_definition(case):
    """SDPA with the matrices that the other tests compare with, one query and one key at a time."""
    for size in (Size(1, 4, 6, 6, 8, 3), Size(1, 4, 3, 5, 8, 2)):
        operands = case.make(size, torch.float64)
        torch.testing.assert_close(case.call_eager(*operands), by_pairs(case, operands), rtol=1e-5, atol=1e-5)


# ---- Values.


def check_parity(case: AttentionCase, size: Size, dtype: torch.dtype, backend: str) -> None:
    operands = case.make(size, dtype)
    with use_backend(backend):
        actual = case.call(*operands)
    wide = [operand if operand.dtype == torch.bool else operand.double() for operand in operands]
    exact = case.call_eager(*wide)
    largest = max(float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 0.0 for t in exact)
    assert_parity(actual, case.call_eager(*operands), exact, tiny=1e-6 * max(1.0, largest))


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    for size in SIZES:
        check_parity(case, size, torch.float32, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_case
def test_parity_16_bits(case, dtype, backend):
    for size in (SIZES[0], *SIZES[3:6]):
        check_parity(case, size, dtype, backend)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("features", HEAD_DIMS)
def test_parity_of_head_dims(features, dtype, backend):
    """With as many values, with fewer and with more; plain, causal, rotated, in groups."""
    for case in (*SOME_CASES, AttentionCase("rope of some", rope="1d interleaved partial")):
        for values in (features, 5, 80):
            check_parity(case, Size(1, 2, 19, 37, features, values), dtype, backend)


@on_every_backend
@every_dtype
def test_parity_of_many_lengths(dtype, backend):
    """Every number of queries and keys around the sides of tiles."""
    for tokens in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 63, 65, 97, 127, 129, 257):
        check_parity(CAUSAL, Size(1, 1, tokens, tokens, 16), dtype, backend)
        check_parity(PLAIN, Size(1, 1, 5, tokens, 16), dtype, backend)
        check_parity(PLAIN, Size(1, 1, tokens, 9, 16), dtype, backend)


@on_every_backend
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_parity_of_long_sequences(case, backend):
    """Many tiles along both sides."""
    check_parity(case, Size(1, 2, 1023, 1023, 24), torch.float32, backend)
    check_parity(case, Size(1, 2, 1023, 1023, 24), torch.bfloat16, backend)


@every_case
def test_float64(case):
    """By the reference, to its precision."""
    for size in (SIZES[0], *SIZES[3:7]):
        operands = case.make(size, torch.float64)
        out, lse = case.call(*operands)
        assert out.dtype == lse.dtype == torch.float64
        torch.testing.assert_close((out, lse), case.call_eager(*operands), rtol=1e-12, atol=1e-12)


@on_every_backend
@every_case
def test_empty_sizes(case, backend):
    """Without samples, heads, queries or features of values: an empty result. Without keys: 0, as without any seen."""
    for size in filter(case.suits, EMPTY_SIZES):
        operands = case.make(size)
        leaves = [operand.requires_grad_() for operand in operands[:3]]
        with use_backend(backend):
            out, lse = case.call(*operands)
            grads = torch.autograd.grad(out.sum() + lse.exp().sum(), leaves)
        expected_out, expected_lse = case.call_eager(*operands)
        assert out.shape == expected_out.shape and lse.shape == expected_lse.shape
        torch.testing.assert_close((out, lse), (torch.zeros_like(out), expected_lse))
        for leaf, grad in zip(leaves, grads, strict=True):
            assert grad.shape == leaf.shape and not grad.isnan().any()


@on_every_backend
@every_case
def test_without_lse_the_result_is_the_same(case, backend):
    operands = case.make(Size(2, 2, 17, 19, 8))
    with use_backend(backend):
        alone = case.call(*operands, return_lse=False)
        assert isinstance(alone, Tensor)
        assert torch.equal(alone, case.call(*operands)[0])


# ---- Shapes of the operands.

SHAPES = {
    "no batch, no heads": ((7, 8), (9, 8), (9, 5)),
    "heads": ((3, 7, 8), (3, 9, 8), (3, 9, 5)),
    "two batches": ((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 5)),
    "one of keys for the batch": ((5, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 8)),
    "one query for the batch": ((1, 4, 7, 8), (5, 4, 9, 8), (5, 4, 9, 8)),
    "batches that broadcast": ((2, 1, 4, 7, 8), (1, 3, 4, 9, 8), (2, 3, 4, 9, 2)),
    "values alone have a batch": ((1, 2, 7, 8), (1, 2, 9, 8), (3, 2, 9, 8)),
    "heads that broadcast": ((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "keys of one head": ((2, 4, 7, 8), (2, 1, 9, 8), (2, 4, 9, 8)),
    "heads of keys alone": ((2, 1, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "six dimensions": ((1, 2, 1, 2, 3, 4), (1, 2, 1, 2, 5, 4), (1, 2, 1, 2, 5, 4)),
}


@on_every_backend
@every_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_sdpa(name, dtype, backend):
    """Values and gradients, those of what broadcasts included; with a mask of the matrix and one of all."""
    operands = [torch.randn(shape).to(dtype) for shape in SHAPES[name]]
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in operands))
    of_scores = torch.broadcast_shapes(*(t.shape[:-2] for t in operands[:2]))
    scores = (*of_scores, operands[0].shape[-2], operands[1].shape[-2])
    seen = torch.rand(scores) < 0.7

    def run(function, cast, arrange=lambda t: t, **options):
        leaves = [t.to(cast).requires_grad_() for t in operands]
        out = function(*map(arrange, leaves), **options)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(torch.bfloat16).to(cast)
        return out, torch.autograd.grad(out, leaves, weights)

    for ours, theirs in (
        ({}, {}),
        ({"mask": seen}, {"attn_mask": seen}),
        ({"mask": masks.causal(1)}, {"attn_mask": torch.ones(scores[-2:]).tril(1).bool()}),
    ):
        exact, exact_grads = run(F.scaled_dot_product_attention, torch.float64, **theirs)
        same, same_grads = run(F.scaled_dot_product_attention, dtype, **theirs)
        with use_backend(backend):
            out, grads = run(attention, dtype, **ours)
            # By hand, in tensors of their own: the gradients that tests/test_attention_gradients.py looks at.
            _, by_hand = run(attention, dtype, lambda t: t.expand(*lead, -1, -1).contiguous(), **ours)
        assert_parity(out, same, exact, tiny=1e-6 * max(1.0, float(exact.detach().abs().max())))
        for actual, expected, eager_grad, best in zip(grads, by_hand, same_grads, exact_grads, strict=True):
            largest, ulp = max(1.0, float(best.abs().max())), torch.finfo(dtype).eps
            units = 4 if dtype == torch.float32 else 1  # sums of all sharers may be taken in another order
            torch.testing.assert_close(actual, expected, rtol=2 * ulp, atol=units * ulp * largest)
            if dtype == torch.float32:
                assert_parity(actual, eager_grad, best, tiny=1e-6 * largest)


@on_every_backend
def test_lse_has_the_shape_of_the_queries(backend):
    with use_backend(backend):
        for name, shapes in SHAPES.items():
            q, k, v = (torch.randn(shape) for shape in shapes)
            out, lse = attention(q, k, v, return_lse=True)
            assert lse.shape == out.shape[:-1], name
            scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
            expected = torch.logsumexp(scores, -1).expand(lse.shape)
            torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_gqa_is_that_of_sdpa(groups, backend):
    """Neighbouring heads share: head h reads key head ``h // groups``; batches broadcast beside it."""
    q, k, v = torch.randn(2, 6, 11, 8), torch.randn(1, 6 // groups, 13, 8), torch.randn(2, 6 // groups, 13, 4)
    with use_backend(backend):
        actual = attention(q, k, v, enable_gqa=True)
        three = attention(q[0], k[0], v[0], enable_gqa=True)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(three, actual[0], rtol=1e-6, atol=1e-6)


@on_every_backend
@every_dtype
def test_the_result_lies_in_memory_as_the_queries_do(dtype, backend):
    """``[batch, N, heads, D]`` seen as ``[batch, heads, N, D]``: what follows needs no copy."""
    with use_backend(backend):
        q, k = torch.randn(2, 9, 3, 16).to(dtype).transpose(1, 2), torch.randn(2, 9, 3, 16).to(dtype).transpose(1, 2)
        for values in (16, 5):
            out = attention(q, k, torch.randn(2, 3, 9, values).to(dtype))
            assert out.transpose(1, 2).is_contiguous()
        assert attention(q.contiguous(), k, k).is_contiguous()


@on_every_backend
def test_a_mask_and_a_bias_broadcast_from_any_shape(backend):
    """Every combination of extents that are 1, and fewer dimensions."""
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    for extents in itertools.product((1, 2), (1, 3), (1, 5), (1, 5)):
        for drop in range(4):
            shape = extents[drop:]
            if any(n > 1 for n in extents[:drop]):
                continue
            seen, added = torch.rand(shape) < 0.7, torch.randn(shape)
            wide = added.double().expand(2, 3, 5, 5).masked_fill(~seen, -torch.inf)
            expected, lse = eager(q.double(), k.double(), v.double(), None, wide, None)
            with use_backend(backend):
                actual = attention(q, k, v, mask=seen, bias=added, return_lse=True)
            torch.testing.assert_close(actual[0].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(actual[1].double(), lse, rtol=1e-5, atol=1e-6)


@on_every_backend
@every_dtype
def test_dtypes_of_masks_and_biases(dtype, backend):
    """Any floating-point dtype beside any of the operands."""
    q, k, v = (torch.randn(2, 2, 5, 8).to(dtype) for _ in range(3))
    added = torch.randn(2, 5, 5).bfloat16().half()  # numbers that all dtypes hold
    added = added.masked_fill(added.abs() < 0.05, 0.0)
    with use_backend(backend):
        expected = attention(q, k, v, bias=added.to(dtype))
        for other in DTYPES:
            for option in ("mask", "bias"):
                actual = attention(q, k, v, **{option: added.to(other)})
                assert actual.dtype == dtype
                torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---- Positions.


def test_rotary_tables_are_the_formula():
    """In float64 before they are rounded: also far from the beginning, where float32 angles would be off."""
    rope = positions.rotary(5000, 64, base=500.0)
    p, r = torch.arange(5000, dtype=torch.float64)[:, None], torch.arange(32, dtype=torch.float64)
    angles = p * 500.0 ** (-2 * r / 64)
    assert torch.equal(rope.table, torch.stack([angles.cos(), angles.sin()], -1).float())
    table = positions.rotary_2d(3, 5, 8).table
    assert table.shape == (15, 4, 2)
    rows, columns = positions.rotary(3, 4).table, positions.rotary(5, 4).table
    for y, x in itertools.product(range(3), range(5)):
        assert torch.equal(table[5 * y + x], torch.cat([rows[y], columns[x]]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_alone(interleaved):
    """So that attention of a sequence that is moved is the same."""
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    rope = positions.rotary(120, 8, interleaved=interleaved)
    moved = positions.Rotary(rope.table[100:].contiguous(), interleaved)
    torch.testing.assert_close(attention(q, k, v, rope=rope), attention(q, k, v, rope=moved), rtol=1e-5, atol=1e-5)
    plain = attention(q, k, v)
    assert max_error(attention(q, k, v, rope=rope), plain) > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_apply_keeps_lengths_and_starts_anywhere(interleaved):
    x, rope = torch.randn(2, 3, 7, 10), positions.rotary(30, 6, interleaved=interleaved)
    whole = torch.cat([torch.zeros(2, 3, 5, 10), x], 2)
    torch.testing.assert_close(rope.apply(x, 5), rope.apply(whole)[:, :, 5:], rtol=0, atol=0)
    turned = rope.apply(x)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert rope.apply(x.bfloat16()).dtype == torch.bfloat16
    assert rope.to("cpu").interleaved is interleaved


def test_alibi_slopes_are_the_published_ones():
    """Of 8 heads, of 16, and of 12: those of 8 and every second of 16."""
    eight = [2.0**-n for n in range(1, 9)]
    sixteen = [2.0 ** (-n / 2) for n in range(1, 17)]
    for heads, slopes in (
        (8, eight),
        (16, sixteen),
        (12, eight + sixteen[:8:2]),
        (1, [2.0**-8]),
        (2, [2.0**-4, 2.0**-8]),
    ):
        torch.testing.assert_close(positions.alibi(heads).slopes, torch.tensor(slopes))
    bias = positions.ALiBi(torch.tensor([1.0, 0.5])).bias(2, 4, first=2)
    assert bias[0].tolist() == [[-2, -1, 0, -1], [-3, -2, -1, 0]]
    assert torch.equal(bias[1], bias[0] / 2)


# ---- Dropout.


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_dropout_multiplies_probabilities(case):
    """Those whose uniform number of the key is above p, by ``1 / (1 - p)``; the denominator is that of all."""
    operands = case.make(Size(2, 4, 12, 12, 8), torch.float64)
    named = dict(zip(case.names, operands, strict=True))
    key = NoiseKey(7, first_sample=3)
    identity = torch.eye(12, dtype=torch.float64).expand(*operands[1].shape[:2], -1, -1)
    probabilities, lse = case.call_eager(*operands[:2], identity, *operands[3:])
    kept = noise_like(torch.empty(2, 4, 12, 12), key, distribution="uniform").double() > 0.25
    v = named["v"].repeat_interleave(case.groups, 1)
    expected = (probabilities * kept / 0.75) @ v
    options = {name: named[name] for name in case.names[3:]}
    if case.mask is not None:
        options["mask"] = case.mask.make(12, 12)
    if case.bias == "alibi":
        options["bias"] = positions.alibi(4)
    options |= {"scale": case.scale, "rope": case.rotary(12, 8), "enable_gqa": case.groups > 1}
    actual = attention(*operands[:3], **options, dropout_p=0.25, noise=key, return_lse=True)
    torch.testing.assert_close(actual, (expected, lse), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", NATIVE)
def test_dropout_takes_the_reference(backend):
    q = torch.randn(1, 2, 5, 8)
    actual = attention(q, q, q, dropout_p=0.5, noise=NoiseKey(1))
    with use_backend("reference"):
        assert torch.equal(actual, attention(q, q, q, dropout_p=0.5, noise=NoiseKey(1)))
    with use_backend(backend), pytest.raises(ValueError, match="dropout"):
        attention(q, q, q, dropout_p=0.5)


def test_dropout_does_not_depend_on_the_batch_and_is_drawn_anew():
    q, k, v = (torch.randn(5, 2, 9, 8) for _ in range(3))
    whole = attention(q, k, v, dropout_p=0.5, noise=NoiseKey(1))
    alone = attention(q[3:4], k[3:4], v[3:4], dropout_p=0.5, noise=NoiseKey(1, first_sample=3))
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    first, second = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)
    assert torch.equal(attention(q, k, v, dropout_p=0.0, noise=NoiseKey(1)), attention(q, k, v))


def test_dropout_keeps_the_mean():
    """Of 4000 keys, with the share that was asked for left out."""
    ones = torch.ones(1, 1, 1000, 4000)[..., :1]
    q = torch.zeros(1, 1, 1000, 4)
    for p in (0.1, 0.8):
        out = attention(
            q, torch.zeros(1, 1, 4000, 4), ones[:, :, :1].expand(1, 1, 4000, 1), dropout_p=p, noise=NoiseKey(2)
        )
        spread = math.sqrt(p / (1 - p) / 4000)  # of one query
        assert abs(float(out.mean()) - 1) < 4 * spread / math.sqrt(1000)
        assert 0.8 * spread < float(out.std()) < 1.2 * spread
