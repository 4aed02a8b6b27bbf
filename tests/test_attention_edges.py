"""Edges of attention: rows that see nothing, large numbers, numbers that are none, extents of one."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import NoiseKey, attention, masks, positions, use_backend
from dgm_kernels._core import backends as registry
from tests.attention_cases import BACKENDS, MASKS, NATIVE, AttentionCase, Size
from tests.cases import DTYPES

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- Dtypes that kernels do not have.


@pytest.mark.parametrize("backend", NATIVE)
def test_float64_takes_the_reference_and_says_so(backend, caplog):
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    registry._log_once.cache_clear()  # another test may have had it logged
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        attention(q, q, q)
    assert "float64" in caplog.text
    with use_backend(backend), pytest.raises(ValueError, match="float64"):
        attention(q, q, q)


def test_a_bias_of_float64_beside_float32():
    """Is added in at least the precision of the scores; the result has the dtype of q."""
    q, bias = torch.randn(1, 2, 5, 8), torch.randn(5, 5, dtype=torch.float64)
    for option in ("mask", "bias"):
        actual = attention(q, q, q, **{option: bias})
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, attention(q, q, q, bias=bias.float()), rtol=1e-5, atol=1e-6)


# ---- Rows that see nothing.


def blind_masks(queries: int, keys: int) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Masks, and which queries see a key."""
    seen = torch.rand(queries, keys) < 0.5
    seen[::3] = False
    some = seen.any(1)
    none = torch.zeros(queries, dtype=torch.bool)
    after_first = torch.arange(queries) > 0
    infinite = torch.zeros(queries, keys).masked_fill(~seen, -torch.inf)
    return {
        "bool": ({"mask": seen}, some),
        "float": ({"mask": infinite}, some),
        "bias": ({"bias": infinite}, some),
        "half in a float mask": ({"mask": infinite.half()}, some),
        "bool and bias": ({"mask": seen, "bias": torch.randn(queries, 1)}, some),
        "strict": ({"mask": masks.causal(-1)}, after_first),
        "far back": ({"mask": masks.causal(-queries // 2)}, torch.arange(queries) >= -(-queries // 2)),
        "beyond the keys": ({"mask": masks.sliding_window(2, 1)}, torch.arange(queries) < keys + 2),
        "nothing": ({"mask": masks.causal(-queries)}, none),
        "no True": ({"mask": torch.tensor(False)}, none),
        "all infinite": ({"mask": torch.full((1, keys), -torch.inf)}, none),
        "a mask and ALiBi": ({"mask": masks.causal(-1), "bias": positions.alibi(2)}, after_first),
        "strict and rotated": ({"mask": masks.causal(-1), "rope": positions.rotary(200, 16)}, after_first),
    }


@on_every_backend
@every_dtype
@pytest.mark.parametrize("name", blind_masks(7, 5))
def test_blind_rows(name, dtype, backend):
    """Exactly 0, lse minus infinity, gradients of 0; in the middle of rows that see something."""
    for queries, keys in ((7, 5), (65, 33), (130, 40)):
        options, some = blind_masks(queries, keys)[name]
        q, k, v = (torch.randn(2, 2, n, 16).to(dtype).requires_grad_() for n in (queries, keys, keys))
        with use_backend(backend):
            out, lse = attention(q, k, v, **options, return_lse=True)
            of_q, of_k, of_v = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        assert torch.equal(out[:, :, ~some], torch.zeros(2, 2, int((~some).sum()), 16, dtype=dtype))
        assert torch.equal(lse == -torch.inf, ~some.expand(2, 2, -1))
        assert not of_q[:, :, ~some].any()
        assert bool((out[:, :, some] != 0).any(-1).all())
        for gradient in (of_q, of_k, of_v):
            assert bool(gradient.isfinite().all())
        if not some.any():
            assert not of_k.any() and not of_v.any()


@on_every_backend
def test_keys_that_nobody_sees_have_no_gradient(backend):
    """Exactly 0: padding, what lies beyond a window, the last key of a strictly causal model."""
    q, k, v = (torch.randn(1, 2, 50, 8).requires_grad_() for _ in range(3))
    padding = torch.arange(50) < 37
    for mask, unseen in (
        (padding, ~padding),
        (masks.causal(-1), torch.arange(50) == 49),
        (masks.sliding_window(3, 0) & masks.causal(-10), torch.arange(50) >= 40),
    ):
        with use_backend(backend):
            of_k, of_v = torch.autograd.grad(attention(q, k, v, mask=mask).square().sum(), (k, v))
        assert not of_k[:, :, unseen].any() and not of_v[:, :, unseen].any()


# ---- Large and small numbers.


@on_every_backend
@every_dtype
@pytest.mark.parametrize("case", [AttentionCase("plain"), AttentionCase("raster", mask=MASKS[16])], ids=str)
def test_large_scores(case, dtype, backend):
    """Of 1e4 and more: no overflow, and the greatest wins; lse is the greatest score."""
    size = Size(1, 2, 30, 30, 16)
    q, k, v = case.make(size, torch.float32)
    q, k = (100.0 * q).to(dtype), (100.0 * k).to(dtype)
    v = v.to(dtype)
    exact = case.call_eager(q.double(), k.double(), v.double())
    assert exact[1][exact[1].isfinite()].abs().max() > 1e4
    with use_backend(backend):
        out, lse = case.call(*(t.requires_grad_() for t in (q, k, v)))
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0.05)
    same = (exact[0] - out.double()).abs().amax(-1) < 0.05
    assert float(same.float().mean()) > 0.9  # of scores of 1e4, float32 keeps two digits behind the point
    assert bool(out.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)


@on_every_backend
def test_scores_of_one_size_and_steps_that_grow(backend):
    """Keys whose scores rise, fall or stay from the first to the last: the running maximum moves in each tile."""
    keys = 700
    for ramp in (torch.linspace(0, 500, keys), torch.linspace(500, 0, keys), torch.full((keys,), 300.0)):
        q, v = torch.ones(1, 1, 3, 1), torch.randn(1, 1, keys, 8)
        k = ramp.view(1, 1, keys, 1)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        with use_backend(backend):
            out, lse = attention(q, k, v, return_lse=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.double(), ramp.double().logsumexp(0).expand(1, 1, 3), rtol=1e-6, atol=1e-6)


@on_every_backend
@every_dtype
def test_the_smallest_number_as_a_mask(dtype, backend):
    """``finfo.min`` in place of minus infinity, as many models have it: rows of nothing else are averages, not 0."""
    q, k, v = (torch.randn(1, 2, 9, 16).to(dtype) for _ in range(3))
    added = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(dtype).min)
    added[4] = torch.finfo(dtype).min
    added = added.to(dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=added.double())
    exact[:, :, 4] = v.double().mean(2)  # in float64 the scores would count beside the smallest number
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with use_backend(backend):
        actual = attention(q, k, v, mask=added)
        if dtype == torch.float16:  # whose smallest number is one that float32 adds scores to
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=added.double())
            tolerance = 0.1
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def patterns(tensor: Tensor) -> Tensor:
    """0 for a number, 1 for NaN, 2 and 3 for infinities."""
    return tensor.isnan() + 2 * (tensor == torch.inf) + 3 * (tensor == -torch.inf)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "mask", "bias"])
