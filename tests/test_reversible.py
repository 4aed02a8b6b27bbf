"""dgm_kernels.nn.Reversible: the gradients of the plain chain, in a memory that does not grow with the depth."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

import dgm_kernels
from bench.timing import peak_memory
from dgm_kernels import additive_coupling, affine_coupling, permute_channels
from dgm_kernels.nn import ActNorm, Coupling, Reversible
from tests.contract import assert_compiles, assert_vmap, max_error
from tests.reversible_layers import (
    CONTEXT,
    FEATURES,
    Affine,
    Identity,
    Opaque,
    assert_same,
    batch,
    flow_of,
    loss_of,
    plain,
    results,
)


@pytest.mark.parametrize("which", ["both", "y", "logdet"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("opaque", [False, True])
def test_gradients_are_those_of_the_plain_chain(opaque, inverse, which):
    flow = flow_of(opaque=opaque, context=CONTEXT)
    inputs = batch(), torch.randn(5, CONTEXT, dtype=torch.float64, requires_grad=True)
    actual = results(flow.inverse if inverse else flow, flow, *inputs, which=which)
    expected = results(lambda *args: plain(flow, *args, inverse=inverse), flow, *inputs, which=which)
    assert_same(actual, expected)
    assert any(t is None for t in expected), "the unused parameter has no gradient in either"


def test_inverse_undoes_forward():
    flow = flow_of()
    x = batch()
    y, logdet = flow(x)
    back, minus_logdet = flow.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus_logdet, -logdet)


def test_only_what_requires_a_gradient_gets_one():
    flow = flow_of(context=CONTEXT)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_("bias" in name and ".1." not in name)
    inputs = batch(grad=False), torch.randn(5, CONTEXT, dtype=torch.float64)
    assert_same(results(flow, flow, *inputs), results(lambda *args: plain(flow, *args), flow, *inputs))
    loss_of(flow(*inputs)).backward()
    for parameter in flow.parameters():
        assert parameter.requires_grad or parameter.grad is None

    flow.requires_grad_(False)  # the context alone, then x alone
    x, context = inputs
    for wanted in ((x, context.clone().requires_grad_()), (x.clone().requires_grad_(), context)):
        assert_same(results(flow, flow, *wanted), results(lambda *args: plain(flow, *args), flow, *wanted))


def test_context_may_be_none_or_hold_labels():
    class Labelled(Affine):
        def condition(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, ...]:
            nothing, labels = context
            assert nothing is None
            return super().condition(x, nn.functional.one_hot(labels, CONTEXT).to(x.dtype))

    flow = Reversible([Labelled(False, context=CONTEXT), Opaque(Labelled(True, context=CONTEXT))]).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    x = batch()
    actual = results(lambda x: flow(x, None, labels), flow, x)
    assert_same(actual, results(lambda x: plain(flow, x, None, labels), flow, x))


def test_shared_layers_and_networks():
    first, second = Affine(False), Affine(True)
    second.network = first.network
    flow = Reversible([first, ActNorm(FEATURES), second, Opaque(first)]).double()
    flow(batch())
    x = batch()
    assert_same(results(flow, flow, x), results(lambda x: plain(flow, x), flow, x))


def test_gradients_accumulate_and_hooks_see_them_once():
    flow = flow_of()
    x = batch()
    expected = results(lambda x: plain(flow, x), flow, x)[3:]
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in flow.named_parameters()}
    for (name, parameter), grad in zip(flow.named_parameters(), expected, strict=True):
        if grad is not None:
            parameter.register_hook(lambda grad, name=name: seen[name].append(grad) or 3 * grad)
    for _ in range(2):
        loss_of(flow(x)).backward()
    for (name, parameter), grad in zip(flow.named_parameters(), expected, strict=True):
        if grad is None:
            assert parameter.grad is None
        else:
            assert len(seen[name]) == 2
            torch.testing.assert_close(seen[name][0], grad)
            torch.testing.assert_close(parameter.grad, 6 * grad)


def test_backward_twice_and_after_other_forwards():
    flow = flow_of(nn.Dropout(0.5))
    loss = loss_of(flow(batch()))
    parameters = [p for n, p in flow.named_parameters() if "unused" not in n]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    loss_of(flow(batch())).backward()
    assert_same(list(torch.autograd.grad(loss, parameters)), list(first), tolerance=0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_second_derivatives_in_eval_mode_only():
    flow = flow_of()
    x = batch()

    def first(x: Tensor) -> Tensor:
        return torch.autograd.grad(loss_of(flow(x)), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match="no second derivatives in training mode"):
        first(x)
    flow.eval()
    assert torch.autograd.gradcheck(first, x)


@pytest.mark.parametrize("opaque", [False, True])
def test_dropout_draws_the_same_numbers_again(opaque):
    flow = flow_of(nn.Dropout(0.5), opaque=opaque)
    x = batch(size=20)
    torch.manual_seed(7)
    expected = results(lambda x: plain(flow, x), flow, x)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert_same(results(flow, flow, x), expected)
    assert torch.equal(torch.rand(3), after), "the backward pass has moved the generator"
    torch.manual_seed(8)
    assert max_error(flow(x)[0], expected[0]) > 1e-3

    flow.preserve_rng_state = False
    torch.manual_seed(7)
    assert max_error(results(flow, flow, x)[2], expected[2]) > 1e-3, "nothing was drawn again, or dropout does nothing"


@pytest.mark.parametrize("opaque", [False, True])
def test_autocast_is_as_in_the_forward_pass(opaque):
    flow = flow_of(opaque=opaque, dtype=torch.float32)
    x = batch(torch.float32, size=40)

    def under_autocast(run: Any) -> Any:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(x)

        return call

    expected = results(under_autocast(lambda x: plain(flow, x)), flow, x)
    assert_same(results(under_autocast(flow), flow, x), expected, tolerance=0.05)
    in_float32 = results(lambda x: plain(flow, x), flow, x)
    assert max_error(in_float32[0].float(), expected[0].float()) > 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logdet = plain(flow, x)  # fills autocast's cache of weights
        inside = results(flow, flow, x)  # the backward pass within the region
        parameters = [p for n, p in flow.named_parameters() if "unused" not in n]
        grads = torch.autograd.grad(loss_of((y, logdet)), parameters)
    assert_same(inside, expected, tolerance=0.05)
    assert_same(list(grads), [g for g in expected[3:] if g is not None], tolerance=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        outputs = flow(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad = torch.autograd.grad(loss_of(outputs), x)
    assert_same(list(grad), in_float32[2:3], tolerance=1e-4)


@pytest.mark.parametrize("opaque", [False, True])
def test_running_statistics_change_once(opaque):
    flow = flow_of(nn.BatchNorm1d(16), opaque=opaque)
    twin = copy.deepcopy(flow)
    x = batch(size=20)
    expected = results(lambda x: plain(twin, x), twin, x)
    assert_same(results(flow, flow, x), expected)
    assert (
        int(
            flow.state_dict()[
                "layers.1.layer.network.2.num_batches_tracked" if opaque else "layers.1.network.2.num_batches_tracked"
            ]
        )
        == 1
    )
    for (name, buffer), other in zip(flow.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_actnorm_is_initialised_by_the_first_batch_alone():
    flow = Reversible([Affine(False), ActNorm(FEATURES), Affine(True), ActNorm(FEATURES)]).double()
    twin = copy.deepcopy(flow)
    x = batch(size=50)
    expected = results(lambda x: plain(twin, x), twin, x)
    assert_same(results(flow, flow, x), expected)
    for a, b in zip(flow.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    y = flow(x)[0]
    torch.testing.assert_close(y.mean(0), torch.zeros(FEATURES, dtype=torch.float64))
    before = copy.deepcopy(flow.state_dict())
    loss_of(flow(3 * x + 1)).backward()
    assert all(torch.equal(a, b) for a, b in zip(flow.state_dict().values(), before.values(), strict=True))


def test_parameters_changed_in_between_are_an_error():
    flow = flow_of()
    loss = loss_of(flow(batch()))
    with torch.no_grad():
        flow.layers[1].network[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_call():
    flow = flow_of(nn.BatchNorm1d(16))
    x = batch()
    state = {n: p.detach().clone().mul(1.1).requires_grad_() for n, p in flow.named_parameters()}
    state |= {n: b.clone() for n, b in flow.named_buffers()}
    parameters = [t for n, t in state.items() if t.requires_grad and "unused" not in n]
    actual = torch.autograd.grad(loss_of(torch.func.functional_call(flow, state, x)), parameters)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.copy_(state[name])
    expected = [g for g in results(lambda x: plain(flow, x), flow, x)[3:] if g is not None]
    assert_same(list(actual), expected)


def test_saved_tensor_hooks_and_checkpoint():
    flow = flow_of(nn.Dropout(0.5))
    x = batch()
    torch.manual_seed(7)
    expected = results(lambda x: plain(flow, x), flow, x)
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        assert_same(results(flow, flow, x), expected)
    torch.manual_seed(7)
    assert_same(results(lambda x: checkpoint.checkpoint(flow, x, use_reentrant=False), flow, x), expected)


def test_chains_in_chains():
    flow = Reversible([flow_of(), Opaque(flow_of()), Affine(True).double()])
    x = batch()
    assert_same(results(flow, flow, x), results(lambda x: plain(flow, x), flow, x))


def test_layers_that_return_their_argument():
    x = batch()
    y, logdet = Reversible([Identity(), Identity()])(x)
    loss_of((y, logdet)).backward()
    torch.testing.assert_close(x.grad, x.cos())
    assert torch.equal(y, x) and not logdet.any()


def test_empty_batch():
    flow = flow_of()
    y, logdet = flow(torch.empty(0, FEATURES, dtype=torch.float64))
    loss_of((y, logdet)).backward()
    assert y.shape == (0, FEATURES) and logdet.shape == (0,)
    assert all(not p.grad.any() for n, p in flow.named_parameters() if "unused" not in n)


def test_images():
    class Checkerboard(Coupling):
        def __init__(self, mask: str) -> None:
            super().__init__()
            self.mask = mask
            self.network = nn.Conv2d(2, 4, 3, padding=1)

        def condition(self, x: Tensor) -> tuple[Tensor, ...]:
            zeros, ones = torch.zeros_like(x), torch.ones_like(x)
            changed, _ = affine_coupling(ones, zeros - 1, zeros, mask=self.mask)  # 1 where x passes, else 0
            return self.network(x * changed.detach()).chunk(2, 1)

        def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
            return affine_coupling(x, *parameters, mask=self.mask, scale_map="tanh", inverse=inverse)

    flow = Reversible([ActNorm(2), Checkerboard("checkerboard"), Checkerboard("checkerboard_flipped")]).double()
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    flow(x)
    assert_same(results(flow, flow, x), results(lambda x: plain(flow, x), flow, x))


class Lossy(nn.Module):
    """Its inverse is off by a given amount."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.error = error

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y / self.scale + self.error, y.new_zeros(y.shape[0])


