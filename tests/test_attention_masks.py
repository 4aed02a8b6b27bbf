"""Masks of attention: against their definitions, as kernels read them, as pictures; what is refused."""

import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_kernels import attention, masks, use_backend
from tests.attention_cases import (
    BACKENDS,
    DOCUMENT_CASE,
    HIGH_PICTURE_CASE,
    MASKS,
    MATRIX_MASK,
    AttentionCase,
    MaskCase,
    Size,
    causal_case,
    neighborhood_case,
    prefix_case,
    raster_case,
    window_case,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_mask = pytest.mark.parametrize("mask", (*MASKS, MATRIX_MASK), ids=str)
LENGTHS = ((1, 1), (3, 59), (59, 3), (12, 12), (13, 20), (35, 30))


def by_pairs(mask: MaskCase, queries: int, keys: int) -> list[list[bool]]:
    """One query and one key at a time."""
    return [[bool(mask.sees(i, j, queries, keys)) for j in range(keys)] for i in range(queries)]


def from_region(mask: masks.Mask, queries: int, keys: int, first: int = 0) -> Tensor:
    """The matrix that a kernel sees: an interval of keys for each query, and of these those of near columns."""
    region = mask.region(queries, keys, first=first)
    assert region is not None
    assert region.bounds.dtype == torch.int32 and region.bounds.shape == (queries, 2)
    matrix = torch.zeros(queries, keys, dtype=torch.bool)
    for row, (begin, end) in enumerate(region.bounds.tolist()):
        assert 0 <= begin <= end <= keys
        for j in range(begin, end):
            width, radius = region.columns
            matrix[row, j] = not width or abs((first + row) % width - j % width) <= radius
    return matrix


def random_case(generator: random.Random) -> MaskCase:
    """Up to three masks of random parameters, combined."""
    side = lambda: generator.choice([None, *range(9)])  # noqa: E731
    small = lambda: generator.randrange(4)  # noqa: E731
    kinds = (
        lambda: causal_case(generator.randrange(-6, 12)),
        lambda: prefix_case(generator.randrange(12)),
        lambda: window_case(side(), side()),
        lambda: neighborhood_case(small(), small()),
        lambda: raster_case(small(), small(), generator.random() < 0.5),
        lambda: DOCUMENT_CASE,
    )
    case = generator.choice(kinds)()
    for _ in range(generator.randrange(3)):
        case = case & generator.choice(kinds)()
    return case


def random_lengths(case: MaskCase, generator: random.Random) -> tuple[int, int]:
    queries = generator.randrange(1, 41)
    return queries, queries if case.square else generator.randrange(1, 41)


# ---- Against the definition.


@every_mask
def test_dense_is_the_definition(mask):
    for queries, keys in LENGTHS:
        keys = queries if mask.square else keys
        expected = torch.tensor(by_pairs(mask, queries, keys))
        assert torch.equal(mask.make(queries, keys).dense(queries, keys), expected)
        assert torch.equal(mask.matrix(queries, keys), expected)


@every_mask
def test_dense_has_as_many_keys_as_queries_by_default(mask):
    assert torch.equal(mask.make(12, 12).dense(12), mask.make(12, 12).dense(12, 12))


@pytest.mark.parametrize("seed", range(60))
def test_random_compositions(seed):
    """dense and region of them, from the first query on and from a later one."""
    generator = random.Random(seed)
    for _ in range(4):
        case = random_case(generator)
        queries, keys = random_lengths(case, generator)
        mask, expected = case.make(queries, keys), torch.tensor(by_pairs(case, queries, keys))
        assert torch.equal(mask.dense(queries, keys), expected), case
        assert torch.equal(from_region(mask, queries, keys), expected), case
        first = generator.randrange(queries)
        assert torch.equal(mask.dense(queries - first, keys, first=first), expected[first:]), case
        assert torch.equal(from_region(mask, queries - first, keys, first), expected[first:]), case


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_region_is_dense(mask):
    for queries, keys in LENGTHS:
        keys = queries if mask.square else keys
        made = mask.make(queries, keys)
        assert torch.equal(from_region(made, queries, keys), made.dense(queries, keys))


@every_mask
def test_later_queries(mask):
    """``first`` counts from the first token, as decoding does: the rows of the whole matrix."""
    made = mask.make(30, 30)
    whole = made.dense(30)
    for first, count in ((0, 30), (7, 5), (29, 1), (30, 0)):
        assert torch.equal(made.dense(count, 30, first=first), whole[first : first + count])
        if mask is not MATRIX_MASK:
            assert torch.equal(from_region(made, count, 30, first), whole[first : first + count])


def test_pictures_of_different_widths_have_no_region():
    mask = MATRIX_MASK.make(12, 12)
    assert mask.region(12, 12) is None and not mask.columns_agree
    for case in (*MASKS, neighborhood_case(1, 1) & raster_case(2, 0)):
        assert case.make(12, 12).columns_agree


def test_the_published_masks():
    """Written out: 3x3 pixels, radius 1, the past and all around."""
    past = masks.raster_2d(3, 3, 1).dense(9)
    assert [row.nonzero().flatten().tolist() for row in past] == [
        *([], [0], [1], [0, 1], [0, 1, 2, 3], [1, 2, 4], [3, 4], [3, 4, 5, 6], [4, 5, 7])
    ]
    around = masks.neighborhood_2d(3, 3, 1).dense(9)
    assert [int(row.sum()) for row in around] == [4, 6, 4, 6, 9, 6, 4, 6, 4]
    assert torch.equal(masks.raster_2d(3, 3, 1, include_self=True).dense(9), around.tril())
    assert torch.equal(masks.raster_2d(3, 3, (3, 3)).dense(9), masks.causal(-1).dense(9))
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).bool()
    assert torch.equal(masks.document([2, 3, 0, 1]).dense(6), blocks)
    assert torch.equal(masks.prefix(0).dense(5), masks.causal().dense(5))
    assert torch.equal(masks.sliding_window(None).dense(5), masks.causal().dense(5))


