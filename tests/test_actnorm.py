"""dgm_kernels.nn.ActNorm: initialisation by the first batch, its state, and what is refused before."""

import copy

import pytest
import torch

from dgm_kernels import actnorm
from dgm_kernels.nn import ActNorm
from tests.contract import assert_compiles


def moments(y):
    dims = (0, *range(2, y.dim()))
    return y.mean(dims), y.var(dims, correction=0)


@pytest.mark.parametrize("shape", [(50, 3), (8, 3, 5), (8, 3, 5, 7), (4, 3, 2, 3, 4)], ids=str)
def test_the_first_batch_comes_out_normalised(shape):
    size = torch.tensor([1e-3, 1.0, 200.0], dtype=torch.float64).view(3, *[1] * (len(shape) - 2))
    x = (torch.randn(shape, dtype=torch.float64) + 5) * size
    layer = ActNorm(3, dtype=torch.float64)
    assert not layer.initialized
    y, logdet = layer(x)
    assert layer.initialized
    mean, variance = moments(y)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(variance, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(y, (x - _per(moments(x)[0], x)) / _per(moments(x)[1].sqrt(), x))
    pixels = x[0, 0].numel()
    torch.testing.assert_close(logdet, (-0.5 * pixels * moments(x)[1].log().sum()).expand(shape[0]))
    back, minus_logdet = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus_logdet, -logdet)


def _per(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def test_it_is_initialised_once():
    layer = ActNorm(3)
    layer(torch.randn(20, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(20, 3) * 9 + 4
    torch.testing.assert_close(layer(x), actnorm(x, layer.shift, layer.log_scale))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(layer.eval()(x)[0], layer.train()(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_channels_are_only_shifted(dtype):
    x = torch.randn(64, 4).to(dtype)
    x[:, 1] = 0.1  # its variance is rounding
    x[:, 2] = 0.0
    layer = ActNorm(4)  # its parameters are float32 whatever x is
    y, logdet = layer(x)
    assert y.dtype == torch.float32 and logdet.isfinite().all()
    assert torch.equal(layer.log_scale[1:3], torch.zeros(2))
    assert not y[:, 2].any()
    torch.testing.assert_close(y[:, 1], torch.zeros(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(moments(y)[1][[0, 3]], torch.ones(2))
    assert layer.inverse(y)[0].isfinite().all()


def test_one_sample_is_all_constant():
    y, logdet = ActNorm(3)(torch.tensor([[1.0, -2.0, 3.0]]))
    assert not y.any() and not logdet.any()


def test_gradients_flow_in_the_first_batch_too():
    layer = ActNorm(3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, logdet = layer(x)
    ((y**3).sum() + logdet.sum()).backward()
    for actual in (layer.shift.grad, layer.log_scale.grad, x.grad):
        assert actual is not None
    torch.testing.assert_close(layer.shift.grad, 3 * y.detach().square().sum(0))
    torch.testing.assert_close(x.grad, 3 * y.detach().square() * layer.log_scale.detach().exp())


def test_refused_before_the_first_batch():
    layer = ActNorm(3)
    x = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="not initialised: inverse needs a first batch in training mode"):
        layer.inverse(x)
    with pytest.raises(RuntimeError, match="not initialised: forward in eval mode needs a first batch"):
        layer.eval()(x)
    layer.train()(x)
    layer.inverse(layer.eval()(x)[0])


def test_state_dict_round_trip():
    fresh, trained = ActNorm(3), ActNorm(3)
    x = torch.randn(20, 3) * 3 + 1
    trained(x)
    assert set(trained.state_dict()) == {"shift", "log_scale", "initialized"}
    for assign in (False, True):
        other = ActNorm(3).eval()
        other.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
        torch.testing.assert_close(other(x), trained(x))
        other.train()(torch.randn(20, 3) - 7)
        assert torch.equal(other.shift, trained.shift), "initialised again after loading"
    trained.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match="not initialised"):
        trained.inverse(x)
    trained(5 * x)
    torch.testing.assert_close(moments(trained(5 * x)[0])[1], torch.ones(3))


def test_copies_and_written_buffers():
    layer = ActNorm(3)
    x = torch.randn(20, 3)
    early = copy.deepcopy(layer)
    layer(x)
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x), layer(x))
    with pytest.raises(RuntimeError, match="not initialised"):
        early.inverse(x)
    with torch.no_grad():  # as averages of weights are copied
        for mine, theirs in zip(early.state_dict().values(), layer.state_dict().values(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(early.eval().inverse(x), layer.inverse(x))


def test_further_arguments_are_not_read():
    layer = ActNorm(3)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x, None, "context"), layer(x))
    torch.testing.assert_close(layer.inverse(x, torch.ones(2)), layer.inverse(x))


def test_bad_input():
    with pytest.raises(ValueError, match="channels must be an int of at least 1, got 0"):
        ActNorm(0)
    layer = ActNorm(3)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 3, ...\], got \(5, 4\)"):
        layer(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 3, ...\], got \(3,\)"):
        layer(torch.randn(3))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        layer(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must be finite and not empty to initialise"):
        layer(torch.full((5, 3), float("nan")))
    with pytest.raises(ValueError, match="x must be finite and not empty to initialise"):
        layer(torch.empty(0, 3))
    assert not layer.initialized and not layer.shift.any()


def test_compile():
    torch._dynamo.reset()
    layer = ActNorm(3)
    x = torch.randn(20, 3) * 2 + 1
    y, _ = torch.compile(layer, backend="aot_eager")(x)  # breaks the graph to initialise
    torch.testing.assert_close(moments(y), (torch.zeros(3), torch.ones(3)))
    assert_compiles(layer, (torch.randn(4, 3, 5, 2),), (torch.randn(6, 3, 4, 3),), backend="aot_eager")
    assert_compiles(layer.inverse, (torch.randn(4, 3),), (torch.randn(6, 3),), backend="aot_eager")


def test_float64_is_computed_in_float64():
    """Parameters of float32 too, by the function and its inverse."""
    shift, log_scale = torch.randn(3), torch.randn(3)
    x = torch.randn(5, 3, dtype=torch.float64)
    for inverse in (False, True):
        y, logdet = actnorm(x, shift, log_scale, inverse=inverse)
        expected = actnorm(x, shift.double(), log_scale.double(), inverse=inverse)
        torch.testing.assert_close((y, logdet), expected, rtol=1e-14, atol=1e-14)


def test_values_of_nflows():
    nflows = pytest.importorskip("nflows.transforms")
    peer = nflows.ActNorm(3).double()
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64) * 3 + 2
    peer(x)
    layer = ActNorm(3, dtype=torch.float64)
    layer.load_state_dict({"shift": peer.shift, "log_scale": peer.log_scale, "initialized": peer.initialized})
    torch.testing.assert_close(layer(x), peer(x))
    torch.testing.assert_close(layer.inverse(x), peer.inverse(x))


def test_repr():
    assert repr(ActNorm(7)) == "ActNorm(7)"
