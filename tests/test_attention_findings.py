"""Corners of attention that a review found wrong, each with what it should be."""

import sys

import pytest
import torch

import dgm_kernels
from dgm_kernels import KVCache, attention, masks, use_backend
from tests.attention_cases import BACKENDS

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
def test_radii_beyond_the_picture_reach_all_of_it(backend):
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    with use_backend(backend):
        for make in (masks.neighborhood_2d, masks.raster_2d):
            expected = attention(q, k, v, mask=make(4, 4, 4))
            for radius in (2**31, 2**32, sys.maxsize, (4, 2**32)):
                torch.testing.assert_close(attention(q, k, v, mask=make(4, 4, radius)), expected, rtol=0, atol=0)


@on_every_backend
def test_the_gradient_of_lse_at_a_blind_query_does_not_count(backend):
    leaves = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    with use_backend(backend):
        _, lse = attention(*leaves, mask=masks.causal(-1), return_lse=True)
        weights = torch.ones_like(lse)
        expected = torch.autograd.grad(lse, leaves[:2], weights, retain_graph=True)
        weights[..., 0] = torch.nan  # what log-sum-exp or squares of minus infinity send back
        actual = torch.autograd.grad(lse, leaves[:2], weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in actual)


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = masks.causal(-3)  # no other test has it
    with FakeTensorMode():
        fake = torch.empty(1, 2, 21, 8)
        assert attention(fake, fake, fake, mask=mask).shape == fake.shape
    q = torch.randn(1, 2, 21, 8)
    torch.testing.assert_close(attention(q, q, q, mask=mask), attention(q, q, q, mask=mask.dense(21)))


def test_a_cache_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        cache = KVCache(1, 2, 4, 8)
    cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert cache.length == 1


@on_every_backend
def test_no_heads_against_one_key_head(backend):
    q, k = torch.randn(2, 0, 4, 16, requires_grad=True), torch.randn(2, 1, 5, 16, requires_grad=True)
    with use_backend(backend):
        out = attention(q, k, k)
        assert out.shape == (2, 0, 4, 16)
        assert not torch.autograd.grad(out.sum(), k)[0].any()


@pytest.mark.parametrize(
    "shapes, gqa, message",
    [
        (((2, 8, 4, 16), (1, 8, 5, 16), (3, 8, 5, 16)), False, "v must have the batch and the heads of q"),
        (((2, 2, 4, 16), (2, 1, 5, 16), (2, 3, 5, 16)), False, "v must have the batch and the heads of q"),
        (((2, 8, 4, 16), (1, 2, 5, 16), (3, 2, 5, 16)), True, "v must have the batch and the heads of q"),
        (((2, 8, 4, 16), (2, 1, 5, 16), (2, 4, 5, 16)), True, "v must have one head or as many as k"),
    ],
)
def test_shapes_that_fit_in_pairs_alone(shapes, gqa, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(shape) for shape in shapes), enable_gqa=gqa)


def test_the_module_refuses_masks_of_another_length_with_padding_too():
    module, x = dgm_kernels.nn.MultiheadAttention(8, 2), torch.randn(1, 16, 8)
    padding = torch.zeros(1, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="made for 64 tokens"):
        module(x, key_padding_mask=padding, mask=masks.neighborhood_2d(8, 8, 1))