# ---- In attention.


@on_every_backend
@pytest.mark.parametrize("seed", range(25))
def test_attention_with_a_random_composition(seed, backend):
    """The result and the gradients of the matrix, exactly 0 where no key is seen."""
    generator = random.Random(1000 + seed)
    case = AttentionCase("random", mask=random_case(generator))
    for tokens in (generator.randrange(1, 41), generator.randrange(50, 300)):
        queries = keys = tokens
        if case.mask is not None and not case.mask.square:
            keys = generator.randrange(1, 200)
        operands = case.make(Size(1, 2, queries, keys, 12), grad=True)
        with use_backend(backend):
            actual = case.call(*operands)
            grads = torch.autograd.grad(actual[0].square().sum(), operands)
        wide = [t.detach().double().requires_grad_() for t in operands]
        expected = case.call_eager(*wide)
        blind = expected[1] == -torch.inf
        assert not actual[0][blind].any() and torch.equal(actual[1] == -torch.inf, blind)
        exact = torch.autograd.grad(expected[0].square().sum(), wide)
        for a, e in zip((*actual, *grads), (*expected, *exact), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)
        assert not grads[0][blind].any()


@on_every_backend
def test_what_a_mask_hides_does_not_count(backend):
    """Keys and values that are not seen may be as large as they like."""
    q, k, v = (torch.randn(1, 2, 60, 16) for _ in range(3))
    for case in (causal_case(-1), prefix_case(9), window_case(4, 4), raster_case(2, 2), DOCUMENT_CASE):
        mask = case.make(60, 60)
        seen = mask.dense(60)
        hidden = ~seen[30]
        loud_k, loud_v = (t.masked_fill(hidden[:, None], 1e18) for t in (k, v))
        with use_backend(backend):
            expected = attention(q, k, v, mask=mask)[:, :, 30]
            torch.testing.assert_close(attention(q, loud_k, loud_v, mask=mask)[:, :, 30], expected)


# ---- As text.


