"""What attention and its positions refuse, and how; numbers of every kind."""

from typing import Any

import numpy as np
import pytest
import torch

from dgm_kernels import attention, masks, positions, use_backend
from tests.attention_cases import BACKENDS

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
Call = tuple[Any, Any, str]


def bad_operands() -> dict[str, Call]:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 3)
    call = lambda *operands, **options: lambda: attention(*operands, **options)  # noqa: E731
    calls: dict[str, Call] = {}
    for index, name in enumerate("qkv"):

        def swapped(change: Any, index: int = index, **options: Any) -> Any:
            operands = [q, k, v]
            operands[index] = change(operands[index])
            return call(*operands, **options)

        calls |= {
            f"{name} no tensor": (swapped(lambda t: t.tolist()), TypeError, f"^{name} must be a tensor, got list"),
            f"{name} None": (swapped(lambda t: None), TypeError, f"^{name} must be a tensor, got NoneType"),
            f"{name} array": (swapped(lambda t: t.numpy()), TypeError, f"^{name} must be a tensor, got ndarray"),
            f"{name} int": (swapped(lambda t: t.long()), TypeError, f"^{name} must be a floating-point .*torch.int64"),
            f"{name} bool": (swapped(lambda t: t > 0), TypeError, f"^{name} must be a floating-point .*torch.bool"),
            f"{name} complex": (swapped(lambda t: t + 0j), TypeError, f"^{name} must be a floating-point"),
            f"{name} float8": (
                swapped(lambda t: t.to(torch.float8_e5m2)),
                TypeError,
                f"^{name} must be a floating-point",
            ),
            f"{name} of one dimension": (
                swapped(lambda t: t[0, 0, 0]),
                ValueError,
                rf"^{name} must have shape \[\.\.\., length, features\], got \(\d,\)",
            ),
            f"{name} scalar": (swapped(lambda t: t[0, 0, 0, 0]), ValueError, rf"^{name} must have shape .*got \(\)"),
        }
        if name != "q":
            calls |= {
                f"{name} dimensions": (
                    swapped(lambda t: t[0]),
                    ValueError,
                    f"^{name} must have as many dimensions as q, 4, got 3",
                ),
                f"{name} device": (
                    swapped(lambda t: t.to("meta")),
                    ValueError,
                    f"^{name} must be on the device of q, cpu, got meta",
                ),
                f"{name} dtype": (
                    swapped(lambda t: t.double()),
                    TypeError,
                    f"^{name} must have the dtype of q, torch.float32, got torch.float64",
                ),
                f"{name} 16 bits": (swapped(lambda t: t.half()), TypeError, f"^{name} must have the dtype of q"),
            }
    calls |= {
        "head dimension": (call(q, k[..., :7], v), ValueError, "^k must have the head dimension of q, 8, got 7"),
        "keys": (call(q, k, v[:, :, :6]), ValueError, "^v must have as many keys as k, 7, got 6"),
        "batch of k": (
            call(q, k[:, :, None].expand(2, 4, 3, 7, 8)[:, 0], v[:, :3]),
            ValueError,
            r"^k must have the batch and the heads of q, \(2, 4\), got \(2, 3\); enable_gqa=True",
        ),
        "batch of v": (
            call(torch.cat([q, q[:1]]), torch.cat([k, k[:1]]), v),
            ValueError,
            r"^v must have the batch and the heads of k, \(3, 4\), got \(2, 4\)",
        ),
        "groups": (
            call(q, k[:, :3], v[:, :3], enable_gqa=True),
            ValueError,
            "^k must have a number of heads that divides that of q, 4, got 3",
        ),
        "more key heads": (
            call(q[:, :2], k, v, enable_gqa=True),
            ValueError,
            "^k must have a number of heads that divides that of q, 2, got 4",
        ),
        "groups without heads": (
            call(q[0, 0], k[0, 0], v[0, 0], enable_gqa=True),
            ValueError,
            r"^q must have a dimension of heads with enable_gqa=True, got shape \(5, 8\)",
        ),
        "groups of v": (
            call(q, k[:, :2], v, enable_gqa=True),
            ValueError,
            r"^v must have the batch and the heads of k, \(2, 2\), got \(2, 4\)",
        ),
    }
    return calls


