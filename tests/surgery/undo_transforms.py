"""The transforms of docs/undo-file.md, from the page alone, one number at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

Floats = list[list[float]]
Numbers = list[tuple[float, float]]
WAVELETS = Path(__file__).parents[2] / "lora_cli" / "data" / "wavelets.json"
PARTS = [float.fromhex(text) for text in ("0x1.921fb54400000p+0", "0x1.0b4611a600000p-34", "0x1.3198a2e037073p-69")]


def times(x: tuple[float, float], y: tuple[float, float]) -> tuple[float, float]:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def circle(n: int) -> Numbers:
    """Cosine and sine of 2πk/n."""
    return [cosine_and_sine(k / n * (2 * math.pi)) for k in range(n)]


def cosine_and_sine(angle: float) -> tuple[float, float]:
    quarters = float(round(angle * (2.0 / math.pi)))
    rest = angle
    for part in PARTS:
        rest = rest - quarters * part
    square = rest * rest
    cosine = series(square, [(-1.0) ** n / math.factorial(2 * n) for n in range(9)])
    sine = series(square, [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(9)]) * rest
    turns = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]
    return turns[int(quarters) % 4]


def series(square: float, factors: list[float]) -> float:
    total = factors[-1]
    for factor in reversed(factors[:-1]):
        total = total * square + factor
    return total


def fourier(out: int, inner: int, at: Sequence[int], amounts: Sequence[float]) -> Floats:
    """Rows two by two, as the real and the imaginary part of one transform."""
    turns, roots = circle(out), circle(inner)
    spots = [divmod(place, inner) for place in at]
    every = [(row, column, amount) for (row, column), amount in zip(spots, amounts, strict=True)]
    every += [((out - row) % out, (inner - column) % inner, amount) for row, column, amount in every]
    spectra = []
    for i in range(out + out % 2):
        spectrum = [(0.0, 0.0)] * inner
        for row, column, amount in every:
            cosine, sine = turns[row * i % out]
            real, imaginary = spectrum[column]
            spectrum[column] = real + cosine * amount, imaginary + sine * amount
        spectra.append(spectrum)
    made = []
    for one, other in zip(spectra[::2], spectra[1::2], strict=True):
        pair = [(a - d, b + c) for (a, b), (c, d) in zip(one, other, strict=True)]
        found = transformed(pair, roots)
        made += [[real for real, _ in found], [imaginary for _, imaginary in found]]
    return made[:out]


def transformed(x: Numbers, roots: Numbers) -> Numbers:
    """Σₖ x[k]·exp(2πi·jk/n), by Stockham's steps."""
    n = len(x)
    done, rest = 1, n
    for p in primes(n):
        fewer = rest // p
        made = [(0.0, 0.0)] * n
        for j in range(fewer):
            for d in range(done):
                values = [x[(q * fewer + j) * done + d] for q in range(p)]
                for t in range(p):
                    twiddle = roots[j * t * (n // rest) % n]
                    made[(j * p + t) * done + d] = times(combined(values, t, roots), twiddle)
        x, done, rest = made, done * p, fewer
    return x


def combined(values: Numbers, t: int, roots: Numbers) -> tuple[float, float]:
    p = len(values)
    total = values[0]
    for q in range(1, p):
        if p == 2:
            more = values[1] if t == 0 else (-values[1][0], -values[1][1])
        else:
            more = times(values[q], roots[q * t % p * (len(roots) // p)])
        total = total[0] + more[0], total[1] + more[1]
    return total


def primes(n: int) -> list[int]:
    """Prime factors, the smallest first."""
    found, p = [], 2
    while n > 1:
        if n % p:
            p += 1
        else:
            found.append(p)
            n //= p
    return found


def wavelet(name: str, out: int, inner: int, at: Sequence[int], amounts: Sequence[float]) -> Floats:
    """The inverse transform of one level: first along rows, then down columns."""
    coarse = json.loads(WAVELETS.read_text())[name]
    coarse = [value * math.sqrt(2) for value in coarse] if name.startswith("coif") else coarse
    filters = coarse, [(-1) ** n * value for n, value in enumerate(reversed(coarse))]
    sides = [size + len(coarse) - 2 + size % 2 for size in (out, inner)]
    laid = [[0.0] * sides[1] for _ in range(sides[0])]
    for place, amount in zip(at, amounts, strict=True):
        row, column = divmod(place, inner)
        laid[row + (sides[0] - out) // 2][column + (sides[1] - inner) // 2] = amount
    high, wide = sides[0] // 2, sides[1] // 2
    halves = []
    for fine_down in (0, 1):
        quarters = [
            [row[fine_down * wide : (fine_down + 1) * wide] for row in laid[side * high : (side + 1) * high]]
            for side in (0, 1)
        ]
        rows = zip(*quarters, strict=True)
        halves.append([[joined(pair, j, filters) for j in range(inner)] for pair in rows])
    columns = [list(zip(*half, strict=True)) for half in halves]
    return [[joined((columns[0][j], columns[1][j]), i, filters) for j in range(inner)] for i in range(out)]


def joined(halves: Sequence[Sequence[float]], i: int, filters: Sequence[Sequence[float]]) -> float:
    """Element i of a signal."""
    taps, total = len(filters[0]) // 2, 0.0
    for n in range(taps):
        for half, values in zip(halves, filters, strict=True):
            total += half[i // 2 + n] * values[i % 2 + 2 * (taps - 1 - n)]
    return total
