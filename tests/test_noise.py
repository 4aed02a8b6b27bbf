"""The noise contract: published integers, the layout of the counter, moments, and independence of everything else."""

import math

import pytest
import torch

from dgm_kernels import NoiseKey, noise_like, use_backend
from dgm_kernels._core.noise import philox4x32
from tests.cases import BACKENDS, NATIVE

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_reference_gives_the_published_words(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_every_backend_gives_the_published_words(backend, counter, key, expected):
    """The published counters, as far as a tensor can reach them: c0 is the group of elements, so 0 here."""
    seed, sample = key[0] | key[1] << 32, counter[2] | (counter[3] & 0xFFFFFF) << 32
    noise_key = NoiseKey(seed, first_sample=sample, step=counter[1], stream=counter[3] >> 24)
    with use_backend(backend):
        words = noise_like(torch.empty(1, 4), noise_key, distribution="bits")[0].tolist()
    c0 = (0, *counter[1:])
    exact = philox4x32(tuple(torch.tensor([c]) for c in c0), tuple(torch.tensor([k]) for k in key))
    assert words == [signed(int(w)) for w in exact]
    if counter[0] == 0:
        assert words == [signed(w) for w in expected]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 59), (2, 3, 113), (5, 1023), (1, 200_000), (2, 192), (0, 4), (3, 0)])
@pytest.mark.parametrize("key", [NoiseKey(0), NoiseKey(2**64 - 1, first_sample=2**40 + 3, step=2**32 - 1, stream=255)])
def test_native_noise_equals_the_reference(backend, shape, key):
    like = torch.empty(shape)
    with use_backend("reference"):
        expected = {d: noise_like(like, key, distribution=d) for d in ("bits", "uniform", "normal")}
    with use_backend(backend):
        actual = {d: noise_like(like, key, distribution=d) for d in expected}
    assert torch.equal(actual["bits"], expected["bits"])
    assert torch.equal(actual["uniform"], expected["uniform"])
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual["normal"], expected["normal"], rtol=4 * ulp, atol=ulp)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_counter(backend):
    """Element, step, sample and stream are the words c0 .. c3 as documented."""
    seed, step, sample, stream = 0x0123456789ABCDEF, 77, (5 << 32) + 9, 3
    with use_backend(backend):
        words = noise_like(torch.empty(1, 11), NoiseKey(seed, sample, step, stream), distribution="bits")[0].tolist()
    for element, word in enumerate(words):
        counter = (element // 4, step, sample & 0xFFFFFFFF, stream << 24 | sample >> 32)
        key = (seed & 0xFFFFFFFF, seed >> 32)
        exact = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
        assert word == signed(int(exact[element % 4]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_order_and_size_do_not_matter(backend):
    key = NoiseKey(11, first_sample=100, step=4)
    with use_backend(backend):
        whole = noise_like(torch.empty(64, 3, 37), key)
        for row in (0, 1, 40, 63):
            one = noise_like(torch.empty(1, 3, 37), NoiseKey(11, first_sample=100 + row, step=4))
            assert torch.equal(one[0], whole[row])
        order = torch.randperm(64)
        shuffled = noise_like(torch.empty(64, 3, 37), NoiseKey(11, step=4, samples=100 + order))
    assert torch.equal(shuffled, whole[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_threads_do_not_matter(backend):
    x = torch.empty(8, 3, 50, 70)
    key = NoiseKey(5)
    threads = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(1)
            one = noise_like(x, key)
            torch.set_num_threads(2)
            two = noise_like(x, key)
            channels_last = noise_like(x.to(memory_format=torch.channels_last), key)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one, channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_step_tensors(backend):
    x = torch.empty(4, 30)
    with use_backend(backend):
        plain = noise_like(x, NoiseKey(2**63 + 5, step=9))
        seed = torch.tensor([-(2**63) + 5])  # the same 64 bits
        assert torch.equal(noise_like(x, NoiseKey(seed, step=torch.tensor(9))), plain)
        per_sample = noise_like(x, NoiseKey(seed, step=torch.tensor([9, 3, 9, 4])))
        assert torch.equal(per_sample[0], plain[0])
        assert torch.equal(per_sample[2], plain[2])
        assert torch.equal(per_sample[1:2], noise_like(x[:1], NoiseKey(seed, first_sample=1, step=3)))


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """10^7 normal numbers of 100 samples."""
    return noise_like(torch.empty(100, 100_000), NoiseKey(2024)).to(torch.float64)


def test_moments(draws):
    """The first six moments lie within five standard errors of the normal distribution's."""
    n = draws.numel()
    moments = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}
    even = {2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395}
    for order, expected in moments.items():
        error = math.sqrt((even[2 * order] - expected**2) / n)
        assert abs(float((draws**order).mean()) - expected) < 5 * error, f"moment {order}"


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0, 4.5, 5.0])
def test_tails(draws, bound):
    """As many numbers beyond the bound, on each side, as the normal distribution has."""
    expected = draws.numel() * 0.5 * math.erfc(bound / math.sqrt(2))
    for count in (int((draws > bound).sum()), int((draws < -bound).sum())):
        assert abs(count - expected) < 5 * math.sqrt(expected) + 1


def test_whole_distribution(draws):
    """Kolmogorov-Smirnov distance of 10^7 draws: below its 0.1 % critical value."""
    values = draws.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(values / math.sqrt(2)))
    n = values.numel()
    grid = torch.arange(n, dtype=torch.float64) / n
    distance = float(torch.maximum((cdf - grid).abs(), (cdf - grid - 1 / n).abs()).max())
    assert distance < 1.95 / math.sqrt(n)


def test_independence(draws):
    """No correlation between neighbours, samples, steps, streams or seeds; of values or of squares."""
    like = torch.empty(100, 100_000)
    others = {
        "step": noise_like(like, NoiseKey(2024, step=1)),
        "stream": noise_like(like, NoiseKey(2024, stream=1)),
        "seed": noise_like(like, NoiseKey(2025)),
        "high seed": noise_like(like, NoiseKey(2024 + (1 << 32))),
        "sample": noise_like(like, NoiseKey(2024, first_sample=1)),
        "neighbour": draws.roll(1, dims=1),
        "next word group": draws.roll(4, dims=1),
    }
    bound = 5 / math.sqrt(draws.numel())
    for name, other in others.items():
        other = other.to(torch.float64)
        assert abs(float((draws * other).mean())) < bound, name
        assert abs(float(((draws**2 - 1) * (other**2 - 1)).mean()) / 2) < bound, name


def test_uniforms_are_in_the_half_open_interval():
    u = noise_like(torch.empty(10, 100_000), NoiseKey(1), distribution="uniform")
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) <= 1
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_round_the_float32_number(dtype):
    key = NoiseKey(8)
    expected = noise_like(torch.empty(3, 201), key)
    actual = noise_like(torch.empty(3, 201, dtype=dtype), key)
    assert actual.dtype == dtype
    ulp = torch.finfo(torch.float32).eps
    rtol = max(torch.finfo(dtype).eps, 4 * ulp)  # one rounding apart at most
    torch.testing.assert_close(actual.double(), expected.to(dtype).double(), rtol=rtol, atol=ulp)