def test_tolerance():
    for error, fails in ((0.0, False), (0.5e-3, False), (2e-3, True), (float("nan"), True)):
        loss = loss_of(Reversible([Lossy(error)], tolerance=1e-3)(batch()))
        if fails:
            with pytest.raises(FloatingPointError, match=r"off by (0\.002|nan), above the tolerance of 0\.001"):
                loss.backward()
        else:
            loss.backward()
    x = batch()
    flow = flow_of(tolerance=1e-9)
    assert_same(results(flow, flow, x), results(lambda x: plain(flow, x), flow, x))


def test_transforms_and_forward_mode():
    flow = flow_of()
    parameters = dict(flow.named_parameters())
    x, tangent = batch(grad=False), batch(grad=False)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(flow, parameters, x))

    actual = torch.func.grad(loss)(parameters, x)
    for grad, expected in zip(actual.values(), results(lambda x: plain(flow, x), flow, x)[2:], strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: flow(x[None])[0][0]))(x)
    _, logdet = flow(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet)
    _, (moved, _) = torch.func.jvp(flow, (x,), (tangent,))
    torch.testing.assert_close(moved, torch.einsum("bij,bj->bi", jacobian, tangent))
    with torch.autograd.forward_ad.dual_level():
        dual, _ = flow(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)
    assert_vmap(flow, (torch.randn(2, 5, FEATURES, dtype=torch.float64),))


