"""Cases of the attention op: plain, masked and positioned attention, its derivatives, decoding, tokens one by one.

Eager is `F.scaled_dot_product_attention`, on CPUs a fused kernel too; of structured masks it gets a boolean matrix.
Against those competes compiled FlexAttention ("flex", with smaller blocks "flex32"; which blocks count is found before
the timed calls), and of strict causal attention the causal one of shifted operands, which needs no matrix ("shifted").
On GPUs each backend of SDPA competes.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench.attention_baselines import (
    FORCED,
    Function,
    PlainCache,
    PlainImageGPT,
    Sees,
    Transformer,
    causal_sdpa,
    count_products,
    flex,
    image_gpts,
    on_backend,
    plain_rotary,
    seen_matrix,
    sees_before,
    sees_near_before,
    shifted_sdpa,
    token_by_token,
)
from bench.compare import (
    Bars,
    Case,
    Contender,
    Setup,
    WrongResult,
    bars_at_two_threads,
    dtype_name,
    ours,
    size_name,
    variants,
)
from dgm_kernels import KVCache, NoiseKey, attention, attention_decode, masks, noise_like, positions

NATIVES = ("cpp", "triton")
SIZES = {"usual": (4, 8, 1024, 64), "dit": (8, 16, 256, 72), "long": (1, 1, 16384, 64), "decode": (4, 8, 4096, 64)}
PICTURE, RADIUS = (32, 32), 5  # as many pixels as the usual tokens
KEY_HEADS, TEXT = 2, 77
FLEX_BLOCKS = {"flex": 128, "flex32": 32}
TOKENS_BATCH, TOKENS_WIDTH, TOKENS_HEADS, TOKENS_LAYERS = 4, 256, 4, 2
COUNTS = (256, 512, 1024)  # of tokens
PICTURES, SMALL_PICTURES, PICTURES_BATCH = (1, 28, 28), (1, 6, 6), 16
KEY = NoiseKey(1234)
ROUNDING = 1e-5  # a uniform number that is closer than this to the edge of a level may draw either
PASSES = 8  # of the naive loop over tokens, evenly spread


class Pass(NamedTuple):
    """What is done with attention.

    `products` counts the matrix products of scores or probabilities: forward QK' and PV; backward QK' again (nothing
    keeps the scores in linear memory), dP = dO V', and those for the three gradients; of a directional derivative three
    for the scores and their tangent, and three for the result's. `operands` and `results` count how often tensors
    like q, k and v, and like the result, must move.
    """

    words: tuple[str, ...]
    call: Callable[[Function, SimpleNamespace], Any]
    products: int
    operands: int
    results: int


def forward(function: Function, i: SimpleNamespace) -> Tensor:
    """The result."""
    return function(*i.operands)


def forward_backward(function: Function, i: SimpleNamespace) -> tuple[Tensor, ...]:
    """What training needs: the result and the gradients of q, k and v, for a given gradient of the result."""
    with torch.enable_grad():
        y = function(*i.operands)
        return y.detach(), *torch.autograd.grad(y, i.operands, i.seed)


def directional(function: Function, *both: Tensor) -> tuple[Tensor, Tensor]:
    """The result and its derivative: three operands, then their tangents."""
    return torch.func.jvp(function, both[:3], both[3:])


FORWARD = Pass((), forward, products=2, operands=1, results=1)
TRAINING = Pass(("forward+backward",), forward_backward, products=7, operands=3, results=2)
TANGENT = Pass(("JVP",), lambda function, i: directional(function, *i.operands, *i.tangents), 6, operands=2, results=2)


def baselines(
    setup: Setup, plain: Function, does: Pass, others: Mapping[str, Function], blind: Tensor | None
) -> dict[str, Contender]:
    """`plain` as it is, compiled, and on GPUs held to each backend of SDPA; and others."""
    if does is TANGENT:  # what is compiled cannot be differentiated forwards from outside
        calls = variants(partial(directional, plain), setup)
        return {name: Contender(lambda i, f=f: f(*i.operands, *i.tangents)) for name, f in calls.items()}
    functions = {**variants(plain, setup), **others}
    if setup.device.type == "cuda":
        functions |= {name: on_backend(plain, backend) for name, backend in FORCED.items()}
    runs = {name: partial(does.call, function) for name, function in functions.items()}
    if blind is None:
        return {name: Contender(run) for name, run in runs.items()}
    hidden = blind[:, None]
    return {name: Contender(run, lambda i, run=run: run(i).masked_fill(hidden, 0)) for name, run in runs.items()}


def attention_case(
    setup: Setup,
    words: tuple[str, ...],
    fused: Function,
    plain: Function,
    *,
    size: str = "usual",
    keys: int | None = None,
    key_heads: int | None = None,
    pairs: int | None = None,
    dtype: torch.dtype = torch.float32,
    does: Pass = FORWARD,
    others: Mapping[str, Function] = MappingProxyType({}),
    blind: Tensor | None = None,
    bars: Mapping[str, float] = MappingProxyType({}),
) -> Case:
    """`fused` against `plain`, of which `pairs` are the queries and keys that see each other (None: all).

    `blind` tells the queries that see nothing: ours must give 0 there, of other contenders the rows are not looked at.
    """
    batch, heads, queries, features = SIZES[size]
    keys, key_heads = keys or queries, key_heads or heads
    wanted, sources = (batch, heads, queries, features), (batch, key_heads, keys, features)
    train = does is TRAINING

    def make_inputs() -> SimpleNamespace:
        made, tangents = (
            [torch.randn(shape, device=setup.device).to(dtype) for shape in (wanted, sources, sources)] for _ in "xt"
        )
        seed = torch.randn(wanted, device=setup.device).to(dtype)
        return SimpleNamespace(operands=[t.requires_grad_(train) for t in made], seed=seed, tangents=tangents)

    def reference(i: SimpleNamespace) -> Any:
        operands = [tensor.detach().double().requires_grad_(train) for tensor in i.operands]
        wide = SimpleNamespace(operands=operands, seed=i.seed.double(), tangents=[t.double() for t in i.tangents])
        return does.call(plain, wide)

    contenders, missing = ours(partial(does.call, fused), setup, NATIVES)
    contenders |= baselines(setup, plain, does, others, blind)
    read, written = batch * features * (heads * queries + 2 * key_heads * keys), batch * heads * queries * features
    seen = queries * keys if pairs is None else pairs
    return Case(
        " ".join(["attention", *words, *does.words, size_name(wanted), dtype_name(dtype)]),
        make_inputs,
        contenders,
        reference,
        bytes=(does.operands * read + does.results * written) * dtype.itemsize,
        flops=2 * does.products * batch * heads * features * seen,
        bars=bars,
        missing=missing,
        grad=train,
        matmul_dtype=dtype,
    )


def plain_or_causal(
    setup: Setup,
    causal: bool,
    *,
    size: str = "usual",
    dtype: torch.dtype = torch.float32,
    does: Pass = FORWARD,
    key_heads: int | None = None,
    bars: Bars = bars_at_two_threads,
) -> Case:
    """Without a mask or with the causal one; heads share keys and values if there are fewer of these.

    The derivative in a direction stands against the math path, as the only one that has it, and its memory, which the
    bench records, grows with the tokens, not with their square. So does that of the long case.
    """
    tokens = SIZES[size][2]
    shared = key_heads is not None
    mask = masks.causal() if causal else None

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attention(q, k, v, mask=mask, enable_gqa=shared)
        assert isinstance(y, Tensor)
        return y

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)

    return attention_case(
        setup,
        (*["causal"] * causal, *[f"{key_heads} key heads"] * shared),
        fused,
        on_backend(plain, SDPBackend.MATH) if does is TANGENT else plain,
        size=size,
        key_heads=key_heads,
        pairs=tokens * (tokens + 1) // 2 if causal else None,
        dtype=dtype,
        does=does,
        bars=bars(setup),
    )


def structured(
    setup: Setup,
    words: tuple[str, ...],
    mask: masks.Mask,
    sees: Sees,
    others: Mapping[str, Function],
    bars: Mapping[str, float],
) -> Case:
    """A structured mask against the same as a boolean matrix, and against FlexAttention."""
    tokens = SIZES["usual"][2]
    matrix = seen_matrix(sees, tokens, setup.device)
    flexes = {name: flex(sees, tokens, setup.device, block) for name, block in FLEX_BLOCKS.items()}
    return attention_case(
        setup,
        words,
        partial(attention, mask=mask),
        partial(F.scaled_dot_product_attention, attn_mask=matrix),
        pairs=int(matrix.sum()),
        others={**flexes, **others},
        blind=~matrix.any(dim=1),
        bars=bars,
    )


def strict_causal(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Tokens see those before them, as models of images want it; the first sees nothing."""
    return structured(
        setup, ("strict causal",), masks.causal(-1), sees_before, {"shifted": shifted_sdpa}, bars=bars(setup)
    )


