"""Calls of attention, and what they mean, written from the definition and not from the op's masks and positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import attention, masks, positions
from tests.cases import NATIVE

BACKENDS = ["reference", *NATIVE]


class Size(NamedTuple):
    """Of the operands; ``values`` are the features of a value, None for as many as a key has."""

    batch: int
    heads: int
    queries: int
    keys: int
    features: int
    values: int | None = None


# Ragged first: no multiple of a vector, a tile or a block; then features of every kind; then round numbers.
SIZES = (
    *(Size(2, 2, 113, 203, 17), Size(1, 4, 239, 1, 16), Size(2, 2, 1, 1023, 64), Size(1, 2, 3, 59, 72, 40)),
    *(Size(3, 2, 59, 3, 3, 5), Size(1, 2, 1, 1, 1), Size(2, 4, 7, 9, 1, 3), Size(1, 2, 64, 128, 32)),
)
HEAD_DIMS = (1, 3, 16, 17, 64, 72, 128, 256)
SMALL_SIZE = Size(2, 4, 6, 6, 8)
EMPTY_SIZES = (
    Size(0, 2, 3, 4, 8),
    Size(2, 0, 3, 4, 8),
    Size(2, 2, 0, 4, 8),
    Size(2, 2, 3, 0, 8),
    Size(2, 2, 3, 4, 8, 0),
)


# ---- Masks. ``sees`` says what one query sees of one key; its operations are those that ints and tensors share.


@dataclasses.dataclass(frozen=True)
class MaskCase:
    """A structured mask and its definition.

    Args:
        make: the mask, for numbers of queries and keys.
        sees: whether query i sees key j, for i, j and these numbers.
        square: queries and keys must be the same tokens.
    """

    name: str
    make: Callable[[int, int], masks.Mask]
    sees: Callable[[Any, Any, int, int], Any]
    square: bool = False

    def __str__(self) -> str:
        return self.name

    def __and__(self, other: MaskCase) -> MaskCase:
        return MaskCase(
            f"{self} & {other}",
            lambda n, m: self.make(n, m) & other.make(n, m),
            lambda i, j, n, m: self.sees(i, j, n, m) & other.sees(i, j, n, m),
            self.square or other.square,
        )

    def matrix(self, queries: int, keys: int) -> Tensor:
        """All pairs at once: bool ``[queries, keys]``."""
        seen = self.sees(torch.arange(queries)[:, None], torch.arange(keys), queries, keys)
        return torch.as_tensor(seen).expand(queries, keys)


def grid(tokens: int) -> tuple[int, int]:
    """Height and width of a picture of so many pixels, as square as can be; no higher than wide."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def packed(tokens: int) -> list[int]:
    """Lengths of sequences that are so many tokens together, one of them empty."""
    first = tokens // 3
    return [first, 0, (tokens - first) // 2, tokens - first - (tokens - first) // 2]


def causal_case(offset: int) -> MaskCase:
    return MaskCase(f"causal({offset})", lambda n, m: masks.causal(offset), lambda i, j, n, m: j <= i + offset)


def prefix_case(length: int) -> MaskCase:
    return MaskCase(f"prefix({length})", lambda n, m: masks.prefix(length), lambda i, j, n, m: (j < length) | (j <= i))


def window_case(left: int | None, right: int | None) -> MaskCase:
    far_left, far_right = (10**6 if side is None else side for side in (left, right))
    return MaskCase(
        f"sliding_window({left}, {right})",
        lambda n, m: masks.sliding_window(left, right),
        lambda i, j, n, m: (i - j <= far_left) & (j - i <= far_right),
    )


def _near(i: Any, j: Any, width: int, rows: int, columns: int) -> Any:
    return (abs(i // width - j // width) <= rows) & (abs(i % width - j % width) <= columns)


def neighborhood_case(rows: int, columns: int) -> MaskCase:
    return MaskCase(
        f"neighborhood_2d({rows}, {columns})",
        lambda n, m: masks.neighborhood_2d(*grid(n), (rows, columns)),
        lambda i, j, n, m: _near(i, j, grid(n)[1], rows, columns),
        square=True,
    )


def raster_case(rows: int, columns: int, itself: bool = False) -> MaskCase:
    def sees(i: Any, j: Any, n: int, m: int) -> Any:
        width = grid(n)[1]
        above, beside = j // width < i // width, (j // width == i // width) & (j % width < i % width)
        return _near(i, j, width, rows, columns) & (above | beside | ((i == j) & (itself | (i < 0))))

    return MaskCase(
        f"raster_2d({rows}, {columns}{', include_self' * itself})",
        lambda n, m: masks.raster_2d(*grid(n), (rows, columns), include_self=itself),
        sees,
        square=True,
    )


def _same_document(i: Any, j: Any, n: int, m: int) -> Any:
    begin, seen = 0, (i < 0) & (j < 0)
    for length in packed(n):
        end = begin + length
        seen = seen | ((begin <= i) & (i < end) & (begin <= j) & (j < end))
        begin = end
    return seen


DOCUMENT_CASE = MaskCase("document", lambda n, m: masks.document(packed(n)), _same_document, square=True)
HIGH_PICTURE_CASE = MaskCase(
    "neighborhood_2d of a high picture",
    lambda n, m: masks.neighborhood_2d(grid(n)[1], grid(n)[0], 1),
    lambda i, j, n, m: _near(i, j, grid(n)[0], 1, 1),
    square=True,
)

MASKS = (
    *(causal_case(offset) for offset in (0, -1, 5, -3)),
    MaskCase("causal, aligned last", lambda n, m: masks.causal(m - n), lambda i, j, n, m: m - j >= n - i),
    *(prefix_case(length) for length in (0, 7)),
    *(window_case(*sides) for sides in ((5, 0), (0, 0), (3, 4), (None, 2), (4, None), (None, None))),
    *(neighborhood_case(*radius) for radius in ((1, 1), (2, 0), (0, 3))),
    *(raster_case(*radius) for radius in ((2, 2), (1, 3), (1, 0, True), (3, 1, True))),
    DOCUMENT_CASE,
    DOCUMENT_CASE & causal_case(0),
    window_case(6, 2) & causal_case(-1),
    prefix_case(4) & window_case(9, 9),
    neighborhood_case(2, 2) & causal_case(0) & window_case(20, 3),
    raster_case(2, 3) & neighborhood_case(1, 2) & causal_case(-2),
    neighborhood_case(2, 1) & DOCUMENT_CASE,
)
# A combination that kernels read as a matrix: two pictures of different widths.
MATRIX_MASK = neighborhood_case(1, 1) & HIGH_PICTURE_CASE


# ---- Calls.


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One way to call attention.

    Args:
        dense: a mask that is a tensor: ``"bool"`` or ``"float"``, and its shape: see ``_SHAPES``.
        bias: ``"alibi"``, or a tensor of a shape of ``_SHAPES``.
        rope: ``"1d"`` or ``"2d"``, perhaps ``"interleaved"``, perhaps ``"partial"``: of the first features only.
        groups: neighbouring heads of q that share one of k and v.
    """

    name: str
    mask: MaskCase | None = None
    dense: tuple[str, str] | None = None
    bias: str | None = None
    rope: str | None = None
    groups: int = 1
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        """The operands that are tensors."""
        added = self.bias is not None and self.bias != "alibi"
        return ("q", "k", "v", *["mask"] * (self.dense is not None), *["bias"] * added)

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Which of them have gradients."""
        return tuple(name != "mask" or (self.dense is not None and self.dense[0] == "float") for name in self.names)

    def fit(self, size: Size) -> Size:
        """The size with numbers of heads that the groups divide, and as many keys as queries if the mask says so."""
        heads = -(-size.heads // self.groups) * self.groups
        keys = size.queries if self.mask is not None and self.mask.square else size.keys
        return size._replace(heads=heads, keys=keys)

    def suits(self, size: Size) -> bool:
        """Whether there are heads to share or to give slopes, and tokens for a picture or for sequences."""
        no_heads = size.heads == 0 and (self.groups > 1 or self.bias == "alibi")
        no_tokens = 0 in (size.queries, size.keys) and self.mask is not None and self.mask.square
        return not (no_heads or no_tokens)

    def make(self, size: Size, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands; scores are of the order of 1."""
        batch, heads, queries, keys, features, values = self.fit(size)
        shapes = {
            "q": (batch, heads, queries, features),
            "k": (batch, heads // self.groups, keys, features),
            "v": (batch, heads // self.groups, keys, features if values is None else values),
        }
        operands = [torch.randn(shapes[name]).to(dtype) for name in "qkv"]
        scores = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
        if self.dense is not None:
            kind, shape = self.dense
            seen = random_mask([scores.get(extent, 1) for extent in _SHAPES[shape]])
            added = torch.randn(seen.shape).masked_fill(~seen, -torch.inf)
            operands.append(seen if kind == "bool" else added.to(dtype))
        if "bias" in self.names:
            assert self.bias is not None
            operands.append(torch.randn([scores.get(extent, 1) for extent in _SHAPES[self.bias]]).to(dtype))
        return [t.requires_grad_(grad and d) for t, d in zip(operands, self.differentiable, strict=True)]

    def call(self, *operands: Tensor, return_lse: bool = True) -> Any:
        """The op: the result and the log of the softmax's denominator."""
        named: dict[str, Any] = dict(zip(self.names, operands, strict=True))
        q, k = operands[:2]
        if self.mask is not None:
            named["mask"] = self.mask.make(q.shape[-2], k.shape[-2])
        if self.bias == "alibi":
            named["bias"] = positions.alibi(q.shape[-3], device=q.device)
        return attention(
            **named,
            scale=self.scale,
            enable_gqa=self.groups > 1,
            rope=self.rotary(max(q.shape[-2], k.shape[-2]), q.shape[-1], q.device),
            return_lse=return_lse,
        )

    def rotary(self, tokens: int, features: int, device: torch.device | str | None = None) -> positions.Rotary | None:
        """The positions; of fewer features than there are where their number asks for that."""
        if self.rope is None:
            return None
        turned = features // 2 if "partial" in self.rope else features
        interleaved = "interleaved" in self.rope
        if "2d" in self.rope and turned >= 4:
            return positions.rotary_2d(*grid(tokens), turned // 4 * 4, interleaved=interleaved, device=device)
        if turned < 2:
            return None
        return positions.rotary(tokens, turned // 2 * 2, interleaved=interleaved, device=device)

    def call_eager(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a user writes it: everything that masks or adds is a matrix for SDPA."""
        named = dict(zip(self.names, operands, strict=True))
        q, k, v = operands[:3]
        if (rope := self.rotary(max(q.shape[-2], k.shape[-2]), q.shape[-1], q.device)) is not None:
            q, k = turn(q, rope), turn(k, rope)
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=-3) for t in (k, v))
        seen, added = self._masks_and_sums(named, q, k)
        return eager(q, k, v, seen, added, self.scale)

    def _masks_and_sums(self, named: dict[str, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        queries, keys = q.shape[-2], k.shape[-2]
        seen = None if self.mask is None else self.mask.matrix(queries, keys).to(q.device)
        added = None
        if self.bias == "alibi":
            distance = (torch.arange(queries)[:, None] - torch.arange(keys)).abs().to(q.device)
            added = -positions.alibi(q.shape[-3], device=q.device).slopes[:, None, None] * distance
            added = added.to(torch.promote_types(q.dtype, torch.float32))
        elif self.bias is not None:
            added = named["bias"]
        if self.dense is not None and self.dense[0] == "bool":
            seen = named["mask"]
        elif self.dense is not None:
            added = named["mask"] if added is None else named["mask"] + added
        return seen, added


_SHAPES: dict[str, tuple[str, ...]] = {
    "full": ("batch", "heads", "queries", "keys"),
    "matrix": ("queries", "keys"),
    "heads": ("heads", "queries", "keys"),
    "key padding": ("batch", "one", "one", "keys"),
    "of queries": ("queries", "one"),
}


def random_mask(shape: list[int]) -> Tensor:
    """True with probability 0.6, and the second row False throughout where there are more."""
    seen = torch.rand(shape) < 0.6
    if seen.shape[-2] > 2:
        seen[..., 1, :] = False
    return seen


def turn(x: Tensor, rope: positions.Rotary) -> Tensor:
    """Rotary positions as a product of complex numbers, in the precision of ``x`` or float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = torch.complex(*rope.table[: x.shape[-2]].to(wide.dtype).unbind(-1))
    pairs = table.shape[1]
    index = torch.arange(2 * pairs, device=x.device)
    index = index.view(pairs, 2) if rope.interleaved else index.view(2, pairs).T
    turned = torch.complex(*wide[..., index].unbind(-1)) * table
    result = wide.clone()
    result[..., index] = torch.stack([turned.real, turned.imag], -1)
    return result.to(x.dtype)


def eager(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, added: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """SDPA, and the log of its denominator from the scores written out."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = scores if added is None else scores + added.to(wide)
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    both = seen if added is None else added if seen is None else added.masked_fill(~seen, -torch.inf)
    if both is not None and both.dim() < 2:
        both = both.expand(scores.shape)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=both, scale=scale)
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # rows whose gradient is 0, and not that of a logarithm of 0
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1).masked_fill(blind.squeeze(-1), -torch.inf)
    return out, lse


def finite(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """With 0 in place of the minus infinity of blind rows, of which a numerical derivative would be NaN."""

    def run(*operands: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(*operands)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return run


PLAIN = AttentionCase("plain")
CAUSAL = AttentionCase("causal", mask=causal_case(0))
OPTION_CASES = (
    PLAIN,
    AttentionCase("scale", scale=-0.3),
    AttentionCase("gqa", groups=2),
    AttentionCase("one key head", groups=4, mask=causal_case(2)),
    AttentionCase("bool matrix", dense=("bool", "matrix")),
    AttentionCase("bool of all", dense=("bool", "full")),
    AttentionCase("bool of keys", dense=("bool", "key padding")),
    AttentionCase("bool of queries", dense=("bool", "of queries")),
    AttentionCase("float matrix", dense=("float", "matrix")),
    AttentionCase("float of all", dense=("float", "full"), groups=2),
    AttentionCase("bias of heads", bias="heads"),
    AttentionCase("bias of all, bool of keys", dense=("bool", "key padding"), bias="full"),
    AttentionCase("float and bias", dense=("float", "heads"), bias="key padding"),
    AttentionCase("alibi", bias="alibi"),
    AttentionCase("alibi, causal, gqa", mask=causal_case(0), bias="alibi", groups=2),
    AttentionCase("alibi, float", dense=("float", "matrix"), bias="alibi"),
    *(AttentionCase(f"rope {rope}", rope=rope) for rope in ("1d", "1d interleaved", "1d partial")),
    *(AttentionCase(f"rope {rope}", rope=rope) for rope in ("2d", "2d interleaved", "2d interleaved partial")),
    AttentionCase("rope, causal, gqa", mask=causal_case(0), rope="1d", groups=2),
    AttentionCase("rope 2d, raster", mask=raster_case(2, 3), rope="2d interleaved"),
    AttentionCase("bias, window", mask=window_case(5, 5), bias="matrix"),
    AttentionCase("two widths", mask=MATRIX_MASK),
    AttentionCase("everything", mask=raster_case(3, 3), bias="heads", rope="2d", groups=2, scale=0.5),
)
MASK_CASES = tuple(AttentionCase(str(mask), mask=mask) for mask in MASKS)
CASES = (*OPTION_CASES, *MASK_CASES)

# One of each kind, for promises that hold for every option alike.
SOME_CASES = (
    PLAIN,
    CAUSAL,
    AttentionCase("raster, rope 2d, gqa", mask=raster_case(2, 2), rope="2d", groups=2),
    AttentionCase("window, alibi", mask=window_case(4, 1), bias="alibi"),
    AttentionCase("bool of keys, bias of heads", dense=("bool", "key padding"), bias="heads"),
    AttentionCase("float matrix, rope interleaved", dense=("float", "matrix"), rope="1d interleaved", scale=0.4),
)
