"""What terms of an undo file add to the elements of a tensor, and what they multiply them by, from its page alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

import reference
from reference import FORMATS, Term, decode, encode, rounded
from undo_formulas import FORMULAS, GAINS, PRODUCTS, Tensor
from undo_world import Raw

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

Find = Callable[[int, str], Raw]
Said = Mapping[str, Any]
Matrix = list[list[Fraction]]


def patterns_in(data: bytes, dtype: str) -> list[int]:
    """Patterns of a floating type."""
    width = FORMATS[NAMES[dtype]].width // 8
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def numbers_in(raw: Raw) -> list[Fraction]:
    """The numbers of a tensor, also of whole ones."""
    dtype, _, data = raw
    if dtype in NAMES:
        return [decode(pattern, NAMES[dtype]) for pattern in patterns_in(data, dtype)]
    width = int(dtype[1:]) // 8
    return [
        Fraction(int.from_bytes(data[at : at + width], "little", signed=dtype[0] == "I"))
        for at in range(0, len(data), width)
    ]


def rows_of(values: list[Fraction], columns: int) -> Matrix:
    """A matrix, row by row."""
    return [values[at : at + columns] for at in range(0, len(values), columns)]


def turned(matrix: Matrix) -> Matrix:
    """Its transpose."""
    return [list(row) for row in zip(*matrix, strict=True)]


@dataclass
class Change:
    """One term.

    Attributes:
        said: What the manifest says.
        products: Its product for each of its matrices; none for a formula that is none.
        values: Of another formula, the numbers of its only matrix.
    """

    said: Said
    products: list[Term]
    values: list[list[float]]

    @property
    def outputs(self) -> int:
        """How many outputs it has itself."""
        return len(self.products[0].b if self.products else self.values)

    @property
    def of(self) -> int:
        """How many the stored matrix has."""
        return self.said["outputs"][2] if self.said.get("outputs") else self.outputs

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self.products[0].a[0] if self.products else self.values[0])

    def where(self) -> dict[int, int]:
        """Which of its outputs each output of the stored matrix is."""
        if not self.said.get("outputs"):
            return {row: row for row in range(self.outputs)}
        begin, end, _, *step = self.said["outputs"]
        rows = [row for run in self.said["rows"] for row in range(*run)]
        return dict(zip(range(begin, end, *step), rows, strict=True))

    def on(self, number: int) -> bool:
        """Whether it is for matrix `number` of the stored tensor."""
        return self.said.get("at") in (None, number)

    def product(self, number: int, rows: list[int]) -> Term:
        """Some outputs of its product for that matrix."""
        which = self.said.get("matrix")
        found = self.products[which if which is not None else number if len(self.products) > 1 else 0]
        return Term([found.b[row] for row in rows], found.a, found.scale)


def deltas_of(said: Sequence[Said], find: Find, work: str) -> list[Fraction]:
    """What was added to each element, matrix after matrix and band by band."""
    changes = [change_of(term, find) for term in said]
    matrices = []
    for number in range(stacked(changes)):
        product = [[Fraction(0)] * changes[0].inputs for _ in range(changes[0].of)]
        adding = [change for change in changes if change.on(number) and change.said["kind"] not in GAINS]
        for outputs, over in bands(adding):
            for output, row in zip(outputs, summed(over, number, outputs, work), strict=True):
                product[output] = row
        matrices += turned(product) if said[0].get("transposed") else product
    return [rounded(value, work) for row in matrices for value in row]


def stacked(changes: Sequence[Change]) -> int:
    """How many matrices the stored tensor has."""
    first = changes[0]
    return first.said.get("count") or (len(first.products) if first.said.get("matrix") is None else 0) or 1


def bands(changes: Sequence[Change]) -> Iterator[tuple[list[int], list[Change]]]:
    """Outputs that lie evenly apart and have the same terms."""
    step = math.lcm(*(change.said["outputs"][3] for change in changes if len(change.said.get("outputs", ())) > 3), 1)
    places = [change.where() for change in changes]
    for turn in range(step):
        outputs = range(turn, max((change.of for change in changes), default=0), step)
        for over, found in groupby(outputs, lambda output: [output in place for place in places]):
            if any(over):
                yield list(found), [change for change, there in zip(changes, over, strict=True) if there]


def summed(over: Sequence[Change], number: int, outputs: list[int], work: str) -> Matrix:
    """The numbers of some outputs: one product of all factors, and what formulas give, from the smallest on."""
    rows = [[change.where()[output] for output in outputs] for change in over]
    pairs = list(zip(over, rows, strict=True))
    parts = [[[Fraction(v) for v in change.values[row]] for row in at] for change, at in pairs if change.values]
    terms = [change.product(number, at) for change, at in pairs if change.products]
    if terms:
        parts.append(reference.product(terms, 1 if work == "float32" else 2))
    return [[one_by_one(sorted(values)) for values in zip(*row, strict=True)] for row in zip(*parts, strict=True)]


def one_by_one(values: Sequence[Fraction]) -> Fraction:
    """Their sum in float64."""
    total = values[0]
    for value in values[1:]:
        total = rounded(total + value, "float64")
    return total


def stretches_of(said: Sequence[Said], find: Find, work: str) -> list[int] | None:
    """The patterns of what formulas multiply each element by; None if none of them does."""
    changes = [change_of(term, find) for term in said]
    stretching = [change for change in changes if change.said["kind"] in GAINS]
    if not stretching:
        return None
    first = stretching[0]
    found = [[1.0] * first.inputs for _ in range(first.of)]
    for change in stretching:
        for output, row in change.where().items():
            found[output] = change.values[row]
    elements = zip(*found, strict=True) if said[0].get("transposed") else found
    sign = FORMATS[work].sign
    return [encode(Fraction(g), work) or (sign if math.copysign(1, g) < 0 else 0) for row in elements for g in row]


def change_of(said: Said, find: Find) -> Change:
    """One term, read."""
    raw = [find(said["adapter"], name) for name in said["tensors"]]
    if said["kind"] in FORMULAS:
        tensors = {name: Tensor(one[1], numbers_in(one)) for name, one in zip(said["parts"], raw, strict=True)}
        made = FORMULAS[said["kind"]](tensors, said)
        return Change(said, [made], []) if said["kind"] in PRODUCTS else Change(said, [], made)
    shapes = [shape for _, shape, _ in raw]
    values = [numbers_in(one) for one in raw]
    if said["kind"] == "lora-stack":
        pairs = experts_of(said, shapes, values)
        return Change(said, [Term(b, a, said["scale"]) for b, a in pairs], [])
    matrices = [rows_of(one, math.prod(shape[1:])) for one, shape in zip(values, shapes, strict=True)]
    left, right = (matrices[0], [[Fraction(1)]]) if said["kind"] == "lora-bias" else (matrices[1], matrices[0])
    if said["kind"] == "lora-blocks-a":
        right = on_the_diagonal(right, said["blocks"])
    if said["kind"] == "lora-blocks-b":
        left = on_the_diagonal(left, said["blocks"])
    if said.get("swapped"):
        left, right = turned(left), right if said["kind"] == "lora-conv" else turned(right)
    return Change(said, [Term(left, right, said["scale"])], [])


def experts_of(
    said: Said, shapes: Sequence[list[int]], values: Sequence[list[Fraction]]
) -> Iterator[tuple[Matrix, Matrix]]:
    """B and A of each matrix of a stack: B (rows × rank), A (rank × columns), whatever side A meets."""
    layout = said.get("layout") or "stacked-turned"
    a, b = (rows_of(one, shape[-1]) for one, shape in zip(values, shapes, strict=True))
    experts = said["shape"][0] if said.get("layout") else shapes[0][0]
    for expert in range(experts):
        if layout == "packed":
            rank = len(a) // experts
            mine = a[expert * rank : (expert + 1) * rank], [row[expert::experts] for row in b]
        elif layout == "packed-by-expert":
            rank = len(a) // experts
            part = slice(expert * rank, (expert + 1) * rank)
            mine = a[part], [row[part] for row in b]
        elif layout == "stacked-last":
            (_, rank, _), (given, _, _) = shapes
            flat = [[row[expert] for row in b[at * rank : (at + 1) * rank]] for at in range(given)]
            mine = a[expert * rank : (expert + 1) * rank], flat
        else:
            one, other = (
                stack[at * high : (at + 1) * high]
                for stack, (count, high, _) in zip((a, b), shapes, strict=True)
                for at in [expert if count > 1 else 0]
            )
            mine = (one, other) if layout == "stacked" else (turned(one), turned(other))
        yield (turned(mine[0]), turned(mine[1])) if said.get("swapped") else (mine[1], mine[0])


def on_the_diagonal(stacked_: Matrix, blocks: int) -> Matrix:
    """The matrix whose blocks were stored one below the other."""
    high, wide = len(stacked_) // blocks, len(stacked_[0])
    return [
        [Fraction(0)] * (at // high * wide) + row + [Fraction(0)] * ((blocks - 1 - at // high) * wide)
        for at, row in enumerate(stacked_)
    ]
