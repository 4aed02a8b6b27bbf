"""Gradients as the tests of every op take them: for which incoming gradients, of which operands, and what is kept."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tests.contract import Outputs, tensors_of


def with_grads(
    fn: Callable[..., Outputs], operands: Sequence[Tensor], count: int | None = None, constant: bool = False
) -> list[Tensor]:
    """fn's outputs, and the gradients of a sum that weighs every element of every output differently.

    Args:
        count: how many of the operands, from the first on, get a gradient; None for all.
        constant: whether outputs may depend on no operand. Else that is an error.
    """
    count = len(operands) if count is None else count
    leaves = [operand.detach().requires_grad_(index < count) for index, operand in enumerate(operands)]
    outputs = tensors_of(fn(*leaves))
    roots = [output for output in outputs if output.requires_grad or not constant] if count else []
    weights = [torch.linspace(-1, 2, root.numel()).view(root.shape).to(root) for root in roots]
    grads = torch.autograd.grad(roots, leaves[:count], weights) if roots else ()
    return [tensor.detach() for tensor in (*outputs, *grads)]


def incoming_gradients(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The same incoming gradients for outputs of any dtype on any device; exact in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(-8, 9, o.shape, generator=generator) / 4).to(o) for o in outputs]


def incoming_gradient(output: Tensor, seed: int = 1) -> Tensor:
    """:func:`incoming_gradients` of one output."""
    return incoming_gradients([output], seed)[0]


def values_and_gradients(
    fn: Callable[..., Outputs], operands: Sequence[Tensor], which: Sequence[int] | None = None
) -> list[Tensor]:
    """fn's outputs, then the operands' gradients for :func:`incoming_gradients` of the outputs ``which`` (None: all).

    Of what an operand has no part in, its gradient is 0.
    """
    leaves = [operand.detach().requires_grad_() for operand in operands]
    outputs = tensors_of(fn(*leaves))
    weights = incoming_gradients(outputs)
    used = [i for i, o in enumerate(outputs) if o.requires_grad and (which is None or i in which)]
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], leaves, [weights[i] for i in used], allow_unused=True, materialize_grads=True
    )
    return [tensor.detach() for tensor in (*outputs, *gradients)]


# Ones as they may lie in memory: as ``sum`` gives them, one for each sample, transposed, and with gaps.
LAYOUTS_OF_ONES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: torch.ones(()).expand(y.shape),
    lambda y: torch.ones((*y.shape[:1], *[1] * (y.dim() - 1))).expand(y.shape),
    lambda y: torch.ones(tuple(reversed(y.shape))).permute(tuple(reversed(range(y.dim())))),
    lambda y: torch.full((*y.shape, 2), torch.nan)[..., 0].fill_(1.0),
)


def in_every_incoming_layout(
    fn: Callable[..., Outputs],
    operands: Sequence[Tensor],
    count: int | None = None,
    more: Sequence[Callable[[Tensor], Tensor]] = (),
    constant: bool = False,
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Gradients of the first ``count`` operands (None: all) for incoming ones in other layouts, and in the usual one.

    Args:
        more: layouts beside :data:`LAYOUTS_OF_ONES`.
        constant: whether outputs may depend on no operand. Else that is an error.
    """

    def grads(arrange: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        wanted = len(operands) if count is None else count
        leaves = [operand.detach().clone().requires_grad_(index < wanted) for index, operand in enumerate(operands)]
        outputs = [output for output in tensors_of(fn(*leaves)) if output.requires_grad or not constant]
        return torch.autograd.grad(outputs, leaves[:wanted], [arrange(output) for output in outputs])

    expected = grads(torch.ones_like)
    for arrange in (*LAYOUTS_OF_ONES, *more):
        yield grads(arrange), expected


def saved_bytes(fn: Callable[..., Outputs], operands: Sequence[Tensor]) -> tuple[int, Outputs]:
    """What autograd keeps of a call beside the operands themselves, and the call's outputs."""
    given = {operand.untyped_storage().data_ptr() for operand in operands}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = fn(*operands)
    return sum(kept.values()), outputs


def assert_any_subset_of_gradients(total: Callable[..., Tensor], operands: Sequence[Tensor]) -> None:
    """Whichever operands ask for a gradient of ``total(*operands)`` get that of a call in which all do; others none."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = torch.autograd.grad(total(*leaves), leaves)
    for wanted in itertools.product((False, True), repeat=len(operands)):
        leaves = [operand.clone().requires_grad_(want) for operand, want in zip(operands, wanted, strict=True)]
        value = total(*leaves)
        assert value.requires_grad == any(wanted)
        if value.requires_grad:
            value.backward()
        for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-6)
