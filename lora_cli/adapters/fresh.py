"""What can be said of a fresh adapter, for files and for live models alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.inits import GAUSSIAN_STD, INITS
from lora_cli.adapters.strength import LARGEST
from lora_cli.adapters.targets import ALL_LINEAR, Target
from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.errors import UsageError

FACTOR_DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Storage types of factors: what people call them, and what a header does."""

PRINCIPAL = ("pissa", "pissa_niter_N", "olora")
"""Inits that take the factors from the weight, and the product of these off it; N is a whole number."""

_PRINCIPAL = re.compile(r"olora|pissa(?:_niter_([0-9]{1,3}))?")


@dataclass(frozen=True, kw_only=True)
class FreshOptions:
    """What can be said of a fresh adapter.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale; the rank unless given.
        targets: What gets factors; see `adapters.targets.Target`. One alone may be given without a tuple.
        exclude: The same, for modules to leave out.
        init: How the factors begin: one of `INITS` for A, with B zero; or one of `PRINCIPAL`, which change the base.
        std: Standard deviation of the init `gaussian`.
        rslora: Divide alpha by the square root of the rank.
        dtype: Storage type of the factors: a key of `FACTOR_DTYPES`.
        seed: Decides the numbers of A, together with the names of the modules.

    Raises:
        UsageError: A value that makes no sense; names the field.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[Target, ...] = (ALL_LINEAR,)
    exclude: tuple[Target, ...] = ()
    init: str = "kaiming"
    std: float | None = None
    rslora: bool = False
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was said."""
        for name in ("targets", "exclude"):
            given = getattr(self, name)
            alone = isinstance(given, str | re.Pattern) or callable(given)
            object.__setattr__(self, name, (given,) if alone else tuple(given))
            right = all(isinstance(item, str | re.Pattern) or callable(item) for item in getattr(self, name))
            check(right, name, "patterns, compiled ones, or functions", given)
        check(_whole(self.rank) and self.rank > 0, "rank", "a whole number over 0", self.rank)
        check(_positive(self.alpha), "alpha", "a number over 0", self.alpha)
        known = self.init in INITS or _PRINCIPAL.fullmatch(self.init) is not None
        check(known, "init", ", ".join((*INITS, *PRINCIPAL)), self.init)
        check(_positive(self.std), "std", "a number over 0", self.std)
        check(self.std is None or self.init == "gaussian", "std", "only with the init gaussian", self.std)
        check(self.dtype in FACTOR_DTYPES, "dtype", ", ".join(FACTOR_DTYPES), self.dtype)
        check(_whole(self.seed), "seed", "a whole number", self.seed)

    @property
    def scale(self) -> Scale:
        """What the product of the factors is multiplied by."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return Scale(alpha, self.rank, self.rslora, "alpha / rank" if self.alpha is not None else "alpha = rank")

    @property
    def storage(self) -> DType:
        """Storage type of the factors."""
        return DTYPES[FACTOR_DTYPES[self.dtype]]

    @property
    def width(self) -> float:
        """Standard deviation of the init `gaussian`."""
        return GAUSSIAN_STD if self.std is None else self.std

    @property
    def principal(self) -> bool:
        """Whether the factors are taken from the weight, which changes the base."""
        return self.init not in INITS

    @property
    def iterations(self) -> int | None:
        """Power iterations of the randomised singular value decomposition; None for the whole one, and other inits."""
        found = _PRINCIPAL.fullmatch(self.init)
        return int(found[1]) if found and found[1] else None


def check(right: bool, field: str, expected: str, found: object) -> None:
    """Refuse a value that makes no sense.

    Raises:
        UsageError: With the field.
    """
    if not right:
        raise UsageError(f"{field} makes no sense", tensor=field, expected=expected, found=found)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: float | None) -> bool:
    return value is None or 0 < value < LARGEST  # NaN is not
