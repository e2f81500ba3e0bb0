"""What two inputs have in common by name, and what of that is not the same. No torch until tensors are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lora_cli.adapters.adapter import Delta
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import UsageError
from lora_cli.progress import Progress
from lora_cli.surgery.edit import MERGEABLE
from lora_cli.surgery.equal_rows import equal_rows

if TYPE_CHECKING:
    from lora_cli.arithmetic.lowrank import Spectrum
    from lora_cli.surgery.distance import Distance, Pair

T = TypeVar("T")


@dataclass(frozen=True)
class Changed:
    """A tensor, the delta of a module, or something that an adapter says, that is not the same in both.

    Attributes:
        key: Its name; a delta has the name of the parameter that it changes, in the adapter's spelling.
        what: `values`, `dtype` (and then values, if they differ), `shape`, or `setting`: a field of an adapter's config
            that changes what its factors mean.
        max_abs: The largest |a - b|; infinite where one of them is NaN. None for what is not compared by value:
            integers, packed types, other shapes.
        relative_norm: ‖A - B‖_F / ‖A‖_F, infinite where A is zero; None likewise.
        changed_fraction: Share of the elements whose bits differ (between two dtypes, whose values differ); None for
            deltas and other shapes.
        max_ulp: The largest difference in units in the last place, pairs with NaN left out; None where there is no
            such unit in common, and for deltas.
        rank: How many directions of the change stand above the noise of rounding; None where that was not asked for.
            Where `low_rank` is False there may be more.
        energy: Their share of ‖A - B‖_F²; None likewise.
        low_rank: Whether `rank` is all there is, is not zero, and factors of that rank are smaller than the matrix;
            None likewise.
        before: Type, shape or setting in A, where they differ.
        after: The same in B.
        equal_rows: Of tables of different lengths, how many rows of the shorter one are the same in both; else None.
    """

    key: str
    what: Literal["values", "dtype", "shape", "setting"]
    max_abs: float | None = None
    relative_norm: float | None = None
    changed_fraction: float | None = None
    max_ulp: int | None = None
    rank: int | None = None
    energy: float | None = None
    low_rank: bool | None = None
    before: str | None = None
    after: str | None = None
    equal_rows: int | None = None


class Comparison:
    """Collects what two inputs have in common, and what of it changed."""

    def __init__(self, tolerance: float, rank: bool, threads: int, memory: int, progress: Progress) -> None:
        self.only_in_a: list[str] = []
        self.only_in_b: list[str] = []
        self.common = 0
        self.changed: list[Changed] = []
        self._tolerance = tolerance
        self._rank = rank
        self._threads = threads
        self._memory = memory
        self._progress = progress

    @property
    def names(self) -> int:
        """How many names there were."""
        return self.common + len(self.only_in_a) + len(self.only_in_b)

    def by_size(self) -> tuple[Changed, ...]:
        """What changed, the largest change first."""
        return tuple(sorted(self.changed, key=_order))

    def tensors(self, a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor]) -> None:
        """Compare stored tensors."""
        from lora_cli.surgery import distance

        pairs: list[Pair] = []
        for key in self._match(a, b):
            pair = distance.Pair(key, a[key], b[key])
            if pair.a.shape != pair.b.shape:
                self.changed.append(_reshaped(pair))
            elif pair.a.dtype == pair.b.dtype or pair.by_value:
                pairs.append(pair)
            else:
                self.changed.append(Changed(key, "dtype", before=pair.a.dtype.name, after=pair.b.dtype.name))
        distances = distance.measure(pairs, self._threads_for(distance.WORKER_BYTES), self._progress)
        differing = [pair for pair in pairs if self._differs(pair, distances[pair.key])]
        matrices = [pair for pair in differing if self._rank and _has_rank(pair, distances[pair.key])]
        spectra = self._spectra(matrices)
        self.changed += [_changed(pair, distances[pair.key], spectra.get(pair.key)) for pair in differing]

    def _spectra(self, pairs: Sequence[Pair]) -> Mapping[str, Spectrum]:
        if not pairs:
            return {}
        from lora_cli.surgery import directions  # which needs torch

        return directions.measure_changes(pairs, memory=self._memory, threads=self._threads, progress=self._progress)

    def deltas(self, a: Mapping[str, Delta], b: Mapping[str, Delta]) -> None:
        """Compare deltas."""
        pairs = []
        for key in self._match(a, b):
            if (a[key].shape, a[key].stack) == (b[key].shape, b[key].stack):
                pairs.append((key, a[key], b[key]))
            else:
                before, after = (_sizes(side[key].shape) for side in (a, b))
                self.changed.append(Changed(key, "shape", before=before, after=after))
        if not pairs:
            return
        from lora_cli.surgery import directions  # which needs torch

        most = max((directions.delta_bytes(one, other) for _, one, other in pairs), default=0)
        found = directions.measure_deltas(pairs, self._threads_for(most), self._progress)
        self.changed += [
            Changed(key, "values", delta.largest, delta.relative_norm, **_directions(delta.spectrum, a[key].shape))
            for key, delta in found.items()
            if not 0 < delta.largest <= self._tolerance
        ]

    def settings(self, a: Mapping[str, object], b: Mapping[str, object]) -> None:
        """Compare what adapters say; only what differs counts as a name, and not what one says of what is its own."""
        for key in (key for key in a if key in b and a[key] != b[key]):
            self.common += 1
            self.changed.append(Changed(key, "setting", before=str(a[key]), after=str(b[key])))

    def _match(self, a: Mapping[str, T], b: Mapping[str, T]) -> list[str]:
        self.only_in_a += [key for key in a if key not in b]
        self.only_in_b += [key for key in b if key not in a]
        common = [key for key in a if key in b]
        self.common += len(common)
        return common

    def _differs(self, pair: Pair, distance: Distance) -> bool:
        if pair.a.dtype != pair.b.dtype:
            return True
        tolerated = pair.by_value and self._tolerance > 0 and distance.largest <= self._tolerance
        return distance.changed > 0 and not tolerated

    def _threads_for(self, each: int) -> int:
        if self._memory < each:
            raise UsageError(
                "The memory budget is too small to compare even one piece",
                expected=f"--memory {-(-each // (1 << 20))}MiB or more",
                found=f"{self._memory} bytes",
            )
        return max(1, min(self._threads, self._memory // max(1, each)))


def _reshaped(pair: Pair) -> Changed:
    return Changed(
        pair.key,
        "shape",
        before=_words(pair.a, pair.b),
        after=_words(pair.b, pair.a),
        equal_rows=equal_rows(pair.a, pair.b),
    )


def _words(tensor: StoredTensor, other: StoredTensor) -> str:
    """The shape, and the type as well where that differs too."""
    shape = _sizes(tensor.shape)
    return shape if tensor.dtype == other.dtype else f"{tensor.dtype.name} {shape}"


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _has_rank(pair: Pair, distance: Distance) -> bool:
    dtypes = {pair.a.dtype.name, pair.b.dtype.name}
    return len(pair.a.shape) == 2 and dtypes <= set(MERGEABLE) and 0 < distance.largest < math.inf


def _changed(pair: Pair, distance: Distance, spectrum: Spectrum | None) -> Changed:
    two_types = pair.a.dtype != pair.b.dtype
    change = Changed(
        pair.key,
        "dtype" if two_types else "values",
        changed_fraction=distance.changed / pair.elements if pair.elements else 0.0,
        before=pair.a.dtype.name if two_types else None,
        after=pair.b.dtype.name if two_types else None,
        **_directions(spectrum, pair.a.shape),
    )
    if not pair.by_value:
        return change
    return replace(
        change, max_abs=distance.largest, relative_norm=_relative(distance), max_ulp=None if two_types else distance.ulp
    )


def _relative(distance: Distance) -> float:
    if not distance.squares:
        return 0.0
    if math.inf in (distance.squares, distance.largest) or not distance.reference:
        return math.inf
    return math.sqrt(distance.squares / distance.reference)


def _directions(spectrum: Spectrum | None, shape: tuple[int, ...]) -> dict[str, Any]:
    if spectrum is None:
        return {}
    return {"rank": spectrum.rank, "energy": spectrum.energy, "low_rank": spectrum.low_rank(shape)}


def _order(change: Changed) -> tuple[float, float, str]:
    fraction = 1.0 if change.changed_fraction is None else change.changed_fraction
    size = change.relative_norm
    if size is None:
        # Not measured: other shapes and types first of all, bytes by how many of them are different.
        size = math.inf if change.what != "values" else fraction
    return -size, -fraction, change.key
