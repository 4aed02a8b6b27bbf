"""Attention as a user writes it, with PyTorch's own kernels, and transformers with it: the baselines of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dgm_models
from bench.masked_conv_baselines import GAIN

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Sees = Callable[[Tensor, Tensor], Tensor]  # whether query i sees key j
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # of a layer, its queries, keys and values

compiled = partial(torch.compile, dynamic=False)
FORCED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def sees_before(i: Tensor, j: Tensor) -> Tensor:
    """Keys before the query's own."""
    return j < i


def sees_near_before(i: Tensor, j: Tensor, width: int, radius: int) -> Tensor:
    """Pixels before the query's own, in raster order, at most so many rows and columns away."""
    rows, columns = i // width - j // width, i % width - j % width
    return (j < i) & (rows <= radius) & (columns.abs() <= radius)


def seen_matrix(sees: Sees, tokens: int, device: torch.device) -> Tensor:
    """A bool matrix of queries by keys, True where a key is seen."""
    place = torch.arange(tokens, device=device)
    return sees(place[:, None], place)


def flex(sees: Sees, tokens: int, device: torch.device, block: int) -> Function:
    """Compiled FlexAttention; which blocks of keys each block of queries needs is found here, once."""
    mask = create_block_mask(lambda b, h, i, j: sees(i, j), None, None, tokens, tokens, device, BLOCK_SIZE=block)
    return partial(compiled(flex_attention), block_mask=mask)


def on_backend(function: Function, backend: SDPBackend) -> Function:
    """`function` with scaled_dot_product_attention held to one of its backends."""

    def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return function(q, k, v)

    return forced


def shifted_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the tokens before each, without a mask matrix: causal attention of all but the first query."""
    out = torch.zeros_like(q)
    out[:, :, 1:] = F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True)
    return out


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as published: cosines and sines `[length, features]`, pairs half of the features apart."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Transformer(nn.Module):
    """Layers of causal attention and an MLP, each behind a norm; who attends how is said by the caller."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.widen = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Of tokens `[batch, length, width]`."""
        for layer, (project, out, widen, narrow) in enumerate(
            zip(self.project, self.out, self.widen, self.narrow, strict=True)
        ):
            packed = project(self.norms[2 * layer](x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            x = x + out(attend(layer, q, k, v).transpose(1, 2).flatten(2))
            x = x + narrow(F.gelu(widen(self.norms[2 * layer + 1](x))))
        return x


def count_products(network: nn.Module, tokens: int, width: int, layers: int) -> int:
    """Multiplications of a sample: of weights with tokens, of queries with keys, of probabilities with values."""
    looked_up = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    weights = sum(p.numel() for p in network.parameters() if p.dim() == 2 and id(p) not in looked_up)
    return tokens * weights + layers * 2 * width * (tokens * (tokens + 1) // 2)


def causal_sdpa(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token to those up to it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PlainCache:
    """Keys and values of each layer in buffers, and SDPA of one token to what they hold."""

    def __init__(self, layers: int, batch: int, heads: int, tokens: int, features: int, device: torch.device) -> None:
        self.buffers = torch.zeros(layers, 2, batch, heads, tokens, features, device=device)
        self.length = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.buffers[layer]
        keys[:, :, self.length] = k[:, :, 0]
        values[:, :, self.length] = v[:, :, 0]
        end = self.length + 1
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end])

    def step(self) -> None:
        """Goes on to the next token."""
        self.length += 1


def token_by_token(network: Transformer, x: Tensor, attend: Attend, after: Callable[[], None] = lambda: None) -> Tensor:
    """Results for all tokens of x, which go through the network one at a time; `after` is called after each."""
    results = []
    for token in x.split(1, dim=1):
        results.append(network(token, attend))
        after()
    return torch.cat(results, dim=1)


def image_gpts(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Any]:
    """`image_gpt` models of one network for pictures of these shapes, with the same random weights.

    Larger ones than PyTorch's, so that what is drawn depends on what was drawn long before.
    """
    make = partial(dgm_models.create_model, "image_gpt", positions="rotary", networks=1)
    models = [make(image_shape=shape).to(device).eval().requires_grad_(False) for shape in shapes]
    torch.manual_seed(0)
    for weight in models[0].parameters():
        if weight.dim() > 1:
            weight.normal_(std=GAIN / weight[0].numel() ** 0.5)
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


class PlainImageGPT:
    """The network of such a model, of binary pictures, with SDPA, and the loop that passes all tokens through it again.

    Tokens are `[batch, length]`, each the level of the pixel before; the first is `START`.
    """

    START = 2

    def __init__(self, network: Any) -> None:
        self.network = network
        table = network.rope().table.to(network.head.weight.dtype)
        self.cos, self.sin = (torch.cat([part, part], dim=1) for part in table.unbind(-1))

    def logits(self, before: Tensor) -> Tensor:
        """Of the pixels that the tokens stand for, `[batch, length]`."""
        network, cos, sin = self.network, self.cos[: before.shape[1]], self.sin[: before.shape[1]]
        x = network.embedding(before)
        for block in network.blocks:
            attention = block.attention
            packed = F.linear(block.attention_norm(x), attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = packed.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = causal_sdpa(0, plain_rotary(q, cos, sin), plain_rotary(k, cos, sin), v)
            x = x + attention.out_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return network.head(network.norm(x))[..., 0]

    def draw(self, before: Tensor, uniform: Tensor) -> Tensor:
        """The last pixel's level, by a number for each sample."""
        return (uniform > torch.sigmoid(-self.logits(before)[:, -1])).long()

    def generate(self, uniform: Tensor) -> Tensor:
        """Levels like the numbers, `[batch, pixels]`."""
        before = torch.full_like(uniform[:, :1], self.START, dtype=torch.int64)
        for numbers in uniform.unbind(1):
            before = torch.cat([before, self.draw(before, numbers)[:, None]], dim=1)
        return before[:, 1:]
