"""The Triton kernels of the latent op in Triton's interpreter, and what the compiler makes of them; needs no GPU."""

import os

import pytest
import torch

import dgm_kernels as dgm
from dgm_kernels import NoiseKey
from tests.contract import assert_bitwise_repeatable, assert_inputs_unchanged, assert_passes_interpreted, compiled_usage
from tests.gradients import values_and_gradients
from tests.latent_cases import CASES, CODE_CASE, IMPORTANCE_CASES, KL_CASES, SAMPLE_CASES, TRIL_CASE, make_pair
from tests.latent_op import check_case

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 1), (7,), (3, 59), (2, 3, 113), (70, 2), (9, 64), (2, 1030), (0, 4), (3, 0)]


def shapes_of(case):
    """One element, ragged, several short samples a program, several programs a sample, none."""
    if case in (TRIL_CASE, CODE_CASE):
        return case.shapes
    return SHAPES if case in (*SAMPLE_CASES[:2], KL_CASES[1]) else [(3, 59), (70, 2), (2, 130), (3, 0)]


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_and_gradients(self, case):
        for shape in shapes_of(case):
            check_case("triton", case, shape)
        for dtype in (torch.float16, torch.bfloat16):
            check_case(
                "triton",
                case,
                shapes_of(case)[0 if case in IMPORTANCE_CASES else 2],
                dtype,
                coarse=dtype == torch.bfloat16,
            )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_gradients_of_one_output(self, case):
        outputs = {CODE_CASE: (0, 3, 4)}.get(case, (0,) if case in KL_CASES else (0, 1))
        for which in outputs:
            check_case("triton", case, case.small, which=(which,))

    def test_keys_on_the_device_and_given_noise(self):
        mu, log_var = make_pair((5, 70))
        key = NoiseKey(torch.tensor([1 << 40]), step=torch.arange(5), samples=torch.arange(5) + (1 << 33))
        for noise in (key, torch.randn(5, 70)):
            both = []
            for backend in ("triton", "reference"):
                call = lambda m, v, noise=noise: dgm.gaussian_sample_kl(m, v, noise)  # noqa: E731
                with dgm.use_backend(backend):
                    both.append(values_and_gradients(call, [mu, log_var]))
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-4)

    def test_of_equal_codes_the_first_is_taken(self):
        codebook = torch.randn(5, 6)[[0, 1, 2, 1, 3, 1, 4] * 20]
        with dgm.use_backend("triton"):
            assert dgm.vector_quantize(codebook[[1, 3, 5, 41, 4]], codebook).indices.tolist() == [1, 1, 1, 6, 4]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_inputs_unchanged_and_repeatable(self, case):
        operands = [o.nan_to_num(0.0) for o in case.make(case.small)]
        with dgm.use_backend("triton"):
            with assert_inputs_unchanged(*operands):
                values_and_gradients(case.call, operands)
            assert_bitwise_repeatable(lambda: values_and_gradients(case.call, operands), runs=2)

    def test_views_are_read_where_they_are(self):
        both = torch.randn(4, 80)
        for start in (0, 3):
            halves = [both[:, start : start + 32], both[:, 40 + start : 72 + start]]
            with dgm.use_backend("triton"):
                actual = values_and_gradients(SAMPLE_CASES[1].call, halves)
            with dgm.use_backend("reference"):
                expected = values_and_gradients(SAMPLE_CASES[1].call, halves)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)

    def test_direct_calls_are_held_to_the_layout(self):
        mu, log_var = make_pair((4, 6))
        args = (*NoiseKey(1).op_args(), 0.0, False, 0.0, 0.0, torch.float32)
        with pytest.raises(ValueError, match="log_var must have the shape of mu"):
            torch.ops.dgm.latent_sample.triton(mu, log_var[:2], *args)
        with pytest.raises(ValueError, match="noise must be a tensor or a key"):
            torch.ops.dgm.latent_sample.triton(mu, log_var, None, None, 0, None, 0, None, 0, -1, *args[8:])


@pytest.mark.skipif(INTERPRETED, reason="is itself inside the interpreter")
def test_interpreted():
    assert_passes_interpreted("tests/test_latent_triton.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_the_main_forms_compile_without_spills_and_with_wide_accesses():
    from dgm_kernels.latent.triton import aot_specs

    for name in ("sample_fp32", "sample_backward_bf16", "importance_backward_fp32", "nearest_bf16"):
        usage = compiled_usage(aot_specs(), name)
        assert usage.spill_bytes == 0, usage
    assert compiled_usage(aot_specs(), "sample_fp32").wide_loads >= 2
