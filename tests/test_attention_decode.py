"""Decoding from a cache: against attention over all tokens, what a cache keeps, forgets and refuses."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.timing import peak_memory
from dgm_kernels import KVCache, attention, attention_decode, masks, positions, use_backend
from tests.attention_cases import (
    BACKENDS,
    DOCUMENT_CASE,
    MATRIX_MASK,
    NATIVE,
    AttentionCase,
    MaskCase,
    Size,
    causal_case,
    neighborhood_case,
    prefix_case,
    raster_case,
    window_case,
)
from tests.cases import DTYPES
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_parity,
    assert_threads_agree,
    strided_variants,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOKENS = 24  # a picture of 4 x 6

MASKS: tuple[MaskCase | None, ...] = (
    *(None, window_case(5, 0), window_case(None, 3), causal_case(-1), causal_case(-4), prefix_case(9)),
    *(raster_case(1, 2), raster_case(2, 1, True), neighborhood_case(1, 1), DOCUMENT_CASE),
    *(window_case(7, 2) & DOCUMENT_CASE, MATRIX_MASK),
)
CASES = (
    *(AttentionCase(str(mask), mask=mask) for mask in MASKS),
    AttentionCase("gqa", groups=2),
    AttentionCase("one key head", groups=4, mask=window_case(6, 0)),
    AttentionCase("alibi", bias="alibi"),
    AttentionCase("alibi, raster, gqa", bias="alibi", mask=raster_case(2, 2), groups=2),
    AttentionCase("scale", scale=-0.4),
    AttentionCase("rope", rope="1d"),
    AttentionCase("rope interleaved partial, gqa", rope="1d interleaved partial", groups=2),
    AttentionCase("rope 2d, alibi, picture", rope="2d", bias="alibi", mask=neighborhood_case(2, 2)),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def past_too(case: AttentionCase) -> AttentionCase:
    """The same over a whole sequence: nobody sees what comes later."""
    past = causal_case(0)
    return dataclasses.replace(case, mask=past if case.mask is None else case.mask & past)


def options(case: AttentionCase, tokens: int, heads: int, features: int) -> dict[str, Any]:
    """Of attention_decode, for a sequence of so many tokens."""
    return {
        "mask": None if case.mask is None else case.mask.make(tokens, tokens),
        "bias": positions.alibi(heads) if case.bias == "alibi" else None,
        "scale": case.scale,
        "enable_gqa": case.groups > 1,
        "rope": case.rotary(tokens, features),
    }


def cache_for(k: Tensor, v: Tensor, capacity: int | None = None) -> KVCache:
    return KVCache(
        k.shape[0], k.shape[1], capacity or k.shape[2], k.shape[3], value_dim=v.shape[3], dtype=k.dtype, device=k.device
    )


def decoded(case: AttentionCase, operands: list[Tensor], chunks: list[int]) -> Tensor:
    """All results, from a cache that is filled chunk by chunk."""
    q, k, v = operands
    given = options(case, q.shape[2], q.shape[1], q.shape[3])
    cache, results, begin = cache_for(k, v), [], 0
    for length in chunks:
        now = slice(begin, begin + length)
        cache.append(k[:, :, now], v[:, :, now], rope=given["rope"])
        results.append(attention_decode(q[:, :, now], cache, **given))
        begin += length
    return torch.cat(results, 2)


def check_parity(case: AttentionCase, size: Size, dtype: torch.dtype, backend: str, chunks: list[int]) -> None:
    operands = case.make(size, dtype)
    with use_backend(backend):
        actual = decoded(case, operands, chunks)
    whole, begin = past_too(case), size.queries - actual.shape[2]
    exact = whole.call_eager(*(t.double() for t in operands))[0][:, :, begin:]
    eager = whole.call_eager(*operands)[0][:, :, begin:]
    assert_parity(actual, eager, exact, tiny=1e-6 * max(1.0, float(exact.abs().max())))


# ---- Against attention over all tokens.


@on_every_backend
@every_dtype
@every_case
def test_token_by_token(case, dtype, backend):
    """As generation does."""
    for features, values in ((16, 16), (17, 5)):
        check_parity(case, Size(2, 4, TOKENS, TOKENS, features, values), dtype, backend, [1] * TOKENS)


@on_every_backend
@every_case
def test_several_tokens_at_once(case, backend):
    """A prompt first, then pieces of every length; and everything at once."""
    size = Size(2, 4, TOKENS, TOKENS, 12, 7)
    for chunks in ([7, 1, 5, 2, 1, 8], [23, 1], [1, 23], [TOKENS]):
        check_parity(case, size, torch.float32, backend, chunks)
    check_parity(case, size, torch.bfloat16, backend, [7, 1, 5, 2, 1, 8])


@on_every_backend
@every_dtype
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 59, 64, 113, 203, 239, 1023])
def test_the_last_of_many(tokens, dtype, backend):
    """One query against a cache of every length, and several of them."""
    for case in (CASES[0], CASES[1], *CASES[-8:-4], CASES[-1])[:: 1 if tokens < 300 else 3]:
        for size in (Size(1, 4, tokens, tokens, 40, 24), Size(2, 4, tokens, tokens, 16))[: 2 if tokens < 300 else 1]:
            operands = case.make(size, dtype)
            q, k, v = operands
            given = options(case, tokens, size.heads, size.features)
            exact = past_too(case).call_eager(*(t.double() for t in operands))[0]
            eager = past_too(case).call_eager(*operands)[0]
            with use_backend(backend):
                cache = cache_for(k, v)
                cache.append(k, v, rope=given["rope"])
                for count in {1, min(tokens, 3)}:
                    actual = attention_decode(q[:, :, -count:], cache, **given)
                    best = exact[:, :, -count:]
                    tiny = 1e-6 * max(1.0, float(best.abs().max()))
                    assert_parity(actual, eager[:, :, -count:], best, tiny=tiny)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("features", [1, 3, 16, 17, 64, 72, 128, 256])
def test_head_dims(features, dtype, backend):
    for case in (CASES[0], AttentionCase("gqa", groups=4), AttentionCase("rope", rope="1d", groups=2)):
        for values in (features, 5, 80):
            size = Size(1, 4, 37, 37, features, values)
            check_parity(case, size, dtype, backend, [36, 1])


@on_every_backend
def test_heads_of_a_thousand_features_and_more(backend):
    """Without a backend forced: what native kernels do not take is computed all the same."""
    with use_backend("reference" if backend == "reference" else "auto"):
        for features, values in ((1000, 8), (4, 1000), (2100, 1500)):
            operands = CASES[0].make(Size(1, 1, 5, 5, features, values))
            expected = past_too(CASES[0]).call_eager(*(t.double() for t in operands))[0]
            torch.testing.assert_close(decoded(CASES[0], operands, [3, 1, 1]).double(), expected, rtol=1e-5, atol=2e-6)


@every_case
def test_float64(case):
    """By the reference, to its precision; without a backend forced."""
    operands = case.make(Size(1, 4, TOKENS, TOKENS, 8), torch.float64)
    actual = decoded(case, operands, [5] + [1] * (TOKENS - 5))
    expected = past_too(case).call_eager(*operands)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@on_every_backend
def test_large_scores_and_blind_queries(backend):
    """Scores of 1e4 do not overflow; a query that sees nothing gives 0."""
    k = torch.randn(1, 2, 50, 16)
    q, v = 1e3 * torch.randn(1, 2, 1, 16), torch.randn(1, 2, 50, 16)
    cache = cache_for(k, v)
    cache.append(10 * k, v)
    with use_backend(backend):
        actual = attention_decode(q, cache)
        exact = torch.softmax(q.double() @ (10 * k).double().mT / 4, -1) @ v.double()
        torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-3)
        assert torch.equal(attention_decode(q, cache, mask=masks.causal(-60)), torch.zeros(1, 2, 1, 16))


# ---- What a cache keeps.


@on_every_backend
def test_the_same_however_it_was_filled(backend):
    """Bit by bit: the buffers and what is read from them; and they never move."""
    q, k, v = AttentionCase("plain").make(Size(2, 3, 20, 20, 8, 5))
    rope = positions.rotary(20, 8)
    caches = [cache_for(k, v, capacity=25) for _ in range(3)]
    pointers = [(cache.keys.data_ptr(), cache.values.data_ptr()) for cache in caches]
    for cache, chunks in zip(caches, ([20], [1] * 20, [3, 0, 16, 1]), strict=True):
        begin = 0
        for length in chunks:
            cache.append(k[:, :, begin : begin + length], v[:, :, begin : begin + length], rope=rope)
            begin += length
        assert (cache.length, cache.capacity) == (20, 25)
    for cache, pointer in zip(caches, pointers, strict=True):
        assert torch.equal(cache.keys, caches[0].keys) and torch.equal(cache.values, caches[0].values)
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == pointer
        with use_backend(backend):
            expected = attention_decode(q[:, :, -1:], caches[0], rope=rope)
            assert torch.equal(attention_decode(q[:, :, -1:], cache, rope=rope), expected)


@on_every_backend
def test_overflow_loses_nothing(backend):
    """An error before anything is written: the cache answers as before, and takes what fits."""
    q, k, v = AttentionCase("plain").make(Size(1, 2, 8, 8, 4))
    cache = cache_for(k, v, capacity=6)
    cache.append(k[:, :, :5], v[:, :, :5])
    with use_backend(backend):
        before = attention_decode(q[:, :, 4:5], cache)
        for too_many in (2, 3):
            with pytest.raises(ValueError, match=f"k must fit into the cache: 6 tokens, 5 taken, {too_many} new"):
                cache.append(k[:, :, 5 : 5 + too_many], v[:, :, 5 : 5 + too_many])
            assert cache.length == 5 and not cache.keys[:, :, 5:].any() and not cache.values[:, :, 5:].any()
            assert torch.equal(attention_decode(q[:, :, 4:5], cache), before)
        cache.append(k[:, :, 5:6], v[:, :, 5:6])
        expected = attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], mask=masks.causal())
        torch.testing.assert_close(attention_decode(q[:, :, 5:6], cache), expected[:, :, 5:], rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="6 tokens, 6 taken, 1 new"):
            cache.append(k[:, :, :1], v[:, :, :1])


@on_every_backend
@pytest.mark.parametrize("stale", [1e30, torch.inf, torch.nan])
def test_reset_forgets(stale, backend):
    """To nothing, and to the first few: what stood behind them does not count, whatever it was."""
    q, k, v = AttentionCase("plain").make(Size(1, 2, 20, 20, 8))
    for kept in (0, 3, 20):
        cache = cache_for(k, v, capacity=40)
        cache.append(k, v)
        cache.append(torch.full_like(k, stale), torch.full_like(v, stale))
        cache.reset(kept) if kept else cache.reset()
        assert cache.length == kept
        other_k, other_v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        cache.append(other_k, other_v)
        whole_k, whole_v = (torch.cat([t[:, :, :kept], o], 2) for t, o in ((k, other_k), (v, other_v)))
        with use_backend(backend):
            for count in (1, 4):
                actual = attention_decode(q[:, :, :count], cache)
                expected = attention(q[:, :, :count], whole_k, whole_v, mask=masks.causal(kept + 5 - count))
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_decoding_changes_no_input_and_repeats(backend):
    q, k, v = AttentionCase("plain").make(Size(2, 4, 300, 300, 24))
    cache = cache_for(k, v, capacity=310)
    cache.append(k, v)
    for count in (1, 3):
        last = q[:, :, -count:]
        with use_backend(backend), assert_inputs_unchanged(q, cache.keys, cache.values):
            assert_bitwise_repeatable(lambda last=last: attention_decode(last, cache))
    assert cache.length == 300


@pytest.mark.parametrize("backend", NATIVE)
@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype, backend, thread_counts):
    """Few heads of many keys are cut along keys, many heads by heads."""
    for size in (Size(1, 1, 4000, 4000, 64), Size(3, 8, 700, 700, 16)):
        q, k, v = AttentionCase("plain").make(size, dtype)
        cache = cache_for(k, v)
        cache.append(k, v)
        with use_backend(backend):
            assert_threads_agree(lambda q=q, cache=cache: attention_decode(q[:, :, -1:], cache), thread_counts)


@on_every_backend
def test_operands_of_any_layout(backend):
    """Queries, keys and values: permuted, with gaps, of one token for all."""
    q, k, v = AttentionCase("plain").make(Size(2, 3, 6, 6, 4, 5))
    with use_backend(backend):
        cache = cache_for(k, v)
        cache.append(k, v)
        for count in (1, 2):
            expected = attention_decode(q[:, :, -count:].contiguous(), cache)
            for variant in strided_variants(q[:, :, -count:]):
                torch.testing.assert_close(attention_decode(variant, cache), expected, rtol=1e-5, atol=1e-6)
        for other_k in strided_variants(k):
            for other_v in strided_variants(v):
                other = cache_for(k, v)
                other.append(other_k, other_v)
                assert torch.equal(other.keys, cache.keys) and torch.equal(other.values, cache.values)


@on_every_backend
def test_no_gradients(backend):
    """Neither recorded in the cache nor in the result; in inference mode too."""
    q, k, v = AttentionCase("plain").make(Size(1, 2, 5, 5, 4), grad=True)
    cache = cache_for(k, v)
    cache.append(k, v)
    assert not cache.keys.requires_grad and not cache.values.requires_grad
    with use_backend(backend):
        expected = attention_decode(q[:, :, -1:], cache)
        assert not expected.requires_grad
        with torch.inference_mode():
            inside = cache_for(k, v)
            inside.append(k, v)
            for held in (cache, inside):
                assert torch.equal(attention_decode(q[:, :, -1:], held), expected)


@on_every_backend
def test_dtypes_and_autocast(backend):
    """Keys are stored in the dtype of the cache; that of the query, as autocast makes it, must be the same."""
    q, k, v = AttentionCase("plain").make(Size(1, 2, 9, 9, 8))
    half = KVCache(1, 2, 9, 8, dtype=torch.bfloat16)
    half.append(k, v)
    assert torch.equal(half.keys, k.bfloat16()) and torch.equal(half.values, v.bfloat16())
    with use_backend(backend):
        for count in (1, 2):
            expected = attention_decode(q[:, :, -count:].bfloat16(), half)
            assert expected.dtype == torch.bfloat16
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(attention_decode(q[:, :, -count:], half), expected)
            with pytest.raises(
                TypeError, match=r"^q must have the dtype of the cache, torch.bfloat16, got torch.float32"
            ):
                attention_decode(q[:, :, -count:], half)


@on_every_backend
def test_empty_sizes(backend):
    """No samples, no queries, no new keys."""
    with use_backend(backend):
        cache = KVCache(0, 2, 4, 8)
        cache.append(torch.randn(0, 2, 3, 8), torch.randn(0, 2, 3, 8))
        assert attention_decode(torch.randn(0, 2, 1, 8), cache).shape == (0, 2, 1, 8)
        cache = KVCache(1, 2, 4, 8, value_dim=3)
        assert attention_decode(torch.randn(1, 2, 0, 8), cache).shape == (1, 2, 0, 3)
        cache.append(torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 3))
        assert cache.length == 0


@pytest.mark.parametrize("backend", NATIVE)
def test_the_cache_is_not_copied(backend):
    """A step at 20000 keys takes no memory to speak of."""
    k = torch.randn(1, 2, 20000, 32)
    cache = cache_for(k, k)
    cache.append(k, k)
    q = torch.randn(1, 2, 1, 32)
    with use_backend(backend):
        for mask in (None, masks.sliding_window(15000)):
            peak = peak_memory(lambda mask=mask: attention_decode(q, cache, mask=mask), torch.device("cpu"))
            assert peak < k.numel() * 4 // 100


# ---- What is refused.


def bad_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    k, v, q = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 8)

    def held() -> KVCache:
        cache = KVCache(2, 3, 6, 8, value_dim=5)
        cache.append(k, v)
        return cache

    make = lambda *args, **named: lambda: KVCache(*args, **named)  # noqa: E731
    append = lambda *args, **named: lambda: held().append(*args, **named)  # noqa: E731
    decode = lambda *args, **named: lambda: attention_decode(args[0], held(), *args[1:], **named)  # noqa: E731
    rope = positions.rotary
    return {
        "batch float": (make(2.0, 3, 4, 5), TypeError, "^batch must be an int, got 2.0"),
        "batch negative": (make(-1, 3, 4, 5), ValueError, "^batch must be at least 0, got -1"),
        "heads": (make(2, 0, 4, 5), ValueError, "^heads must be at least 1, got 0"),
        "heads bool": (make(2, True, 4, 5), TypeError, "^heads must be an int, got True"),
        "capacity": (make(2, 3, 0, 5), ValueError, "^capacity must be at least 1, got 0"),
        "capacity None": (make(2, 3, None, 5), TypeError, "^capacity must be an int, got None"),
        "head_dim": (make(2, 3, 4, 0), ValueError, "^head_dim must be at least 1, got 0"),
        "value_dim": (make(2, 3, 4, 5, value_dim=-2), ValueError, "^value_dim must be at least 1, got -2"),
        "dtype": (make(2, 3, 4, 5, dtype=torch.int32), TypeError, "^dtype must be a floating-point .* torch.int32"),
        "dtype float8": (make(2, 3, 4, 5, dtype=torch.float8_e4m3fn), TypeError, "^dtype must be a floating-point"),
        "k no tensor": (append([1.0], v), TypeError, "^k must be a tensor, got list"),
        "v None": (append(k, None), TypeError, "^v must be a tensor, got NoneType"),
        "k batch": (append(k[:1], v), ValueError, r"^k must have shape \(2, 3, 4, 8\), .*got \(1, 3, 4, 8\)"),
        "k heads": (append(k[:, :2], v), ValueError, r"^k must have shape \(2, 3, 4, 8\), .*got \(2, 2, 4, 8\)"),
        "k features": (append(v, v), ValueError, r"^k must have shape \(2, 3, 4, 8\), .*got \(2, 3, 4, 5\)"),
        "k dimensions": (append(k[0], v), ValueError, r"^k must have shape .*got \(3, 4, 8\)"),
        "k of one dimension": (append(k[0, 0, 0], v), ValueError, r"^k must have shape .*got \(8,\)"),
        "v features": (append(k, k), ValueError, r"^v must have shape \(2, 3, 4, 5\), .*got \(2, 3, 4, 8\)"),
        "v tokens": (append(k[:, :, :1], v), ValueError, r"^v must have shape \(2, 3, 1, 5\), .*got \(2, 3, 4, 5\)"),
        "v device": (append(k, v.to("meta")), ValueError, "^v must be on the device of the cache, cpu, got meta"),
        "k int": (append(k.long(), v), TypeError, "^k must be a floating-point .*torch.int64"),
        "v complex": (append(k[:, :, :2], v[:, :, :2] + 0j), TypeError, "^v must be a floating-point .*complex64"),
        "overflow": (append(k, v), ValueError, "^k must fit into the cache: 6 tokens, 4 taken, 4 new"),
        "rope of append": (append(k[:, :, :1], v[:, :, :1], rope=1), TypeError, "^rope must be a Rotary .*got int"),
        "rope too short": (
            append(k[:, :, :2], v[:, :, :2], rope=rope(5, 8)),
            ValueError,
            "^rope must have at least 6 positions, got 5",
        ),
        "rope too wide": (
            append(k[:, :, :2], v[:, :, :2], rope=rope(6, 10)),
            ValueError,
            "^rope must turn at most the 8 features .* got 10",
        ),
        "reset beyond": (lambda: held().reset(5), ValueError, "^length must be an int from 0 to 4, .* got 5"),
        "reset negative": (lambda: held().reset(-1), ValueError, "^length must be an int from 0 to 4, .* got -1"),
        "reset float": (lambda: held().reset(1.0), ValueError, "^length must be an int from 0 to 4, .* got 1.0"),
        "no cache": (lambda: attention_decode(q, k), TypeError, "^cache must be a KVCache, got Tensor"),
        "q no tensor": (decode([1.0]), TypeError, "^q must be a tensor, got list"),
        "q int": (decode(q.long()), TypeError, "^q must be a floating-point"),
        "q dimensions": (decode(q[0]), ValueError, r"^q must have shape \[2, heads, N, 8\], .*got \(3, 1, 8\)"),
        "q features": (decode(q[..., :7]), ValueError, r"^q must have shape \[2, heads, N, 8\], .*got \(2, 3, 1, 7\)"),
        "q batch": (decode(q[:1]), ValueError, r"^q must have shape \[2, heads, N, 8\], .*got \(1, 3, 1, 8\)"),
        "q heads": (decode(torch.randn(2, 6, 1, 8)), ValueError, "^q must have .*3 heads.*got 6"),
        "q heads in groups": (
            decode(torch.randn(2, 4, 1, 8), enable_gqa=True),
            ValueError,
            "^q must have a multiple of 3 heads, those of the cache, got 4",
        ),
        "q tokens": (
            decode(torch.randn(2, 3, 5, 8)),
            ValueError,
            "^q must have at most as many tokens as the cache holds, 4, got 5",
        ),
        "q dtype": (decode(q.double()), TypeError, "^q must have the dtype of the cache, .*float32, got .*float64"),
        "q device": (decode(q.to("meta")), ValueError, "^q must be on the device of the cache, cpu, got meta"),
        "bias tensor": (decode(q, bias=torch.zeros(4)), TypeError, "^bias must be ALiBi or None, got Tensor"),
        "bias heads": (
            decode(q, bias=positions.alibi(4)),
            ValueError,
            "^bias must have a slope for each of 3 heads, got 4",
        ),
        "mask tensor": (decode(q, mask=torch.ones(1, 4).bool()), TypeError, "^mask must be a Mask .*got Tensor"),
        "mask of fewer": (
            decode(q, mask=masks.document([3])),
            ValueError,
            r"^mask document\(\[3\]\) is made for 3 tokens, the cache holds 4",
        ),
        "scale text": (decode(q, scale="1"), TypeError, "^scale must be a number or None, got str"),
        "scale nan": (decode(q, scale=float("nan")), ValueError, "^scale must be finite, got nan"),
        "rope of decode": (decode(q, rope=torch.zeros(4)), TypeError, "^rope must be a Rotary .*got Tensor"),
        "rope of fewer": (decode(q, rope=rope(3, 8)), ValueError, "^rope must have at least 4 positions, got 3"),
    }


BAD = bad_calls()


@on_every_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    call, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


def test_numbers_of_every_kind():
    """NumPy's integers; a mask made for more tokens than the cache holds."""
    cache = KVCache(np.int64(1), np.int32(2), np.int64(5), np.int64(4), value_dim=np.int64(3))
    assert cache.keys.shape == (1, 2, 5, 4) and cache.values.shape == (1, 2, 5, 3)
    cache.append(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 3))
    cache.reset(np.int64(2))
    assert cache.length == 2
    q = torch.randn(1, 2, 1, 4)
    torch.testing.assert_close(attention_decode(q, cache, mask=masks.document([5])), attention_decode(q, cache))
