"""What happens to one tensor of an output: the edit, and the deltas that it adds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_cli.adapters.adapter import Acts, Delta, Load
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.region import Place, Region
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.dtypes import DType

if TYPE_CHECKING:
    from lora_cli.adapters.formula import Before, Values
    from lora_cli.adapters.inits import FreshTensor
    from lora_cli.arithmetic.product import Term

MERGEABLE = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Storage types that can take a delta; `arithmetic.rounding.MERGEABLE` has the same as torch's types."""

WHOLE_NUMBERS = ("U8", "I8", "I16", "I32", "I64")
"""Storage types that can say places."""

Operation = Literal["keep", "rename", "cast", "add", "subtract", "replace", "append", "repeat", "restore"]


SUMMANDS: Final = ("product", "sum")
"""What deltas do that are summands."""


def may_be_factor(tensor: StoredTensor, delta: Delta) -> bool:
    """Whether a tensor of a delta is stored as what it is to be: numbers, or of some formulas places."""
    if tensor.dtype.name in MERGEABLE or not isinstance(delta, Formula):
        return tensor.dtype.name in MERGEABLE
    places = (delta.parts.get(name) for name in delta.method.indices)
    return tensor.dtype.name in WHOLE_NUMBERS and any(part is tensor for part in places)


def is_alone(delta: Delta) -> bool:
    """Whether nothing can be added along with a delta on the same outputs, and no weight but 1 has a meaning."""
    return delta.magnitude is not None or delta.acts not in SUMMANDS


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor of the base, or a part of it, that a change is computed from.

    Attributes:
        tensor: Where it is stored.
        transposed: The base stores the matrix as (in × out).
        region: The outputs of the stored tensor that are meant; None for all of them.
    """

    tensor: StoredTensor
    transposed: bool
    region: Region | None


@dataclass(frozen=True, slots=True)
class Contribution:
    """One delta of one adapter on one tensor.

    Attributes:
        adapter: Position of the adapter on the command line, from 0.
        name: Module in the adapter's spelling.
        delta: The change.
        weight: The user's weight.
        transposed: The base stores the matrix as (in × out).
        region: The outputs of the stored tensor that it changes; None for all of them.
        matrix: Which matrix of the delta, a stack, it is; None for all, each on its own, or where there is one.
        at: Which matrix of the stored tensor, a stack, it changes; None likewise.
        count: How many matrices the stored tensor is a stack of; None where it is none.
        seen: Where the base has the module's weight, for a change that is computed from that.
        parameter: The module's parameter that it is for.
        label: What the adapter is called, for messages.
    """

    adapter: int
    name: str
    delta: Delta
    weight: float
    transposed: bool
    region: Region | None = None
    matrix: int | None = None
    at: int | None = None
    count: int | None = None
    seen: tuple[Seen, ...] = ()
    parameter: str = "weight"
    label: str = ""

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(matrices, rows, columns) as which the delta sees the stored tensor."""
        out, inner = self.delta.shape
        out = self.region.of if self.region else out
        return (self.count or 1, *((inner, out) if self.transposed else (out, inner)))

    def changes(self, number: int) -> bool:
        """Whether it changes matrix `number` of the stored tensor."""
        return self.at is None or self.at == number

    def index(self, number: int) -> int:
        """Which matrix of the delta changes matrix `number` of the stored tensor."""
        if self.matrix is not None:
            return self.matrix
        return 0 if self.delta.stack is None else number

    @property
    def adds(self) -> bool:
        """Whether it is a summand; else it makes something of what is there."""
        return self.delta.acts in SUMMANDS

    @property
    def alone(self) -> bool:
        """Whether nothing can be added along with it on the same outputs, and no weight but 1 has a meaning."""
        return is_alone(self.delta)

    def changed(self, first: int, last: int) -> range:
        """Which outputs of the stored tensor it changes, among those from one to another."""
        (begin, end), step = self.outputs, self.step
        return range(begin + max(0, -((begin - first) // step)) * step, min(last, end), step)

    def rows(self, outputs: range) -> list[int] | range:
        """The delta's outputs that some outputs of the stored tensor are; all of them are among those it changes."""
        if self.region is None or not outputs:
            return outputs
        first = self.region.stored.index(outputs[0])
        return self.region.indices()[first :: max(1, outputs.step // self.step)][: len(outputs)]

    @property
    def outputs(self) -> tuple[int, int]:
        """First output of the stored tensor that it changes, and one past the last."""
        return self.region.outputs if self.region else (0, self.delta.shape[0])

    @property
    def part(self) -> tuple[int, int] | None:
        """These outputs, where the stored tensor has others besides; None where all are changed, in whatever order."""
        return self.outputs if self.region and len(self.region.stored) < self.region.of else None

    @property
    def step(self) -> int:
        """From one of these outputs to the next."""
        return self.region.step if self.region else 1

    def term(self, load: Load, number: int = 0) -> Term:
        """Read the factors for matrix `number` of the stored tensor, as a product of its full height."""
        term = self.delta.term(load, self.weight, self.index(number))
        if self.region is None:
            return term
        begin, end = self.region.outputs
        b = term.b.new_zeros((self.region.of, term.b.shape[1]))
        b[begin : end : self.step] = term.b[self.region.indices()]
        return replace(term, b=b)

    def values(self, load: Load, before: Before | None = None) -> Values:
        """What a formula adds to each element of the delta, or multiplies it by; ready to be asked for tiles."""
        assert isinstance(self.delta, Formula)  # noqa: S101 (who asks has looked at `acts`)
        return self.delta.values(load, self.weight, before)

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is what the delta changes, whole."""
        count, rows, columns = self.matrices
        if self.count is not None:
            return shape == (count, rows, columns)
        return bool(shape) and shape[0] == rows and math.prod(shape[1:]) == columns


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor that an adapter holds whole.

    Attributes:
        tensor: What holds them, (rows × columns).
        rows: Which rows of that.
        at: Which rows of the stored tensor become these; each once. Both are sorted by it.
    """

    tensor: StoredTensor
    rows: tuple[int, ...]
    at: tuple[int, ...]

    def __post_init__(self) -> None:
        pairs = sorted(zip(self.at, self.rows, strict=True))
        object.__setattr__(self, "rows", tuple(row for _, row in pairs))
        object.__setattr__(self, "at", tuple(at for at, _ in pairs))

    def spans(self, columns: int, first: int, count: int) -> Iterator[tuple[int, slice]]:
        """Where they lie among `count` elements of the stored tensor from `first` on.

        Yields:
            The first element in `tensor` of each row, or part of a row, and the slice of the elements.
        """
        for number in range(
            bisect_left(self.at, first // columns), bisect_left(self.at, -(-(first + count) // columns))
        ):
            row, at = self.rows[number], self.at[number]
            begin, end = max(first, at * columns), min(first + count, (at + 1) * columns)
            yield (row - at) * columns + begin, slice(begin - first, end - first)


def rows_of_part(tensor: StoredTensor, stored: tuple[int, ...], place: Place) -> Rows | None:
    """The rows of a stored tensor that become those of one that an adapter holds whole; None where it has others.

    A tensor of the adapter may be a stack of which the stored one is a matrix, or has some rows.

    Args:
        tensor: The adapter's.
        stored: Shape of the stored tensor.
        place: Which part of the adapter's parameter that is.
    """
    shape, first = tensor.shape, 0
    if place.matrix is not None and len(shape) > 1 and place.matrix < shape[0]:
        first, shape = place.matrix * shape[1], shape[1:]
    if place.turned or place.at is not None or not stored or shape[1:] != stored[1:]:
        return None
    rows = place.region.indices() if place.region else range(stored[0])
    at = place.region.stored if place.region else range(stored[0])
    if len(shape) != len(stored) or max(rows, default=0) >= shape[0]:
        return None
    return Rows(tensor, tuple(first + row for row in rows), tuple(at))


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What a merge forgot of one tensor, as an undo file holds it.

    Attributes:
        how: Which of its preimages each element was, or the `residual` of what is there.
        stored: The part of the undo file.
        fragments: Bytes in it for each cut of the tensor.
    """

    how: Literal["preimages", "residual"]
    stored: StoredTensor
    fragments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """What happens to one tensor of the output.

    Attributes:
        key: Its name in the output.
        operation: `keep` its bytes, `rename` it, `cast` it, `add` or `subtract` deltas, `replace` it, or rows of it, by
            what an adapter holds, `append` a tensor that the base lacks, `repeat` one under a further name, with
            deltas of its own, or `restore` what it was before a merge.
        origin: Where its numbers come from: the base, the adapter for what it holds whole, or a rule for a new factor.
        dtype: Its storage type in the output.
        shape: Its shape.
        begin: First byte within the output's data section.
        end: One past the last.
        terms: Deltas that are summed in one exact product.
        rows: Rows that adapters hold; they go over all else.
        displaced: The base's own tensor, where the adapter's takes its place.
        forgotten: What a restored tensor needs besides its source.
        gains: What its outputs were multiplied by in the merge; where deltas are to be added they say it themselves.
    """

    key: str
    operation: Operation
    origin: StoredTensor | FreshTensor
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int
    terms: tuple[Contribution, ...] = ()
    rows: tuple[Rows, ...] = ()
    displaced: StoredTensor | None = None
    forgotten: Forgotten | None = None
    gains: StoredTensor | None = None

    @property
    def source(self) -> StoredTensor:
        """The stored tensor that its numbers come from; only where `fresh` is None."""
        assert isinstance(self.origin, StoredTensor)  # noqa: S101 (who asks has looked at `fresh` or `copies`)
        return self.origin

    @property
    def fresh(self) -> FreshTensor | None:
        """The rule that its numbers are made from, for a tensor that is stored nowhere."""
        return None if isinstance(self.origin, StoredTensor) else self.origin

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.end - self.begin

    @property
    def copies(self) -> bool:
        """Whether the output's bytes are the source's bytes and need not be looked at.

        Numbers from an adapter are looked at: NaN must not go through.
        """
        same = self.fresh is None and not self.terms and not self.rows and self.dtype == self.source.dtype
        from_adapter = self.operation in ("replace", "append") and self.dtype.name in MERGEABLE
        return same and not from_adapter and self.operation != "restore"

    @property
    def former(self) -> StoredTensor | None:
        """The base's tensor that it was; None where that was none, or one of another shape."""
        if self.operation in ("append", "repeat"):
            return None
        was = self.displaced or self.source
        return was if was.shape == self.shape else None

    def held(self, first: int, count: int) -> Iterator[slice]:
        """Where among `count` elements from `first` on rows lie that adapters hold."""
        return (span for rows in self.rows for _, span in rows.spans(self.matrix[1], first, count))

    @property
    def stretched(self) -> bool:
        """Whether deltas set the lengths of outputs, as DoRA does."""
        return any(term.delta.magnitude for term in self.terms)

    @property
    def acts(self) -> frozenset[Acts]:
        """What its deltas do to a matrix."""
        return frozenset(term.delta.acts for term in self.terms)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) as which blocks and units cut the tensor."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape) // rows if rows else 0

    def as_dict(self) -> dict[str, Any]:
        """The edit as plain values, for printing as JSON."""
        return {
            "key": self.key,
            "operation": self.operation,
            "source": {"file": self.source.shard.name, "key": self.source.key, "dtype": self.source.dtype.name}
            if self.fresh is None
            else {"file": None, "key": None, "dtype": self.dtype.name, "made_by": str(self.fresh)},
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "begin": self.begin,
            "end": self.end,
            "terms": [
                {
                    "adapter": term.adapter,
                    "module": term.name,
                    "kind": term.delta.kind,
                    "rank": term.delta.rank or None,
                    "scale": term.delta.scale.times(term.weight) if term.delta.scale.exists else None,
                    "scale_source": term.delta.scale.source,
                    "transposed": term.transposed,
                    "outputs": list(term.outputs),
                }
                for term in self.terms
            ],
            **({"rows": sum(len(rows.at) for rows in self.rows)} if self.rows else {}),
        }
