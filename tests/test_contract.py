"""Shows that each helper of the contract fails on an op that breaks it, and passes on one that does not."""

import pytest
import torch
from torch import Tensor

from dgm_kernels import rms_norm, use_backend
from tests.cases import NATIVE
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_close_by_size,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_instruction_sets_agree,
    assert_never_waits,
    assert_parity,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    expanded_and_dense,
    in_every_layout,
    max_error,
    record_native_calls,
    results_of_instruction_sets,
    stacked,
    strided_variants,
    tangents_of,
)
from tests.gradients import (
    assert_any_subset_of_gradients,
    in_every_incoming_layout,
    saved_bytes,
    values_and_gradients,
    with_grads,
)


def double(x: Tensor) -> Tensor:
    return 2 * x


class TestParity:
    def test_accepts_twice_the_error_of_eager(self):
        reference = torch.zeros(3, dtype=torch.float64)
        eager = torch.full((3,), 1e-3)
        assert_parity(torch.full((3,), 2e-3), eager, reference)
        with pytest.raises(AssertionError, match="error"):
            assert_parity(torch.full((3,), 2.1e-3), eager, reference)

    def test_refuses_an_unwritten_element(self):
        x = torch.randn(5)

        def leaves_the_last_one(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            out[:-1] = 2 * x[:-1]
            return out

        with pytest.raises(AssertionError, match="error inf"):
            assert_parity(leaves_the_last_one(x), double(x), double(x.double()))

    def test_refuses_another_shape_or_dtype_and_one_output_less(self):
        x = torch.randn(4, 1)
        with pytest.raises(AssertionError, match="shape"):
            assert_parity(x.T, x, x.double())
        with pytest.raises(AssertionError, match="dtype"):
            assert_parity(x.double(), x, x.double())
        with pytest.raises(AssertionError, match="float64"):
            assert_parity(x, x, x)
        with pytest.raises(AssertionError, match="numbers of outputs"):
            assert_parity((x,), (x, x), (x.double(), x.double()))

    def test_nan_and_infinity_match_only_themselves(self):
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=torch.float64)
        assert max_error(special.float(), special) == 0
        assert max_error(special.nan_to_num(), special) == float("inf")
        assert max_error(torch.tensor([float("nan")]), torch.tensor([1.0], dtype=torch.float64)) == float("inf")
        assert max_error(torch.tensor([-float("inf")]), torch.tensor([float("inf")], dtype=torch.float64)) == float(
            "inf"
        )

    def test_zero_size(self):
        x = torch.randn(0, 3)
        assert_parity(x, x, x.double())


class TestCloseBySize:
    def test_counts_in_the_largest_finite_element_of_each_output(self):
        expected = [torch.tensor([100.0, 0.0, torch.inf]), torch.tensor([0.5, 0.0])]
        assert_close_by_size([torch.tensor([100.0, 0.09, torch.inf]), torch.tensor([0.5, 9e-4])], expected, 1e-3)
        for wrong in ([expected[0] + 0.3, expected[1]], [expected[0], expected[1] + 2e-3]):
            with pytest.raises(AssertionError, match=r"output [01]: .*not close"):
                assert_close_by_size(wrong, expected, 1e-3)

    def test_refuses_nan_and_takes_no_elements(self):
        with pytest.raises(AssertionError, match="not close"):
            assert_close_by_size(torch.tensor([torch.nan]), torch.tensor([torch.nan]), 1e-3)
        assert_close_by_size(torch.empty(0), torch.empty(0), 0.0)


class TestStridedVariants:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
    def test_equal_values_in_other_layouts(self, dtype):
        x = (4 * torch.randn(2, 1, 3, 5)).to(dtype)
        variants = list(strided_variants(x))
        assert all(torch.equal(variant, x) for variant in variants)
        strides = {variant.stride() for variant in variants} - {x.stride()}
        assert len(strides) >= 4
        assert any(0 in variant.stride() for variant in variants)
        assert any(variant.storage_offset() == 1 and variant.is_contiguous() for variant in variants)
        assert any(variant.is_contiguous(memory_format=torch.channels_last) for variant in variants)

    def test_expands_equal_rows_only(self):
        assert any(v.stride() == (0, 1) for v in strided_variants(torch.randn(1, 3).repeat(4, 1)))
        assert not any(0 in v.stride() for v in strided_variants(torch.randn(4, 3)))

    def test_zero_size_and_zero_dim(self):
        assert all(variant.shape == (0, 3) for variant in strided_variants(torch.randn(0, 3)))
        assert [variant.storage_offset() for variant in strided_variants(torch.tensor(1.0))] == [1, 0, 0]

    def test_keeps_requires_grad(self):
        variants = list(strided_variants(torch.randn(2, 3, requires_grad=True)))
        assert variants and all(variant.requires_grad and variant.is_leaf for variant in variants)

    def test_catches_an_op_that_ignores_strides(self):
        x = torch.randn(3, 5)

        def ignores_strides(x: Tensor) -> Tensor:
            return 2 * x.as_strided(x.shape, (x.shape[1], 1))

        assert torch.equal(ignores_strides(x), double(x))
        # Only the variant with a storage offset is dense in row-major order.
        wrong = [v for v in strided_variants(x) if not torch.equal(ignores_strides(v), double(v))]
        assert len(wrong) == len(list(strided_variants(x))) - 1


