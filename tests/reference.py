"""The merge in exact rational arithmetic: slow, and independent of torch, numpy and `lora_cli`.

It says what the bits of a merged tensor are, from bit patterns to bit patterns, with Python's integers and
fractions alone. The steps are those of the package's arithmetic; nothing of their implementation is used.

    fold      B ← round_double(scale·B), each element once
    balance   column k of B and row k of A by 2^-t and 2^t until their largest elements are alike
    grids     rows of B and columns of A to p bits, and what that leaves to p more where two slices are due
    sum       hi·hi, or round_double(round_double(hi·hi + hi·lo) + lo·hi)
    delta     round_work(sum)
    merged    the base's own bits where delta is zero, else round_storage(round_work(w + delta))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Matrix = Sequence[Sequence[Fraction]]
Patterns = list[list[int]]


class TooLargeError(Exception):
    """A value does not fit in its format."""


@dataclass(frozen=True)
class Format:
    """An IEEE-like format: widths of its fields, and the pattern of its largest finite number."""

    exponent_bits: int
    fraction_bits: int
    largest_pattern: int

    @property
    def width(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def sign(self) -> int:
        """The pattern of -0.0."""
        return 1 << (self.width - 1)

    @property
    def least_normal(self) -> int:
        """The exponent of the least normal number."""
        return 2 - (1 << (self.exponent_bits - 1))


FORMATS = {
    "bfloat16": Format(8, 7, 0x7F7F),
    "float16": Format(5, 10, 0x7BFF),
    "float32": Format(8, 23, 0x7F7F_FFFF),
    "float64": Format(11, 52, 0x7FEF_FFFF_FFFF_FFFF),
    "float8_e4m3fn": Format(4, 3, 0x7E),
    "float8_e5m2": Format(5, 2, 0x7B),
}


def decode(pattern: int, name: str) -> Fraction:
    """The value of a finite pattern; both zeros are 0."""
    form = FORMATS[name]
    magnitude = pattern & (form.sign - 1)
    if magnitude > form.largest_pattern:
        raise ValueError(f"{pattern:#x} is no finite {name}")
    fraction = magnitude & ((1 << form.fraction_bits) - 1)
    biased = magnitude >> form.fraction_bits
    if biased:
        fraction += 1 << form.fraction_bits
    value = fraction * power(form.least_normal - form.fraction_bits + max(biased - 1, 0))
    return -value if pattern & form.sign else value


def encode(value: Fraction, name: str) -> int:
    """The pattern nearest to a value, ties to even; what rounds to zero keeps its sign, zero itself is +0.0."""
    form = FORMATS[name]
    magnitude = abs(value)
    spacing = max(exponent(magnitude) - 1, form.least_normal) - form.fraction_bits
    # Counted from the least normal binade on, the whole number of spacings carries into the exponent by
    # itself.
    pattern = round(magnitude / power(spacing))
    pattern += (spacing - form.least_normal + form.fraction_bits) << form.fraction_bits
    if magnitude >= limit(name):
        raise TooLargeError(f"{float(magnitude)} does not fit in {name}")
    return pattern | (form.sign if value < 0 else 0)


def limit(name: str) -> Fraction:
    """The magnitude from which values are refused: the largest and half a spacing."""
    largest = FORMATS[name].largest_pattern
    return decode(largest, name) + (decode(largest, name) - decode(largest - 1, name)) / 2


def rounded(value: Fraction, name: str) -> Fraction:
    return decode(encode(value, name), name)


def power(n: int) -> Fraction:
    return Fraction(1 << n) if n >= 0 else Fraction(1, 1 << -n)


def exponent(magnitude: Fraction) -> int:
    """The e with 2^(e-1) ≤ magnitude < 2^e; far below everything for zero."""
    if magnitude == 0:
        return -(10**6)
    guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return guess + 1 if magnitude >= power(guess) else guess


def working(*names: str) -> str:
    return "float32" if all(FORMATS[name].width <= 16 for name in names) else "float64"


@dataclass(frozen=True)
class Term:
    """scale · b · a, with the factors' elements as exact rationals."""

    b: Matrix
    a: Matrix
    scale: float


