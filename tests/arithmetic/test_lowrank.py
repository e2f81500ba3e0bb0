"""Low-rank algebra against dense matrices, and what stands above rounding noise against what was planted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from patterns import DTYPES, gaussian
from torch import Tensor

from lora_cli.arithmetic import lowrank
from lora_cli.arithmetic.lowrank import SAFETY, Noise, Spectrum, Tiles
from lora_cli.arithmetic.ordered import ulp
from lora_cli.arithmetic.product import Term
from lora_cli.errors import NumericError, ShapeError

SHAPES = [(30, 40, (4,)), (40, 30, (3, 5)), (64, 9, (16,)), (7, 50, (5, 6)), (12, 1, (1,)), (20, 20, (20, 20))]
STORED = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have it: a thread to a core, and none of torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def terms_of(out: int, inner: int, ranks: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Term]:
    return [
        Term(gaussian(2 * at, out, rank, dtype=dtype), gaussian(2 * at + 1, rank, inner, dtype=dtype), (-0.7) ** at)
        for at, rank in enumerate(ranks)
    ]


def dense(terms: Sequence[Term]) -> Tensor:
    return torch.stack([term.scale * (term.b.double() @ term.a.double()) for term in terms]).sum(0)


# Sums of products


@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
@pytest.mark.parametrize("dtype", STORED)
def test_singular_values_and_norms_are_those_of_the_dense_sum(
    out: int, inner: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    terms = terms_of(out, inner, ranks, dtype)
    full = dense(terms)
    expected = torch.linalg.svdvals(full)
    values = lowrank.singular_values(terms)
    assert len(values) == min(out, inner, sum(ranks))
    assert torch.allclose(values, expected[: len(values)], rtol=1e-12, atol=1e-12 * float(expected[0]))
    assert lowrank.frobenius_norm(terms) == pytest.approx(float(full.norm()), rel=1e-13)
    assert lowrank.largest_magnitude(terms) == pytest.approx(float(full.abs().max()), rel=1e-13)
    other = terms_of(out, inner, (2, *ranks), dtype)
    assert lowrank.inner_product(terms, other) == pytest.approx(float((full * dense(other)).sum()), rel=1e-11)


@pytest.mark.parametrize(("out", "inner", "ranks"), [(9, 14, (10,)), (14, 9, (300, 7)), (20, 20, (21,)), (1, 5, (64,))])
def test_ranks_above_a_side_are_added_up_in_bands(
    out: int, inner: int, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made is no larger than the sum, whatever the rank; the numbers are those of the dense sum."""
    monkeypatch.setattr(lowrank, "_BAND_ELEMENTS", 64)
    monkeypatch.setattr(lowrank, "stacked", None)  # which would make both factors anew
    terms = terms_of(out, inner, ranks, torch.bfloat16)
    full = dense(terms)
    expected = torch.linalg.svdvals(full)
    values = lowrank.singular_values(terms)
    assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12 * float(expected[0]))
    assert lowrank.frobenius_norm(terms) == pytest.approx(float(full.norm()), rel=1e-13)
    assert lowrank.largest_magnitude(terms) == pytest.approx(float(full.abs().max()), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_broken_number_in_any_band_is_found(bad: float, factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_BAND_ELEMENTS", 64)
    (term,) = terms_of(6, 5, (40,))
    getattr(term, factor)[-1, -1] = bad
    with pytest.raises(NumericError, match="NaN or infinity"):
        lowrank.singular_values([term])


@pytest.mark.parametrize(("out", "inner", "rank"), [(30, 7, 5), (7, 30, 90), (30, 30, 31)])
def test_the_edge_of_a_product_is_the_same_in_bands(
    out: int, inner: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = terms_of(out, inner, (rank,))
    whole = lowrank.product_edge(terms)
    monkeypatch.setattr(lowrank, "_BAND_ELEMENTS", 64)
    assert lowrank.product_edge(terms) == pytest.approx(whole, rel=1e-13)
    largest = [float(torch.linalg.svdvals(factor.double())[0]) for factor in (terms[0].a, terms[0].b)]
    edges = [lowrank._edge(factor) for factor in (terms[0].b, terms[0].a)]
    assert whole == pytest.approx(edges[0] * largest[0] + largest[1] * edges[1], rel=1e-12)


def test_what_cancels_leaves_no_more_than_float64_rounding() -> None:
    """The same product from other factors: B·R and R⁻¹·A."""
    (term,) = terms_of(60, 50, (8,))
    mix = gaussian(9, 8, 8, dtype=torch.float64)
    other = Term(term.b.double() @ mix, torch.linalg.inv(mix) @ term.a.double(), -term.scale)
    size = lowrank.frobenius_norm([term])
    assert lowrank.frobenius_norm([term, other]) < 1e-12 * size
    assert float(lowrank.singular_values([term, other])[0]) < 1e-12 * size


def test_a_small_difference_keeps_its_digits() -> None:
    """One in 10^10 between two products, which a difference of sums of squares would not show."""
    (term,) = terms_of(60, 50, (8,))
    nearly = Term(term.b.double() * (1 + 1e-10), term.a, -term.scale)
    assert lowrank.frobenius_norm([term, nearly]) == pytest.approx(
        1e-10 * lowrank.frobenius_norm([term]), rel=1e-4, abs=0
    )


def test_a_product_too_large_to_be_formed_is_measured() -> None:
    """300 000 × 300 000 would be 720 GB."""
    terms = terms_of(300_000, 300_000, (1, 2))
    assert lowrank.frobenius_norm(terms) ** 2 == pytest.approx(lowrank.inner_product(terms, terms), rel=1e-9)
    assert len(lowrank.singular_values(terms)) == 3


def test_largest_magnitude_is_found_in_any_row_and_of_either_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_TILE_ELEMENTS", 64)
    for row in (0, 13, 22):
        for sign in (1.0, -1.0):
            (term,) = terms_of(23, 20, (3,))
            term.b[row] *= 100 * sign
            assert lowrank.largest_magnitude([term]) == pytest.approx(float(dense([term]).abs().max()), rel=1e-13)


def test_numbers_and_shapes_that_make_no_sense_are_refused() -> None:
    (term,) = terms_of(4, 5, (2,))
    for broken in (math.nan, math.inf):
        with pytest.raises(NumericError):
            lowrank.singular_values([Term(term.b, term.a, broken)])
        with pytest.raises(NumericError):
            lowrank.frobenius_norm([Term(term.b, term.a.clone().fill_(broken), 1.0)])
    for measure in (lowrank.singular_values, lowrank.frobenius_norm):
        with pytest.raises(NumericError, match="product overflows"):
            measure([Term(term.b.double() * 1e200, term.a.double() * 1e200, 1.0)])
    with pytest.raises(ShapeError):
        lowrank.singular_values([])
    with pytest.raises(ShapeError):
        lowrank.singular_values([term, *terms_of(4, 6, (2,))])
    with pytest.raises(ShapeError):
        lowrank.singular_values([Term(term.b, term.a[:1], 1.0)])
    with pytest.raises(ShapeError):
        lowrank.inner_product([term], terms_of(4, 6, (2,)))


# Noise


@pytest.mark.parametrize("name", DTYPES)
def test_variance_is_a_twelfth_of_a_squared_unit(name: str) -> None:
    dtype = DTYPES[name]
    values = torch.cat([gaussian(1, 500, dtype=dtype), gaussian(2, 500, dtype=dtype, std=1e-4)]).double()
    info = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, 1.0, 2.0, -4.0, info.max, info.smallest_normal, info.smallest_normal / 2])
    values = torch.cat([values, edges.double()])
    expected = ulp(values, dtype).square() / 12
    assert torch.allclose(lowrank.rounding_variance(values, dtype), expected, rtol=1e-14, atol=0)


def test_the_edge_of_even_noise_is_that_of_marchenko_and_pastur() -> None:
    noise = Noise(900)
    for rows in (100, 299, 1):
        noise.add(torch.full((rows, 900), 0.25, dtype=torch.float64))
    assert noise.edge == pytest.approx(0.5 * (20 + 30))
    assert noise.energy == pytest.approx(0.25 * 400 * 900)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", [(300, 300), (80, 640)])
def test_real_rounding_errors_end_at_the_edge(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    exact = gaussian(3, *shape, dtype=torch.float64, std=0.02)
    stored = exact.to(dtype).double()
    noise = Noise(shape[1])
    noise.add(lowrank.rounding_variance(stored, dtype))
    largest = float(torch.linalg.svdvals(stored - exact)[0])
    assert 0.8 * noise.edge < largest < 1.02 * noise.edge


def test_the_edge_of_uneven_noise_is_its_largest_row_and_column() -> None:
    variances = gaussian(4, 50, 70, dtype=torch.float64).square()
    variances[3] *= 9
    variances[:, 5] *= 9
    noise = Noise(70)
    for part in (variances[:20], variances[20:40], variances[40:]):
        noise.add(part)
    assert noise.edge == pytest.approx(float(variances.sum(1).max().sqrt() + variances.sum(0).max().sqrt()))
    assert noise.energy == pytest.approx(float(variances.sum()))


def test_uneven_noise_ends_below_the_edge() -> None:
    uneven = gaussian(4, 200, 1, dtype=torch.float64).exp() * gaussian(5, 1, 300, dtype=torch.float64).exp()
    noise = Noise(300)
    noise.add(uneven.square())
    assert float(torch.linalg.svdvals(uneven * gaussian(6, 200, 300, dtype=torch.float64))[0]) < 1.02 * noise.edge


@pytest.mark.parametrize("rounded", ["b", "a"])
def test_the_edge_of_a_product_holds_what_rounding_a_factor_does(rounded: str) -> None:
    (exact,) = (Term(term.b * 100, term.a, 3.0) for term in terms_of(90, 70, (6,), torch.float64))
    b, a = (exact.b.bfloat16(), exact.a) if rounded == "b" else (exact.b, exact.a.bfloat16())
    error = float(torch.linalg.svdvals(dense([Term(b, a, 3.0)]) - dense([exact]))[0])
    assert error < lowrank.product_edge([Term(b, a, 3.0)]) < 4 * error


# The spectrum of a large matrix


def tiles_of(matrix: Tensor, height: int = 37) -> Tiles:
    """As files are read: every tile in the same buffer."""
    buffer = torch.empty((height, matrix.shape[1]), dtype=torch.float64)

    def tiles() -> Iterator[Tensor]:
        for top in range(0, matrix.shape[0], height):
            rows = matrix[top : top + height]
            yield buffer[: rows.shape[0]].copy_(rows)

    return tiles


def even_noise(shape: tuple[int, int], std: float) -> Noise:
    noise = Noise(shape[1])
    noise.add(torch.full(shape, std**2, dtype=torch.float64))
    return noise


def planted(shape: tuple[int, int], strengths: Sequence[float], std: float = 1.0, seed: int = 0) -> Tensor:
    """Noise of that deviation and orthogonal directions whose singular values are multiples of its safe edge."""
    rows, columns = shape
    left = torch.linalg.qr(gaussian(seed, rows, len(strengths), dtype=torch.float64)).Q
    right = torch.linalg.qr(gaussian(seed + 1, columns, len(strengths), dtype=torch.float64)).Q
    edge = SAFETY * std * (math.sqrt(rows) + math.sqrt(columns))
    signal: Tensor = left * (edge * torch.tensor(strengths, dtype=torch.float64)) @ right.T
    return signal + gaussian(seed + 2, *shape, dtype=torch.float64, std=std)


def look(matrix: Tensor, std: float = 1.0, height: int = 37) -> Spectrum:
    shape = (matrix.shape[0], matrix.shape[1])
    return lowrank.spectrum(shape, tiles_of(matrix, height), even_noise(shape, std))


def assert_like_dense(found: Spectrum, matrix: Tensor, rank: int) -> None:
    exact = torch.linalg.svdvals(matrix)
    share = float(exact[:rank].square().sum() / exact.square().sum())
    assert found.complete
    assert found.rank == rank
    assert found.low_rank(tuple(matrix.shape)) == (rank < matrix.numel() / sum(matrix.shape))
    assert torch.allclose(found.values[:rank], exact[:rank], rtol=0.01)
    assert found.energy == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300), (257, 1000), (100, 500), (500, 3)])