class TestOperands:
    def test_every_operand_in_every_layout(self):
        x, y = torch.randn(2, 3), torch.randn(4)
        found = list(in_every_layout([x, y]))
        assert len(found) == len(list(strided_variants(x))) + len(list(strided_variants(y)))
        assert all(torch.equal(a, x) and torch.equal(b, y) for a, b in found)
        assert {(a is x, b is y) for a, b in found} == {(True, False), (False, True)}

    def test_every_dimension_expanded(self):
        x, y = torch.randn(2, 3), torch.randn(4)
        for given, expected in (([0, 1], 3), ([1], 1)):
            pairs = list(expanded_and_dense([x, y], given))
            assert len(pairs) == expected
            for wide, dense in pairs:
                assert all(torch.equal(a, b) for a, b in zip(wide, dense, strict=True))
                assert any(0 in t.stride() for t in wide) and not any(0 in t.stride() for t in dense)
        assert len(list(expanded_and_dense([x, y]))) == 3


class TestInputsUnchanged:
    def test_refuses_a_write_to_an_element(self):
        x, y = torch.randn(3), torch.randn(3)
        with assert_inputs_unchanged(x, y):
            double(x)
        with pytest.raises(AssertionError, match="input 1"), assert_inputs_unchanged(x, y):
            y[1] = 0

    def test_refuses_a_write_between_the_elements(self):
        storage = torch.zeros(6)
        with pytest.raises(AssertionError, match="input 0"), assert_inputs_unchanged(storage[::2]):
            storage[1] = 1


class TestBitwiseRepeatable:
    def test_refuses_another_bit(self):
        x = torch.tensor([0.0, float("nan")])
        assert_bitwise_repeatable(lambda: double(x))
        signs = iter([1.0, 1.0, -1.0])
        with pytest.raises(AssertionError, match="run 2"):
            assert_bitwise_repeatable(lambda: x[:1] * next(signs))

    def test_refuses_fresh_noise(self):
        with pytest.raises(AssertionError, match="run 1"):
            assert_bitwise_repeatable(lambda: torch.randn(3))

    def test_takes_one_expanded_element(self):
        x = torch.randn(1).expand(5)[:1]
        assert x.stride() == (0,)
        assert_bitwise_repeatable(lambda: x)


class TestThreads:
    def test_refuses_what_depends_on_their_number(self, thread_counts):
        x = torch.randn(3)
        assert_threads_agree(lambda: double(x), thread_counts)
        depends = lambda: x + 1e-5 * torch.get_num_threads()  # noqa: E731
        assert_threads_agree(depends, thread_counts, 1e-4)
        with pytest.raises(AssertionError, match="2 threads, output 0"):
            assert_threads_agree(depends, thread_counts)


