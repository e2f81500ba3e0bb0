"""How the factors of a stack of matrices, such as the experts of a layer, lie in their tensors, and which is which.

    packing            A                        B                        who writes it
    packed             (experts·rank, met)      (given, rank·experts)    PEFT; in B the expert is fastest
    packed-by-expert   (experts·rank, met)      (given, experts·rank)    Unsloth before September 2026
    stacked            (experts, rank, met)     (experts, given, rank)   Megatron-Bridge, Tinker, MLX
    stacked-last       (experts, rank, met)     (given, rank, experts)   Megatron-Bridge for vLLM
    stacked-turned     (experts, met, rank)     (experts, rank, given)   torchtune

A *meets* one side of each matrix and B *gives* the other. Of a parameter (experts, d1, d2) A may meet the rows (d1) or
the columns (d2). Shapes say which, but for squares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lora_cli.errors import UsageError

Packing = Literal["packed", "packed-by-expert", "stacked", "stacked-last", "stacked-turned"]
Side = Literal["rows", "columns"]
Order = Literal["fastest", "slowest"]

PACKED: tuple[Packing, ...] = ("packed", "packed-by-expert")
"""Those of two dimensions, of which shapes cannot tell one from the other."""
FASTEST: tuple[Packing, ...] = ("packed", "stacked-last")
"""Those in whose B the expert is fastest."""

WORDS: dict[Packing, str] = {
    "packed": "in B the expert is fastest",
    "packed-by-expert": "in B the expert is slowest",
    "stacked": "A is (experts, rank, n), B (experts, n, rank)",
    "stacked-last": "A is (experts, rank, n), B (n, rank, experts)",
    "stacked-turned": "A is (experts, n, rank), B (experts, rank, n)",
}


class Sizes(NamedTuple):
    """What factors of some packing say.

    Attributes:
        rank: Of each matrix.
        met: Numbers on the side that A meets.
        given: Numbers on the other one.
    """

    rank: int
    met: int
    given: int


def sizes(packing: Packing, a: tuple[int, ...], b: tuple[int, ...], experts: int) -> Sizes | None:
    """What factors of these shapes say of so many experts; None where they cannot be packed so.

    Where each expert has the same factor, `stacked` may hold it once.
    """
    if experts < 1 or 0 in a + b:
        return None
    if packing in PACKED:
        fits = len(a) == len(b) == 2 and a[0] == b[1] and a[0] % experts == 0
        return Sizes(a[0] // experts, a[1], b[0]) if fits else None
    if not len(a) == len(b) == 3:
        return None
    if packing == "stacked":
        (a_count, rank, met), (b_count, given, shared) = a, b
    elif packing == "stacked-last":
        (a_count, rank, met), (given, shared, b_count) = a, b
    else:
        (a_count, met, rank), (b_count, shared, given) = a, b
    counts = {a_count, b_count} - ({1} if packing == "stacked" else set())
    return Sizes(rank, met, given) if rank == shared and counts <= {experts} else None


def experts_in(packing: Packing, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> int:
    """How many experts factors of these shapes are for, as far as they say it.

    Args:
        packing: How they are packed.
        a: The shape of A.
        b: That of B.
        rank: Of each matrix; only packed factors need it.
    """
    if packing in PACKED:
        return max(1, a[0] // max(1, rank))
    return max(a[0], b[2] if packing == "stacked-last" else b[0])


def ranks_of(a: tuple[int, ...], b: tuple[int, ...]) -> dict[Packing, int]:
    """The packings that factors of three dimensions can have, each with the rank that they have in it."""
    packings: tuple[Packing, ...] = ("stacked", "stacked-last", "stacked-turned")
    if not len(a) == len(b) == 3:
        return {}
    found = ((packing, sizes(packing, a, b, experts_in(packing, a, b, 1))) for packing in packings)
    return {packing: said.rank for packing, said in found if said is not None}


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What a person says of the factors of experts (`--expert-layout`).

    Attributes:
        side: Which side of each expert's matrix A meets: `rows`, its first dimension, or `columns`.
        order: Whether the expert is `fastest` or `slowest` in the order of B's numbers.
    """

    side: Side | None = None
    order: Order | None = None

    @staticmethod
    def parse(text: str) -> ExpertLayout:
        """Read one word of each, such as `columns`, `slowest` or `rows-slowest`.

        Raises:
            UsageError: Another word, or two of a kind.
        """
        words = text.split("-")
        sides: list[Side] = [side for side in get_args(Side) if side in words]
        orders: list[Order] = [order for order in get_args(Order) if order in words]
        if len(sides) > 1 or len(orders) > 1 or len(words) != len(sides) + len(orders):
            raise UsageError(
                "--expert-layout is not understood",
                found=text,
                expected="rows or columns, fastest or slowest, or one of each, such as rows-slowest",
            )
        return ExpertLayout(sides[0] if sides else None, orders[0] if orders else None)

    def __str__(self) -> str:
        return "-".join(word for word in (self.side, self.order) if word)

    def allows(self, packing: Packing) -> bool:
        """Whether a packing is not against it."""
        return self.order is None or (self.order == "fastest") == (packing in FASTEST)


# Which side PEFT's A meets


_OLD, _BETWEEN, _NOW = "up to 0.18", "0.19.0", "from 0.19.1 on"
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?P<rest>.*)", re.DOTALL)
"""A release, and what makes it a development version, such as `.dev0@1f3a`."""


def side_of_peft(version: str | None, transposed: bool | None) -> Side | None:
    """The side of a parameter (experts, d1, d2) that A meets in some version of PEFT; None where that is not known.

    PEFT up to 0.18 had A meet the rows. Since 0.19.1 (huggingface/peft#3165) A meets the columns, but of modules that
    have `is_transposed` set, which store (experts, in, out), the rows. 0.19.0 did the opposite.

    Args:
        version: As the config says it. PEFT writes it since 0.18; where it is missing, an old one or another tool that
            does as PEFT does now wrote the file.
        transposed: Whether the module has `is_transposed`; None if that is not known.
    """
    sides = {
        _side(era, turned)
        for era in _eras(version)
        for turned in ((True, False) if transposed is None else (transposed,))
    }
    return sides.pop() if len(sides) == 1 else None


def is_new(version: str | None) -> bool:
    """Whether a version is known to do as the newest one does."""
    return set(_eras(version)) == {_NOW}


def eras_words(version: str | None) -> str:
    """The versions that do as one does, or may do so: equal for two of which the same is known."""
    return " or ".join(_eras(version))


def _side(era: str, transposed: bool) -> Side:
    if era == _OLD:
        return "rows"
    return "rows" if transposed == (era == _NOW) else "columns"


def _eras(version: str | None) -> Iterator[str]:
    """The eras that a version may be of: one in development may be of that before it and of that after."""
    match = None if version is None else _VERSION.fullmatch(version)
    if match is None:
        yield _OLD
        yield _NOW
        if version is not None:
            yield _BETWEEN
        return
    release = tuple(int(number or 0) for number in match.groups()[:3])
    unsure = bool(match["rest"])
    if release < (0, 19, 0) or (unsure and release == (0, 19, 0)):
        yield _OLD
    if release == (0, 19, 0) or (unsure and (0, 18, 0) < release <= (0, 19, 1)):
        yield _BETWEEN
    if release >= (0, 19, 1):
        yield _NOW
