"""MultiheadAttention: the results and state dicts of PyTorch's, masks, caches, positions, refusals."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import KVCache, masks, positions, use_backend
from dgm_kernels.nn import MultiheadAttention
from tests.attention_module_cases import RASTER, double
from tests.cases import BACKENDS
from tests.contract import assert_parity

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
STRUCTURED = {
    "causal": masks.causal(),
    "strict": masks.causal(-1),
    "raster": RASTER,
    "window": masks.sliding_window(1, 2),
    "two pictures": RASTER & masks.neighborhood_2d(3, 2, 1),
}


def pair(embed_dim: int = 12, heads: int = 3, **settings: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and PyTorch's with the same parameters, none of them 0, in float64."""
    ours = MultiheadAttention(embed_dim, heads, **settings).double()
    theirs = nn.MultiheadAttention(embed_dim, heads, **{"batch_first": True, **settings}).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# name: (settings of the layer, shapes of the inputs, one for each that is another tensor)
LAYOUTS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "self": ({}, [(2, 6, 12)]),
    "keys and values from one": ({}, [(2, 4, 12), (2, 6, 12)]),
    "three inputs": ({}, [(2, 4, 12), (2, 6, 12), (2, 6, 12)]),
    "other features": ({"kdim": 5, "vdim": 7}, [(2, 4, 12), (2, 6, 5), (2, 6, 7)]),
    "one kind of other features": ({"vdim": 5}, [(2, 4, 12), (2, 6, 12), (2, 6, 5)]),
    "length first": ({"batch_first": False}, [(4, 2, 12), (6, 2, 12), (6, 2, 12)]),
    "length first, self": ({"batch_first": False}, [(6, 2, 12)]),
    "no batch": ({}, [(4, 12), (6, 12), (6, 12)]),
    "no bias": ({"bias": False}, [(2, 4, 12), (2, 6, 12), (2, 6, 12)]),
    "no bias, other features": ({"bias": False, "kdim": 5}, [(2, 4, 12), (2, 6, 5), (2, 6, 12)]),
    "one token": ({}, [(1, 1, 12)]),
}


def inputs_of(name: str) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    settings, shapes = LAYOUTS[name]
    given = [double(*shape) for shape in shapes]
    query, key, value = (given + given[-1:] * 2)[:3]
    return settings, (query, key, value)


@on_every_backend
@pytest.mark.parametrize("name", LAYOUTS)
def test_results_weights_and_gradients_are_pytorchs(name: str, backend: str) -> None:
    settings, inputs = inputs_of(name)
    dtype = torch.float64 if backend == "reference" else torch.float32
    layers = [layer.to(dtype) for layer in pair(**settings)]
    found = []
    for layer in layers:
        unique: dict[int, Tensor] = {id(x): x.to(dtype).requires_grad_() for x in inputs}
        with use_backend(backend):
            out, _ = layer(*(unique[id(x)] for x in inputs), need_weights=False)
            _, weights = layer(*(unique[id(x)] for x in inputs), need_weights=True)
            _, each = layer(*(unique[id(x)] for x in inputs), need_weights=True, average_attn_weights=False)
            grads = torch.autograd.grad(out.sin().sum(), [*layer.parameters(), *unique.values()])
        found.append([out, weights, each, *grads])
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[0], found[1], **tolerance)


