"""In how many directions two things differ: stored matrices, read in row tiles, and deltas, from their factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.adapters.adapter import Delta
from lora_cli.arithmetic.lowrank import (
    SAFETY,
    Noise,
    Spectrum,
    frobenius_norm,
    largest_magnitude,
    look_above,
    product_edge,
    rounding_variance,
    singular_values,
    spectrum,
    spectrum_bytes,
)
from lora_cli.arithmetic.product import Term
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NumericError
from lora_cli.progress import Progress
from lora_cli.surgery.distance import Pair
from lora_cli.surgery.elements import decode
from lora_cli.surgery.readers import Readers, open_readers, raw_bytes, torch_dtype
from lora_cli.surgery.workers import run_units

_TILE_ELEMENTS = 1 << 18
_WORK = 64
_TINY = 2.0**-48
"""A difference of two products that is smaller than this, measured by their factors, is float64's own rounding."""


class DeltaDistance(NamedTuple):
    """How far two deltas of one shape are apart.

    Attributes:
        largest: The largest |element| of the difference; infinite where a factor holds NaN or infinity.
        relative_norm: ‖b - a‖_F / ‖a‖_F.
        spectrum: Of the difference; None where it is not finite.
    """

    largest: float
    relative_norm: float
    spectrum: Spectrum | None