def test_compile():
    flow = Reversible([Affine(False), ActNorm(FEATURES), Affine(True)])
    flow(batch(torch.float32))
    assert_compiles(flow, (batch(torch.float32, 4),), (batch(torch.float32, 7),), backend="aot_eager")


def test_compiled_layers_in_an_eager_chain():
    flow = Reversible([Affine(False), Affine(True), Opaque(Affine(False))]).double()
    x = batch()
    expected = results(lambda x: plain(flow, x), flow, x)
    torch._dynamo.reset()
    for layer in flow.layers:
        layer.compile(backend="aot_eager")
    assert_same(results(flow, flow, x), expected)
    torch._dynamo.reset()


def test_without_gradients_nothing_is_recorded():
    flow = flow_of()
    with torch.no_grad():
        assert not flow(batch())[0].requires_grad
    with torch.inference_mode():
        assert flow(batch())[0].is_inference()
    assert not flow.requires_grad_(False)(batch(grad=False))[0].requires_grad


def test_state_dict_and_copies():
    flow = flow_of()
    assert {key.split(".")[0] for key in flow.state_dict()} == {"layers"}
    x = batch()
    other = flow_of()
    other.load_state_dict(flow.state_dict())
    for twin in (other, copy.deepcopy(flow)):
        assert_same(results(twin, twin, x), results(flow, flow, x), tolerance=0.0)