def product(terms: Sequence[Term], slices: int) -> list[list[Fraction]]:
    """Σ scale·B·A as the package computes it: every element is a double."""
    rows, columns = balanced(*stacked(terms))
    bits = (53 - (len(rows[0]) - 1).bit_length()) // 2 if rows and rows[0] else 26
    left = [on_grids(row, bits) for row in rows]
    right = [on_grids(column, bits) for column in columns]
    return [[_element(row, column, slices) for column in right] for row in left]


def stacked(terms: Sequence[Term]) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """The rows of B and the columns of A of all terms, the scale folded into B."""
    rows: list[list[Fraction]] = [[] for _ in terms[0].b]
    columns: list[list[Fraction]] = [[] for _ in terms[0].a[0]]
    for term in terms:
        for row, part in zip(rows, term.b, strict=True):
            row.extend(rounded(Fraction(term.scale) * value, "float64") for value in part)
        for index, column in enumerate(columns):
            column.extend(row_of_a[index] for row_of_a in term.a)
    return rows, columns


def balanced(
    rows: list[list[Fraction]], columns: list[list[Fraction]]
) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    for k in range(len(rows[0])):
        largest_b = max(abs(row[k]) for row in rows)
        largest_a = max(abs(column[k]) for column in columns)
        shift = (exponent(largest_b) - exponent(largest_a)) // 2
        shift = min(max(shift, -1000), 1000)
        alive = 1 if largest_a and largest_b else 0
        for row in rows:
            row[k] *= power(-shift) * alive
        for column in columns:
            column[k] *= power(shift) * alive
    return rows, columns


def on_grids(values: list[Fraction], bits: int) -> tuple[list[Fraction], list[Fraction]]:
    """What each value is on the first grid, and what is left of it on the second."""
    if not any(values):
        return values, values
    top = exponent(max(abs(value) for value in values))
    coarse, fine = power(top - bits), power(top - 2 * bits - 1)
    first = [round(value / coarse) * coarse for value in values]
    return first, [round((value - hi) / fine) * fine for value, hi in zip(values, first, strict=True)]


def _element(
    row: tuple[list[Fraction], list[Fraction]], column: tuple[list[Fraction], list[Fraction]], slices: int
) -> Fraction:
    def dot(x: list[Fraction], y: list[Fraction]) -> Fraction:
        return sum((u * v for u, v in zip(x, y, strict=True)), Fraction(0))

    total = dot(row[0], column[0])
    if slices == 2:
        total = rounded(total + dot(row[0], column[1]), "float64")
        total = rounded(total + dot(row[1], column[0]), "float64")
    return total


def true_product(terms: Sequence[Term]) -> list[list[Fraction]]:
    """Σ scale·B·A without any rounding."""
    return [
        [
            sum(
                (Fraction(term.scale) * value * term.a[k][j] for term in terms for k, value in enumerate(term.b[i])),
                Fraction(0),
            )
            for j in range(len(terms[0].a[0]))
        ]
        for i in range(len(terms[0].b))
    ]


def merged_bits(base: Patterns, name: str, terms: Sequence[Term], out_name: str | None = None) -> Patterns:
    """The patterns of the merged tensor, given those of the base.

    Raises:
        TooLargeError: A sum does not fit in the working or the output format.
    """
    out_name = out_name or name
    work = working(name, out_name)
    deltas = product(terms, 1 if work == "float32" else 2)
    return [
        [_merged(pattern, name, rounded(delta, work), work, out_name) for pattern, delta in zip(*row, strict=True)]
        for row in zip(base, deltas, strict=True)
    ]


def _merged(pattern: int, name: str, delta: Fraction, work: str, out_name: str) -> int:
    if delta == 0:
        return cast_bits(pattern, name, out_name)
    total = rounded(decode(pattern, name) + delta, work)
    return encode(total, out_name)


def cast_bits(pattern: int, name: str, out_name: str) -> int:
    """The pattern in another format, rounded once; the sign of zero stays."""
    value = decode(pattern, name)
    if value == 0 and pattern:
        return FORMATS[out_name].sign
    return encode(value, out_name)