def test_what_is_no_number_goes_where_eager_puts_it(where, bad, dtype, backend):
    """One element; the rows, keys or features that it reaches, and nothing else."""
    for queries, keys in ((5, 7), (70, 90)):
        operands = {"q": torch.randn(1, 2, queries, 16).to(dtype)}
        operands |= {name: torch.randn(1, 2, keys, 16).to(dtype) for name in "kv"}
        added = torch.randn(1, 2, queries, keys).to(dtype)
        row = keys - 2 if where in "kv" else 3
        (added if where in ("mask", "bias") else operands[where])[0, 1, row, 4] = bad
        wide = [t.double() for t in operands.values()]
        eager = F.scaled_dot_product_attention(*wide, attn_mask=added.double())
        with use_backend(backend):
            out = attention(*operands.values(), **{where if where in ("mask", "bias") else "bias": added})
        assert torch.equal(patterns(out), patterns(eager))
        finite = eager.isfinite()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[finite].double(), eager[finite], rtol=tolerance, atol=tolerance)


@on_every_backend
def test_a_nan_does_not_reach_queries_of_other_samples_and_heads(backend):
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    with use_backend(backend):
        clean = attention(q, k, v, mask=masks.causal())
        for dirty in (q, k, v):
            before = dirty[1, 2].clone()
            dirty[1, 2] = torch.nan
            out = attention(q, k, v, mask=masks.causal())
            dirty[1, 2] = before
            assert bool(out[1, 2].isnan().all())
            out[1, 2] = clean[1, 2]
            assert torch.equal(out, clean)


