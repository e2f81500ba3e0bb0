"""The Mersenne Twister as docs/undo-file.md draws from it: places, and numbers of shared matrices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

Floats = list[list[float]]


def twister(seed: int) -> Callable[[], int]:
    """Words of 32 bits, from a state that is begun as Matsumoto and Nishimura's `init_genrand` begins it."""
    words = [seed & 0xFFFFFFFF]
    for at in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + at) & 0xFFFFFFFF)
    state = random.Random()
    state.setstate((3, (*words, 624), None))
    return lambda: state.getrandbits(32)


def places(seed: int, of: int, count: int) -> list[int]:
    """The first of a permutation of so many places."""
    draw = twister(seed)
    found = {at: at for at in range(count)}
    for at in range(count):
        other = at + draw() % (of - at)
        found[at], found[other] = found.get(other, other), found[at]
    return [found[at] for at in range(count)]


def shared(seed: int, *shapes: tuple[int, int]) -> list[Floats]:
    """Matrices that are drawn one after the other."""
    draw, made = twister(seed), []
    for rows, columns in shapes:
        high = float(np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))))
        numbers = [
            float(np.float32((draw() % (1 << 24)) * 2.0**-24 * (2 * high) - high)) for _ in range(rows * columns)
        ]
        made.append([numbers[at * columns : (at + 1) * columns] for at in range(rows)])
    return made
