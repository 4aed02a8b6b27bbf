"""Shows that each helper of the contract fails on an op that breaks it, and passes on one that does not."""

import pytest
import torch
from torch import Tensor

from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_parity,
    assert_vmap,
    max_error,
    strided_variants,
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
