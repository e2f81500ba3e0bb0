"""Text for people: what came from a file is made harmless here, and numbers are made short."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 300
"""Characters of one name that are shown; JSON has the whole."""

EMPTY = '""'
"""How a name is shown that has no characters."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_COMBINING = {"Mn", "Me", "Mc"}
_BLANK = frozenset(
    chr(code)
    for first, last in (
        (0x34F, 0x34F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)
"""Letters and marks that nobody sees: what Unicode's Default_Ignorable_Code_Point holds of them (variation selectors,
fillers, joiners). Two names that differ by them alone would look the same."""


def shown(value: object, limit: int = LONGEST) -> str:
    """Return `value` as text that cannot steer a terminal: control, format and direction characters as escapes.

    So are characters that nobody sees. Idempotent. Combining characters are kept, but no more than four on one another.
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text if len(text) <= limit else f"{text[: limit - 1]}…"
    out: list[str] = []
    stacked = 0
    for character in text[: limit + 1]:
        category = unicodedata.category(character)
        stacked = stacked + 1 if category in _COMBINING else 0
        harmless = category not in _INVISIBLE and character not in _BLANK and stacked <= 4
        out.append(character if harmless else _escaped(character))
    joined = "".join(out)
    return joined if len(joined) <= limit else f"{joined[: limit - 1]}…"


def _escaped(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and the Hub count: 2.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(value: float) -> str:
    """A number of a person's length: 2, 0.353553, 1e-07."""
    return f"{value:g}"


def ulps(value: int) -> str:
    """A distance in units in the last place, of which there may be very many: 3, 16,762,001, 4.6e+18."""
    return f"{value:,}" if value < 10**9 else f"{value:.2g}"


def count(amount: int, noun: str) -> str:
    """An amount with its noun: 1 tensor, 14 tensors."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def shape(sizes: Iterable[int]) -> str:
    """The shape of a tensor: 48×32."""
    return "×".join(map(str, sizes)) or "scalar"


def few(names: Iterable[object], most: int = 8) -> str:
    """The first names in one line, and how many more there are."""
    listed = list(names)
    more = f" … and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(str(name) or EMPTY for name in listed[:most]) + more


def spans(numbers: Iterable[int]) -> str:
    """Numbers in their order, those that follow one another as a span: 0-2, 1, 4-5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def duration(seconds: float) -> str:
    """A time for people: 0.3 s, 2 min 5 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def parse_size(text: str) -> int:
    """Parse `256MiB`, `1GB`, `4096`: GB is 10^9, GiB is 2^30.

    Raises:
        ValueError: It is no positive size.
    """
    digits = text.strip().rstrip("BbKkMmGgTtIi")
    unit = text.strip()[len(digits) :].lower()
    factors = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        factors[f"{letter}b"] = factors[letter] = 1000**power
        factors[f"{letter}ib"] = 1024**power
    if unit not in factors:
        raise ValueError(f"unknown unit {unit!r}; use MB, MiB, GB or GiB")
    amount = float(digits)
    if not 0 < amount < 1e15:
        raise ValueError("must be more than 0")
    return int(amount * factors[unit])


def alike(names: Sequence[str], most: int = 3) -> str:
    """Names that are alike as one, and else a few: x.experts.0-7.up_proj/gate_proj."""
    columns = [list(dict.fromkeys(parts)) for parts in zip(*(name.split(".") for name in names), strict=False)]
    if len({name.count(".") for name in names}) > 1 or math.prod(map(len, columns)) != len({*names}):
        return few(names, most)
    return ".".join(map(_alternatives, columns))


def _alternatives(parts: Sequence[str]) -> str:
    if len(parts) > 1 and all(part.isdecimal() for part in parts):
        return spans(sorted(map(int, parts))).replace(", ", "/")
    return "/".join(parts)
