"""The Triton kernels of the sampler op in Triton's interpreter, and what the compiler makes of them; needs no GPU."""

import os
import re

import pytest
import torch

import dgm_kernels as dgm
from dgm_kernels.sampler import reference
from tests.contract import (
    assert_bitwise_repeatable,
    assert_inputs_unchanged,
    assert_passes_interpreted,
    strided_variants,
)
from tests.sampler_op import (
    FORMS,
    SHAPES,
    check_step,
    check_training,
    key_args,
    native_loss,
    native_noise,
    native_step,
    step_call,
    step_inputs,
    training_call,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def compile_for_sm90(name: str) -> str:
    """The PTX of a kernel that ``aot_specs`` lists, for tensors at 16-byte addresses."""
    from triton.backends.compiler import GPUTarget

    from dgm_kernels.sampler.triton import aot_specs

    _, function, signature, constexprs, options = next(spec for spec in aot_specs() if spec[0] == name)
    types = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
    pointers = [place for place, type_ in enumerate(types.values()) if type_.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = triton.compiler.ASTSource(function, types, constexprs, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


if INTERPRETED:
    from dgm_kernels._core.triton_noise import philox

    @triton.jit
    def philox_once(out_ptr, counter_ptr, key_ptr):
        c0 = tl.load(counter_ptr).to(tl.uint32)
        c1 = tl.load(counter_ptr + 1).to(tl.uint32)
        c2 = tl.load(counter_ptr + 2).to(tl.uint32)
        c3 = tl.load(counter_ptr + 3).to(tl.uint32)
        k0 = tl.load(key_ptr).to(tl.uint32)
        k1 = tl.load(key_ptr + 1).to(tl.uint32)
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
        tl.store(out_ptr, w0.to(tl.int64))
        tl.store(out_ptr + 1, w1.to(tl.int64))
        tl.store(out_ptr + 2, w2.to(tl.int64))
        tl.store(out_ptr + 3, w3.to(tl.int64))


class TestInterpreted:
    """Collected only where TRITON_INTERPRET=1, which Triton reads when a kernel is defined."""

    __test__ = INTERPRETED

    # Random123's kat_vectors, philox4x32 10.
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_known_answers(self, counter, key, expected):
        out = torch.empty(4, dtype=torch.int64)
        philox_once[(1,)](out, torch.tensor(counter), torch.tensor(key))
        assert tuple(out.tolist()) == expected

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("on_device", [False, True])
    def test_noise(self, shape, on_device):
        args = key_args(shape[0], "cpu", on_device)
        like = torch.empty(shape)
        for kind in (1, 2):
            assert torch.equal(native_noise("triton", like, args, kind), reference.noise_like(like, args, kind))
        normal, expected = native_noise("triton", like, args, 0), reference.noise_like(like, args, 0)
        torch.testing.assert_close(normal, expected, rtol=4 * 2**-23, atol=0)
        assert torch.equal(native_noise("triton", like.half(), args, 0), normal.half())
        bits = native_noise("triton", like.bfloat16(), args, 2)
        assert torch.equal(bits, reference.noise_like(like, args, 2))
        torch.testing.assert_close(native_noise("triton", like.bfloat16(), args, 0).float(), normal, rtol=2**-7, atol=0)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_step(self, form, dtype):
        for shape in SHAPES if dtype == torch.float32 else SHAPES[2:5]:
            check_step("triton", step_call(shape, dtype, form), coarse=dtype == torch.bfloat16)

    @pytest.mark.parametrize("form", ["given", "drawn", "drawn device_key mixed"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_training(self, form, dtype):
        for shape in SHAPES if dtype == torch.float32 else SHAPES[2:5]:
            coarse = dtype == torch.bfloat16 or "mixed" in form
            check_training("triton", training_call(shape, dtype, form), coarse)

    def test_a_step_without_noise_ignores_the_key(self):
        call = step_call((2, 113), torch.float32, "drawn known")
        for row in (1, 2):
            first, _ = native_step("triton", {**call, "step": row})
            other, _ = native_step("triton", {**call, "step": row, "args": key_args(2, "cpu", True)})
            assert torch.equal(first, other) == (row == 2), "row 1 puts noise on known pixels, row 2 none at all"

    @pytest.mark.parametrize("form", ["given", "given history known"])
    @pytest.mark.parametrize("row_steps", [False, True])
    def test_operands_with_coefficient_zero_do_not_count(self, form, row_steps):
        """Row 2 of the table uses neither noise nor history, so the samples at it may hold anything there."""
        for elements in (59, 1024):
            call = step_call((3, elements), torch.float32, form)
            call["rows"][2, 7] = 0.0
            call["step"] = torch.tensor([2, 3, 2]) if row_steps else 2
            expected = native_step("triton", call)
            for operand, junk in ((call["args"][0], float("inf")), (call["history"], float("nan"))):
                if operand is not None:
                    operand[::2] = junk
            for result, clean in zip(native_step("triton", call), expected, strict=True):
                assert torch.equal(result, clean)

    @pytest.mark.parametrize("bad", [-1, 6, 1 << 40])
    def test_index_out_of_range_gives_nan(self, bad):
        call = step_call((3, 59), torch.float32, "drawn row_steps known threshold")
        call["step"] = torch.tensor([1, bad, 2])
        for result in native_step("triton", call):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
        new, x0 = native_step("triton", {**step_call((3, 59), torch.float32, ""), "step": torch.tensor(bad)})
        assert new.isnan().all() and x0.isnan().all()
        call = {**training_call((3, 59), torch.float32, "drawn"), "t": torch.tensor([1, bad, 2])}
        for result in native_loss("triton", call):
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()

    def test_nan_passes_the_bounds(self):
        call = step_call((2, 59), torch.float32, "threshold")
        call["x"][0, 7] = float("nan")
        for threshold in (None, call["threshold"]):
            for result in native_step("triton", {**call, "threshold": threshold}):
                assert result[0, 7].isnan() and result.isnan().sum() == 1

    def test_refuses_other_strides(self):
        call = step_call((3, 59), torch.float32, "")
        call["model_output"] = call["model_output"].t().contiguous().t()
        with pytest.raises(ValueError, match="contiguous"):
            native_step("triton", call)

    def test_out_may_be_x(self):
        call = step_call((2, 1023), torch.float32, "drawn history")
        expected = native_step("triton", call)
        x0 = torch.empty_like(call["x"])
        torch.ops.dgm.sampler_step_out.triton(*step_inputs(call), call["x"], x0)
        assert torch.equal(call["x"], expected[0]) and torch.equal(x0, expected[1])

    def test_zero_sizes(self):
        args = key_args(0, "cpu", False)
        for shape in ((0, 3), (3, 0)):
            like = torch.empty(shape)
            assert native_noise("triton", like, args, 0).shape == shape
            assert native_step("triton", step_call(shape, torch.float32, "drawn"))[0].shape == shape
            loss, residual = native_loss("triton", training_call(shape, torch.float32, "drawn"))
            assert loss.shape == shape[:1] and residual.shape == shape and loss.isnan().all()

    def test_more_samples_than_a_grid_axis_holds(self):
        like = torch.empty(65536 + 7, 1)
        args = key_args(1, "cpu", False)
        assert torch.equal(native_noise("triton", like, args, 2), reference.noise_like(like, args, 2))

    def test_any_strides_and_unchanged_inputs(self):
        table = dgm.tables.ddpm(dgm.Schedule.linear(10))
        x, m, key = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), dgm.NoiseKey(7)
        with dgm.use_backend("triton"):
            expected = dgm.sampler_step(x, m, table, 4, noise=key)
            for x_, m_ in zip(strided_variants(x), strided_variants(m), strict=True):
                with assert_inputs_unchanged(x_, m_):
                    torch.testing.assert_close(dgm.sampler_step(x_, m_, table, 4, noise=key), expected, rtol=0, atol=0)

    def test_repeatable(self):
        step = step_call((2, 1025), torch.float32, "drawn")
        assert_bitwise_repeatable(lambda: native_step("triton", step))
        loss = training_call((3, 3000), torch.float32, "drawn")
        assert_bitwise_repeatable(lambda: native_loss("triton", loss))

    def test_gradients(self):
        table = dgm.tables.training(dgm.Schedule.linear(10), prediction="v")
        t, key = torch.tensor([3, 8]), dgm.NoiseKey(11)
        gradients = []
        for backend in ("triton", "reference"):
            torch.manual_seed(1)
            x0, scale = torch.randn(2, 59, requires_grad=True), torch.randn(2, 59, requires_grad=True)
            with dgm.use_backend(backend):
                noisy = dgm.add_noise(x0, table, t, key)
                loss = dgm.denoising_loss(noisy * scale, x0, table, t, key)
            gradients.append(torch.autograd.grad(loss, (x0, scale)))
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("form", ["drawn", "given known guided history"])
    def test_opcheck(self, form):
        call = step_call((2, 59), torch.float32, form)
        call["x"].requires_grad_()
        torch.library.opcheck(torch.ops.dgm.sampler_step.triton, (*step_inputs(call), True))


class TestNotInterpreted:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self):
        """Runs the tests above in a process of their own: Triton interprets all kernels of a process or none."""
        assert_passes_interpreted(__file__)

    @pytest.mark.parametrize(
        ("name", "loads", "stores"),
        [
            ("noise_like_fp32", 0, 2),
            ("step_fp32", 4, 2),
            ("step_bf16", 2, 1),
            ("step_drawn_fp32", 4, 2),
            ("step_drawn_bf16", 2, 1),
            ("step_every_option_bf16", 5, 2),
            ("denoising_loss_bf16", 2, 1),
        ],
    )
    def test_compiled_accesses_are_16_bytes(self, name, loads, stores):
        """A thread has 8 elements of every tensor: two 16-byte accesses in float32, one in 16 bits."""
        ptx = compile_for_sm90(name)
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores
        assert not re.findall(r"(?:ld|st)\.global\.b(?:8|16) ", ptx), "an element is read or written on its own"
        if name.startswith(("noise_like", "step")):
            assert ".shared" not in ptx, "threads exchange elements: noise is not drawn where it is used"
