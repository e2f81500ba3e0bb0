"""Small building blocks for views: every text that goes through here is made harmless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from math import ceil
from statistics import fmean
from typing import TYPE_CHECKING

from lora_cli.cli.text import EMPTY, shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text


def line(*parts: object, style: str = "") -> Text:
    """One line of text; a pair (text, style) is drawn in that style."""
    from rich.text import Text

    text = Text(style=style)
    for part in parts:
        if isinstance(part, tuple):
            text.append(shown(part[0], 1000), part[1])
        else:
            text.append(shown(part, 1000))
    return text


NARROW = 40
"""On fewer columns than this, tables become plain lines: columns would lose what they say."""


def facts(rows: Iterable[tuple[str, object]]) -> Facts:
    """Names on the left, what is to be said of them on the right; rows without content are left out."""
    return Facts([(name, value) for name, value in rows if value not in (None, "", (), [])])


class Facts:
    """A table of two columns, or plain lines where there is no room for it."""

    def __init__(self, rows: list[tuple[str, object]]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table

        if options.max_width < NARROW:
            yield from (line(f"{name}: {value}" if name else value) for name, value in self._rows)
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows:
            table.add_row(f"  {name}", line(value))
        yield table


class Bars:
    """Numbers from the largest down as a row of bars on a linear scale, in a cell of a table.

    A bar is as high as its number's share of the first one, in eighths, rounded up: what is there is seen, and a blank
    is nothing but rounding. Of more numbers than bars each bar has the mean of some neighbours.
    """

    MOST = 16
    """Bars in a row."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = list(numbers)

    def drawn(self, *, ascii_only: bool) -> str:
        """The bars, or characters from thin to thick where a terminal knows only ASCII."""
        first = max(self._numbers, default=0.0)
        if not first:
            return ""
        marks = " .:-=+*#@" if ascii_only else " ▁▂▃▄▅▆▇█"
        count = min(self.MOST, len(self._numbers))
        edges = [bar * len(self._numbers) // count for bar in range(count + 1)]
        heights = [fmean(self._numbers[begin:end]) / first for begin, end in pairwise(edges)]
        return "".join(marks[ceil(8 * height) if height > _NOTHING else 0] for height in heights)


_NOTHING = 1e-12


def grid(
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Iterable[int] = (),
    named: Iterable[int] = (0,),
) -> NameTable:
    """A table of named things, with a head and no lines but one.

    Args:
        heads: Names of the columns.
        rows: Their content.
        right: Columns of numbers.
        named: Columns of dotted names.
    """
    columns = frozenset(named)
    named_rows = [[EMPTY if cell == "" and at in columns else cell for at, cell in enumerate(row)] for row in rows]
    return NameTable(heads, named_rows, frozenset(right), columns)


_GAP = 3
"""Columns between those of a table."""

_WORDS = 16
"""As wide a column of words stays beside names."""


class NameTable:
    """A table that says what all names begin with only once where it would be too wide otherwise."""

    def __init__(
        self, heads: Sequence[str], rows: list[list[object]], right: frozenset[int], named: frozenset[int]
    ) -> None:
        self._heads, self._rows, self._right, self._named = heads, rows, right, named

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.measure import Measurement

        self._rows = [
            [cell.drawn(ascii_only=options.ascii_only) if isinstance(cell, Bars) else cell for cell in row]
            for row in self._rows
        ]
        if options.max_width < NARROW:
            yield from (line("  ".join("" if cell is None else str(cell) for cell in row)) for row in self._rows)
            return
        table = self._table({})
        if Measurement.get(console, options.update(max_width=10_000), table).maximum > options.max_width:
            prefixes = {at: _shared_prefix(self._names(at)) for at in self._named if at < len(self._heads)}
            table = self._table(prefixes, self._room(options.max_width))
        yield table

    def _room(self, width: int) -> int:
        """How wide a column of names can be, beside whole numbers and words of some width."""
        columns = zip(self._heads, *self._rows, strict=True)
        widest = [max(len("" if cell is None else str(cell)) for cell in column) for column in columns]
        others = [
            most if at in self._right else min(most, _WORDS) for at, most in enumerate(widest) if at not in self._named
        ]
        # rich takes one more beside the first column.
        return max(0, width - sum(others) - _GAP * len(others) - 1) // max(1, len(widest) - len(others))

    def _names(self, column: int) -> list[str]:
        return [str(row[column]) for row in self._rows if row[column] is not None]

    def _table(self, prefixes: Mapping[int, str], room: int = 0) -> Table:
        """The table, where no name up to this width is broken."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        for position, head in enumerate(self._heads):
            prefix = prefixes.get(position)
            title = f"{head} in {shown(prefix.rstrip('.'))}" if prefix else head
            names = self._names(position) if position in prefixes else ()
            parts = (part for name in names for part in _cell(name.removeprefix(prefix or ""), room).split())
            longest = min(max((part.cell_len for part in parts), default=0), room)
            fixed = max(longest, len(head)) if longest else None
            right = position in self._right
            table.add_column(title, justify="right" if right else "left", overflow="fold", width=fixed)
        for row in self._rows:
            cells = ("" if cell is None else str(cell) for cell in row)
            named = (cell.removeprefix(prefixes.get(at) or "") for at, cell in enumerate(cells))
            table.add_row(*(_cell(cell, room if at in prefixes else 0) for at, cell in enumerate(named)))
        return table


def _cell(words: str, room: int) -> Text:
    """What stands in a cell: a dotted name that is wider than `room` goes on in the next line after a dot."""
    if not room or len(words) <= room:
        return line(words)
    rows = [""]
    for part in re.split(r"(?<=\.)", words):
        fits = len(rows[-1]) + len(part) <= room
        rows = [*rows[:-1], rows[-1] + part] if fits else [*filter(None, rows), part]
    from rich.text import Text

    return Text("\n").join(line(row) for row in rows)


def _shared_prefix(names: Sequence[str]) -> str:
    """The dotted parts that all names begin with, with their last dot; never a whole name."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    return f"{'.'.join(shared)}." if shared and len(names) > 1 else ""
