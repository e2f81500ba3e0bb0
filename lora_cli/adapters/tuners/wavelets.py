"""Wavelets by name: the filters that put a signal together again from its coarse and its fine half.

`data/wavelets.json` has the coarse filters: Daubechies' (1988, "Orthonormal bases of compactly supported wavelets";
1992, "Ten Lectures on Wavelets", tables 6.1, 6.3 and 8.2), with the digits that PEFT has (`peft.tuners.waveft`),
also where these are not his (coif4). Its coif5 is of the wrong length, and no adapter can have been trained with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

Filter = tuple[float, ...]


@cache
def wavelets() -> Mapping[str, Filter]:
    """The coarse filter of each wavelet, with an even number of entries."""
    text = (resources.files("lora_cli") / "data" / "wavelets.json").read_text("utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return {name: _scaled(name, values) for name, values in table.items()}


def fine(coarse: Filter) -> Filter:
    """The filter of the fine half: the other one's mirror image, with the sign of every second entry changed."""
    return tuple((-1) ** at * value for at, value in enumerate(reversed(coarse)))


def _scaled(name: str, values: list[float]) -> Filter:
    # The table has coiflets as in the book, with sum 1 or nearly; the others' sum is the root of 2.
    factor = math.sqrt(2) if name.startswith("coif") else 1.0
    return tuple(value * factor for value in values)