def test_planted_directions_are_found_with_their_energy(shape: tuple[int, int]) -> None:
    strengths = [9.0, 5.0, 5.0, 2.0, 1.3][: min(shape)]
    matrix = planted(shape, strengths)
    assert_like_dense(look(matrix), matrix, len(strengths))


def test_a_direction_that_noise_hides_at_first_comes_out() -> None:
    """Among noise nearly as large as it is: at the second look it is not there yet, only growing."""
    matrix = 1.8 * planted((1200, 1000), [30.0, 0.5])
    edge = SAFETY * even_noise((1200, 1000), 1.0).edge
    assert int((torch.linalg.svdvals(matrix) > edge).sum()) == 2
    assert look(matrix, height=400).rank == 2


def test_more_directions_than_the_first_probes_are_found() -> None:
    matrix = planted((300, 350), [40.0] * 30 + [3.0] * 30)
    assert_like_dense(look(matrix), matrix, 60)


def test_a_matrix_without_noise_is_known_after_two_passes() -> None:
    matrix = dense(terms_of(400, 300, (8,)))
    passes = 0

    def tiles() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        yield from tiles_of(matrix)()

    found = lowrank.spectrum((400, 300), tiles, even_noise((400, 300), 1e-9))
    assert_like_dense(found, matrix, 8)
    assert found.energy == pytest.approx(1.0, abs=1e-12)
    assert passes == 2


def test_noise_alone_has_no_rank() -> None:
    for shape in [(300, 400), (200, 400)]:
        found = look(planted(shape, []))
        assert (found.rank, found.energy, found.complete) == (0, 0.0, True)


@pytest.mark.parametrize("times", [SAFETY * 1.02, SAFETY * 1.2, 10.0, 1000.0])
@pytest.mark.parametrize("shape", [(200, 400), (400, 500), (700, 600)])
def test_a_change_of_full_rank_is_never_called_low(shape: tuple[int, int], times: float) -> None:
    """However much larger than the noise it is: just a little, and only its upper end stands above the edge."""
    assert not look(times * planted(shape, [])).low_rank(shape)


def test_nothing_depends_on_the_run_and_little_on_the_tiles() -> None:
    matrix = planted((300, 420), [9.0, 2.0])
    first, again, other = look(matrix), look(matrix), look(matrix, height=300)
    assert torch.equal(first.values, again.values)
    assert torch.allclose(first.values, other.values, rtol=1e-10)


def test_zeros_have_no_energy() -> None:
    found = look(torch.zeros(300, 300, dtype=torch.float64))
    assert (found.rank, found.energy, found.complete) == (0, 0.0, True)
