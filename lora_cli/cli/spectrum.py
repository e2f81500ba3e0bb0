"""How `lora-cli inspect --spectrum` shows singular values."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import median_low
from typing import TYPE_CHECKING

from lora_cli.cli.draw import Bars, facts, grid, line
from lora_cli.cli.text import count, number

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_cli.surgery.spectrum import AdapterSpectrum, ModuleSpectrum

NAMED = 3
"""Modules with most energy that are named, and common ranks that are told of."""


def view(spectrum: AdapterSpectrum, rows: int) -> Iterator[RenderableType]:
    """What an adapter's changes are like, for people: a summary, and a row of bars for each module."""
    yield facts(_summary(spectrum))
    yield line()
    heads = ["module", "rank", "norm", "largest", "90%", "99%", "linear spectrum"]
    yield grid(heads, [_row(module) for module in spectrum.modules[:rows]], right=range(1, 6))


def _row(module: ModuleSpectrum) -> list[object]:
    return [
        module.module if module.stack is None else f"{module.module}: {module.stack} matrices",
        module.rank,
        _short(module.norm),
        _short(module.largest),
        module.rank_90,
        module.rank_99,
        Bars(module.profile),
    ]


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _summary(spectrum: AdapterSpectrum) -> Iterator[tuple[str, object]]:
    changing = [module for module in spectrum.modules if module.norm]
    if not spectrum.scaled:
        yield "spectrum", "of B·A alone, as if the scale were 1: nothing says what it is"
    if spectrum.before:
        yield "spectrum", f"of what a merge adds, after {spectrum.before} is taken off"
    elif spectrum.initial:
        yield "spectrum", f"with what {spectrum.initial} took off the base; --initial takes that off again"
    if any(module.magnitude for module in spectrum.modules):
        yield "DoRA", "spectrum of the change of direction alone, before outputs get their lengths"
    if any(module.stack is not None for module in spectrum.modules):
        yield "stacks", "the n-th bar is the root mean square of the n-th values of all matrices; ranks are of that"
    zero = len(spectrum.modules) - len(changing)
    of_them = f", {zero:,} of them zero" if zero else ""
    yield "norm", f"{_short(spectrum.norm)}, of {count(len(spectrum.modules), 'module')}{of_them}"
    if len(changing) > 1:
        yield "energy", _where(changing)
    ranks = Counter(module.rank for module in changing if module.rank > 1).most_common()
    for rank, _ in ranks[:NAMED]:
        yield f"rank {rank}", _used(rank, [module for module in changing if module.rank == rank])
    if len(ranks) > NAMED:
        yield "", f"and {count(len(ranks) - NAMED, 'other rank')}"


def _where(changing: Sequence[ModuleSpectrum]) -> str:
    """Which modules have most of the energy."""
    largest = sorted(changing, key=lambda module: -module.share)
    half = min(bisect_left(list(accumulate(module.share for module in largest)), 0.5) + 1, len(largest))
    named = ", ".join(f"{module.module} {module.share:.1%}" for module in largest[: min(half, NAMED)])
    return f"half in {half:,} of {count(len(changing), 'module')}: {named}{', …' if half > NAMED else ''}"


def _used(rank: int, modules: Sequence[ModuleSpectrum]) -> str:
    """Whether so many ranks are used up by the modules that have them."""
    needed = [module.rank_99 for module in modules]
    most, middle = max(needed), f"median {median_low(needed)}"
    if most < rank:
        return f"99% of every module's energy is in {most} of {rank} ranks ({middle}): rank {most} would keep that"
    full = sum(1 for module in modules if module.rank_99 == rank)
    return f"99% of the energy takes all {rank} in {full:,} of {count(len(modules), 'module')} ({middle})"
