"""TransformerBlock: PyTorch's encoder and decoder layers, caches, images, the order of tokens, dtypes, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import masks, positions, use_backend
from dgm_kernels.nn import MultiheadAttention, TransformerBlock
from tests.attention_module_cases import RASTER, double
from tests.cases import BACKENDS
from tests.contract import assert_compiles

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def block_like(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, **settings: Any) -> TransformerBlock:
    """A block with the parameters of a layer of PyTorch."""
    block = TransformerBlock(12, 3, mlp_ratio=2, **settings).double()
    names = {"self_attn": "attention", "linear1": "mlp.0", "linear2": "mlp.2", "multihead_attn": "cross_attention"}
    norms = {"norm1": "attention_norm", "norm2": "mlp_norm"}
    if isinstance(layer, nn.TransformerDecoderLayer):
        norms = {"norm1": "attention_norm", "norm2": "cross_norm", "norm3": "mlp_norm"}
    state = {}
    for key, value in layer.state_dict().items():
        module, _, rest = key.partition(".")
        state[f"{ {**names, **norms}[module] }.{rest}".replace(" ", "")] = value
    block.load_state_dict(state)
    return block


def test_the_block_is_pytorchs_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    block, x = block_like(layer), double(2, 6, 12)
    torch.testing.assert_close(block(x), layer(x))
    hidden = ~masks.causal().dense(6)
    torch.testing.assert_close(block(x, mask=masks.causal()), layer(x, src_mask=hidden))
    image = x.transpose(1, 2).reshape(2, 12, 3, 2)
    result = block(image, mask=masks.causal())
    assert result.shape == image.shape
    torch.testing.assert_close(result.flatten(2).transpose(1, 2), layer(x, src_mask=hidden))


def test_the_block_with_a_context_is_pytorchs_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, context = double(2, 6, 12), double(2, 5, 12)
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    block = block_like(layer, cross_width=12)
    expected = layer(x, context, memory_key_padding_mask=~seen)
    torch.testing.assert_close(block(x, context, context_mask=seen), expected)
    image = x.transpose(1, 2).reshape(2, 12, 2, 3)
    torch.testing.assert_close(block(image, context, context_mask=seen).flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(block(x[1:], context[1:, :3]), expected[1:])


@on_every_backend
def test_blocks_decode_from_caches(backend: str) -> None:
    """Text to image: the pixels so far in a cache, a text beside them."""
    blocks = [TransformerBlock(12, 3, cross_width=5, dropout=0.3).eval() for _ in range(2)]
    x, text = torch.randn(2, 6, 12), torch.randn(2, 4, 5)
    seen = torch.tensor([[True] * 4, [True, True, False, False]])
    options = {"context_mask": seen, "rope": positions.rotary_2d(2, 3, 4), "mask": RASTER}
    with use_backend(backend), torch.no_grad():
        expected = x
        for block in blocks:
            expected = block(expected, text, **options)
        caches = [block.new_cache(2, 6) for block in blocks]
        found = []
        for token in x.split(1, dim=1):
            for block, cache in zip(blocks, caches, strict=True):
                token = block(token, text, cache=cache, **options)
            found.append(token)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_A9_without_positions_attention_is_permutation_equivariant(kind: str, backend: str) -> None:
    """Tokens that change places take their results along; with positions or a mask they do not."""
    layer = MultiheadAttention(12, 3) if kind == "attention" else TransformerBlock(12, 3)
    x, order = torch.randn(2, 6, 12), torch.tensor([3, 0, 5, 1, 4, 2])
    rope, alibi = positions.rotary_2d(2, 3, 4, base=10.0), positions.alibi(3)

    def run(x: Tensor, **options: Any) -> Tensor:
        with use_backend(backend), torch.no_grad():
            out = layer(x, **options)
        return out[0] if kind == "attention" else out

    torch.testing.assert_close(run(x[:, order]), run(x)[:, order], rtol=1e-4, atol=1e-5)
    for options in ({"rope": rope}, {"bias": alibi}, {"mask": masks.causal()}, {"mask": RASTER}):
        difference = (run(x[:, order], **options) - run(x, **options)[:, order]).abs().max()
        assert float(difference) > 1e-2, list(options)
    places = torch.randn(6, 12)
    difference = (run(x[:, order] + places) - run(x + places)[:, order]).abs().max()
    assert float(difference) > 1e-2


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype, backend: str) -> None:
    """Made in the dtype or moved to it: forward, backward and decoding in it, near the result of float32."""
    made, moved = TransformerBlock(12, 3, dtype=dtype), TransformerBlock(12, 3).to(dtype)
    rope = positions.rotary(6, 4)
    for block in (made, moved):
        wide = copy.deepcopy(block).float()
        x = torch.randn(2, 6, 12).to(dtype).requires_grad_()
        with use_backend(backend):
            out = block(x, mask=masks.causal(), rope=rope)
            out.sum().backward()
            cache = block.new_cache(2, 6)
            decoded = torch.cat([block(token, rope=rope, cache=cache) for token in x.detach().split(1, 1)], 1)
        wide_x = x.detach().float().requires_grad_()
        expected = wide(wide_x, mask=masks.causal(), rope=rope)
        expected.sum().backward()
        assert out.dtype == x.grad.dtype == cache.keys.dtype == decoded.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        for actual, wanted in ((out, expected), (decoded, expected), (x.grad, wide_x.grad)):
            atol = tolerance * float(wanted.detach().abs().max())
            torch.testing.assert_close(actual.float(), wanted, rtol=tolerance, atol=atol)


@on_every_backend
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=str)
def test_compiles(mask: masks.Mask | None, backend: str) -> None:
    """Without a graph break, once for two sizes."""
    block = TransformerBlock(12, 3)
    args = [[torch.randn(batch, length, 12, requires_grad=True)] for batch, length in ((3, 5), (5, 9))]
    with use_backend(backend):
        assert_compiles(lambda x: block(x, mask=mask), *args, backend="aot_eager")


def test_devices() -> None:
    """On the meta device nothing is initialised; materialised elsewhere, it loads a state dict."""
    settings = {"cross_width": 5, "mlp_ratio": 1.5}
    empty, full = TransformerBlock(12, 3, device="meta", **settings), TransformerBlock(12, 3, **settings)
    assert all(parameter.is_meta for parameter in empty.parameters())
    x, context = torch.randn(2, 6, 12), torch.randn(2, 4, 5)
    real = empty.to_empty(device="cpu")
    real.load_state_dict(full.state_dict())
    assert torch.equal(real(x, context), full(x, context))


def test_every_parameter_of_a_block_is_trained_and_dropout_drops() -> None:
    block = TransformerBlock(12, 3, cross_width=5, dropout=0.4, attention_dropout=0.2)
    x, context = torch.randn(3, 6, 12), torch.randn(3, 4, 5)
    out = block(x, context)
    out.square().sum().backward()
    unused = [name for name, p in block.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not unused
    assert not torch.equal(block(x, context), out)
    block.eval()
    assert torch.equal(block(x, context), block(x, context))
    assert block.attention.dropout == block.cross_attention.dropout == 0.2


# ---- Refusals.


def bad_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    block, cross = TransformerBlock(12, 3), TransformerBlock(12, 3, cross_width=5)
    x, k, text = torch.randn(2, 4, 12), torch.randn(2, 6, 12), torch.randn(2, 4, 5)
    hidden = torch.zeros(4, 6, dtype=torch.bool)
    return {
        "width": (lambda: TransformerBlock(-1, 3), ValueError, "width must be positive, got -1"),
        "block's heads": (lambda: TransformerBlock(12, 5), ValueError, "heads must divide width, 12, got 5"),
        "mlp_ratio": (lambda: TransformerBlock(12, 3, mlp_ratio=0), ValueError, "mlp_ratio must give the MLP"),
        "mlp_ratio's type": (lambda: TransformerBlock(12, 3, mlp_ratio="4"), TypeError, "mlp_ratio must be a number"),
        "cross_width": (lambda: TransformerBlock(12, 3, cross_width=0), ValueError, "cross_width must be positive"),
        "attention_dropout": (
            lambda: TransformerBlock(12, 3, attention_dropout=-0.1), ValueError, r"attention_dropout must be in"
        ),
        "x": (
            lambda: block(x[..., :5]),
            ValueError,
            r"x must have shape \[batch, tokens, 12\] or \[batch, 12, height, columns\], got \(2, 4, 5\)",
        ),
        "image": (lambda: block(torch.randn(2, 3, 4, 12)), ValueError, r"x must have shape .* got \(2, 3, 4, 12\)"),
        "no context": (lambda: block(x, text), ValueError, "context must be None: this block has no cross_width"),
        "no context_mask": (lambda: block(x, context_mask=hidden), ValueError, "context_mask must be None"),
        "missing context": (lambda: cross(x), ValueError, "context must be given: this block has a cross_width"),
        "context": (lambda: cross(x, k), ValueError, r"context must have shape \[2, tokens, 5\], got \(2, 6, 12\)"),
        "context's batch": (lambda: cross(x, text[:1]), ValueError, r"context must have shape \[2, tokens, 5\]"),
        "context_mask": (
            lambda: cross(x, text, context_mask=hidden), ValueError, r"context_mask must have shape \(2, 4\), got"
        ),
        "context_mask's dtype": (
            lambda: cross(x, text, context_mask=torch.ones(2, 4)), TypeError, "context_mask must be a bool tensor, got"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name: str) -> None:
    call, error, message = bad_calls()[name]
    with pytest.raises(error, match=f"^{message}"):
        call()
