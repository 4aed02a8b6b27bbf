"""Native kernels read rows of contiguous elements; this brings tensors of any strides to that form and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The permutation that makes a dense tensor contiguous, or None."""
    stride = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda d: (-stride[d], d)))
    return order if x.permute(order).is_contiguous() else None


def common_order(tensors: Sequence[Tensor | None]) -> tuple[int, ...] | None:
    """One permutation that makes all the tensors contiguous, batch first, without moving memory; or None."""
    first = next(t for t in tensors if t is not None)
    order = memory_order(first)
    if order is None or order[0] != 0 or any(t is not None and t.stride() != first.stride() for t in tensors):
        return None
    return order


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=lambda d: order[d])


def like_strides(result: Tensor, model: Tensor) -> Tensor:
    """``result`` in the memory format of ``model``, as elementwise PyTorch ops return it."""
    order = memory_order(model)
    if order is None or order == tuple(range(model.dim())):
        return result
    return result.permute(order).contiguous().permute(inverse(order))


def rows(x: Tensor) -> Tensor:
    """``x`` itself if each sample is contiguous, whatever the distance between samples; else a contiguous copy."""
    if x.is_contiguous():
        return x
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def last_rows(x: Tensor) -> Tensor:
    """``x`` itself if its last dimension is contiguous and the others are evenly spaced; else a contiguous copy."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return x.contiguous()
    expected = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return x.contiguous()
        expected = stride * size
    return x