def torch_masks() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """key_padding_mask and attn_mask for batch 2, 3 heads, 4 queries and 6 keys, each query with a key that it sees."""
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:], padding[1, 0] = True, True
    some = torch.rand(4, 6) > 0.6
    some[:, 3] = False
    many = torch.rand(6, 4, 6) > 0.6
    many[..., 3] = False
    added = torch.zeros(2, 6, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return {
        "padding": (padding, None),
        "padding, added": (added + 0.3, None),
        "hidden": (None, some),
        "hidden for each head": (None, many),
        "added": (None, double(4, 6)),
        "added for each head": (None, double(6, 4, 6)),
        "both hidden": (padding, many),
        "both added": (added, double(4, 6)),
        "hidden and added": (added, double(6, 4, 6).masked_fill(many, -torch.inf)),
    }


@on_every_backend
@pytest.mark.parametrize("name", torch_masks())
def test_masks_are_pytorchs(name: str, backend: str) -> None:
    torch.manual_seed(1)
    padding, attn = torch_masks()[name]
    dtype = torch.float64 if backend == "reference" else torch.float32
    padding, attn = (t if t is None or t.dtype == torch.bool else t.to(dtype) for t in (padding, attn))
    ours, theirs = (layer.to(dtype) for layer in pair())
    query, key = double(2, 4, 12).to(dtype), double(2, 6, 12).to(dtype)
    options = {"key_padding_mask": padding, "attn_mask": attn, "need_weights": True, "average_attn_weights": False}
    with use_backend(backend):
        expected, weights = theirs(query, key, key, **options)
        torch.testing.assert_close(ours(query, key, key, **options), (expected, weights), rtol=1e-4, atol=1e-5)
        alone, nothing = ours(query, key, **{**options, "need_weights": False})
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    assert nothing is None
    assert (weights == 0).any() or "added" in name, "the mask hides something"


def test_masks_without_a_batch() -> None:
    ours, theirs = pair()
    query, key = double(4, 12), double(6, 12)
    padding, attn = torch.tensor([False] * 4 + [True] * 2), double(3, 4, 6)
    for options in ({"key_padding_mask": padding}, {"attn_mask": attn}, {"attn_mask": attn[0]}):
        expected = theirs(query, key, key, **options)
        torch.testing.assert_close(ours(query, key, key, need_weights=True, **options), expected)


def test_is_causal_needs_no_matrix() -> None:
    ours, theirs = pair()
    x = double(2, 6, 12)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x, is_causal=True)[0], expected)
    torch.testing.assert_close(ours(x, attn_mask=hidden, is_causal=True)[0], expected)
    near = ours(x, is_causal=True, mask=masks.sliding_window(1))[0]
    torch.testing.assert_close(near, theirs(x, x, x, attn_mask=hidden | torch.ones(6, 6).tril(-2).bool())[0])