def test_bad_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        Reversible([])
    with pytest.raises(TypeError, match=r"layers\[1\] must have a method inverse, got Linear"):
        Reversible([ActNorm(3), nn.Linear(3, 3)])
    with pytest.raises(TypeError, match=r"layers\[0\] must be a torch.nn.Module, got function"):
        Reversible([permute_channels])
    with pytest.raises(ValueError, match="tolerance must be None or positive, got 0"):
        Reversible([ActNorm(3)], tolerance=0)
    with pytest.raises(TypeError, match="abstract class Coupling with abstract methods condition"):
        Coupling()


def test_bad_calls():
    flow = flow_of(dtype=torch.float32)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        flow([1.0])
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        flow.inverse(torch.zeros(2, FEATURES, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"context\[1\] must be a tensor or None, got str"):
        flow(torch.randn(2, FEATURES), None, "label")

    class Wrong(Identity):
        def forward(self, x: Tensor) -> Any:
            return self.answer(x)

    for answer, error, message in (
        (lambda x: x, TypeError, r"Wrong.forward must return two tensors \(y, logdet\), got Tensor"),
        (lambda x: (x, 0.0), TypeError, "Wrong.forward must return two tensors"),
        (lambda x: (x, x), ValueError, r"Wrong.forward must return logdet of shape \(2,\), got \(2, 3\)"),
        (lambda x: (x, x.sum()), ValueError, r"Wrong.forward must return logdet of shape \(2,\), got \(\)"),
    ):
        layer = Wrong()
        layer.answer = answer
        with pytest.raises(error, match=message):
            Reversible([layer])(torch.randn(2, 3, requires_grad=True))


class EagerAffine(Affine):
    """The layer as one writes it without this library."""

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        fixed, changed = x.chunk(2, 1)[:: -1 if self.flipped else 1]
        shift, s = parameters[0], parameters[1].tanh()
        changed = (changed - shift) * torch.exp(-s) if inverse else changed * torch.exp(s) + shift
        return torch.cat([changed, fixed] if self.flipped else [fixed, changed], 1), (-s if inverse else s).sum(1)


def training_peak(kind: type[Affine], depth: int, size: int, reversible: bool) -> tuple[int, int]:
    """Peak bytes of a training step of a RealNVP on [size, 64], and the bytes of its parameters."""
    torch.manual_seed(0)
    layers = [kind(bool(i % 2), features=64) for i in range(depth)]
    for layer in layers:
        layer.network = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    flow = Reversible(layers)
    x = torch.randn(size, 64)

    def step() -> None:
        y, logdet = flow(x) if reversible else plain(flow, x)
        loss = -dgm_kernels.standard_normal_log_prob(y, logdet).mean()
        loss.backward()

    return peak_memory(step, x.device), sum(p.numel() * 4 for p in flow.parameters())


def test_memory_of_a_64_layer_realnvp_is_at_most_a_tenth():
    ours, parameters = training_peak(Affine, 64, 4096, reversible=True)
    eager, _ = training_peak(EagerAffine, 64, 4096, reversible=False)
    assert ours > parameters, "the gradients of the parameters are part of it"
    assert 10 * ours <= eager, f"{ours} bytes, eager takes {eager}"


def test_memory_does_not_grow_with_the_depth():
    (shallow, few), (deep, many) = (training_peak(Affine, depth, 512, reversible=True) for depth in (4, 32))
    assert deep - many <= 1.05 * (shallow - few) + 28 * 16384, "beyond the gradients of the parameters"


class Shift(Coupling):
    """Additive, with one parameter, a network whose buffers change in every call, and optionally a flip around it."""

    def __init__(self, flipped: bool = False, normalized: bool = False) -> None:
        super().__init__()
        linear = nn.Linear(4, 4)
        self.net = nn.utils.parametrizations.spectral_norm(linear) if normalized else linear
        self.flipped = flipped

    def condition(self, x: Tensor) -> Tensor:
        return self.net(x[:, :4])

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return additive_coupling(x, *parameters, mask="channels", inverse=inverse)


class Flipped(Shift):
    """Calling it is more than condition and transform."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.flip(1))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(y)
        return x.flip(1), logdet


@pytest.mark.parametrize("layer", [Shift, partial(Shift, normalized=True), Flipped, partial(Flipped, normalized=True)])
def test_gradients_of_layers_that_are_more_than_a_network(layer):
    plain = [layer().double() for _ in range(4)]
    deep = Reversible(copy.deepcopy(plain))

    def gradients(chain, parameters):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        y = chain(x)
        return torch.autograd.grad(y.square().sum(), [x, *parameters])

    def in_turn(x):
        for one in plain:
            x, _ = one(x)
        return x

    expected = gradients(in_turn, [p for one in plain for p in one.parameters()])
    actual = gradients(lambda x: deep(x)[0], list(deep.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
