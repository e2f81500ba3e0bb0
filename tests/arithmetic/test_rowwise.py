"""Products of matrices of which each row is what it would be alone; rotations and reflections that are made of them."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from patterns import gaussian, same_bits
from torch import Tensor

from lora_cli.arithmetic.cayley import cayley, cayley_series, skew
from lora_cli.arithmetic.reflections import orthogonal_factor, triangle
from lora_cli.arithmetic.rowwise import dots, multiply
from lora_cli.arithmetic.sines import cosine_and_sine
from lora_cli.errors import NumericError, ShapeError

SIDES = (1, 2, 3, 15, 16, 17, 33, 64, 130)


def exact(left: Tensor, right: Tensor) -> Tensor:
    """A product of fractions, rounded once."""
    rows = [[Fraction(x) for x in row] for row in left.tolist()]
    columns = [[Fraction(x) for x in column] for column in right.T.tolist()]
    made = [[float(sum(a * b for a, b in zip(r, c, strict=True))) for c in columns] for r in rows]
    return torch.tensor(made, dtype=torch.float64)


def test_a_product_is_within_its_bound() -> None:
    left, right = gaussian(1, 9, 40), gaussian(2, 40, 7)
    left[3] *= 1e20
    right[:, 2] *= 1e-12
    bits = (53 - 6) // 2
    bound = 40 * (2.0 ** (1 - 2 * bits) + 2.0**-51) * left.abs().amax(1, keepdim=True) * right.abs().amax(0)
    assert bool(((multiply(left, right) - exact(left, right)).abs() <= bound).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_no_row_and_no_column_depends_on_others(threads: int) -> None:
    left, right = gaussian(1, 70, 300), gaussian(2, 300, 50)
    left[5] *= 1e30
    right[:, 7] *= 1e-30
    whole, before = multiply(left, right), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns in ((slice(3, 4), slice(0, 50)), (slice(0, 41), slice(7, 9)), (slice(0, 70), slice(0, 1))):
            assert same_bits(multiply(left[rows], right[:, columns]), whole[rows, columns].contiguous())
        stacked = multiply(left.view(7, 10, 300), right.expand(7, 300, 50))
        assert same_bits(stacked.reshape(70, 50), whole)
    finally:
        torch.set_num_threads(before)


def test_tiny_numbers_count_as_zero_and_huge_ones_are_refused() -> None:
    tiny = torch.tensor([[2.0**-1070, 1.0]], dtype=torch.float64)
    assert multiply(tiny, tiny.T).tolist() == [[1.0]]
    assert multiply(tiny[:, :1], tiny[:, 1:]).tolist() == [[0.0]]
    least = torch.full((2, 2), 2.0**-480, dtype=torch.float64)
    assert multiply(least, least).tolist() == [[2.0**-959] * 2] * 2
    assert multiply(torch.zeros(2, 0), torch.zeros(0, 3)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(NumericError, match="largest double"):
        multiply(torch.full((1, 2), 1e200, dtype=torch.float64), torch.full((2, 1), 1e200, dtype=torch.float64))


def test_what_is_not_finite_is_never_a_number() -> None:
    for wrong in (math.nan, math.inf):
        left = torch.tensor([[wrong, 1.0], [1.0, 2.0]])
        found = multiply(left, torch.ones(2, 2))
        assert not bool(torch.isfinite(found[0]).any())
        assert found[1].tolist() == [3.0, 3.0]


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError):
        multiply(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ShapeError):
        multiply(torch.ones(2, 3), torch.ones(1, 3, 2))
    assert multiply(torch.ones(5, 2, 3), torch.ones(1, 3, 2)).shape == (5, 2, 2)


def test_dots_are_the_rows_with_each_other() -> None:
    one, other = gaussian(1, 5, 20), gaussian(2, 5, 20)
    assert torch.allclose(dots(one, other), (one.double() * other.double()).sum(1), rtol=1e-13)


# Rotations


def triangles(seed: int, blocks: int, side: int, size: float = 0.5) -> Tensor:
    return gaussian(seed, blocks, side * (side - 1) // 2) * size


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_cayley_is_what_a_solver_finds(side: int, size: float) -> None:
    matrices, eye = skew(triangles(side, 3, side, size), side), torch.eye(side, dtype=torch.float64)
    found = cayley(matrices)
    expected = torch.linalg.solve(eye + matrices, eye - matrices, left=False)
    assert float((found - expected).abs().max()) < 1e-10 * max(1.0, size)
    assert float((found @ found.mT - eye).abs().max()) < 1e-10 * max(1.0, size)


def test_a_rotation_does_not_depend_on_those_beside_it() -> None:
    matrices = skew(triangles(1, 9, 40), 40)
    found = cayley(matrices)
    assert same_bits(cayley(matrices[4:6]), found[4:6])
    assert same_bits(cayley_series(matrices[4:6], 5, last_once=True), cayley_series(matrices, 5, last_once=True)[4:6])


def test_skew_takes_upper_triangles_row_by_row() -> None:
    expected = [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    assert skew(torch.tensor([[1.0, 2.0, 3.0]]), 3).tolist() == [expected]


@pytest.mark.parametrize("terms", range(9))
@pytest.mark.parametrize("last_once", [True, False])
def test_a_series_is_its_terms(terms: int, last_once: bool) -> None:
    matrix = skew(triangles(1, 1, 6), 6)
    powers = [torch.linalg.matrix_power(matrix, power) for power in range(10)]
    factors = [1.0] + [2.0] * (terms - 1)
    if last_once and terms > 2:
        factors = [1.0] + [2.0] * (max(terms, 4) - 2) + [1.0]
    expected = sum((factor * power for factor, power in zip(factors, powers, strict=False)), torch.zeros(1))
    assert torch.allclose(cayley_series(matrix, terms, last_once=last_once), expected, rtol=1e-12, atol=1e-12)


# Reflections


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 1), (6, 6), (40, 7)])
def test_a_triangle_makes_a_product_of_reflections(size: int, count: int) -> None:
    normals, factors, eye = gaussian(1, size, count).double(), gaussian(2, count).double(), torch.eye(size).double()
    expected = eye
    for normal, factor in zip(normals.T, factors, strict=True):
        expected = expected @ (eye - factor * torch.outer(normal, normal))
    found = eye - normals @ triangle(normals, factors) @ normals.T
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 1), (6, 6), (40, 7)])
def test_an_orthogonal_factor_has_the_signs_of_lapack(size: int, count: int) -> None:
    matrix = gaussian(1, size, count)
    assert torch.allclose(orthogonal_factor(matrix), torch.linalg.qr(matrix.double()).Q, rtol=1e-11, atol=1e-11)


def test_columns_that_need_no_reflection_keep_their_signs() -> None:
    for matrix in (torch.eye(4, 2), -torch.eye(4, 2), torch.zeros(4, 2), torch.ones(4, 3)):
        expected = torch.linalg.qr(matrix.double()).Q
        if matrix.bool().all():  # of columns that are alike only the first has a direction
            expected = expected[:, :1]
        assert torch.allclose(orthogonal_factor(matrix)[:, : expected.shape[1]], expected, atol=1e-14)


# Sines


def test_sines_are_within_two_units() -> None:
    angles = torch.cat([gaussian(1, 4000).double() * size for size in (1e-6, 1.0, 30.0, 1e4)])
    quarters = torch.arange(-20, 21, dtype=torch.float64) * (math.pi / 4)
    angles = torch.cat([angles, quarters, torch.tensor([0.0, -0.0, 2.0**20], dtype=torch.float64)])
    cosines, sines = cosine_and_sine(angles)
    for found, function in ((cosines, math.cos), (sines, math.sin)):
        expected = torch.tensor([function(angle) for angle in angles.tolist()], dtype=torch.float64)
        assert float((found - expected).abs().max()) <= 2.0**-51
    assert sines[-3].item() == 0.0


def test_an_angle_has_its_sines_wherever_it_stands() -> None:
    angles = gaussian(1, 1000)
    both = cosine_and_sine(angles)
    for at in (0, 1, 7, 998):
        alone = cosine_and_sine(angles[at : at + 1])
        assert [float(part) for part in alone] == [float(part[at]) for part in both]


# Bits


def test_the_bits_are_these_on_every_machine() -> None:
    found = {
        "product": multiply(gaussian(1, 20, 33), gaussian(2, 33, 10)),
        "cayley": cayley(skew(triangles(1, 2, 40), 40)),
        "series": cayley_series(skew(triangles(1, 2, 20), 20), 6, last_once=True),
        "orthogonal": orthogonal_factor(gaussian(1, 30, 6)),
        "sines": torch.stack(cosine_and_sine(gaussian(1, 100).double() * 50)),
    }
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in found.items()}
    assert digests == {
        "product": "c9f634d561e01e6d",
        "cayley": "209418a250dc318a",
        "series": "78ae74a048a4dafb",
        "orthogonal": "04671f9fca279972",
        "sines": "065251c958051051",
    }
