"""The exact product: the same bits however it is cut, and as near to the true product as it says."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import DTYPES, awkward, gaussian, gaussian_term, same_bits, to_fractions, to_reference
from torch import Tensor

from lora_cli.arithmetic.product import ExactProduct, Term, grid_bits, prepare
from lora_cli.errors import NumericError

ALL = slice(None)
Slices = Literal[1, 2]
both = pytest.mark.parametrize("slices", [1, 2])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def exact(out: int, rank: int, width: int, slices: Slices, seed: int = 0) -> ExactProduct:
    return prepare([gaussian_term(seed, out, rank, width)], slices=slices)


def whole(product: ExactProduct, *, transposed: bool = False) -> Tensor:
    return product.tile(ALL, ALL, transposed=transposed)


def test_grid_bits_leave_room_for_k_products() -> None:
    assert [grid_bits(k) for k in (1, 16, 17, 64, 256, 1000, 1024)] == [26, 24, 24, 23, 22, 21, 21]
    assert grid_bits(0) == 26
    for k in range(1, 5000):
        assert k * 4 ** grid_bits(k) <= 2**53 < k * 4 ** (grid_bits(k) + 1)


# Independence: of tiles, threads, order and layout.


@both
def test_tiles_of_every_height_and_width_hold_the_same_bits(slices: Slices) -> None:
    product = exact(37, 5, 29, slices)
    expected = whole(product)
    for height in range(1, 38):
        tiles = [product.tile(slice(top, top + height), ALL) for top in range(0, 37, height)]
        assert same_bits(torch.cat(tiles), expected)
    for width in range(1, 30):
        tiles = [product.tile(ALL, slice(left, left + width)) for left in range(0, 29, width)]
        assert same_bits(torch.cat(tiles, 1), expected)
    assert same_bits(product.tile(slice(3, 30, 4), slice(1, 29, 3)), expected[3:30:4, 1:29:3])


@both
@pytest.mark.parametrize("rank", [3, 16, 100])
def test_threads_do_not_show(slices: Slices, rank: int, two_threads: None) -> None:
    product = exact(515, rank, 513, slices)
    on_two = whole(product)
    prepared_on_two = product.tile(slice(100, 400), ALL)
    torch.set_num_threads(1)
    assert same_bits(whole(product), on_two)
    assert same_bits(whole(exact(515, rank, 513, slices))[100:400], prepared_on_two)


@both
def test_the_order_of_k_and_of_terms_does_not_show(slices: Slices) -> None:
    terms = [
        gaussian_term(seed, 33, rank, 47, scale) for seed, rank, scale in ((0, 7, 2.0), (2, 1, -0.3), (4, 16, 1e-3))
    ]
    expected = whole(prepare(terms, slices=slices))
    assert same_bits(whole(prepare(terms[::-1], slices=slices)), expected)
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        shuffled = Term(terms[2].b[:, order], terms[2].a[order], terms[2].scale)
        assert same_bits(whole(prepare([terms[1], shuffled, terms[0]], slices=slices)), expected)


@both
def test_a_transposed_layout_holds_the_same_bits(slices: Slices) -> None:
    product = exact(37, 9, 53, slices)
    expected = whole(product)
    turned = whole(product, transposed=True)
    assert turned.is_contiguous()
    assert same_bits(turned, expected.t())
    part = product.tile(slice(5, 40), slice(2, 30), transposed=True)
    assert same_bits(part, expected[2:30, 5:40].t())


def loop_over_k(product: ExactProduct) -> Tensor:
    """Add up rank by rank, as no library does."""
    left, right = product._left, product._right
    total = torch.zeros(product.shape, dtype=torch.float64)
    for k in range(product.rank):
        total += left.hi[:, k : k + 1] * right.hi[k]
    for b, a in ((left.hi, right.lo), (left.lo, right.hi)):
        if b is not None and a is not None:
            part = torch.zeros(product.shape, dtype=torch.float64)
            for k in range(product.rank):
                part += b[:, k : k + 1] * a[k]
            total += part
    return total


@both
def test_a_plain_loop_over_k_gives_the_same_bits(slices: Slices) -> None:
    for rank in (1, 2, 3, 8, 16, 17, 64, 129, 333, 1000):
        product = exact(40, rank, 65, slices, seed=rank)
        assert torch.equal(whole(product), loop_over_k(product))


def test_every_rank_up_to_1000_is_exact() -> None:
    b, a = gaussian(0, 5, 1000), gaussian(1, 1000, 7)
    for rank in range(1, 1001):
        product = prepare([Term(b[:, :rank], a[:rank], 1.0)], slices=1)
        left, right = product._left.hi, product._right.hi
        assert torch.equal(whole(product), left.flip(1).contiguous() @ right.flip(0).contiguous())
        assert torch.equal(whole(product), (left.unsqueeze(1) * right.t()).sum(-1))


def test_a_float32_product_would_depend_on_the_order() -> None:
    term = gaussian_term(0, 65, 64, 65)
    order = torch.arange(63, -1, -1)
    assert not torch.equal(term.b @ term.a, term.b[:, order] @ term.a[order])


@both
def test_the_opposite_scale_gives_the_opposite_product(slices: Slices) -> None:
    term = gaussian_term(0, 12, 5, 13)
    opposite = Term(term.b, term.a, -term.scale)
    assert torch.equal(whole(prepare([opposite], slices=slices)), -whole(prepare([term], slices=slices)))


# Truth: against rationals.

LEAST_NORMAL = Fraction(1, 1 << 1022)


def factors_in_float64(terms: list[Term]) -> list[Tensor]:
    factors = [factor for term in terms for factor in (term.b, term.a)]
    return [factor for factor in factors if factor.dtype == torch.float64 and bool(factor.any())]


@both
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_reference_and_keeps_its_bound(slices: Slices, data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    out, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    terms = []
    for rank in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)):
        b_type, a_type = (DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))] for _ in range(2))
        span = data.draw(st.sampled_from([0, 3, 30, 120]))
        scale = data.draw(st.sampled_from([1.0, -0.3, 2.0**-20, 1e10, 0.0, 1 / 3]))
        terms.append(Term(awkward(rng, out, rank, b_type, span), awkward(rng, rank, width, a_type, span), scale))
    try:
        product = prepare(terms, slices=slices)
    except NumericError:
        # Float64's own subnormals may be all that is left of a row; nothing narrower is too small.
        assert any(0 < float(t.abs()[t != 0].min()) < 1e-300 for t in factors_in_float64(terms))
        return
    rational = to_reference(terms)
    tile = whole(product)
    # Of float64 factors a product can be below the least normal double, which matrix kernels may flush to zero.
    pairs = zip(to_fractions(tile), reference.product(rational, slices), strict=True)
    assert all(
        found == said or (found == 0 and abs(said) < LEAST_NORMAL)
        for row in pairs
        for found, said in zip(*row, strict=True)
    )
    bound = [[limit + LEAST_NORMAL for limit in row] for row in to_fractions(product.error_bound(ALL, ALL))]
    true = reference.true_product(rational)
    for row in zip(to_fractions(tile), true, bound, strict=True):
        assert all(abs(value - truth) <= limit for value, truth, limit in zip(*row, strict=True))


def frobenius_error(term: Term, slices: Slices) -> float:
    """Against the exact rational product, of a few rows and columns."""
    true = reference.true_product(to_reference([term]))
    tile = to_fractions(whole(prepare([term], slices=slices)))
    pairs = [(x, y) for row in zip(tile, true, strict=True) for x, y in zip(*row, strict=True)]
    return math.sqrt(sum((x - y) ** 2 for x, y in pairs) / sum(y**2 for _, y in pairs))


@pytest.mark.parametrize(
    ("rank", "slices", "at_most"),
    [(16, 1, 1e-7), (64, 1, 3e-7), (1000, 1, 1.2e-6), (16, 2, 4e-15), (64, 2, 3e-14), (1000, 2, 6e-13)],
)
def test_gaussian_factors_lose_little(rank: int, slices: Slices, at_most: float) -> None:
    assert frobenius_error(gaussian_term(rank, 12, rank, 12), slices) < at_most


@both
def test_large_beside_small_keeps_its_accuracy(slices: Slices) -> None:
    """A ~ 1, B ~ 1e-7 stacked with the reverse: without balancing, half of the product would be lost."""
    small, large = 1e-7, 1.0
    b = torch.cat([gaussian(0, 12, 4, std=small), gaussian(1, 12, 4, std=large)], 1)
    a = torch.cat([gaussian(2, 4, 12, std=large), gaussian(3, 4, 12, std=small)])
    at_most = 2e-7 if slices == 1 else 1e-14
    assert frobenius_error(Term(b, a, 1.0), slices) < at_most


def test_a_dead_rank_does_not_widen_the_grids() -> None:
    term = gaussian_term(0, 6, 4, 7)
    expected = whole(prepare([term, Term(torch.zeros(6, 1), torch.zeros(1, 7), 1.0)], slices=1))
    for b, a in ((0.0, 1e30), (1e30, 0.0)):
        dead = Term(torch.full((6, 1), b), torch.full((1, 7), a), 1.0)
        assert torch.equal(whole(prepare([term, dead], slices=1)), expected)
