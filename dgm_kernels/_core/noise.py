"""Counter-based noise: Philox4x32-10, keyed by (seed, sample, step, stream), one word an element."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .checks import as_int, check_device, check_like

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The same eight arguments, in this order, end up in every op that draws noise.
SCHEMA = (
    "Tensor? noise, Tensor? seed_tensor, SymInt seed, Tensor? key_step_tensor, SymInt key_step, "
    "Tensor? samples, SymInt first_sample, int stream"
)
OpArgs = tuple[Tensor | None, Tensor | None, int, Tensor | None, int, Tensor | None, int, int]
NO_NOISE: OpArgs = (None, None, 0, None, 0, None, 0, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseKey:
    """Names a block of noise; the same key gives the same numbers on every device and in every batch.

    The noise of element ``e`` of sample ``s`` is Philox4x32-10 of the counter ``(e // 4, step, s mod 2^32,
    stream << 24 | s >> 32)`` under the 64-bit key ``seed``, word ``e % 4``. It depends on nothing else: not on the
    batch size, the place in the batch, the number of processes or threads, or the strides of the tensor.

    Args:
        seed: 0 to 2**64 - 1, or an int64 tensor with one element (read on the device, so that a CUDA graph can replay
            with new noise).
        first_sample: global index of the first row of the batch; row ``b`` is sample ``first_sample + b``.
        step: 0 to 2**32 - 1, or an int64 tensor with one element or one a row. A sampler step adds its own index.
        stream: 0 to 255; independent noise for another purpose. 0 is used by steps, 1 for initial states.
        samples: global sample index of every row, int64 ``[batch]``, in place of ``first_sample``; for batches whose
            rows are not consecutive.

    Raises:
        ValueError: a number is negative or too large.
        TypeError: a tensor is not int64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    seed: int | Tensor
    first_sample: int = 0
    step: int | Tensor = 0
    stream: int = 0
    samples: Tensor | None = None

    def __post_init__(self) -> None:
        for name, limit in (("seed", 1 << 64), ("first_sample", 1 << 56), ("step", 1 << 32), ("stream", 1 << 8)):
            value = getattr(self, name)
            if isinstance(value, Tensor) and name in ("seed", "step"):
                _check_integers(name, value)
                continue
            number = as_int(value)
            if number is None:
                expected = "an int or an int64 tensor" if name in ("seed", "step") else "an int"
                raise TypeError(f"{name} must be {expected}, got {value!r}")
            if not 0 <= number < limit:
                raise ValueError(f"{name} must be in [0, 2**{limit.bit_length() - 1}), got {number}")
            if number is not value:
                object.__setattr__(self, name, number)
        if self.samples is not None:
            _check_integers("samples", self.samples)

    @classmethod
    def draw(cls, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> NoiseKey:
        """A key with a fresh seed from PyTorch's generator (``torch.manual_seed`` governs it); never a host sync."""
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device)
        return cls(seed)

    def at(self, step: int | Tensor) -> NoiseKey:
        """The same key at another step."""
        return dataclasses.replace(self, step=step)

    def op_args(self) -> OpArgs:
        """The key as the arguments of an op."""
        seed, step = self.seed, self.step
        seed_tensor, seed = (
            (seed, 0) if isinstance(seed, Tensor) else (None, seed if seed < 1 << 63 else seed - (1 << 64))
        )
        step_tensor, step = (step, 0) if isinstance(step, Tensor) else (None, step)
        return None, seed_tensor, seed, step_tensor, step, self.samples, self.first_sample, self.stream


def noise_args(noise: NoiseKey | Tensor | None, x: Tensor, like: str = "x") -> OpArgs:
    """Noise for the batch ``x``, which messages call ``like``, as the arguments of an op; None draws a seed."""
    if isinstance(noise, Tensor):
        check_like("noise", noise, x, like)
        return (noise, *NO_NOISE[1:])
    if noise is None:
        noise = NoiseKey.draw(device=x.device)
    elif not isinstance(noise, NoiseKey):
        raise TypeError(f"noise must be a NoiseKey, a tensor or None, got {type(noise).__name__}")
    _, seed_tensor, seed, step_tensor, step, samples, first_sample, stream = noise.op_args()
    for name, value, per_row in (("seed", seed_tensor, False), ("step", step_tensor, True), ("samples", samples, True)):
        if value is None:
            continue
        check_device(f"noise.{name}", value, x, like)
        if per_row and value.shape != x.shape[:1] and (name == "samples" or value.numel() != 1):
            raise ValueError(f"noise.{name} must have {x.shape[0]} entries, got shape {tuple(value.shape)}")
    step_tensor, samples = (None if value is None else value.contiguous() for value in (step_tensor, samples))
    return None, seed_tensor, seed, step_tensor, step, samples, first_sample, stream


def _check_integers(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}")
    if value.dim() > 1 or (name == "seed" and value.numel() != 1):
        expected = "one element" if name == "seed" else "at most one dimension"
        raise ValueError(f"{name} must have {expected}, got shape {tuple(value.shape)}")


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold unsigned 32-bit numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps modulo 2^64, which leaves both words right
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def words(shape: torch.Size, device: torch.device, args: OpArgs, step: int | Tensor = 0) -> tuple[Tensor, ...]:
    """The four Philox words of every group of four elements: four tensors ``[batch, ceil(elements / 4)]``."""
    _, seed_tensor, seed, step_tensor, key_step, samples, first_sample, stream = args
    groups = (math.prod(shape[1:]) + 3) // 4
    sample = first_sample + torch.arange(shape[0], device=device) if samples is None else samples
    c0 = torch.arange(groups, device=device).expand(shape[0], groups)
    c1 = torch.zeros_like(sample) + key_step + step
    if step_tensor is not None:
        c1 = c1 + step_tensor
    c3 = (stream << 24) | (sample >> 32 & 0xFFFFFF)
    key = torch.zeros_like(sample) + seed if seed_tensor is None else seed_tensor.expand_as(sample)
    counter = (c0 & _MASK, *(c[:, None] & _MASK for c in (c1, sample, c3)))
    return philox4x32(counter, (key[:, None] & _MASK, key[:, None] >> 32 & _MASK))


def uniforms(words_: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Words to float32 numbers in (0, 1]."""
    return tuple(w.to(torch.float32) * 2.0**-32 + 2.0**-33 for w in words_)


def normals(words_: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Words to standard normal float32 numbers by Box-Muller, worked out in float64."""
    u0, u1, u2, u3 = (u.to(torch.float64) for u in uniforms(words_))
    r0, r1 = (torch.sqrt(-2.0 * torch.log(u)) for u in (u0, u2))
    a0, a1 = (2.0 * math.pi * u for u in (u1, u3))
    pairs = (r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1))
    return tuple(n.to(torch.float32) for n in pairs)


def interleave(groups: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """Puts word ``e % 4`` of group ``e // 4`` at element ``e`` of every sample."""
    elements = math.prod(shape[1:])
    return torch.stack(groups, dim=-1).flatten(1)[:, :elements].reshape(shape)


def normal_noise(shape: torch.Size, device: torch.device, args: OpArgs, step: int | Tensor = 0) -> Tensor:
    """Standard normal noise, float32, of the key that ``args`` spell out."""
    return interleave(normals(words(shape, device, args, step)), shape)


def uniform_noise(shape: torch.Size, device: torch.device, args: OpArgs, step: int | Tensor = 0) -> Tensor:
    """Uniform noise in (0, 1], float32, of the key that ``args`` spell out."""
    return interleave(uniforms(words(shape, device, args, step)), shape)