PICTURES = {
    "causal": (masks.causal().show(4), "██······ ████···· ██████·· ████████"),
    "strict, five keys": (masks.causal(-1).show(3, 5), "·········· ██········ ████······"),
    "prefix": (masks.prefix(3).show(4), "██████·· ██████·· ██████·· ████████"),
    "window": (masks.sliding_window(1, 2).show(5), "██████···· ████████·· ··████████ ····██████ ······████"),
    "document": (masks.document([2, 0, 1]).show(), "████·· ████·· ····██"),
    "neighborhood": (masks.neighborhood_2d(2, 2, (0, 1)).show(), "████···· ████···· ····████ ····████"),
    "raster": (masks.raster_2d(3, 2, 1).show(4, 6), "············ ██·········· ████········ ██████······"),
    "composition": ((masks.causal() & masks.sliding_window(1)).show(3), "██···· ████·· ··████"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    picture, expected = PICTURES[name]
    assert picture == expected.replace(" ", "\n")


def test_pictures_of_many_tokens_are_shaded():
    """At most 64 cells along a side; a cell of which anything is seen shows it."""
    lines = masks.causal().show(128).split("\n")
    assert lines == ["██" * n + "▓▓" + "··" * (63 - n) for n in range(64)]
    lines = masks.sliding_window(0, 0).show(6400).split("\n")
    assert lines == ["··" * n + "░░" + "··" * (63 - n) for n in range(64)]
    lines = masks.causal().show(3, 640).split("\n")
    assert lines == [shade + "··" * 63 for shade in ("░░", "░░", "▒▒")]  # 1, 2 and 3 of 10
    assert masks.sliding_window(None, None).show(1000) == "\n".join(["██" * 64] * 64)
    half = masks.document([32, 32, 32, 32]).show().split("\n")
    assert half == [line for n in range(4) for line in ["··" * 16 * n + "██" * 16 + "··" * 16 * (3 - n)] * 16]


def test_pictures_have_as_many_tokens_as_the_mask():
    assert len(masks.causal().show().split("\n")) == 16
    assert len(masks.raster_2d(4, 5, 1).show().split("\n")) == 20
    assert len((masks.causal() & masks.document([3, 4])).show().split("\n")) == 7


def test_masks_print_as_they_are_made():
    texts = (
        *("causal(0)", "causal(-1)", "prefix(3)", "sliding_window(2, 0)", "sliding_window(None, 4)"),
        *("document([3, 0, 2])", "neighborhood_2d(3, 4, 1)", "neighborhood_2d(3, 4, (1, 2))", "raster_2d(3, 4, 1)"),
        *("raster_2d(3, 4, (0, 2), include_self=True)", "causal(0) & sliding_window(5, 0) & prefix(2)"),
    )  # fmt: skip
    for text in texts:
        mask = eval(text, vars(masks))
        assert str(mask) == repr(mask) == text
        assert eval(repr(mask), vars(masks)) == mask


# ---- Objects.


def test_combining():
    """In any grouping; equal masks are equal and hash alike, so that what is known of one is kept."""
    a, b, c = masks.causal(), masks.sliding_window(3), masks.prefix(2)
    assert ((a & b) & c).terms == (a & (b & c)).terms
    assert a & b == masks.causal(0) & masks.sliding_window(3, 0) and hash(a & b) == hash(masks.causal() & b)
    assert a != masks.causal(1) and a & b != a
    assert torch.equal((a & b).dense(7), a.dense(7) & b.dense(7))
    assert torch.equal((b & a).dense(7), (a & b).dense(7))
    assert torch.equal((a & a).dense(7), a.dense(7))
    for other in (None, 1, "causal", a.dense(7)):
        with pytest.raises(TypeError):
            a & other
        with pytest.raises(TypeError):
            other & a


def test_masks_are_copied_and_pickled():
    for case in MASKS:
        mask = case.make(12, 12)
        for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
            assert other == mask and torch.equal(other.dense(12), mask.dense(12))


def test_length():
    assert masks.causal().length is None and (masks.prefix(2) & masks.sliding_window(3)).length is None
    assert masks.raster_2d(3, 5, 1).length == 15 and masks.document([3, 0, 4]).length == 7
    assert (masks.causal() & masks.document([12]) & masks.neighborhood_2d(3, 4, 1)).length == 12
    assert (HIGH_PICTURE_CASE & DOCUMENT_CASE).make(12, 12).length == 12


def test_numbers_of_every_kind():
    """NumPy's integers, lists, arrays of PyTorch."""
    two = np.int64(2)
    assert masks.causal(two) == masks.causal(2) and masks.sliding_window(two, np.int32(0)) == masks.sliding_window(2)
    assert masks.raster_2d(np.int64(3), two, [two, 1]) == masks.raster_2d(3, 2, (2, 1))
    expected = masks.document([3, 4])
    for lengths in ((3, 4), [np.int64(3), 4], torch.tensor([3, 4])):
        assert masks.document(lengths) == expected


BAD = {
    "causal float": (lambda: masks.causal(1.0), TypeError, "^offset must be an int, got 1.0"),
    "causal bool": (lambda: masks.causal(True), TypeError, "^offset must be an int, got True"),
    "causal None": (lambda: masks.causal(None), TypeError, "^offset must be an int, got None"),
    "causal tensor": (lambda: masks.causal(torch.tensor(1)), TypeError, "^offset must be an int, got tensor"),
    "prefix": (lambda: masks.prefix(-1), ValueError, "^length must be at least 0, got -1"),
    "prefix text": (lambda: masks.prefix("3"), TypeError, "^length must be an int, got '3'"),
    "left": (lambda: masks.sliding_window(-1), ValueError, "^left must be at least 0, got -1"),
    "right": (lambda: masks.sliding_window(1, -2), ValueError, "^right must be at least 0, got -2"),
    "left float": (lambda: masks.sliding_window(0.5), TypeError, "^left must be an int, got 0.5"),
    "height": (lambda: masks.raster_2d(0, 3, 1), ValueError, "^height must be at least 1, got 0"),
    "width": (lambda: masks.neighborhood_2d(3, -1, 1), ValueError, "^width must be at least 1, got -1"),
    "width float": (lambda: masks.neighborhood_2d(3, 2.0, 1), TypeError, "^width must be an int, got 2.0"),
    "radius": (lambda: masks.neighborhood_2d(3, 3, -1), ValueError, "^radius must be at least 0, got -1"),
    "radius of columns": (lambda: masks.raster_2d(3, 3, (1, -1)), ValueError, "^radius must be at least 0, got -1"),
    "three radii": (lambda: masks.raster_2d(3, 3, (1, 1, 1)), ValueError, r"^radius must be an int or two, got \(1"),
    "radius None": (lambda: masks.raster_2d(3, 3, None), TypeError, "^radius must be an int, got None"),
    "lengths empty": (lambda: masks.document([]), ValueError, r"^lengths must be .* at least one int, got \[\]"),
    "lengths int": (lambda: masks.document(3), ValueError, "^lengths must be a sequence .* got 3"),
    "lengths negative": (lambda: masks.document([2, -1]), ValueError, r"^lengths\[1\] must be at least 0, got -1"),
    "lengths float": (lambda: masks.document([1.5]), TypeError, r"^lengths\[0\] must be an int, got 1.5"),
    "lengths nested": (lambda: masks.document([[1], [2]]), TypeError, r"^lengths\[0\] must be an int, got \[1\]"),
    "lengths text": (lambda: masks.document("12"), TypeError, r"^lengths\[0\] must be an int, got '1'"),
    "lengths of two masks": (
        lambda: (masks.document([4]) & masks.raster_2d(2, 3, 1)).length,
        ValueError,
        r"document\(\[4\]\) & raster_2d\(2, 3, 1\) combines masks for 4 and 6 tokens",
    ),
    "dense of more": (
        lambda: masks.document([2, 2]).dense(5),
        ValueError,
        r"document\(\[2, 2\]\) is made for 4 tokens, got 5",
    ),
    "dense of later": (lambda: masks.raster_2d(2, 2, 1).dense(2, 4, first=3), ValueError, "for 4 tokens, got 5"),
    "region of more keys": (lambda: masks.document([2, 2]).region(4, 6), ValueError, "for 4 tokens, got 6"),
    "region of later": (lambda: masks.document([2, 2]).region(1, 4, first=4), ValueError, "for 4 tokens, got 5"),
    "picture of more": (lambda: masks.neighborhood_2d(2, 2, 1).show(6), ValueError, "for 4 tokens, got 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@on_every_backend
def test_a_mask_for_other_tokens_is_refused(backend):
    """Of attention: too few, too many, and queries of another picture than the keys."""
    mask = masks.causal() & masks.raster_2d(3, 4, 1)
    for queries, keys in itertools.product((11, 12, 13), repeat=2):
        q, k = torch.randn(1, 1, queries, 4), torch.randn(1, 1, keys, 4)
        with use_backend(backend):
            if (queries, keys) == (12, 12):
                assert attention(q, k, k, mask=mask).shape == q.shape
                continue
            message = f"is made for 12 tokens, got {queries} queries and {keys} keys"
            with pytest.raises(ValueError, match=message):
                attention(q, k, k, mask=mask)
