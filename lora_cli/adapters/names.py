"""Renaming as small, composable, invertible mappers.

A mapper takes a name and gives the new one, or None for a name that it does not concern. Its inverse takes back exactly
what it gave: for every name, `mapper(name)` is None or `mapper.inverse(mapper(name)) == name`. (The idea of leaves and
composers is that of d9d's state mappers.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Mapper(Protocol):
    """A partial, invertible map of names."""

    def __call__(self, name: str, /) -> str | None:
        """Return the new name, or None outside the domain."""
        ...

    @property
    def inverse(self) -> Mapper:
        """The map that goes back."""
        ...

    def __str__(self) -> str:
        """Describe it for a person."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Every name stays."""

    def __call__(self, name: str) -> str | None:
        return name

    @property
    def inverse(self) -> Mapper:
        return self

    def __str__(self) -> str:
        return "as they are"


@dataclass(frozen=True, slots=True)
class Prefix:
    """`old` at the start becomes `new`; either may be empty. Both sides are empty or end in a dot."""

    old: str
    new: str

    def __call__(self, name: str) -> str | None:
        return self.new + name[len(self.old) :] if name.startswith(self.old) else None

    @property
    def inverse(self) -> Mapper:
        return Prefix(self.new, self.old)

    def __str__(self) -> str:
        return f"{self.old}* → {self.new}*"


@dataclass(frozen=True, slots=True)
class Subtree:
    """The name `old` and everything below it (`old.…`) becomes `new`."""

    old: str
    new: str

    def __call__(self, name: str) -> str | None:
        inside = name == self.old or name.startswith(self.old + ".")
        return self.new + name[len(self.old) :] if inside else None

    @property
    def inverse(self) -> Mapper:
        return Subtree(self.new, self.old)

    def __str__(self) -> str:
        return f"{self.old} → {self.new}"


@dataclass(frozen=True)
class Table:
    """Single names become other single names.

    Raises:
        ValueError: Two names would become one.
    """

    pairs: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(set(self.pairs.values())) != len(self.pairs):
            raise ValueError("two names would become one")

    def __call__(self, name: str) -> str | None:
        return self.pairs.get(name)

    @property
    def inverse(self) -> Mapper:
        return Table({new: old for old, new in self.pairs.items()})

    def __str__(self) -> str:
        return f"{len(self.pairs)} names by table"


@dataclass(frozen=True)
class Wrap:
    """A parameter of a wrapped module moves below it: `X.weight` → `X.base.weight`, for each X in `modules`."""

    modules: frozenset[str]
    child: str = "base"

    def __call__(self, name: str) -> str | None:
        module, _, parameter = name.rpartition(".")
        return f"{module}.{self.child}.{parameter}" if module in self.modules else None

    @property
    def inverse(self) -> Mapper:
        return Unwrap(self.modules, self.child)

    def __str__(self) -> str:
        return f"X.weight → X.{self.child}.weight for {len(self.modules)} modules"


@dataclass(frozen=True)
class Unwrap:
    """The inverse of `Wrap`."""

    modules: frozenset[str]
    child: str = "base"

    def __call__(self, name: str) -> str | None:
        wrapped, _, parameter = name.rpartition(".")
        module, _, child = wrapped.rpartition(".")
        return f"{module}.{parameter}" if child == self.child and module in self.modules else None

    @property
    def inverse(self) -> Mapper:
        return Wrap(self.modules, self.child)

    def __str__(self) -> str:
        return f"X.{self.child}.weight → X.weight for {len(self.modules)} modules"


@dataclass(frozen=True)
class Parametrize:
    """A parameter moves to where `torch.nn.utils.parametrize` keeps it: `X.P` → `X.parametrizations.P.original`."""

    parameters: frozenset[str]

    def __call__(self, name: str) -> str | None:
        if name not in self.parameters:
            return None
        module, dot, parameter = name.rpartition(".")
        return f"{module}{dot}parametrizations.{parameter}.original"

    @property
    def inverse(self) -> Mapper:
        return Unparametrize(self.parameters)

    def __str__(self) -> str:
        return f"X.P → X.parametrizations.P.original for {len(self.parameters)} parameters"


@dataclass(frozen=True)
class Unparametrize:
    """The inverse of `Parametrize`."""

    parameters: frozenset[str]

    def __call__(self, name: str) -> str | None:
        parts = name.split(".")
        if len(parts) < 3 or (parts[-3], parts[-1]) != ("parametrizations", "original"):
            return None
        plain = ".".join([*parts[:-3], parts[-2]])
        return plain if plain in self.parameters else None

    @property
    def inverse(self) -> Mapper:
        return Parametrize(self.parameters)

    def __str__(self) -> str:
        return f"X.parametrizations.P.original → X.P for {len(self.parameters)} parameters"


@dataclass(frozen=True)
class Chain:
    """One mapper after the other; a name that one of them does not concern is outside."""

    steps: tuple[Mapper, ...]

    def __call__(self, name: str) -> str | None:
        current: str | None = name
        for step in self.steps:
            current = step(current) if current is not None else None
        return current

    @property
    def inverse(self) -> Mapper:
        return Chain(tuple(step.inverse for step in reversed(self.steps)))

    def __str__(self) -> str:
        return ", then ".join(str(step) for step in self.steps) or str(Identity())


@dataclass(frozen=True)
class First:
    """The first mapper that concerns a name decides; a result that would not lead back to the name is outside."""

    choices: tuple[Mapper, ...]

    def __call__(self, name: str) -> str | None:
        result = self._apply(name)
        return result if result is not None and First._back(self, result) == name else None

    def _apply(self, name: str) -> str | None:
        return next((new for choice in self.choices if (new := choice(name)) is not None), None)

    def _back(self, name: str) -> str | None:
        return next((old for choice in self.choices if (old := choice.inverse(name)) is not None), None)

    @property
    def inverse(self) -> Mapper:
        return First(tuple(choice.inverse for choice in self.choices))

    def __str__(self) -> str:
        return "; ".join(str(choice) for choice in self.choices)


def colliding(mapper: Mapper, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (first name, second name, result) wherever two names become one; names outside the domain stay."""
    seen: dict[str, str] = {}
    collisions = []
    for name in names:
        result = mapper(name)
        new = name if result is None else result
        if new in seen:
            collisions.append((seen[new], name, new))
        seen[new] = name
    return collisions