class TestGradients:
    def test_of_some_operands_and_of_outputs_that_depend_on_them(self):
        x, y = torch.randn(3), torch.randn(3)
        product, gradient = with_grads(torch.mul, [x, y], 1)
        assert torch.equal(product, x * y)
        torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.5, 2.0]) * y)
        assert len(with_grads(torch.mul, [x, y])) == 3
        constant = lambda x: (double(x), torch.zeros(1))  # noqa: E731
        with pytest.raises(RuntimeError, match="does not require grad"):
            with_grads(constant, [x])
        assert len(with_grads(constant, [x], constant=True)) == 3

    def test_an_operand_without_a_part_has_a_gradient_of_zeros(self):
        _, _, to_x, to_y = values_and_gradients(lambda x, y: (double(x), double(y)), [torch.randn(9)] * 2, which=[0])
        assert to_x.any() and not to_y.any()

    def test_refuses_a_backward_pass_that_ignores_strides(self):
        class IgnoresStrides(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, grad):
                memory = torch.empty(0).set_(grad.untyped_storage())
                return 2 * memory.repeat(grad.numel())[: grad.numel()].view(grad.shape)

        def check(fn):
            for actual, expected in in_every_incoming_layout(fn, [torch.randn(2, 3)]):
                torch.testing.assert_close(actual, expected)

        check(double)
        with pytest.raises(AssertionError, match="not close"):
            check(IgnoresStrides.apply)

    def test_counts_what_is_saved_beside_the_operands(self):
        x, y = (torch.randn(5, requires_grad=True) for _ in range(2))
        assert saved_bytes(torch.mul, [x, y])[0] == 0
        assert saved_bytes(torch.exp, [x])[0] == 5 * 4

    def test_refuses_a_gradient_that_nobody_asked_for(self):
        x, y = torch.randn(3), torch.randn(3)
        assert_any_subset_of_gradients(lambda x, y: (x * y).sum(), [x, y])
        with pytest.raises(AssertionError):
            assert_any_subset_of_gradients(lambda x, y: (x * y.clone().requires_grad_()).sum(), [x, y])


class TestCompiles:
    small, large = (torch.randn(3, 5),), (torch.randn(7, 11),)

    def test_accepts_a_traceable_op_and_its_gradient(self):
        assert_compiles(double, (torch.randn(3, 5, requires_grad=True),), (torch.randn(7, 11, requires_grad=True),))

    def test_refuses_a_recompile(self):
        def depends_on_the_size(x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] == 3 else x + 1.0

        with pytest.raises(AssertionError, match="compiled 1 times more"):
            assert_compiles(depends_on_the_size, self.small, self.large, backend="aot_eager")

    def test_refuses_a_graph_break(self):
        def breaks(x: Tensor) -> Tensor:
            return x * float(x.sum().item()) if x.sum() > 0 else x

        with pytest.raises(torch._dynamo.exc.Unsupported):
            assert_compiles(breaks, self.small, self.large, backend="aot_eager")

    def test_refuses_another_result(self):
        def knows_it_is_compiled(x: Tensor) -> Tensor:
            return x + 1 if torch.compiler.is_compiling() else x

        with pytest.raises(AssertionError, match="not close"):
            assert_compiles(knows_it_is_compiled, self.small, self.large, backend="aot_eager")


