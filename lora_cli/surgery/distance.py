"""How far stored tensors are apart, streamed in strips through buffers that are made once per worker.

Strips and units are cut at fixed places and their sums added exactly, so that no number depends on threads or memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.progress import Progress
from lora_cli.surgery.budget import TILE_ELEMENTS, UNIT_BYTES
from lora_cli.surgery.edit import MERGEABLE
from lora_cli.surgery.elements import (
    Array,
    decode,
    finite_squares,
    most_ulps,
    same_bytes,
    settle_specials,
    squares,
    unequal_elements,
)
from lora_cli.surgery.readers import Readers, open_readers
from lora_cli.surgery.workers import run_units

STRIP_BYTES = 1 << 20
"""Most bytes of one read: a strip of either tensor and the tiles made of them stay in a core's own cache."""

WORKER_BYTES = 2 * STRIP_BYTES + 8 * TILE_ELEMENTS * 4
"""What one worker takes: two strips, three tiles in float64, a scratch, and masks."""


class Pair(NamedTuple):
    """Two stored tensors of one name and shape: of one dtype, or both floating."""

    key: str
    a: StoredTensor
    b: StoredTensor

    @property
    def elements(self) -> int:
        """How many elements each has."""
        return math.prod(self.a.shape)

    @property
    def by_value(self) -> bool:
        """Whether elements are compared as numbers: floating ones that torch can read."""
        return all(tensor.dtype.floating and tensor.dtype.torch_name for tensor in (self.a, self.b))

    @property
    def bits(self) -> int:
        """Width of the wider element."""
        return max(self.a.dtype.bits, self.b.dtype.bits)


class Part(NamedTuple):
    """Elements `begin` to `end` of a pair."""

    pair: Pair
    begin: int
    end: int


@dataclass(slots=True)
class Distance:
    """What was found in a pair, or in a part of it.

    Attributes:
        changed: How many elements differ: in bits, or between two dtypes in value.
        largest: The largest |a - b|; infinite where just one of the two is NaN. 0 for what is not compared by value.
        ulp: The most units in the last place between two elements; pairs with a NaN are left out. None where the two
            dtypes differ, or have no such unit.
        squares: Σ (a - b)².
        reference: Σ a² over the finite elements of a; unknown (too small) where nothing changed.
        same: Runs that were found to be the same bytes, from one element up to another, and are not in `reference`.
    """

    changed: int = 0
    largest: float = 0.0
    ulp: int | None = None
    squares: float = 0.0
    reference: float = 0.0
    same: list[tuple[int, int]] = field(default_factory=list)


def measure(pairs: Sequence[Pair], threads: int, progress: Progress) -> dict[str, Distance]:
    """Compare tensors element by element, all of them; needs `WORKER_BYTES` for each worker."""
    if not pairs:
        return {}
    progress.begin("compare", sum(pair.a.nbytes for pair in pairs))
    found = _run(_parts(pairs), _Bench.compare, threads, progress.advance)
    # ‖a‖ is asked for only where something changed; what was the same there is read once more.
    changed = [pair for pair in pairs if pair.by_value and pair.key in found and found[pair.key].changed]
    rest = [Part(pair, begin, end) for pair in changed for begin, end in found[pair.key].same]
    for key, norm in _run(rest, _Bench.norm, threads, lambda _: None).items():
        found[key].reference = _total((found[key].reference, norm.reference))
    return {pair.key: found.get(pair.key, Distance()) for pair in pairs}  # empty tensors have no parts


def _parts(pairs: Iterable[Pair]) -> Iterator[Part]:
    for pair in pairs:
        step = UNIT_BYTES * 8 // pair.bits // TILE_ELEMENTS * TILE_ELEMENTS
        for begin in range(0, pair.elements, step):
            yield Part(pair, begin, min(begin + step, pair.elements))


def _units(parts: Iterable[Part]) -> Iterator[tuple[Part, ...]]:
    """Put small parts together: a thousand vectors are not worth a thousand tasks."""
    unit: list[Part] = []
    size = 0
    for part in parts:
        unit.append(part)
        size += (part.end - part.begin) * part.pair.bits // 8
        if size >= UNIT_BYTES:
            yield tuple(unit)
            unit, size = [], 0
    if unit:
        yield tuple(unit)