@on_every_backend
@pytest.mark.parametrize("bias", ["none", "added", "alibi"])
@pytest.mark.parametrize("others", ["none", "padding", "added", "padding and added"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_masks_and_biases_are_matrices(name: str, others: str, bias: str, backend: str) -> None:
    """In every combination with PyTorch's masks; queries that see no key come after the others' keys are hidden."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    ours, theirs = (layer.to(dtype) for layer in pair())
    x, given, total = double(2, 6, 12).to(dtype), {}, torch.zeros(2, 3, 6, 6, dtype=dtype)
    total = total.masked_fill(~STRUCTURED[name].dense(6), -torch.inf)
    if "padding" in others:
        given["key_padding_mask"] = torch.zeros(2, 6, dtype=torch.bool)
        given["key_padding_mask"][0, 5] = given["key_padding_mask"][1, 1] = True
        total = total.masked_fill(given["key_padding_mask"][:, None, None], -torch.inf)
    if "added" in others:
        given["attn_mask"] = double(6, 6, 6).to(dtype)
        total = total + given["attn_mask"].view(2, 3, 6, 6)
    if bias != "none":
        given["bias"] = positions.alibi(3) if bias == "alibi" else double(3, 6, 6).to(dtype)
        total = total + (positions.alibi(3).bias(6, 6).to(dtype) if bias == "alibi" else given["bias"])
    with use_backend(backend):
        actual, weights = ours(x, mask=STRUCTURED[name], need_weights=True, **given)
        alone, _ = ours(x, mask=STRUCTURED[name], **given)
    expected, expected_weights = theirs(x, x, x, attn_mask=total.flatten(0, 1))
    blind = (total == -torch.inf).all(-1).all(1)  # where PyTorch's result is NaN
    torch.testing.assert_close(actual[~blind], expected[~blind], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[~blind], expected_weights[~blind], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, actual, rtol=1e-4, atol=1e-5)
    if blind.any():
        assert bool((weights[blind] == 0).all())
        torch.testing.assert_close(actual[blind], ours.out_proj.bias.expand_as(actual[blind]))
    assert not blind.all()


@on_every_backend
@pytest.mark.parametrize("name", ["rotary", "rotary_2d", "interleaved"])
def test_rotary_positions_turn_queries_and_keys(name: str, backend: str) -> None:
    rope = {
        "rotary": positions.rotary(6, 4),
        "rotary_2d": positions.rotary_2d(2, 3, 4),
        "interleaved": positions.rotary(9, 2, interleaved=True),
    }[name]
    layer = MultiheadAttention(12, 3)
    x = torch.randn(2, 6, 12)
    q, k, v = nn.functional.linear(x, layer.in_proj_weight).view(2, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (rope.apply(q) @ rope.apply(k).transpose(-2, -1) / 2).softmax(-1)
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    with use_backend(backend):
        out, found = layer(x, rope=rope, need_weights=True, average_attn_weights=False)
        torch.testing.assert_close(layer(x, rope=rope)[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((out, found), (expected, weights), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, layer(x)[0], atol=1e-3)


def decoding_options() -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "rope": {"rope": positions.rotary(8, 4)},
        "raster": {"mask": masks.raster_2d(2, 3, 1, include_self=True), "rope": positions.rotary_2d(2, 3, 4)},
        "strict": {"mask": masks.causal(-1)},
        "two pictures": {"mask": STRUCTURED["two pictures"]},
        "alibi": {"bias": positions.alibi(3), "mask": masks.sliding_window(2)},
    }


@on_every_backend
@pytest.mark.parametrize("parts", [(1,) * 6, (4, 1, 1), (2, 3, 1), (6,)], ids=str)
@pytest.mark.parametrize("name", decoding_options())
def test_decoding_is_causal_attention(name: str, parts: tuple[int, ...], backend: str) -> None:
    """Token by token or several at a time; the cache holds what it has to and no more."""
    options = decoding_options()[name]
    layer = MultiheadAttention(12, 3)
    x = torch.randn(2, 6, 12)
    with use_backend(backend), torch.no_grad():
        expected, _ = layer(x, is_causal=True, **options)
        cache = layer.new_cache(2, 6)
        assert isinstance(cache, KVCache) and tuple(cache.keys.shape) == (2, 3, 6, 4)
        found = []
        for part in x.split(parts, dim=1):
            out, weights = layer(part, cache=cache, **options)
            found.append(out)
            assert weights is None
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
        assert cache.length == 6
        cache.reset(2)
        last, _ = layer(x[:, 2:], cache=cache, **options)
        torch.testing.assert_close(last, expected[:, 2:], rtol=1e-4, atol=1e-5)
    other = MultiheadAttention(12, 3, batch_first=False)
    other.load_state_dict(layer.state_dict())
    cache = other.new_cache(2, 6)
    turned, _ = other(x.transpose(0, 1), cache=cache, **options)
    torch.testing.assert_close(turned.transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 7}, {"vdim": 7}, {"bias": False}], ids=str)
def test_state_dicts_are_those_of_pytorch(settings: dict[str, Any]) -> None:
    ours, theirs = MultiheadAttention(12, 3, **settings), nn.MultiheadAttention(12, 3, **settings)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for target, source in ((ours, theirs), (theirs, MultiheadAttention(12, 3, **settings))):
        target.load_state_dict(source.state_dict(), strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
    torch.manual_seed(3)
    ours = MultiheadAttention(12, 3, **settings)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 3, **settings)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), "the same initialisation"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_takes_its_place_in_pytorchs_transformer(mode: str) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 6, 12), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    getattr(layer, mode)()
    expected = layer(x, src_mask=hidden, src_key_padding_mask=padding)
    ours = MultiheadAttention(12, 3)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours.train(layer.training)
    torch.testing.assert_close(layer(x, src_mask=hidden, src_key_padding_mask=padding), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_probabilities_in_training() -> None:
    layer = MultiheadAttention(12, 3, dropout=0.5)
    x = torch.randn(2, 40, 12)
    layer.eval()
    expected, weights = layer(x, need_weights=True, average_attn_weights=False)
    assert torch.equal(layer(x, need_weights=True)[0], expected)
    layer.train()
    torch.manual_seed(5)
    out, dropped = layer(x, need_weights=True, average_attn_weights=False)
    zero = dropped == 0
    assert float(zero.float().mean()) == pytest.approx(0.5, abs=0.02)  # of 9600: 4 standard deviations
    torch.testing.assert_close(dropped[~zero], 2 * weights[~zero])
    v = nn.functional.linear(x, layer.in_proj_weight[24:]).view(2, 40, 3, 4).transpose(1, 2)
    torch.testing.assert_close(out, layer.out_proj((dropped @ v).transpose(1, 2).flatten(2)))
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x)[0], out)
    assert not torch.allclose(layer(x)[0], out, atol=1e-3)


def test_copies_and_pickles() -> None:
    layer, x = MultiheadAttention(12, 3), torch.randn(2, 6, 12)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is MultiheadAttention and repr(other) == repr(layer)
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.in_proj_weight.add_(1.0)
        assert not torch.equal(other(x)[0], expected)
    assert torch.equal(layer(x)[0], expected)


def test_repr() -> None:
    shown = repr(MultiheadAttention(12, 3, 0.1, kdim=5, bias=False, batch_first=False)).split("\n")[1].strip()
    assert shown == "12, num_heads=3, kdim=5, vdim=12, dropout=0.1, bias=False, batch_first=False"
    assert repr(MultiheadAttention(12, 3)).split("\n")[1].strip() == "12, num_heads=3"


@on_every_backend
def test_autocast(backend: str) -> None:
    """The dtype and the precision that PyTorch's module has under autocast; float32 gradients in the parameters."""
    ours, theirs = pair()
    x, hidden = double(2, 60, 12), ~masks.causal().dense(60)
    expected = theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
    ours, theirs, x = ours.float(), theirs.float(), x.float()
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ours(x, mask=masks.causal())[0]
        eager = theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
        assert actual.dtype == torch.bfloat16
        assert_parity(actual, eager, expected)
        added = torch.zeros(60, 60).masked_fill(hidden, -torch.inf)
        assert_parity(ours(x, attn_mask=added)[0], eager, expected)
        cache = ours.new_cache(2, 60)
        decoded = [ours(token, cache=cache)[0] for token in x.split(20, dim=1)]
        assert_parity(torch.cat(decoded, dim=1), eager, expected)
        actual.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


# ---- Refusals.

Bad = tuple[Any, type[Exception], str]  # a call, the error and its message


def bad_settings() -> dict[str, Bad]:
    return {
        "embed_dim": (lambda: MultiheadAttention(0, 3), ValueError, "embed_dim must be positive, got 0"),
        "embed_dim's type": (lambda: MultiheadAttention(12.0, 3), TypeError, "embed_dim must be an int, got 12.0"),
        "heads": (lambda: MultiheadAttention(12, 5), ValueError, "num_heads must divide embed_dim, 12, got 5"),
        "kdim": (lambda: MultiheadAttention(12, 3, kdim=0), ValueError, "kdim must be positive, got 0"),
        "dropout": (lambda: MultiheadAttention(12, 3, 1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        "bias_kv": (lambda: MultiheadAttention(12, 3, add_bias_kv=True), ValueError, "add_bias_kv must be False"),
        "zero": (lambda: MultiheadAttention(12, 3, add_zero_attn=True), ValueError, "add_zero_attn must be False"),
    }  # fmt: skip


def bad_inputs() -> dict[str, Bad]:
    layer, first = MultiheadAttention(12, 3), MultiheadAttention(12, 3, batch_first=False)
    x, k, hidden = torch.randn(2, 4, 12), torch.randn(2, 6, 12), torch.zeros(4, 6, dtype=torch.bool)
    return {
        "query": (
            lambda: layer(x[..., :5]), ValueError, r"query must have shape \[batch, length, 12\], got \(2, 4, 5\)"
        ),
        "length first": (
            lambda: first(x[..., :5]), ValueError, r"query must have shape \[length, batch, 12\], got \(2, 4, 5\)"
        ),
        "query's type": (lambda: layer([1.0]), TypeError, "query must be a tensor, got list"),
        "key": (lambda: layer(x, k[..., :5]), ValueError, r"key must have shape .* got \(2, 6, 5\)"),
        "key's batch": (lambda: layer(x, k[:1]), ValueError, "key must have the batch of query, 2, got 1"),
        "value": (lambda: layer(x, k, x), ValueError, r"value must have the batch and length of key"),
        "padding": (
            lambda: layer(x, k, key_padding_mask=hidden),
            ValueError,
            r"key_padding_mask must have shape \(2, 6\), got \(4, 6\)",
        ),
        "attn_mask": (
            lambda: layer(x, k, attn_mask=hidden.T),
            ValueError,
            r"attn_mask must have shape \(4, 6\) or \(6, 4, 6\), got \(6, 4\)",
        ),
        "attn_mask's dtype": (
            lambda: layer(x, k, attn_mask=hidden.long()), TypeError, "attn_mask must be bool or floating-point, got"
        ),
        "attn_mask's type": (lambda: layer(x, k, attn_mask=RASTER), TypeError, "attn_mask must be a tensor or None"),
        "mask": (lambda: layer(x, k, mask=hidden), TypeError, "mask must be a Mask of dgm_kernels.masks, got Tensor"),
        "mask's length": (lambda: layer(x, mask=RASTER), ValueError, "mask raster_2d.* is made for 6 tokens, got 4"),
        "rope": (lambda: layer(x, rope=positions.rotary(3, 4)), ValueError, "rope must have at least 4 positions"),
        "bias": (lambda: layer(x, bias=positions.alibi(2)), ValueError, "bias must have a slope for each of 3 heads"),
    }  # fmt: skip


def bad_cached_calls() -> dict[str, Bad]:
    layer, trained = MultiheadAttention(12, 3), MultiheadAttention(12, 3, dropout=0.1)
    x, k, hidden = torch.randn(2, 4, 12), torch.randn(2, 6, 12), torch.zeros(4, 6, dtype=torch.bool)
    cache = lambda: layer.new_cache(2, 8)  # noqa: E731
    return {
        "cache": (lambda: layer(x, cache=[]), TypeError, "cache must be a KVCache, got list"),
        "cache's batch": (lambda: layer(x[:1], cache=cache()), ValueError, "k must have shape .* that of the cache"),
        "full cache": (lambda: layer(x, cache=layer.new_cache(2, 3)), ValueError, "k must fit into the cache: 3"),
        "cache and keys": (lambda: layer(x, k, cache=cache()), ValueError, "key must be as long as query with a"),
        "padding of a cache": (
            lambda: layer(x, cache=cache(), key_padding_mask=torch.zeros(2, 4)),
            ValueError,
            "key_padding_mask must be None with a cache",
        ),
        "matrix for a cache": (
            lambda: layer(x, cache=cache(), attn_mask=hidden), ValueError, "attn_mask must be None with a cache"
        ),
        "weights of a cache": (
            lambda: layer(x, cache=cache(), need_weights=True), ValueError, "need_weights must be False with a cache"
        ),
        "dropout of a cache": (
            lambda: trained(x, cache=cache()), ValueError, "cache must be None in training with dropout"
        ),
    }  # fmt: skip


BAD = bad_settings() | bad_inputs() | bad_cached_calls()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_call_that_is_refused_leaves_the_cache() -> None:
    layer, x = MultiheadAttention(12, 3), torch.randn(2, 1, 12)
    cache = layer.new_cache(2, 8)
    layer(x, cache=cache)
    for options in ({"mask": masks.raster_2d(1, 1, 1)}, {"bias": positions.alibi(2)}, {"bias": torch.zeros(1, 1)}):
        with pytest.raises((TypeError, ValueError)):
            layer(x, cache=cache, **options)
        assert cache.length == 1, list(options)


def test_all_combinations_of_masks_are_tested() -> None:
    """Of a structured mask, PyTorch's masks and ALiBi, none is left out without a word."""
    layer, x = MultiheadAttention(12, 3).double(), double(2, 6, 12)
    options: dict[str, Any] = {
        "mask": masks.sliding_window(2, 2),
        "key_padding_mask": torch.tensor([[True] + [False] * 5] * 2),
        "attn_mask": double(6, 6),
        "bias": positions.alibi(3),
        "rope": positions.rotary(6, 4, base=10.0),
    }
    results = []
    for count in range(len(options) + 1):
        for names in itertools.combinations(options, count):
            results.append(layer(x, **{name: options[name] for name in names})[0].detach())
    for a, b in itertools.combinations(results, 2):
        assert float((a - b).abs().max()) > 1e-4