class TestAutocast:
    args = (torch.randn(3, 5), torch.randn(5, 2))

    def test_accepts_the_same_op(self):
        assert_autocast_like(torch.mm, torch.matmul, self.args)

    def test_refuses_another_dtype(self):
        def ignores_autocast(a: Tensor, b: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return a @ b

        with pytest.raises(AssertionError, match=r"float32 under autocast"):
            assert_autocast_like(ignores_autocast, torch.mm, self.args)

    def test_refuses_other_values(self):
        with pytest.raises(AssertionError, match="not close"):
            assert_autocast_like(lambda a, b: a @ b + 1, torch.mm, self.args)


class TestVmap:
    def test_accepts_a_batched_op_with_an_unmapped_argument(self):
        assert_vmap(torch.mul, (torch.randn(4, 3), torch.randn(3)), in_dims=(0, None))
        assert_vmap(torch.outer, (torch.randn(4, 3), torch.randn(4, 2)))

    def test_refuses_an_op_that_mixes_the_batch(self):
        class MixesTheBatch(torch.autograd.Function):
            @staticmethod
            def forward(x):
                return x - x.mean()

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def vmap(info, in_dims, x):
                return MixesTheBatch.apply(x), in_dims[0]

        with pytest.raises(AssertionError, match="not close"):
            assert_vmap(MixesTheBatch.apply, (torch.randn(4, 3),))

    def test_over_one_operand_alone(self):
        operands = stacked(lambda: [torch.randn(3), torch.randn(3)])
        assert [tuple(o.shape) for o in operands] == [(3, 3), (3, 3)]
        assert_vmap_of_one(torch.mul, operands, 0)
        seen = []

        def shapes(x: Tensor, y: Tensor) -> Tensor:
            seen.append([torch._C._functorch.is_batchedtensor(t) for t in (x, y)])
            return x * y

        assert_vmap_of_one(shapes, operands, 1)
        assert seen == [*[[False, False]] * 3, [False, True]]


class TestTransforms:
    class WrongTangent(torch.autograd.Function):
        """The square, whose derivative is right backward and wrong forward."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.square()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

        @staticmethod
        def jvp(ctx, tangent):
            return 3 * ctx.saved_tensors[0] * tangent

    def test_gradient_and_directional_derivative(self):
        x, y = torch.randn(3).double(), torch.randn(3).double()
        to_x, to_y = assert_functional_transforms(lambda x, y: (x * y, x.argmax()), [x, y])
        torch.testing.assert_close([to_x, to_y], [(x * y).cos() * y, (x * y).cos() * x])
        assert_functional_transforms(torch.mul, [x, y], ((torch.float64, 1e-9), (torch.float32, 1e-3)))
        with pytest.raises(AssertionError, match="not close"):
            assert_functional_transforms(self.WrongTangent.apply, [x])

    def test_tangents_of_dual_numbers(self):
        x = torch.randn(3)
        actual, expected = tangents_of(lambda x: (x.square(), x.detach()), lambda x: (x * x, 0 * x), [x])
        torch.testing.assert_close(actual, expected)
        actual, expected = tangents_of(torch.square, torch.square, [x], [torch.ones(3)])
        torch.testing.assert_close([actual[0], expected[0]], [2 * x.double()] * 2)
        actual, expected = tangents_of(self.WrongTangent.apply, torch.square, [x])
        assert not torch.allclose(actual[0], expected[0])


class TestNeverWaits:
    @pytest.mark.gpu
    def test_refuses_a_call_that_waits(self):
        with assert_never_waits():
            x = torch.ones(1, device="cuda")
        with pytest.raises(RuntimeError, match="synchronizing"), assert_never_waits():
            x.item()
        assert torch.cuda.get_sync_debug_mode() == 0


class TestNativeCalls:
    @pytest.mark.parametrize("backend", NATIVE)
    def test_records_forward_and_backward_passes(self, backend):
        x = torch.randn(3, 5, requires_grad=True)
        with use_backend(backend), record_native_calls() as calls:
            rms_norm(x, (5,)).sum().backward()
        assert [name for name, _ in calls] == [backend] * 2
        assert calls[0][1][0].shape == x.shape
        with use_backend("reference"), record_native_calls() as calls:
            rms_norm(x, (5,)).sum().backward()
        assert not calls

    @pytest.mark.parametrize("backend", NATIVE)
    def test_instruction_sets(self, backend, tmp_path):
        """Each runs in a process that is told which to use."""
        script = "import os\noutputs = os.environ['ATEN_CPU_CAPABILITY'], float(torch.rand(())), sys.argv[1]"
        results = results_of_instruction_sets(script, tmp_path, "argument")
        assert {isa: found[0] for isa, found in results.items()} == {isa: isa for isa in results}
        assert {found[1:] for found in results.values()} == {(results["default"][1], "argument")}

    def test_refuses_an_instruction_set_with_other_numbers(self, monkeypatch, tmp_path):
        def agree(isa: list[Tensor], float32: float, others: float, **options: bool) -> None:
            found = {"default": [[torch.ones(2), torch.ones(2).half()]], "avx2": [isa]}
            monkeypatch.setattr("tests.contract.results_of_instruction_sets", lambda script, folder: found)
            assert_instruction_sets_agree("", tmp_path, float32, others, **options)

        wide, narrow = [torch.full((2,), 1.001), torch.ones(2).half()], [torch.ones(2), torch.full((2,), 1.01).half()]
        agree(wide, 1e-2, 0.0)
        with pytest.raises(AssertionError, match="avx2, call 0, output 0"):
            agree(wide, 1e-4, 1.0)
        agree(narrow, 0.0, 2e-2)
        with pytest.raises(AssertionError, match="avx2, call 0, output 0"):
            agree(narrow, 1e-3, 2e-2, by_first=True)


class TestFixtures:
    def test_uninitialised_memory_is_poisoned(self):
        x = torch.zeros(3)
        fresh = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,)), torch.Tensor(3)]
        fresh.append(torch.empty(3, dtype=torch.bfloat16))
        assert all(tensor.isnan().all() for tensor in fresh)
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()

    @pytest.mark.parametrize("run", [0, 1])
    def test_seeds_are_the_same_in_every_test(self, run):
        expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.randn(3), expected)

    @pytest.mark.gpu
    def test_gpu_tests_run_only_with_a_gpu(self):
        assert torch.cuda.is_available()