def _run(
    parts: Iterable[Part],
    work: Callable[[_Bench, Part, Readers], Distance],
    threads: int,
    advance: Callable[[int], None],
) -> dict[str, Distance]:
    """Do `work` on all parts, and put together what was found in the parts of each pair."""

    def one(unit: tuple[Part, ...], bench: _Bench) -> list[Distance]:
        with open_readers() as readers, np.errstate(all="ignore"):
            return [work(bench, part, readers) for part in unit]

    found: defaultdict[str, list[Distance]] = defaultdict(list)
    todo = list(parts)
    nbytes = sum((part.end - part.begin) * part.pair.bits // 8 for part in todo)
    for unit, distances in run_units(_units(todo), one, _Bench, threads, nbytes=nbytes):
        for part, distance in zip(unit, distances, strict=True):
            found[part.pair.key].append(distance)
        advance(sum((part.end - part.begin) * part.pair.a.dtype.bits // 8 for part in unit))
    return {key: _together(several) for key, several in found.items()}


def _together(parts: Sequence[Distance]) -> Distance:
    ulps = [part.ulp for part in parts if part.ulp is not None]
    return Distance(
        changed=sum(part.changed for part in parts),
        largest=max(part.largest for part in parts),
        ulp=max(ulps) if ulps else None,
        squares=_total(part.squares for part in parts),
        reference=_total(part.reference for part in parts),
        same=[same for part in parts for same in part.same],
    )


def _total(values: Iterable[float]) -> float:
    """The sum, rounded once from the exact one: the same in any order."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


class _Bench:
    """What one worker keeps: a strip of each tensor, and tiles in float64."""

    def __init__(self) -> None:
        self._strips = [np.empty(STRIP_BYTES, np.uint8) for _ in range(2)]
        self._tiles = [np.empty(TILE_ELEMENTS, np.float64) for _ in range(3)]
        self._scratch = np.empty(TILE_ELEMENTS, np.uint32)

    def compare(self, part: Part, readers: Readers) -> Distance:
        """Compare a part, taking elements apart only in strips that are not the same bytes."""
        pair, found = part.pair, Distance()
        for begin, end in _strips(part):
            a = _read(readers, pair.a, begin, end, self._strips[0])
            b = _read(readers, pair.b, begin, end, self._strips[1])
            if pair.a.dtype == pair.b.dtype and same_bytes(a, b):
                _extend(found.same, begin, end)
                continue
            for one, other in _tiles(a, b, pair, end - begin):
                if pair.by_value:
                    self._compare_values(pair, one, other, found)
                else:
                    found.changed += unequal_elements(one, other, pair.bits)
        return found

    def norm(self, part: Part, readers: Readers) -> Distance:
        """Sum the squares of `a` alone."""
        pair, found = part.pair, Distance()
        for begin, end in _strips(part):
            a = _read(readers, pair.a, begin, end, self._strips[0])
            for one, _ in _tiles(a, a, pair._replace(b=pair.a), end - begin):
                found.reference += finite_squares(decode(one, pair.a.dtype, self._tiles[0], self._scratch))
        return found

    def _compare_values(self, pair: Pair, one: Array, other: Array, found: Distance) -> None:
        a = decode(one, pair.a.dtype, self._tiles[0], self._scratch)
        b = decode(other, pair.b.dtype, self._tiles[1], self._scratch)
        difference = np.subtract(a, b, out=self._tiles[2][: a.size])
        largest = max(float(difference.max()), -float(difference.min()))
        numbers: Array | None = None
        if not math.isfinite(largest):
            numbers = settle_specials(a, b, difference)
            largest = max(float(difference.max()), -float(difference.min()))
        found.largest = max(found.largest, largest)
        found.squares += squares(difference)
        found.reference += finite_squares(a)
        if pair.a.dtype != pair.b.dtype:
            found.changed += int(np.count_nonzero(difference))
            return
        found.changed += unequal_elements(one, other, pair.bits)
        if pair.a.dtype.name in MERGEABLE:
            integers = np.dtype(f"i{pair.bits // 8}")
            bits = [each.view(integers) for each in (one, other)]
            if numbers is not None:
                bits = [each[numbers] for each in bits]
            # The float64 tiles have done their work, and serve as scratch.
            scratch = [tile.view(integers)[: bits[0].size] for tile in self._tiles]
            found.ulp = max(found.ulp or 0, most_ulps(bits, scratch))


def _strips(part: Part) -> Iterator[tuple[int, int]]:
    step = STRIP_BYTES * 8 // part.pair.bits // TILE_ELEMENTS * TILE_ELEMENTS
    for begin in range(part.begin, part.end, step):
        yield begin, min(begin + step, part.end)


def _read(readers: Readers, tensor: StoredTensor, begin: int, end: int, buffer: Array) -> Array:
    """Read elements, as bytes. They begin at a whole byte, since strips begin at whole tiles."""
    first, last = begin * tensor.dtype.bits // 8, end * tensor.dtype.bits // 8
    strip = buffer[: last - first]
    readers.of(tensor).read_into(tensor.offset + first, strip.data)
    return strip


def _tiles(a: Array, b: Array, pair: Pair, elements: int) -> Iterator[tuple[Array, Array]]:
    for begin in range(0, elements, TILE_ELEMENTS):
        end = min(begin + TILE_ELEMENTS, elements)
        yield tuple(  # type: ignore[misc]
            strip[begin * bits // 8 : end * bits // 8]
            for strip, bits in ((a, pair.a.dtype.bits), (b, pair.b.dtype.bits))
        )


def _extend(runs: list[tuple[int, int]], begin: int, end: int) -> None:
    if runs and runs[-1][1] == begin:
        begin, _ = runs.pop()
    runs.append((begin, end))
