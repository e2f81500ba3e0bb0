"""Changes that are not factors to be multiplied: what tuners other than LoRA make of their tensors.

A `Method` is what one tuner does, as mathematics: it knows the names and shapes of its tensors and what becomes of a
matrix, and nothing of files. A `Formula` is a method with the tensors of one module. (The tuners that have them are in
`tuners`.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from lora_cli.adapters.adapter import Acts, Load, Parameter, Scale
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term

Setting = int | float | bool | str | tuple[int, ...]
"""A number or word that a method needs besides tensors; undo files hold it."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a method's tensors by the names of these."""

Settings = Mapping[str, Setting]

Shape = tuple[int, ...]
"""Of the parameter as the module holds it: (out, in), a convolution's (out, in/groups, k…), a vector's (out,)."""


@dataclass(frozen=True)
class Given:
    """What a method computes from.

    Attributes:
        tensors: Its tensors by name, as stored.
        settings: Numbers and words from the config.
        scale: What multiplies the change, the user's weight included.
        shape: The shape of the parameter.
        before: Reads what the module's weight was, whole, as a matrix (out × in); for methods that ask for it.
    """

    tensors: Mapping[str, Tensor]
    settings: Settings
    scale: float
    shape: Shape
    before: Before | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the parameter as a matrix; a vector is a column."""
        return as_matrix(self.shape)


Before = Callable[[], "Tensor"]
"""Reads a weight as the base has it, (out × in) in its storage type."""

Values = Callable[["Tensor", slice], "Tensor"]
"""Gives rows (indices) × columns of a matrix (out × in), in float64."""

Rows = Callable[["Tensor", "Tensor"], "Tensor"]
"""Is given indices of rows and these rows of W (rows × in) in float64, whole groups of them; gives new rows."""


class Method(ABC):
    """What one tuner does to one parameter.

    Attributes:
        kind: Its name, in undo files too: one name means one formula forever.
        parts: Names of its tensors, in the order in which they are recorded; any of them may be missing.
        exact: Whether it has the same bits on every machine: it needs no library sines, no exponentials, no sums in an
            order that a library chooses, no factorizations, no random numbers.
        indices: Those of the parts that say places, and so may be stored as whole numbers.
        reads: Whether it computes from the base's weight besides, and not of single rows of it alone. So an undo, which
            has the merged weight, cannot compute it again.
        together: Whether it depends on the shapes of all parameters that its adapter changes.
        doubted: Those of the parts of which `doubt` must see the numbers.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    indices: ClassVar[tuple[str, ...]] = ()
    acts: ClassVar[Acts]
    exact: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    together: ClassVar[bool] = False
    doubted: ClassVar[tuple[str, ...]] = ()

    def among(self, settings: Settings, parameters: Sequence[Shape]) -> Settings:
        """The settings with what it must know of all parameters that its adapter changes; see `together`."""
        return settings

    @abstractmethod
    def problem(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """Say in words why tensors of these shapes are none for a parameter of this shape; None where they are.

        Whatever a damaged or forged file holds must be found here: the other methods trust it.
        """

    @property
    def preimages(self) -> bool:
        """Whether a change can be computed again from the adapter when the merge is done, and element by element."""
        return self.exact and not self.reads and self.acts != "map"

    def unsupported(self, shapes: Shapes, settings: Settings, shape: Shape) -> str | None:
        """Say in words why no weight does what the tuner does with such a parameter; None where one does."""
        return None

    def doubt(self, tensors: Mapping[str, Tensor], settings: Settings) -> str | None:
        """Say in words what makes these parts mean another thing elsewhere, and what to do; None if nothing does."""
        return None

    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """LoRA's rank, or what is like it; 0 where nothing is: the size of a block is no rank."""
        return 0

    def working_bytes(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """Bytes that computing takes at its height besides tiles: as a rule its tensors in float64, three times."""
        return 24 * sum(math.prod(of) for of in shapes.values())


class ProductMethod(Method):
    """Adds scale · B·A, with factors that are made of its tensors without rounding, or by one rounding each."""

    acts = "product"

    @abstractmethod
    def term(self, given: Given) -> Term:
        """B (out × K), A (K × in) and the scale. Products of two float32 are exact in float64."""

    @abstractmethod
    def rank(self, shapes: Shapes, settings: Settings) -> int:
        """K: the columns that the change takes up in the exact product."""


class SumMethod(Method):
    """Adds what a formula of its tensors gives for each element, the scale included."""

    acts = "sum"

    @abstractmethod
    def values(self, given: Given) -> Values:
        """Get ready; what comes back is called for tile after tile, and no element may depend on how these are cut."""


class GainMethod(Method):
    """Multiplies each element by what a formula of its tensors gives for it."""

    acts = "gain"

    @abstractmethod
    def values(self, given: Given) -> Values:
        """Get ready; as for sums."""


class MapMethod(Method):
    """Makes new rows of the old ones, with each new row depending on no others than those of its group."""

    acts = "map"
    exact = False

    def group(self, shapes: Shapes, settings: Settings, shape: Shape) -> int:
        """How many rows, from a multiple of that number on, depend on each other."""
        return 1

    @abstractmethod
    def rows(self, given: Given) -> Rows:
        """Get ready; what comes back is called for some whole groups after another."""


@dataclass(frozen=True)
class Formula:
    """A method with the tensors of one module: a `Delta`.

    Attributes:
        method: What is computed.
        parts: Its tensors by name.
        scale: What multiplies the change.
        settings: Numbers and words from the config.
        parameter: The shape of the parameter, once a base has told it.
        transposed: The base stores it (in × out).
    """

    method: Method
    parts: Mapping[str, StoredTensor]
    scale: Scale
    settings: Settings = field(default_factory=dict)
    parameter: Shape | None = None
    transposed: bool = False

    @property
    def kind(self) -> str:
        """Name of the method."""
        return self.method.kind

    @property
    def acts(self) -> Acts:
        """What the method does to a matrix."""
        return self.method.acts

    @property
    def preimages(self) -> bool:
        """What the method says."""
        return self.method.preimages

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), once a base has told it; zeros before."""
        return (0, 0) if self.parameter is None else as_matrix(self.parameter)

    @property
    def stack(self) -> None:
        """It is one matrix."""
        return

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """As the base stores it, once that is known."""
        if self.parameter is None:
            return {}
        return {self.transposed: self.parameter[::-1] if self.transposed else self.parameter}

    @property
    def magnitude(self) -> None:
        """Lengths that are learned apart are LoRA's."""
        return

    @property
    def strided(self) -> None:
        """It is one matrix."""
        return

    def gathered(self, copy: StoredTensor) -> Formula:
        """Nothing is to be put in order."""
        return self

    @property
    def rank(self) -> int:
        """What the method says, if these are tensors of its; before a base has told it that is not certain."""
        if self.parameter is None:
            with suppress(LookupError, ValueError):
                return self.method.rank(self._shapes, self.settings)
            return 0
        return self.method.rank(self._shapes, self.settings)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Its tensors, in the method's order."""
        return tuple(self.parts[name] for name in self.method.parts if name in self.parts)

    @property
    def working_bytes(self) -> int:
        """Bytes that computing it takes besides tiles."""
        return self.method.working_bytes(self._shapes, self.settings, self.parameter or ())

    @property
    def group(self) -> int:
        """Of a map, how many rows depend on each other."""
        assert isinstance(self.method, MapMethod)  # noqa: S101 (who asks has looked at `acts`)
        return self.method.group(self._shapes, self.settings, self.parameter or ())

    @property
    def _shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self.parts.items()}

    def among(self, parameters: Sequence[Shape]) -> Formula:
        """It, where its adapter changes parameters of these shapes."""
        return replace(self, settings=self.method.among(self.settings, parameters))

    def on(self, parameter: Parameter) -> Formula:
        """It, for this parameter.

        Raises:
            ShapeError: Its tensors are none for that.
            UnsupportedError: The tuner does what no weight does.
        """
        problem = None
        if parameter.stack:
            problem = "the base stores a stack of matrices"
        elif self.acts == "map" and parameter.transposed:
            problem = "the base stores (in × out), of which rows are no outputs"
        problem = problem or self.method.problem(self._shapes, self.settings, parameter.shape)
        if problem:
            raise ShapeError(problem)
        if problem := self.method.unsupported(self._shapes, self.settings, parameter.shape):
            raise UnsupportedError(problem)
        return replace(self, parameter=parameter.shape, transposed=parameter.transposed)

    def given(self, load: Load, weight: float, before: Before | None = None) -> Given:
        """Read its tensors."""
        assert self.parameter is not None  # noqa: S101 (a plan has settled it)
        tensors = {name: load(tensor) for name, tensor in self.parts.items()}
        return Given(tensors, self.settings, self.scale.times(weight), self.parameter, before)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """The factors of what is a product."""
        assert isinstance(self.method, ProductMethod)  # noqa: S101 (who asks has looked at `acts`)
        return self.method.term(self.given(load, weight))

    def values(self, load: Load, weight: float, before: Before | None = None) -> Values:
        """The values of a sum, or the gains."""
        assert isinstance(self.method, SumMethod | GainMethod)  # noqa: S101 (likewise)
        return self.method.values(self.given(load, weight, before))

    def rows(self, load: Load, weight: float, before: Before | None = None) -> Rows:
        """The rows of a map."""
        assert isinstance(self.method, MapMethod)  # noqa: S101 (likewise)
        return self.method.rows(self.given(load, weight, before))


def as_matrix(shape: Shape) -> tuple[int, int]:
    """(out, in) of a parameter as a matrix; a vector is a column."""
    return shape[0] if shape else 1, math.prod(shape[1:])