# ---- Extents of one, offsets beyond everything.


@on_every_backend
@every_dtype
def test_one_key(dtype, backend):
    """The result is its value, whatever the scores; lse is the score."""
    q, k, v = (
        torch.randn(2, 3, 70, 24).to(dtype),
        torch.randn(2, 3, 1, 24).to(dtype),
        torch.randn(2, 3, 1, 24).to(dtype),
    )
    with use_backend(backend):
        for options in ({}, {"mask": masks.causal()}, {"bias": positions.alibi(3)}, {"scale": 40.0}):
            out, lse = attention(q, k, v, **options, return_lse=True)
            assert torch.equal(out, v.expand_as(out))
        score = 40.0 * (q.double() * k.double()).sum(-1)
        torch.testing.assert_close(lse.double(), score, rtol=1e-5, atol=1e-3)


@on_every_backend
@every_dtype
def test_one_feature_and_none(backend, dtype):
    """Products of numbers; without features of keys, the average of the values."""
    q, k, v = (torch.randn(1, 2, n, 1).to(dtype) for n in (9, 11, 11))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    with use_backend(backend):
        exact = torch.softmax(q.double() * k.double().mT, -1) @ v.double()
        torch.testing.assert_close(attention(q, k, v).double(), exact, rtol=tolerance, atol=tolerance)
        average = attention(q[..., :0], k[..., :0], v)
        torch.testing.assert_close(
            average.double(), v.double().mean(2, keepdim=True).expand(1, 2, 9, 1), rtol=tolerance, atol=tolerance
        )


@on_every_backend
def test_offsets_beyond_everything(backend):
    """Everything or nothing is seen, also of numbers that 32 bits do not hold."""
    q = torch.randn(1, 2, 20, 8)
    with use_backend(backend):
        plain, nothing = attention(q, q, q), torch.zeros_like(q)
        for far in (20, 1000, 2**31 - 1, 2**31, 2**40, 2**62):
            for mask, expected in (
                (masks.causal(far), plain),
                (masks.causal(-far), nothing),
                (masks.prefix(far), plain),
                (masks.sliding_window(far, far), plain),
                (masks.causal(far) & masks.causal(-far), nothing),
                (masks.neighborhood_2d(4, 5, min(far, 2**31 - 1)), plain),
            ):
                torch.testing.assert_close(attention(q, q, q, mask=mask), expected)


@on_every_backend
def test_a_mask_of_one_number(backend):
    """A tensor without dimensions stands for all scores."""
    q = torch.randn(1, 2, 5, 8)
    with use_backend(backend):
        for mask in (torch.tensor(True), torch.tensor(-3.0), torch.tensor([[0.5]])):
            torch.testing.assert_close(attention(q, q, q, mask=mask), attention(q, q, q))


@on_every_backend
def test_many_masks_and_lengths(backend):
    """More than are kept: each call gets its own."""
    q = torch.randn(1, 1, 90, 4)
    with use_backend(backend):
        for _ in range(2):
            for tokens in range(1, 90, 11):
                for left in range(9):
                    x = q[:, :, :tokens]
                    mask = masks.sliding_window(left)
                    expected = attention(x, x, x, mask=mask.dense(tokens))
                    torch.testing.assert_close(attention(x, x, x, mask=mask), expected)


def test_a_noise_key_without_dropout_changes_nothing():
    q = torch.randn(1, 1, 5, 4)
    assert torch.equal(attention(q, q, q, noise=NoiseKey(3)), attention(q, q, q))
