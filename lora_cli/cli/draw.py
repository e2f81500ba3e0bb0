"""Small building blocks for views: every text that goes through here is made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lora_cli.cli.text import shown

if TYPE_CHECKING:
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


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Names on the left, what is to be said of them on the right; rows without content are left out."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, "", (), []):
            table.add_row(f"  {name}", line(value) if not hasattr(value, "__rich_console__") else value)
    return table


def grid(heads: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> Table:
    """A table with a head and no lines but one.

    Args:
        heads: Names of the columns.
        rows: Their content.
        right: Columns of numbers.
    """
    from rich import box
    from rich.table import Table

    numbers = set(right)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for position, head in enumerate(heads):
        table.add_column(head, justify="right" if position in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(line("" if cell is None else cell) for cell in row))
    return table
