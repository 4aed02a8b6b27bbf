"""The contract of an op as assertions, shared by the tests of every op."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).resolve().parents[1]

Outputs = Any  # a tensor, or tensors nested in tuples, lists and dicts


def assert_parity(op_out: Outputs, eager_out: Outputs, ref64_out: Outputs, tiny: float = 1e-6) -> None:
    """err(op) <= 2 * err(same-precision eager) + tiny, both largest absolute errors against the float64 reference."""
    for index, (actual, eager, reference) in enumerate(_paired(op_out, eager_out, ref64_out)):
        assert reference.dtype == torch.float64, f"output {index}: the reference is {reference.dtype}, not float64"
        assert actual.dtype == eager.dtype, f"output {index}: dtype {actual.dtype}, eager gives {eager.dtype}"
        error, eager_error = max_error(actual, reference), max_error(eager, reference)
        assert eager_error < float("inf"), f"output {index}: eager itself is off by {eager_error}: no bound follows"
        bound = 2 * eager_error + tiny
        assert error <= bound, f"output {index}: error {error:.3e} > {bound:.3e} (eager: {eager_error:.3e})"


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; NaN or infinity in one of the two alone counts as infinite."""
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    actual = actual.detach().to(reference.dtype)
    reference = reference.detach()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    difference = (actual - reference).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.masked_fill(same, 0.0).max())


def strided_variants(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other layouts: offset, padded rows, every second element, permuted, channels-last, expanded.

    What lies between the elements is NaN, so a read outside the view shows. A dimension is expanded (stride 0) where
    the values along it are equal: to test stride 0, pass a tensor with a dimension of size 1 or of equal slices.
    """
    source = tensor.detach()
    yield _like(tensor, _between_poison(source, offset=1))
    yield _like(tensor, _between_poison(source, pad=3))
    yield _like(tensor, _between_poison(source, step=2))
    for order in itertools.islice(itertools.permutations(range(source.dim())), 1, None):
        if order in (_reversed_dims(source), _channels_last(source)):
            inverse = sorted(range(len(order)), key=order.__getitem__)
            yield _like(tensor, source.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse))
    for dim in range(source.dim()):
        first = source.narrow(dim, 0, min(1, source.size(dim)))
        if source.size(dim) and _equal_bits(first.expand_as(source), source):
            one = first.clone()
            strides = [0 if d == dim else stride for d, stride in enumerate(one.stride())]
            yield _like(tensor, one.as_strided(source.shape, strides))


def _reversed_dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(range(tensor.dim())))


def _channels_last(tensor: Tensor) -> tuple[int, ...]:
    return (0, *range(2, tensor.dim()), 1) if tensor.dim() > 2 else ()


def _between_poison(source: Tensor, pad: int = 0, step: int = 1, offset: int = 0) -> Tensor:
    """A copy of source in a larger poisoned buffer: `pad` more elements a dimension, every `step`-th one used."""
    sizes = [step * size + pad for size in source.shape]
    count = torch.Size(sizes).numel()
    poison = float("nan") if source.is_floating_point() or source.is_complex() else _largest(source.dtype)
    buffer = torch.full((count + offset,), poison, dtype=source.dtype, device=source.device)
    view = buffer[offset:].view(sizes)[tuple(slice(0, step * size, step) for size in source.shape)]
    return view.copy_(source)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _like(tensor: Tensor, variant: Tensor) -> Tensor:
    return variant.detach().requires_grad_(tensor.requires_grad)


@contextmanager
def assert_inputs_unchanged(*tensors: Tensor) -> Iterator[None]:
    """Fails if the block changes one byte of the tensors' storages, the gaps between their elements included."""
    before = [_storage_bytes(tensor).clone() for tensor in tensors]
    yield
    for index, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        assert torch.equal(_storage_bytes(tensor), old), f"input {index} was written to"


def assert_bitwise_repeatable(fn: Callable[[], Outputs], runs: int = 3) -> None:
    """Fails unless every call of fn() gives the same bits."""
    first = _tensors(fn())
    for run in range(1, runs):
        for index, (expected, actual) in enumerate(_paired(first, fn())):
            assert _equal_bits(actual, expected), f"output {index} of run {run} differs from that of run 0"


def assert_compiles(
    fn: Callable[..., Outputs], args_small: Sequence[Any], args_large: Sequence[Any], backend: str = "inductor"
) -> None:
    """torch.compile(fullgraph=True, dynamic=True) gives eager's outputs and gradients, compiled once for both sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for args in (args_small, args_large):
        torch.testing.assert_close(_outputs_and_grads(compiled, args), _outputs_and_grads(fn, args), equal_nan=True)
        compilations.append(counter.frame_count)
    torch._dynamo.reset()
    first, both = compilations  # torch.compile may restart within the first call: that counts in both
    assert first == both, f"compiled {both - first} times more for the second size"


def assert_autocast_like(
    fn: Callable[..., Outputs],
    eager: Callable[..., Outputs],
    args: Sequence[Any],
    dtype: torch.dtype = torch.bfloat16,
    device_type: str = "cpu",
) -> None:
    """Under torch.autocast fn gives eager's dtypes, and its values to the tolerance of the dtype."""
    with torch.autocast(device_type, dtype=dtype):
        pairs = _paired(fn(*args), eager(*args))
    for index, (ours, theirs) in enumerate(pairs):
        assert ours.dtype == theirs.dtype, f"output {index}: {ours.dtype} under autocast, eager gives {theirs.dtype}"
        # Casting to the autocast dtype bounds the error whichever dtype the outputs have.
        torch.testing.assert_close(ours.to(dtype), theirs.to(dtype), equal_nan=True)


def assert_vmap(fn: Callable[..., Outputs], args: Sequence[Any], in_dims: int | tuple[int | None, ...] = 0) -> None:
    """torch.func.vmap(fn) equals a loop over the mapped dimension."""
    dims = (in_dims,) * len(args) if isinstance(in_dims, int) else in_dims
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    looped = []
    for i in range(size):
        row = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)]
        looped.append(_tensors(fn(*row)))
    expected = [torch.stack(outputs) for outputs in zip(*looped, strict=True)]
    torch.testing.assert_close(_tensors(torch.func.vmap(fn, in_dims=dims)(*args)), expected, equal_nan=True)