def bad_options() -> dict[str, Call]:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    call = lambda **options: lambda: attention(q, k, k, **options)  # noqa: E731
    square = lambda **options: lambda: attention(k, k, k, **options)  # noqa: E731
    shape = r"\(2, 4, 5, 7\), \[\.\.\., queries, keys\]"
    calls: dict[str, Call] = {
        "mask text": (call(mask="causal"), TypeError, "^mask must be a Mask .*, a tensor or None, got str"),
        "mask True": (call(mask=True), TypeError, "^mask must be a Mask .*, a tensor or None, got bool"),
        "mask function": (call(mask=masks.causal), TypeError, "^mask must be a Mask .*got function"),
        "mask of others": (
            square(mask=masks.raster_2d(2, 4, 1)),
            ValueError,
            r"^mask raster_2d\(2, 4, 1\) is made for 8 tokens, got 7 queries and 7 keys",
        ),
        "mask of two": (
            square(mask=masks.document([7]) & masks.raster_2d(2, 3, 1)),
            ValueError,
            "^mask .* combines masks for 6 and 7 tokens",
        ),
        "slopes": (call(bias=positions.alibi(3)), ValueError, "^bias must have a slope for each of 4 heads, got 3"),
        "slopes elsewhere": (
            call(bias=positions.alibi(4, device="meta")),
            ValueError,
            "^bias must be on the device of q, cpu, got meta",
        ),
        "bias number": (call(bias=1.0), TypeError, "^bias must be a tensor, ALiBi or None, got float"),
        "bias bool": (call(bias=torch.ones(5, 7).bool()), TypeError, "^bias must be a floating-point .*torch.bool"),
        "mask int": (call(mask=torch.ones(5, 7).int()), TypeError, "^mask must be a floating-point .*torch.int32"),
        "mask uint8": (call(mask=torch.ones(5, 7).byte()), TypeError, "^mask must be a floating-point .*torch.uint8"),
        "scale text": (call(scale="0.1"), TypeError, "^scale must be a number or None, got str"),
        "scale bool": (call(scale=True), TypeError, "^scale must be a number or None, got bool"),
        "scale tensor": (call(scale=torch.tensor(0.1)), TypeError, "^scale must be a number or None, got Tensor"),
        "scale nan": (call(scale=float("nan")), ValueError, "^scale must be finite, got nan"),
        "scale infinite": (call(scale=-float("inf")), ValueError, "^scale must be finite, got -inf"),
        "dropout text": (call(dropout_p="0.1"), TypeError, "^dropout_p must be a number, got str"),
        "dropout None": (call(dropout_p=None), TypeError, "^dropout_p must be a number, got NoneType"),
        "dropout bool": (call(dropout_p=True), TypeError, "^dropout_p must be a number, got bool"),
        "dropout negative": (call(dropout_p=-0.1), ValueError, r"^dropout_p must be in \[0, 1\), got -0.1"),
        "dropout of all": (call(dropout_p=1.0), ValueError, r"^dropout_p must be in \[0, 1\), got 1.0"),
        "dropout nan": (call(dropout_p=float("nan")), ValueError, r"^dropout_p must be in \[0, 1\), got nan"),
        "noise int": (call(dropout_p=0.1, noise=3), TypeError, "^noise must be a NoiseKey or None, got int"),
        "noise without dropout": (
            call(noise=torch.zeros(1)),
            TypeError,
            "^noise must be a NoiseKey or None, got Tensor",
        ),
        "rope tensor": (call(rope=torch.zeros(7, 4, 2)), TypeError, "^rope must be a Rotary .*, got Tensor"),
        "rope short": (call(rope=positions.rotary(6, 8)), ValueError, "^rope must have at least 7 positions, got 6"),
        "rope wide": (
            call(rope=positions.rotary(7, 10)),
            ValueError,
            "^rope must turn at most the 8 features of q, got 10",
        ),
        "rope elsewhere": (
            call(rope=positions.rotary(7, 8, device="meta")),
            ValueError,
            "^rope must be on the device of q, cpu, got meta",
        ),
        "positional mask": (lambda: attention(q, k, k, masks.causal()), TypeError, "positional"),
    }
    for name, make in (("mask", torch.ones), ("mask", lambda *s: torch.ones(*s).bool()), ("bias", torch.ones)):
        kind = f"{name} {make(1).dtype}"
        for extents in ((5, 6), (4, 7), (3, 5, 7), (1, 2, 4, 5, 7), (2, 4, 5, 14)):
            value, got = make(*extents), str(extents).replace("(", r"\(").replace(")", r"\)")
            message = f"^{name} must broadcast to {shape}, got {got}"
            calls[f"{kind} {extents}"] = (call(**{name: value}), ValueError, message)
        elsewhere = make(5, 7).to("meta")
        message = f"^{name} must be on the device of q, cpu, got meta"
        calls[f"{kind} elsewhere"] = (call(**{name: elsewhere}), ValueError, message)
    return calls


