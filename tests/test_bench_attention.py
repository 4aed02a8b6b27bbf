"""The contenders of attention's benchmarks compute one function, shown at small sizes and without compiling."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import attention_baselines as baselines
from bench import bench_attention, timing
from bench.compare import Case, Setup, WrongResult, check, make_input_sets
from dgm_kernels import attention, masks
from tests.cases import NATIVE

CPU = torch.device("cpu")
SETUP = Setup(CPU, torch.get_num_threads())
TWO_THREADS = Setup(CPU, threads=2)
SMALL = {
    "SIZES": {"usual": (2, 4, 35, 8), "dit": (2, 3, 13, 9), "long": (1, 1, 70, 8), "decode": (2, 3, 37, 8)},
    "PICTURE": (7, 5),
    "RADIUS": 2,
    "TEXT": 5,
    "TOKENS_WIDTH": 12,
    "TOKENS_HEADS": 3,
    "PASSES": 4,
    "PICTURES": (1, 6, 8),
    "SMALL_PICTURES": (1, 4, 5),
    "PICTURES_BATCH": 3,
}
STRICT = 35 * 34 // 2
CAUSAL = 35 * 36 // 2
ELEMENTS = 2 * 4 * 35 * 8  # of q, k, v and the result
OTHERS = {"strict": {"flex", "flex32", "shifted"}, "raster": {"flex", "flex32"}}


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_attention, name, value)
    monkeypatch.setattr(bench_attention, "variants", lambda function, setup: {"eager": function})
    monkeypatch.setattr(baselines, "compiled", lambda function: function)


def small_case(name: str) -> Case:
    return bench_attention.CASES[name](SETUP)


def check_case(case: Case) -> set[str]:
    """Names of the contenders that gave the right result; a wrong one raises."""
    errors, unavailable = check(case, make_input_sets(case, CPU)[0])
    assert unavailable == {}
    assert case.ours == f"dgm {(*NATIVE, 'reference')[0]}"
    return set(errors) - {case.ours}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name in bench_attention.CASES if not name.startswith("tokens")])
def test_contenders_agree(name: str) -> None:
    assert check_case(small_case(name)) == {"eager", *OTHERS.get(name, set())}


@pytest.mark.parametrize("count", [16, 36])
def test_tokens_agree(count: int) -> None:
    assert check_case(bench_attention.tokens(SETUP, count)) == {"eager", "cached"}


def test_contenders_that_see_nothing_give_zero() -> None:
    """Ours must; that the others do is what lets their rows be left out of the comparison without a loss."""
    for name in ("strict", "raster"):
        case = small_case(name)
        inputs = case.make_inputs()
        for contender_name, contender in case.contenders.items():
            with contender.context(), torch.no_grad():
                first = contender.run(inputs)[:, :, 0]
            assert torch.equal(first, torch.zeros_like(first)), contender_name


def test_row_of_a_query_that_sees_nothing_is_looked_at_in_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_attention.attention

    def wrong(*args: Any, **named: Any) -> Tensor:
        y = right(*args, **named)
        return torch.cat([y[:, :, :1] + 1, y[:, :, 1:]], dim=2)

    monkeypatch.setattr(bench_attention, "attention", wrong)
    with pytest.raises(WrongResult, match="dgm"):
        check_case(small_case("strict"))


@pytest.mark.parametrize(
    ("sees", "mask"),
    [
        (baselines.sees_before, masks.causal(-1)),
        (lambda i, j: baselines.sees_near_before(i, j, 5, 2), masks.raster_2d(7, 5, 2)),
    ],
    ids=["strict", "raster"],
)
def test_masks_of_the_baselines_are_ours(sees: baselines.Sees, mask: masks.Mask) -> None:
    assert torch.equal(baselines.seen_matrix(sees, 35, CPU), mask.dense(35))


# Of a picture of 7x5 with radius 2: pixels before in the row, 0 + 1 + 2 + 2 + 2, and per row above 3 + 4 + 5 + 4 + 3.
@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("full", 35 * 35),
        ("causal", CAUSAL),
        ("strict", STRICT),
        ("raster", 7 * 7 + (0 + 1 + 5 * 2) * 19),
        ("rotary", CAUSAL),
        ("cross", 35 * 5),
    ],
)
def test_floor_counts_pairs_that_see_each_other(name: str, pairs: int) -> None:
    """Two products of 8 features a pair, of 2 samples and 4 heads."""
    case = small_case(name)
    keys = 5 if name == "cross" else 35
    assert case.flops == 2 * 2 * 8 * 2 * 4 * pairs
    assert case.bytes == 4 * (2 * ELEMENTS + 2 * ELEMENTS * keys // 35)


def test_floor_of_derivatives() -> None:
    forward, training, half, jvp = (small_case(f"causal{end}") for end in ("", "-train", "-train-bf16", "-jvp"))
    assert training.flops == half.flops == 3.5 * forward.flops and jvp.flops == 3 * forward.flops
    assert training.bytes == 2 * half.bytes == 4 * (3 * 3 + 2) * ELEMENTS  # q, k, v twice and their gradients
    assert jvp.bytes == 4 * 2 * 4 * ELEMENTS


def test_floor_of_shared_keys_and_of_decoding() -> None:
    assert small_case("gqa").flops == small_case("causal").flops
    assert small_case("gqa").bytes == 4 * (2 * ELEMENTS + 2 * ELEMENTS // 2)
    decode = small_case("decode")
    assert decode.bytes == 4 * 2 * 2 * 3 * 8 * (37 + 1) and decode.flops == 2 * 2 * 2 * 3 * 8 * 37


def test_floor_of_tokens() -> None:
    """Weights of two layers of width 12, and of each token all up to it; products of a batch of four."""
    case = bench_attention.tokens(SETUP, 20)
    weights = 2 * (12 * 36 + 12 * 12 + 2 * 12 * 48)
    assert case.flops == 2 * 4 * (20 * weights + 2 * 2 * 12 * 20 * 21 // 2)
    vectors = 2 * (36 + 12 + 48 + 12) + 4 * 24  # biases, and of each norm a scale and a shift
    assert case.bytes == 4 * (weights + vectors + 2 * 4 * 20 * 12)


def test_floor_of_pictures() -> None:
    """48 tokens of width 32 through four layers and a head with one output; the embedding is no product."""
    case = small_case("image-gpt")
    matrices = 4 * 12 * 32 * 32 + 32
    assert case.flops == 2 * 3 * (48 * matrices + 4 * 2 * 32 * 48 * 49 // 2)
    vectors = 4 * (3 + 1 + 4 + 1 + 4) * 32 + 2 * 32 + 1  # biases and norms
    assert case.bytes == 4 * (matrices + vectors + 3 * 32) + 8 * 3 * 48


def test_bars() -> None:
    bars = {name: dict(build(TWO_THREADS).bars) for name, build in bench_attention.CASES.items()}
    assert {name: bar for name, bar in bars.items() if bar} == {
        "full": {"eager": 2.2},
        "causal": {"eager": 2.5},
        "full-bf16": {"eager": 3},
        "strict": {"eager": 3, "flex": 2},
        "raster": {"eager": 8, "flex": 5},
        "causal-train": {"eager": 2},
        "causal-jvp": {"eager": 3},
        "dit": {"eager": 2},
        "decode": {"eager": 1.5, "floor": 1.3},
        "image-gpt": {"eager": 10},
    }
    assert not any(build(Setup(CPU, threads=1)).bars for build in bench_attention.CASES.values())


def test_passes_stand_for_the_naive_loop() -> None:
    """Prefixes that are evenly spread: work that grows with the length or with its square comes out right."""
    lengths: list[int] = []
    case = bench_attention.tokens(SETUP, 240)
    inputs = case.make_inputs()
    x = inputs.x

    class Noted:
        def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
            lengths.append(index[1].stop)
            return x[index]

    inputs.x = Noted()
    naive = case.contenders["eager"]
    with torch.no_grad():
        naive.run(inputs)
    assert len(lengths) == 4
    for power in (1, 2):
        whole = sum(length**power for length in range(1, 241))
        assert naive.repeats * sum(length**power for length in lengths) == pytest.approx(whole, rel=0.03)
    assert {name: contender.repeats for name, contender in case.contenders.items()} == {
        case.ours: 1,
        "eager": 60,
        "cached": 1,
    }


def test_last_token_of_a_prefix_is_that_of_the_whole() -> None:
    """So that passes over prefixes, one pass over all and a cache compute the same."""
    torch.manual_seed(0)
    network = baselines.Transformer(12, 3, 2).double().requires_grad_(False)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole = network(x, baselines.causal_sdpa)
    for end in (1, 5, 9):
        torch.testing.assert_close(network(x[:, :end], baselines.causal_sdpa)[:, -1], whole[:, end - 1])
    moved = x.clone()
    moved[:, 3, 0] += 1
    change = (network(moved, baselines.causal_sdpa) - whole).abs().amax((0, 2))
    assert change[:3].max() == 0 and change[3:].min() > 1e-3  # every token is used by all after it


def test_sampler_that_is_wrong_at_full_size_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_attention.image_gpts

    def wrong(shapes: list[tuple[int, ...]], device: torch.device) -> list[Any]:
        models = right(shapes, device)
        sampler = models[0].sampler
        models[0].sampler = lambda n: lambda *args, **named: 1 - sampler(n)(*args, **named)
        return models

    monkeypatch.setattr(bench_attention, "image_gpts", wrong)
    with pytest.raises(WrongResult, match="levels are not what"):
        check_case(small_case("image-gpt"))


def test_level_that_its_number_does_not_draw_is_found() -> None:
    (model,) = baselines.image_gpts([(1, 6, 8)], CPU)
    plain = baselines.PlainImageGPT(model.networks[0].double())
    uniform = torch.rand(3, 48, dtype=torch.float64)
    levels = plain.generate(uniform)
    bench_attention.verify(plain, levels, uniform)
    for pixel in (0, 20, 47):
        wrong = levels.clone()
        wrong[1, pixel] ^= 1
        with pytest.raises(WrongResult, match="levels are not what"):
            bench_attention.verify(plain, wrong, uniform)


def test_pixels_depend_on_the_first_one() -> None:
    """Else a sampler that forgets what its cache holds would pass."""
    (model,) = baselines.image_gpts([(1, 28, 28)], CPU)
    plain = baselines.PlainImageGPT(model.networks[0])
    before = torch.randint(2, (4, 784))
    other = before.clone()
    other[:, 1] ^= 1
    moved = (plain.logits(other) - plain.logits(before)).abs().amax(0)
    assert moved[0] == 0 and moved[1:50].min() > 1e-2 and moved[-200:].max() > 1e-3


def test_plain_image_gpt_is_the_model() -> None:
    (model,) = baselines.image_gpts([(1, 6, 8)], CPU)
    network = model.networks[0].double()
    levels = torch.randint(2, (3, 48))
    before = torch.cat([torch.full((3, 1), 2), levels[:, :-1]], dim=1)
    expected = network(levels.double().view(3, 1, 6, 8) * 2 - 1).flatten(1)
    torch.testing.assert_close(baselines.PlainImageGPT(network).logits(before), expected)


def test_backends_of_sdpa_compete_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_attention.CASES["full"](Setup(torch.device("cuda")))
    assert set(baselines.FORCED) < set(case.contenders)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **named: torch.backends.cuda.flash_sdp_enabled()
    )
    q = torch.randn(1, 1, 2, 4)
    inputs = type("Inputs", (), {"operands": [q, q, q]})
    assert {name: case.contenders[name].run(inputs) for name in baselines.FORCED} == {
        "sdpa flash": True,
        "sdpa efficient": False,
        "sdpa cudnn": False,
    }


GIGABYTE = 10**9


def peak_of(call: Any, operands: list[Tensor]) -> int:
    """Bytes of the operands and of what a call holds at once."""
    return sum(t.untyped_storage().nbytes() for t in operands) + timing.peak_memory(call, CPU)


@pytest.mark.skipif(not NATIVE, reason="the reference holds all scores")
@pytest.mark.parametrize("call", [bench_attention.FORWARD, bench_attention.TRAINING, bench_attention.TANGENT])
def test_memory_is_linear_in_the_tokens(call: bench_attention.Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(tokens: int) -> int:
        monkeypatch.setattr(bench_attention, "SIZES", {"usual": (1, 2, tokens, 16)})
        case = bench_attention.plain_or_causal(SETUP, causal=True, does=call)
        inputs, contender = case.make_inputs(), case.contenders[case.ours]
        with contender.context(), torch.set_grad_enabled(case.grad):
            return timing.peak_memory(lambda: contender.run(inputs), CPU)

    small, large = peak(512), peak(4096)
    assert large < 12 * small


@pytest.mark.skipif(not NATIVE, reason="the reference holds all scores")
def test_long_sequences_fit_into_a_gigabyte() -> None:
    """Of the bench's usual batch and heads; a window keeps the test short."""
    with torch.no_grad():
        q, k, v = (torch.randn(4, 8, 16384, 64) for _ in range(3))
        window = masks.sliding_window(64)
        assert peak_of(lambda: attention(q, k, v, mask=window), [q, k, v]) < GIGABYTE
        few = [t[:1, :1] for t in (q, k, v)]
        whole = timing.peak_memory(lambda: attention(*few), CPU)
    assert whole < 16384 * 16384  # not even a byte a score
