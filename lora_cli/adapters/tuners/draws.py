"""What torch's generator draws, without drawing the rest: places and numbers that a tuner's file leaves to a seed.

torch's generator on a CPU is the Mersenne Twister (Matsumoto and Nishimura 1998), which numpy has too. `torch.randperm`
shuffles by Fisher and Yates from the front, so its first places need as many draws; with more than 2^32 / 20 places it
does so from the back ("inside out"), and every draw counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lora_cli.adapters.formula import Given

    Places = np.ndarray[tuple[int], np.dtype[np.int64]]

_FEW = (2**32 - 1) // 20
_AT_ONCE = 1 << 20


def is_seed(value: object) -> bool:
    """Whether `torch.Generator.manual_seed` takes it."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def permuted(seed: int, of: int, count: int) -> Places:
    """Return the first `count` of `torch.randperm(of, generator=torch.Generator().manual_seed(seed))`.

    Args:
        seed: A seed; torch uses its last 32 bits.
        of: How many places there are.
        count: At most as many.
    """
    import numpy as np

    # Frozen by numpy (NEP 19): the same draws for ever.
    state = np.random.RandomState(seed & 0xFFFFFFFF)
    if of < _FEW:
        return _from_the_front(state, of, count)
    return _from_the_back(state, of, count)


def drawn(given: Given, count: int) -> Tensor:
    """Draw different places of a matrix, row · width + column, as the setting `seed` says."""
    import torch

    seed = given.settings["seed"]
    assert isinstance(seed, int)  # noqa: S101 (`problem` has looked)
    return torch.from_numpy(permuted(seed, math.prod(given.matrix), count))


class Uniform:
    """Numbers that torch's `uniform_` draws on a CPU in float32, one tensor after the other.

    A draw is 24 bits; PEFT's machines multiply and add in one rounding (FMA), or in two, one unit apart.
    """

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def between(self, bound: float, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Return the next numbers from -bound to bound, rounded once."""
        import numpy as np

        low, high = np.float32(-bound), np.float32(bound)
        found = np.empty(count, np.float32)
        for first in range(0, count, _AT_ONCE):
            part = found[first : first + _AT_ONCE]
            share = (_draws(self._state, len(part)) & 0xFFFFFF).astype(np.float64) * 2.0**-24
            part[:] = share * np.float64(high - low) + np.float64(low)
        return found


def _draws(state: np.random.RandomState, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    import numpy as np

    return state.randint(0, 1 << 32, size=count, dtype=np.uint32)


def _from_the_front(state: np.random.RandomState, of: int, count: int) -> Places:
    import numpy as np

    places = np.arange(count)
    draws = places + _draws(state, count).astype(np.int64) % (of - places)
    if count == of:
        draws[-1] = of - 1  # the last one is what is left
    moved: dict[int, int] = {}
    for place, drawn in enumerate(draws.tolist()):
        places[place] = moved.get(drawn, drawn)
        moved[drawn] = moved.get(place, place)
    return places


def _from_the_back(state: np.random.RandomState, of: int, count: int) -> Places:
    import numpy as np

    places = np.arange(count)
    for first in range(0, of, _AT_ONCE):
        last = min(first + _AT_ONCE, of)
        halves = _draws(state, 2 * (last - first)).astype(np.uint64)
        now = np.arange(first, last)
        drawn = ((halves[::2] << np.uint64(32) | halves[1::2]) % (now + 1).astype(np.uint64)).astype(np.int64)
        early = max(0, min(count - first, last - first))
        for place, other in zip(now[:early].tolist(), drawn[:early].tolist(), strict=True):
            places[place] = places[other]
            places[other] = place
        hits = early + np.flatnonzero(drawn[early:] < count)
        places[drawn[hits]] = now[hits]  # of several the last one stays
    return places
