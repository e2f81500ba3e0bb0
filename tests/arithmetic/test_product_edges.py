"""The exact product at its edges: nothing, buffers, and what it refuses."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import reference
import torch
from patterns import gaussian, gaussian_term, same_bits, to_fractions, to_reference
from torch import Tensor

from lora_cli.arithmetic.product import ExactProduct, Term, prepare
from lora_cli.errors import NumericError, ShapeError

ALL = slice(None)
Slices = Literal[1, 2]
both = pytest.mark.parametrize("slices", [1, 2])


def whole(product: ExactProduct) -> Tensor:
    return product.tile(ALL, ALL)


@both
def test_nothing_times_anything_is_exactly_zero(slices: Slices) -> None:
    zeros = [
        Term(torch.zeros(3, 2), gaussian(0, 2, 4), 1.0),
        Term(gaussian(0, 3, 2), torch.zeros(2, 4), -1.0),
        Term(gaussian(0, 3, 2), gaussian(1, 2, 4), 0.0),
        Term(torch.zeros(3, 0), torch.zeros(0, 4), 1.0),
    ]
    for terms in ([term] for term in zeros):
        product = prepare(terms, slices=slices)
        stale = torch.full((3, 4), 7.0, dtype=torch.float64)
        assert torch.equal(product.tile(ALL, ALL, out=stale), torch.zeros(3, 4, dtype=torch.float64))
        assert float(product.error_bound(ALL, ALL).max()) < 1e-300
    partly = gaussian_term(0, 3, 2, 4)
    partly.b[1] = 0
    partly.a[:, 2] = 0
    tile = whole(prepare([partly, zeros[3]], slices=slices))
    assert not tile[1].any()
    assert not tile[:, 2].any()
    assert int((tile != 0).sum()) == 6


@both
@pytest.mark.parametrize(("out", "width"), [(0, 4), (4, 0), (0, 0)])
def test_an_empty_target_has_an_empty_product(slices: Slices, out: int, width: int) -> None:
    product = prepare([Term(torch.zeros(out, 2), torch.zeros(2, width), 1.0)], slices=slices)
    assert whole(product).shape == product.shape == (out, width)


@both
def test_a_bias_is_a_column_times_one(slices: Slices) -> None:
    column = gaussian(0, 9, 1)
    tile = whole(prepare([Term(column, torch.ones(1, 1), 0.5)], slices=slices))
    assert torch.equal(tile, column.double() * 0.5)


@both
def test_buffers_are_used_and_inputs_left_alone(slices: Slices) -> None:
    term = Term(gaussian(0, 6, 3, dtype=torch.float64), gaussian(1, 3, 8, dtype=torch.float64), 2.0)
    before = term.b.clone(), term.a.clone()
    product = prepare([term], slices=slices)
    assert (product.shape, product.rank, product.slices) == ((6, 8), 3, slices)
    out, scratch = torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 3, dtype=torch.float64)
    assert product.tile(slice(1, 3), slice(0, 3), out=out, scratch=scratch) is out
    assert same_bits(out, whole(product)[1:3, 0:3])
    assert torch.equal(term.b, before[0])
    assert torch.equal(term.a, before[1])
    for bad in (torch.empty(3, 2, dtype=torch.float64), torch.empty(2, 3)):
        with pytest.raises(ShapeError, match="buffer"):
            product.tile(slice(1, 3), slice(0, 3), out=bad)


def test_factors_that_require_gradients_are_taken_as_numbers() -> None:
    term = gaussian_term(0, 4, 2, 3)
    product = prepare([Term(term.b.requires_grad_(), term.a.requires_grad_(), 1.0)], slices=1)
    assert not whole(product).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_refuses_factors_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    for where in ("B", "A"):
        factors = {"B": torch.zeros(4, 2), "A": torch.zeros(2, 5)}
        factors[where][1, 1] = value
        factors[where][0, 0] = value
        with pytest.raises(NumericError, match=f"factor {where}") as caught:
            prepare([Term(factors["B"].to(dtype), factors["A"].to(dtype), 0.0)], slices=1)
        assert caught.value.found is not None
        assert caught.value.found.startswith("2 of")
    with pytest.raises(NumericError, match="scale"):
        prepare([Term(torch.zeros(4, 2), torch.zeros(2, 5), value)], slices=1)


@both
def test_refuses_what_float64_cannot_hold(slices: Slices) -> None:
    def term(b: float, a: float, scale: float = 1.0) -> Term:
        matrix = torch.full((2, 1), b, dtype=torch.float64)
        return Term(matrix, torch.full((1, 2), a, dtype=torch.float64), scale)

    with pytest.raises(NumericError, match="overflows when it is scaled"):
        prepare([term(1e300, 1.0, 1e10)], slices=slices)
    with pytest.raises(NumericError, match="may exceed"):
        prepare([term(1e200, 1e200)], slices=slices)
    with pytest.raises(NumericError, match="too small"):
        prepare([term(1e-200, 1e-200)], slices=slices)
    lonely = term(1.0, 1.0)
    lonely.b[1] = 1e-305
    with pytest.raises(NumericError, match="too small"):
        prepare([lonely], slices=slices)
    # Far apart, yet with a product in the middle: balancing makes them alike.
    for extreme in (term(1e300, 1e-300), term(1e-300, 1e300), term(2.0**1023, 2.0**-1074)):
        rational = to_reference([extreme])
        assert to_fractions(whole(prepare([extreme], slices=slices))) == reference.product(rational, slices)


@both
def test_what_float32_holds_is_never_too_small(slices: Slices) -> None:
    least = torch.full((3, 2), 2.0**-149)
    terms = [Term(least, least.t(), 1e-3), Term(torch.full((3, 1), 2.0**127), torch.full((1, 3), 2.0**127), 1.0)]
    for one in terms:
        assert to_fractions(whole(prepare([one], slices=slices)))[0][0] > Fraction(0)
    assert bool((whole(prepare(terms, slices=slices)) > 0).all())


def test_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        prepare([], slices=1)
    with pytest.raises(ShapeError, match="do not fit"):
        prepare([Term(torch.zeros(4, 2), torch.zeros(3, 5), 1.0)], slices=1)
    with pytest.raises(ShapeError, match="do not fit"):
        prepare([Term(torch.zeros(4), torch.zeros(4, 5), 1.0)], slices=1)
    with pytest.raises(ShapeError, match="differ"):
        prepare([gaussian_term(0, 4, 2, 5), gaussian_term(0, 4, 2, 6)], slices=1)