def measure_changes(pairs: Sequence[Pair], *, memory: int, threads: int, progress: Progress) -> dict[str, Spectrum]:
    """Find how many directions of b - a stand above the rounding of both, for pairs of matrices without new specials.

    Works on as many matrices at once as fit into `memory`; one that does not fit is alone, and takes what it needs:
    24 bytes times (out + in) times the probes (32 at first, at most 256), and a few MiB.
    """
    if not pairs:
        return {}
    progress.begin("rank", sum(pair.a.nbytes for pair in pairs))
    found = {}

    def at_once(pair: Pair) -> int:
        return max(1, min(threads, memory // (spectrum_bytes(_shape(pair)) + _tile_bytes(pair))))

    # Sorting keeps the order within a group, so the largest matrices do not hold up the others.
    for count, group in groupby(sorted(pairs, key=at_once), key=at_once):
        todo = list(group)
        nbytes = sum(pair.a.nbytes for pair in todo)
        for pair, result in run_units(todo, lambda pair, _: _change_of(pair), lambda: None, count, nbytes=nbytes):
            progress.advance(pair.a.nbytes)
            found[pair.key] = result
    return found


def _shape(pair: Pair) -> tuple[int, int]:
    rows, columns = pair.a.shape
    return rows, columns


def _height(columns: int) -> int:
    return max(1, _TILE_ELEMENTS // max(1, columns))


def _tile_bytes(pair: Pair) -> int:
    """Two tiles as stored and in float64, and as much again while their variances are computed."""
    columns = _shape(pair)[1]
    return _height(columns) * columns * 8 * 6


def _change_of(pair: Pair) -> Spectrum:
    with open_readers() as readers:
        rows, columns = _shape(pair)
        noise = Noise(columns)
        for a, b in _decoded(pair, readers):
            variances = rounding_variance(a, torch_dtype(pair.a.dtype))
            noise.add(variances.add_(rounding_variance(b, torch_dtype(pair.b.dtype))))
        try:
            return spectrum((rows, columns), partial(_differences, pair, readers), noise)
        except NumericError as error:
            error.tensor = error.tensor or pair.key
            raise


def _differences(pair: Pair, readers: Readers) -> Iterator[Tensor]:
    for a, b in _decoded(pair, readers):
        yield b.sub_(a)


def _decoded(pair: Pair, readers: Readers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of both in float64, in buffers that the next ones overwrite; what is not finite counts as zero."""
    rows, columns = _shape(pair)
    height = _height(columns)
    sides = [
        (tensor, torch.empty(height * columns * tensor.dtype.bits // 8, dtype=torch.uint8), _float64(height * columns))
        for tensor in (pair.a, pair.b)
    ]
    for top in range(0, rows, height):
        elements = (min(top + height, rows) - top) * columns
        for tensor, raw, tile in sides:
            _read_values(readers, tensor, top * columns, raw, tile[:elements])
        yield tuple(tile[:elements].view(-1, columns) for _, _, tile in sides)  # type: ignore[misc]


def _float64(elements: int) -> Tensor:
    return torch.empty(elements, dtype=torch.float64)


def _read_values(readers: Readers, tensor: StoredTensor, begin: int, raw: Tensor, tile: Tensor) -> None:
    size = tensor.dtype.bits // 8
    stored = raw[: tile.numel() * size]
    readers.of(tensor).read_into(tensor.offset + begin * size, raw_bytes(stored))
    decode(stored.numpy(), tensor.dtype, tile.numpy())
    tile.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


# Deltas


def measure_deltas(
    pairs: Sequence[tuple[str, Delta, Delta]], threads: int, progress: Progress
) -> dict[str, DeltaDistance]:
    """Compare deltas from their factors; only those that differ have an entry."""
    if not pairs:
        return {}
    nbytes = sum(_stored_bytes(a) for _, a, _ in pairs)
    progress.begin("compare deltas", nbytes)
    found = {}

    def work(pair: tuple[str, Delta, Delta], _: None) -> DeltaDistance | None:
        return _delta_distance(*pair[1:])

    # Comparing two deltas is much more work than their bytes.
    for (key, a, _), distance in run_units(pairs, work, lambda: None, threads, nbytes=_WORK * nbytes):
        progress.advance(_stored_bytes(a))
        if distance is not None:
            found[key] = distance
    return found


def delta_bytes(a: Delta, b: Delta) -> int:
    """Bytes that comparing two deltas takes: factors as stored, in float64, stacked and taken apart, and a tile."""
    return 8 * 6 * (a.rank + b.rank) * sum(a.shape) + 8 * max(_TILE_ELEMENTS, a.shape[1])


def _stored_bytes(delta: Delta) -> int:
    return sum(tensor.nbytes for tensor in delta.tensors)


class _Apart(NamedTuple):
    """Two matrices that differ: singular values of the difference, its largest |element|, and what is no difference."""

    values: Tensor
    largest: float
    tiny: float
    edge: float


def _delta_distance(one: Delta, other: Delta) -> DeltaDistance | None:
    """Compare two deltas of one shape; None where they are the same as far as float64 can tell.

    Stacks are compared as if their matrices lay along a diagonal: the directions are those of all of them.
    """
    indices = range(one.stack or 1)
    with open_readers() as readers:
        try:
            terms = ((one.term(readers.load, 1.0, index), other.term(readers.load, 1.0, index)) for index in indices)
            parts = [part for a, b in terms if (part := _apart(a, b)) is not None]
        except NumericError:
            return DeltaDistance(math.inf, math.inf, None)
        if not parts:
            return None
        values = torch.cat([part.values for part in parts]).sort(descending=True).values
        norm, tiny = float(torch.linalg.vector_norm(values)), sum(part.tiny for part in parts)
        if norm <= tiny:
            return None
        reference = math.hypot(*(frobenius_norm([one.term(readers.load, 1.0, index)]) for index in indices))
    return DeltaDistance(
        largest=max(part.largest for part in parts),
        relative_norm=norm / reference if reference else math.inf,
        spectrum=look_above(values, max(tiny, *(part.edge for part in parts))),
    )


def _apart(a: Term, b: Term) -> _Apart | None:
    """How far two terms are apart; None where they have the same bits."""
    if a.scale == b.scale and _same_bits(a.b, b.b) and _same_bits(a.a, b.a):
        return None
    difference = [b, Term(a.b, a.a, -a.scale)]
    return _Apart(
        singular_values(difference),
        largest_magnitude(difference),
        _TINY * (_size(a) + _size(b)),
        SAFETY * product_edge(difference),
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _size(term: Term) -> float:
    """A bound of ‖scale·B·A‖_F that does not see what cancels."""
    b, a = (float(torch.linalg.vector_norm(factor.to(torch.float64))) for factor in (term.b, term.a))
    return abs(term.scale) * b * a