def bad_positions() -> dict[str, Call]:
    table = torch.zeros(5, 4, 2)
    return {
        "length": (lambda: positions.rotary(0, 8), ValueError, "^length must be positive .*got 0"),
        "length float": (lambda: positions.rotary(4.0, 8), TypeError, "^length must be an int, got 4.0"),
        "dim odd": (lambda: positions.rotary(4, 7), ValueError, "^dim must be positive and divisible by 2, got 7"),
        "dim bool": (lambda: positions.rotary(4, True), TypeError, "^dim must be an int, got True"),
        "base": (lambda: positions.rotary(4, 8, base=0), ValueError, "^base must be a positive number, got 0"),
        "base text": (
            lambda: positions.rotary(4, 8, base="10"),
            ValueError,
            "^base must be a positive number, got '10'",
        ),
        "base nan": (lambda: positions.rotary(4, 8, base=float("nan")), ValueError, "^base must be a positive number"),
        "height": (lambda: positions.rotary_2d(0, 3, 8), ValueError, "^height must be positive .*got 0"),
        "width": (lambda: positions.rotary_2d(3, -1, 8), ValueError, "^width must be positive .*got -1"),
        "dim 2d": (lambda: positions.rotary_2d(3, 3, 6), ValueError, "^dim must be positive and divisible by 4, got 6"),
        "table": (lambda: positions.Rotary([1.0]), TypeError, "^table must be a tensor, got list"),
        "table shape": (
            lambda: positions.Rotary(table[..., :1]),
            ValueError,
            r"^table must have shape \[positions, pairs, 2\], got \(5, 4, 1\)",
        ),
        "table dtype": (
            lambda: positions.Rotary(table.double()),
            TypeError,
            "^table must be float32, got torch.float64",
        ),
        "heads": (lambda: positions.alibi(0), ValueError, "^heads must be a positive int, got 0"),
        "heads float": (lambda: positions.alibi(4.0), ValueError, "^heads must be a positive int, got 4.0"),
        "slopes": (lambda: positions.ALiBi([0.5]), TypeError, "^slopes must be a tensor, got list"),
        "slopes shape": (
            lambda: positions.ALiBi(table),
            ValueError,
            r"^slopes must be float32 \[heads\], got .*\(5, 4, 2\)",
        ),
        "slopes dtype": (
            lambda: positions.ALiBi(torch.zeros(4).half()),
            ValueError,
            r"^slopes must be float32 \[heads\], got torch.float16",
        ),
    }


BAD = bad_operands() | bad_options() | {f"positions: {name}": bad for name, bad in bad_positions().items()}


@on_every_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    call, error, message = BAD[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


@on_every_backend
def test_an_error_is_the_same_under_autocast(backend):
    """The dtypes that are compared are those that autocast makes: a mix is none; float64 and integers still are."""
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q.bfloat16(), k, k.half()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^k must be a floating-point"):
            attention(q, k.long(), k)
        with pytest.raises(TypeError, match=r"^v must have the dtype of q, torch.bfloat16, got torch.float64"):
            attention(q, k, k.double())


@on_every_backend
def test_numbers_of_every_kind(backend):
    """NumPy's floats and ints where they are numbers of Python; slopes and tables that are not contiguous."""
    q = torch.randn(1, 2, 5, 8)
    with use_backend(backend):
        for scale, same in ((2, 2.0), (np.float64(0.5), 0.5), (0, 0.0)):
            assert torch.equal(attention(q, q, q, scale=scale), attention(q, q, q, scale=same))
        torch.testing.assert_close(attention(q, q, q, scale=0), q.mean(2, keepdim=True).expand_as(q))
        slopes = torch.randn(2, 3)[:, 1]
        expected = attention(q, q, q, bias=positions.ALiBi(slopes.contiguous()))
        assert torch.equal(attention(q, q, q, bias=positions.ALiBi(slopes)), expected)
        table = positions.rotary(9, 8).table
        expected = attention(q, q, q, rope=positions.Rotary(table))
        for other in (table.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([table, table], -1)[..., 0]):
            assert not other.is_contiguous()
            assert torch.equal(attention(q, q, q, rope=positions.Rotary(other)), expected)
