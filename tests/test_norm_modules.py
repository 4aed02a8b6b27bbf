"""Modules of the norm op: state dicts, constructors and results of PyTorch's, and where they are used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgm_kernels.nn import GroupNormSiLU, LayerNorm, ModulatedLayerNorm, RMSNorm
from dgm_kernels.norm import modulated_layer_norm


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (lambda: LayerNorm(6), lambda: nn.LayerNorm(6), (2, 5, 6)),
        (lambda: LayerNorm((5, 6), 1e-3, bias=False), lambda: nn.LayerNorm((5, 6), 1e-3, bias=False), (2, 5, 6)),
        (lambda: LayerNorm(6, elementwise_affine=False), lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 6)),
        (lambda: RMSNorm(6), lambda: nn.RMSNorm(6), (2, 5, 6)),
        (lambda: RMSNorm([5, 6], eps=1e-2), lambda: nn.RMSNorm([5, 6], eps=1e-2), (2, 5, 6)),
        (lambda: GroupNormSiLU(2, 6), lambda: nn.GroupNorm(2, 6), (2, 6, 3, 5)),
        (lambda: GroupNormSiLU(3, 6, 1e-3, affine=False), lambda: nn.GroupNorm(3, 6, 1e-3, affine=False), (2, 6, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_are_pytorchs(ours, theirs, shape, dtype):
    """The same keys, and with the same state the same results and gradients."""
    theirs, ours = randomized(theirs()).to(dtype), ours().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(shape, dtype=dtype)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y = F.silu(y) if module is theirs and isinstance(module, nn.GroupNorm) else y
        y.sin().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_modulated_layer_norm_has_no_parameters_unless_asked_for():
    assert not list(ModulatedLayerNorm(6).parameters())
    module = randomized(ModulatedLayerNorm(6, elementwise_affine=True))
    assert list(module.state_dict()) == ["weight", "bias"]
    x, residual = torch.randn(2, 2, 5, 6).unbind()
    scale, shift, gate = torch.randn(3, 2, 6).unbind()
    parameters = {"weight": module.weight, "bias": module.bias, "eps": 1e-6}
    torch.testing.assert_close(module(x, scale, shift), modulated_layer_norm(x, scale, shift, **parameters))
    expected = modulated_layer_norm(x, scale, shift, gate=gate, residual=residual, **parameters)
    torch.testing.assert_close(module(x, scale, shift, gate=gate, residual=residual), expected)


def test_group_norm_silu_takes_the_time_embedding():
    module = randomized(GroupNormSiLU(2, 6))
    x, scale, shift = torch.randn(2, 6, 4, 5), torch.randn(2, 6), torch.randn(2, 6)
    z = F.group_norm(x, 2, module.weight, module.bias) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(module(x, scale, shift), F.silu(z))


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="width must be the size of one dimension"):
        ModulatedLayerNorm((5, 6))
    with pytest.raises(ValueError, match="x must have shape"):
        ModulatedLayerNorm(6)(torch.randn(2, 3, 5), torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(ValueError, match="normalized_shape must be the end"):
        LayerNorm(6)(torch.randn(2, 5))


def test_modules_are_described_like_pytorchs():
    assert repr(LayerNorm(6)) == repr(nn.LayerNorm(6))
    assert repr(GroupNormSiLU(2, 6)) == repr(nn.GroupNorm(2, 6)).replace("GroupNorm", "GroupNormSiLU")