def raster(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Pixels see those before them that are near; the first sees nothing."""
    near = partial(sees_near_before, width=PICTURE[1], radius=RADIUS)
    words = (f"raster {size_name(PICTURE)} radius {RADIUS}",)
    return structured(setup, words, masks.raster_2d(*PICTURE, RADIUS), near, {}, bars=bars(setup))


def rotary(setup: Setup) -> Case:
    """Causal attention with rotary positions of all features, inside the kernel or before it."""
    tokens, features = SIZES["usual"][2:]
    rope = positions.rotary(tokens, features, device=setup.device)
    cos, sin = (torch.cat([part, part], dim=1) for part in rope.table.unbind(-1))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (plain_rotary(x, cos, sin) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    fused = partial(attention, mask=masks.causal(), rope=rope)
    return attention_case(setup, ("causal rotary",), fused, plain, pairs=tokens * (tokens + 1) // 2)


def cross(setup: Setup) -> Case:
    """Pixels to the tokens of a text."""
    return attention_case(setup, (f"to {TEXT} keys",), attention, F.scaled_dot_product_attention, keys=TEXT)


def decode(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """One token to those in a cache, of whose buffers they fill a half. What must move is the keys and values.

    Two bars, of which the issue that set them asks for either: 1.5 times SDPA, 1.3 times the floor.
    """
    batch, heads, keys, features = SIZES["decode"]

    def make_inputs() -> SimpleNamespace:
        cache = KVCache(batch, heads, 2 * keys, features, device=setup.device)
        cache.append(*torch.randn(2, batch, heads, keys, features, device=setup.device))
        held = [buffer[:, :, :keys] for buffer in (cache.keys, cache.values)]
        return SimpleNamespace(q=torch.randn(batch, heads, 1, features, device=setup.device), cache=cache, held=held)

    contenders, missing = ours(lambda i: attention_decode(i.q, i.cache), setup, NATIVES)
    for name, function in variants(F.scaled_dot_product_attention, setup).items():
        contenders[name] = Contender(lambda i, f=function: f(i.q, *i.held))
    elements = batch * heads * features
    return Case(
        f"attention decode {size_name((batch, heads, 1, features))} to {keys} keys fp32",
        make_inputs,
        contenders,
        lambda i: F.scaled_dot_product_attention(i.q.double(), *(t.double() for t in i.held)),
        bytes=2 * elements * (keys + 1) * 4,
        flops=4 * elements * keys,
        bars=bars(setup),
        missing=missing,
    )


def prefixes(count: int) -> list[int]:
    """Lengths of the passes that stand for those over 1, 2, ... `count` tokens."""
    return [(2 * number + 1) * count // (2 * PASSES) for number in range(PASSES)]


def tokens(setup: Setup, count: int) -> Case:
    """What `count` tokens cost, each through a transformer that keeps keys and values, or with all before it.

    The naive loop is timed by some of its passes, over prefixes of lengths that are evenly spread, whose results are
    compared; "cached" keeps keys and values in PyTorch. What must be done: the products of the weights with each token
    and of queries and values with keys; what must move: the weights, the tokens and the results.
    """
    torch.manual_seed(0)
    network = Transformer(TOKENS_WIDTH, TOKENS_HEADS, TOKENS_LAYERS).to(setup.device).eval().requires_grad_(False)
    wide = copy.deepcopy(network).double()
    ends = prefixes(count)
    chosen = torch.tensor(ends, device=setup.device) - 1
    sizes = TOKENS_BATCH, TOKENS_HEADS, count, TOKENS_WIDTH // TOKENS_HEADS

    def fused(i: SimpleNamespace) -> Tensor:
        for cache in i.caches:
            cache.reset()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            i.caches[layer].append(k, v)
            return attention_decode(q, i.caches[layer])

        return token_by_token(network, i.x, attend)[:, chosen]

    def cached(i: SimpleNamespace) -> Tensor:
        i.plain.length = 0
        return token_by_token(network, i.x, i.plain.attend, i.plain.step)[:, chosen]

    def naive(i: SimpleNamespace, network: Callable[..., Tensor]) -> Tensor:
        return torch.stack([network(i.x[:, :end], causal_sdpa)[:, -1] for end in ends], dim=1)

    def make_inputs() -> SimpleNamespace:
        x = torch.randn(TOKENS_BATCH, count, TOKENS_WIDTH, device=setup.device)
        caches = [KVCache(*sizes, device=setup.device) for _ in range(TOKENS_LAYERS)]
        return SimpleNamespace(x=x, caches=caches, plain=PlainCache(TOKENS_LAYERS, *sizes, setup.device))

    contenders, missing = ours(fused, setup, NATIVES)
    networks = variants(network, setup) if count == min(COUNTS) else {"eager": network}
    for name, function in networks.items():
        contenders[name] = Contender(partial(naive, network=function), repeats=count // PASSES)
    contenders["cached"] = Contender(cached)
    if "compile" not in networks:
        missing["compile"] = f"of {min(COUNTS)} tokens it is measured"
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Case(
        f"{count} tokens of a transformer, {TOKENS_LAYERS} layers, width {TOKENS_WIDTH}, batch {TOKENS_BATCH}",
        make_inputs,
        contenders,
        lambda i: wide(i.x.double(), causal_sdpa)[:, chosen],
        bytes=(weights + 2 * TOKENS_BATCH * count * TOKENS_WIDTH) * 4,
        flops=2 * TOKENS_BATCH * count_products(network, count, TOKENS_WIDTH, TOKENS_LAYERS),
        missing=missing,
    )


def verify(plain: PlainImageGPT, levels: Tensor, uniform: Tensor) -> None:
    """Raises WrongResult unless every level is what its uniform number draws given the levels before it."""
    levels, uniform = levels.flatten(1), uniform.double()
    before = torch.cat([torch.full_like(levels[:, :1], plain.START), levels[:, :-1]], dim=1)
    zero = torch.sigmoid(-plain.logits(before))
    low, high = (uniform + shift > zero for shift in (-ROUNDING, ROUNDING))
    wrong = (levels < low) | (levels > high)
    if wrong.any():
        raise WrongResult(f"{int(wrong.sum())} of {wrong.numel()} levels are not what their uniform numbers draw")


def image_gpt(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Pictures of a model with random weights: its sampler against a naive loop, timed by some of its passes as above.

    That both draw the same is checked on small pictures, and what the timed calls of ours draw by one pass.
    """
    models = image_gpts([PICTURES, SMALL_PICTURES], setup.device)
    draw, draw_small = (model.sampler(0) for model in models)
    network, small = (PlainImageGPT(model.networks[0]) for model in models)
    wide, wide_small = (PlainImageGPT(copy.deepcopy(model.networks[0]).double()) for model in models)
    pixels = torch.Size(PICTURES).numel()
    ends = prefixes(pixels)

    def uniform(shape: tuple[int, ...]) -> Tensor:
        like = torch.empty(PICTURES_BATCH, torch.Size(shape).numel(), 4, device=setup.device)
        return noise_like(like, KEY, distribution="uniform")[:, :, 0]

    def checked(i: SimpleNamespace) -> Tensor:
        verify(wide, draw(PICTURES_BATCH, key=KEY), uniform(PICTURES))
        return draw_small(PICTURES_BATCH, key=KEY).flatten(1).float()

    def naive(i: SimpleNamespace) -> Tensor:
        return torch.stack([network.draw(i.before[:, :end], i.uniform[:, end - 1]) for end in ends], dim=1)

    def make_inputs() -> SimpleNamespace:
        before = torch.randint(2, (PICTURES_BATCH, pixels), device=setup.device)
        before[:, 0] = network.START
        return SimpleNamespace(before=before, uniform=uniform(PICTURES))

    contenders, missing = ours(lambda i: draw(PICTURES_BATCH, key=KEY), setup, NATIVES, checked)
    whole = lambda i: small.generate(uniform(SMALL_PICTURES)).float()  # noqa: E731
    contenders["eager"] = Contender(naive, whole, repeats=pixels // PASSES)
    width, depth = network.network.head.in_features, len(network.network.blocks)
    weights = sum(parameter.numel() for parameter in network.network.parameters())
    return Case(
        f"image GPT {size_name(PICTURES[1:])}, width {width}, {depth} layers, batch {PICTURES_BATCH}",
        make_inputs,
        contenders,
        lambda i: wide_small.generate(uniform(SMALL_PICTURES).double()).double(),
        bytes=weights * 4 + PICTURES_BATCH * pixels * 8,
        flops=2 * PICTURES_BATCH * count_products(network.network, pixels, width, depth),
        bars=bars(setup),
        missing={"compile": f"of {min(COUNTS)} tokens it is measured", **missing},
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "full": partial(plain_or_causal, causal=False, bars=partial(bars_at_two_threads, eager=2.2)),
    "causal": partial(plain_or_causal, causal=True, bars=partial(bars_at_two_threads, eager=2.5)),
    "full-bf16": partial(
        plain_or_causal, causal=False, dtype=torch.bfloat16, bars=partial(bars_at_two_threads, eager=3)
    ),
    "strict": partial(strict_causal, bars=partial(bars_at_two_threads, eager=3, flex=2)),
    "raster": partial(raster, bars=partial(bars_at_two_threads, eager=8, flex=5)),
    "causal-train": partial(plain_or_causal, causal=True, does=TRAINING, bars=partial(bars_at_two_threads, eager=2)),
    "causal-train-bf16": partial(plain_or_causal, causal=True, does=TRAINING, dtype=torch.bfloat16),
    "causal-jvp": partial(plain_or_causal, causal=True, does=TANGENT, bars=partial(bars_at_two_threads, eager=3)),
    "dit": partial(plain_or_causal, causal=False, size="dit", bars=partial(bars_at_two_threads, eager=2)),
    "dit-bf16": partial(plain_or_causal, causal=False, size="dit", dtype=torch.bfloat16),
    "gqa": partial(plain_or_causal, causal=True, key_heads=KEY_HEADS),
    "rotary": rotary,
    "cross": cross,
    "long": partial(plain_or_causal, causal=False, size="long"),
    "decode": partial(decode, bars=partial(bars_at_two_threads, eager=1.5, floor=1.3)),
    **{f"tokens-{count}": partial(tokens, count=count) for count in COUNTS},
    "image-gpt": partial(image_gpt, bars=partial(bars_at_two_threads, eager=10)),
}


def test_attention(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