def test_draw_follows_the_generator():
    torch.manual_seed(3)
    a = noise_like(torch.empty(2, 8), NoiseKey.draw())
    torch.manual_seed(3)
    assert torch.equal(noise_like(torch.empty(2, 8), NoiseKey.draw()), a)
    assert not torch.equal(noise_like(torch.empty(2, 8), NoiseKey.draw()), a)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(noise_like(torch.empty(2, 8), NoiseKey.draw(generator)), a)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "seed must have one element"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed must be an int64"),
        ({"seed": 0, "step": -1}, ValueError, "step must be in"),
        ({"seed": 0, "stream": 256}, ValueError, "stream must be in"),
        ({"seed": 0, "first_sample": -2}, ValueError, "first_sample must be in"),
        ({"seed": 0, "samples": torch.tensor([1.0])}, TypeError, "samples must be an int64"),
    ],
)
def test_bad_keys(fields, error, message):
    with pytest.raises(error, match=message):
        NoiseKey(**fields)


def test_bad_calls():
    with pytest.raises(TypeError, match="x must be a floating-point"):
        noise_like(torch.empty(2, 3, dtype=torch.int64), NoiseKey(0))
    with pytest.raises(ValueError, match="batch dimension"):
        noise_like(torch.empty(()), NoiseKey(0))
    with pytest.raises(ValueError, match="distribution must be"):
        noise_like(torch.empty(2), NoiseKey(0), distribution="cauchy")
    with pytest.raises(TypeError, match="key must be a NoiseKey"):
        noise_like(torch.empty(2), 7)
    with pytest.raises(ValueError, match=r"noise.samples must have 2 entries"):
        noise_like(torch.empty(2, 3), NoiseKey(0, samples=torch.arange(3)))