def assert_passes_interpreted(file: str) -> None:
    """The tests of class ``TestInterpreted`` in this file pass where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{file}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def _outputs_and_grads(fn: Callable[..., Outputs], args: Sequence[Any]) -> list[Tensor]:
    """fn's outputs, then the gradients of their sum with respect to the arguments that require one."""
    args = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    outputs = _tensors(fn(*args))
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    roots = [output.sum() for output in outputs if output.requires_grad]
    grads = torch.autograd.grad(roots, inputs, allow_unused=True, materialize_grads=True) if roots and inputs else ()
    return [tensor.detach() for tensor in (*outputs, *grads)]


def _tensors(outputs: Outputs) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def results_of_instruction_sets(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a script saves to its last argument under each instruction set that this CPU has; it prints the backend."""
    results = {}
    for isa in ("default", "avx2", "avx512"):
        command = [sys.executable, "-c", script, *arguments, str(folder / isa)]
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
        if isa in done.stdout:
            results[isa] = torch.load(folder / isa)
    return results


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``run`` and its result, after a call that compiles and allocates."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def _paired(*outputs: Outputs) -> list[tuple[Tensor, ...]]:
    """First outputs together, then second ones, and so on; fails unless all have as many."""
    columns = [_tensors(output) for output in outputs]
    counts = [len(column) for column in columns]
    assert len(set(counts)) == 1, f"numbers of outputs differ: {counts}"
    return list(zip(*columns, strict=True))


def _storage_bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat_a, flat_b = a.detach().reshape(-1).contiguous(), b.detach().reshape(-1).contiguous()
    return torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))
