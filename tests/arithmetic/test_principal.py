"""Factors taken from a weight: what PiSSA and OLoRA promise of them, checked against numpy and PEFT's own formulas."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_cli.arithmetic.principal import olora, pissa, sample_width
from lora_cli.errors import NumericError, ShapeError

Take = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(out: int, inner: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values halve from one to the next."""
    few = min(out, inner)
    u, v = (torch.linalg.qr(numbers(side, few, seed=seed + at)).Q for at, side in enumerate((out, inner)))
    return torch.einsum("ik,k,jk->ij", u, torch.exp2(-torch.arange(few, dtype=torch.float64)), v)


def randomised(weight: Tensor, rank: int, scale: float, iterations: int = 4) -> tuple[Tensor, Tensor]:
    width = sample_width((weight.shape[0], weight.shape[1]), rank)
    return pissa(weight, rank, scale, iterations=iterations, test=numbers(weight.shape[1], width, seed=9))


def of_olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    return olora(weight, rank)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
        lambda sides: st.tuples(st.just(sides), st.integers(1, min(sides)))
    ),
    st.sampled_from([0.25, 1.0, 3.0, math.sqrt(8)]),
    st.integers(0, 1000),
)
def test_pissa_is_the_nearest_matrix_of_its_rank(shape: tuple[tuple[int, int], int], scale: float, seed: int) -> None:
    """Eckart and Young: what is left has the singular values that were not taken. A and B have equal shares."""
    (out, inner), rank = shape
    weight = numbers(out, inner, seed=seed)
    a, b = pissa(weight, rank, scale)
    assert a.shape == (rank, inner)
    assert b.shape == (out, rank)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    left = np.linalg.svd((weight - scale * b @ a).numpy(), compute_uv=False)
    assert np.allclose(left[: len(values) - rank], values[rank:], atol=1e-12)
    for gram in (a @ a.T, b.T @ b):
        assert np.allclose(gram.numpy(), np.diag(values[:rank] / scale), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 1000))
def test_olora_is_the_beginning_of_a_qr_decomposition(out: int, inner: int, seed: int) -> None:
    weight = numbers(out, inner, seed=seed)
    for rank in range(1, min(out, inner) + 1):
        a, b = olora(weight, rank)
        assert np.allclose((b.T @ b).numpy(), np.eye(rank), atol=1e-12)
        assert torch.equal(a, a.triu())
        # A whole QR decomposition has these factors, but for signs.
        q, r = np.linalg.qr(weight.numpy())
        signs = np.sign(np.sum(q[:, :rank] * b.numpy(), axis=0))
        assert np.allclose(q[:, :rank] * signs, b.numpy(), atol=1e-7)
        assert np.allclose(r[:rank] * signs[:, None], a.numpy(), atol=1e-7)
        assert np.allclose((b @ a)[:, :rank].numpy(), weight[:, :rank].numpy(), atol=1e-12)


@pytest.mark.parametrize("take", [pissa, randomised, of_olora])
def test_the_largest_number_of_each_column_of_b_is_positive(take: Take) -> None:
    for seed in range(5):
        weight = numbers(7, 9, seed=seed)
        a, b = take(weight, 4, 0.5)
        assert (b.abs().max(dim=0).values == b.max(dim=0).values).all()
        turned_a, turned_b = take(-weight, 4, 0.5)
        # The columns of the other sign are the same ones, so it is in A that the sign is.
        assert np.allclose(b.numpy(), turned_b.numpy(), atol=1e-9)
        assert np.allclose(a.numpy(), -turned_a.numpy(), atol=1e-9)


def test_a_randomised_decomposition_nears_the_exact_one() -> None:
    weight, rank = decaying(40, 60), 5
    exact, best = pissa(weight, rank, 2.0), 2.0**-(rank)
    errors = []
    for iterations in (0, 1, 4):
        a, b = randomised(weight, rank, 2.0, iterations)
        errors.append(float(torch.linalg.matrix_norm(weight - 2.0 * b @ a, 2)) / best)
    assert errors[0] > errors[1] > errors[2] - 1e-12
    assert errors[2] == pytest.approx(1, abs=1e-6)
    for found, wanted in zip(randomised(weight, rank, 2.0), exact, strict=True):
        assert np.allclose(found.numpy(), wanted.numpy(), atol=1e-6)


def test_a_randomised_decomposition_of_full_width_is_exact() -> None:
    weight = numbers(6, 9)
    assert sample_width((6, 9), 5) == 6
    assert sample_width((60, 90), 5) == 13
    for found, wanted in zip(randomised(weight, 5, 1.0, 0), pissa(weight, 5, 1.0), strict=True):
        assert np.allclose(found.numpy(), wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("take", [pissa, randomised, of_olora])
def test_any_type_is_read_and_float64_computed(take: Take, dtype: torch.dtype) -> None:
    weight = numbers(8, 6).to(dtype)
    for found, wanted in zip(take(weight, 3, 2.0), take(weight.double(), 3, 2.0), strict=True):
        assert found.dtype == torch.float64
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("take", [pissa, randomised, of_olora])
def test_what_cannot_be_decomposed(take: Take) -> None:
    for rank in (0, 5):
        with pytest.raises(ShapeError):
            take(numbers(4, 6), rank, 1.0)
    for broken in (math.nan, math.inf, -math.inf):
        weight = numbers(4, 6)
        weight[1, 2] = broken
        with pytest.raises(NumericError):
            take(weight, 2, 1.0)


@pytest.mark.parametrize("shape", [(5, 3), (6, 5), (6,)])
def test_a_test_matrix_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="test matrix"):
        pissa(numbers(4, 6), 2, 1.0, test=numbers(*shape))
