"""Changes of a stack of matrices, such as the experts of a layer, whose factors lie in any of the known ways.

Of a parameter (experts, d1, d2) `shape` is (d1, d2), whichever of them its module calls inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lora_cli.adapters.adapter import Load, Parameter, Scale, Strided
from lora_cli.adapters.deltas import LowRank, Product, SettledProduct, is_matrix_pair
from lora_cli.adapters.expert_layout import FASTEST, PACKED, WORDS, Packing, Side, Sizes, eras_words, experts_in, sizes
from lora_cli.adapters.expert_sides import Told, settle_side
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.arithmetic.product import Term


@dataclass(frozen=True, slots=True)
class LowRankExperts(SettledProduct):
    """LoRA on a stack of matrices: of matrix e, ΔW[e] = scale · B[e]·A[e], or the transpose of that.

    Attributes:
        a: The factor A of all of them.
        b: The factor B.
        scale: What multiplies the products.
        packing: How they lie in their tensors; see `expert_layout`.
        experts: How many matrices there are.
        side: Which side of each matrix (d1, d2) A meets; where it meets the rows, ΔW[e] is the transpose.
        transposed: The base stores each matrix the other way round.
        reason: Why they are read so, for people.
        surprise: What a person should look at in that.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    packing: Packing
    experts: int
    side: Side
    transposed: bool = False
    reason: str = field(default="", compare=False)
    surprise: str | None = field(default=None, compare=False)
    kind: Literal["lora-stack"] = "lora-stack"

    @property
    def shape(self) -> tuple[int, int]:
        """(d1, d2) of each change."""
        _, met, given = self._sizes
        return (met, given) if self.side == "rows" else (given, met)

    @property
    def stack(self) -> int:
        """How many matrices there are."""
        return self.experts

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """As the base stores it."""
        return {self.transposed: (self.experts, *(self.shape[::-1] if self.transposed else self.shape))}

    @property
    def magnitude(self) -> None:
        """There are no lengths apart from directions."""
        return

    @property
    def rank(self) -> int:
        """Rank of each change, as the factors have it."""
        return self._sizes.rank

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    @property
    def strided(self) -> Strided | None:
        """B, unless the numbers of each expert lie together in it."""
        if self.packing in ("stacked", "stacked-turned"):
            return None
        rank, _, given = self._sizes
        return Strided(_viewed(self.b, (given, rank * self.experts)), self.experts, self.packing in FASTEST)

    def gathered(self, copy: StoredTensor) -> LowRankExperts:
        """It, with a B (experts, given, rank); A needs only be looked at so."""
        rank, met, _ = self._sizes
        return replace(self, a=_viewed(self.a, (self.experts, rank, met)), b=copy, packing="stacked")

    @property
    def words(self) -> str:
        """How its factors are read, and why, for people."""
        return f"{WORDS[self.packing]}; A meets {self.side} ({self.reason})"

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors of one expert and return them with their scale."""
        from lora_cli.arithmetic.product import Term

        a, b = self._a(load, index), self._b(load, index)
        b, a = (a.T, b.T) if self.side == "rows" else (b, a)
        return Term(b, a, self.scale.times(weight))

    @property
    def _sizes(self) -> Sizes:
        found = sizes(self.packing, self.a.shape, self.b.shape, self.experts)
        assert found is not None  # noqa: S101 (whoever makes it has looked)
        return found

    def _a(self, load: Load, index: int) -> Tensor:
        """(rank × met) of one expert."""
        rank, met, _ = self._sizes
        a = _viewed(self.a, (self.experts, rank, met)) if self.packing in PACKED else self.a
        found = load(_one(a, index))
        return found.T if self.packing == "stacked-turned" else found

    def _b(self, load: Load, index: int) -> Tensor:
        """(given × rank) of one expert."""
        if self.packing == "packed":
            return load(self.b)[:, index :: self.experts]
        if self.packing == "packed-by-expert":
            rank = self.rank
            return load(self.b)[:, index * rank : (index + 1) * rank]
        if self.packing == "stacked-last":
            return load(self.b)[..., index]
        found = load(_one(self.b, index))
        return found.T if self.packing == "stacked-turned" else found


@dataclass(frozen=True, slots=True)
class OpenExperts(Product):
    """Factors of a parameter that may be a stack of matrices; how they lie is seen where the base tells its shape.

    Attributes:
        a: The factor A of all matrices.
        b: The factor B.
        scale: What multiplies the products.
        packings: How they may lie in their tensors.
        config_rank: The rank of each matrix as a config says it, and the field; None where only the factors say it.
        told: What is known of the side that A meets.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    packings: tuple[Packing, ...]
    config_rank: tuple[int, str] | None
    told: Told
    kind: Literal["lora-stack"] = "lora-stack"

    @property
    def shape(self) -> tuple[int, int]:
        """(given, met): that of each product B[e]·A[e]."""
        _, met, given = self._likeliest._sizes
        return given, met

    @property
    def stack(self) -> int:
        """How many matrices there are, as far as the factors say it."""
        return self._likeliest.experts

    @property
    def words(self) -> str:
        """How its factors may lie, for people."""
        return f"{self.packed_words}; a base tells which side A meets"

    @property
    def packed_words(self) -> str:
        """How they may be packed, for people."""
        return ", or ".join(WORDS[packing] for packing in self.packings)

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """It is open."""
        return {}

    @property
    def magnitude(self) -> None:
        """There are no lengths apart from directions."""
        return

    @property
    def rank(self) -> int:
        """Rank of each change."""
        return self._likeliest.rank

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors of one expert, if there is one way to read them.

        Raises:
            UnsupportedError: There are several.
        """
        if len(self.packings) > 1:
            ways = "; or ".join(WORDS[packing] for packing in self.packings)
            raise UnsupportedError(
                "Without a base the factors of experts can be read in several ways",
                tensor=self.a.key,
                found=ways,
                hint="say which with --expert-layout fastest or slowest",
            )
        return self._likeliest.term(load, weight, index)

    def on(self, parameter: Parameter) -> LowRank | LowRankExperts:
        """It, for this parameter: of two dimensions a matrix, of three a stack.

        Raises:
            ShapeError: The factors do not fit.
            UnsupportedError: They fit in several ways, and nothing says which is meant.
        """
        shape = parameter.shape
        if len(shape) == 2:
            return self._of_matrix(parameter)
        if len(shape) != 3 or not parameter.stack:
            raise ShapeError("the factors are those of a matrix or a stack of matrices")
        found = list(self._readings(shape))
        packings = dict.fromkeys(one.packing for one in found)
        if not found:
            raise ShapeError(self._misfit(shape))
        if len(packings) > 1:
            ways = "; or ".join(WORDS[packing] for packing in packings)
            raise UnsupportedError(
                f"the factors fit in two ways, --expert-layout fastest or slowest must say in which: {ways}"
            )
        said = settle_side([one.side for one in found], found[0].packing, shape[0], self.told, parameter.base_config)
        chosen = next(one for one in found if one.side == said.side)
        return replace(chosen, transposed=parameter.transposed, reason=said.reason, surprise=said.surprise)

    @property
    def meets(self) -> str | None:
        """What is known of the side that A meets of square matrices, for people; None where shapes say it."""
        if self.shape[0] != self.shape[1] or self.told.layout.side is not None:
            return self.told.layout.side
        return f"as in PEFT {eras_words(self.told.version)}" if self.packings[0] in PACKED else "inputs"

    def rule(self, base_config: Mapping[str, Any]) -> Hashable:
        """What is equal for stacks of one adapter of which the same side is meant."""
        return self.told.rule(self.packings[0], base_config)

    def side_on(self, parameter: Parameter) -> Side | None:
        """The side that A meets of a stack, if its shape alone says it."""
        found = {one.side for one in self._readings(parameter.shape)} if len(parameter.shape) == 3 else set[Side]()
        return found.pop() if len(found) == 1 and parameter.stack else None

    @property
    def _likeliest(self) -> LowRankExperts:
        """The first way to read them."""
        packing, a, b = self.packings[0], self.a.shape, self.b.shape
        rank = self.config_rank[0] if self.config_rank else a[0]
        experts = experts_in(packing, a, b, rank)
        return LowRankExperts(self.a, self.b, self.scale, packing, experts, "columns")

    def _readings(self, shape: tuple[int, ...]) -> Iterator[LowRankExperts]:
        """Every way to read them that fits a stack of this shape."""
        experts, *matrix = shape
        sides: tuple[Side, ...] = ("columns", "rows")
        for packing in self.packings:
            found = sizes(packing, self.a.shape, self.b.shape, experts)
            if found is None or (self.config_rank and found.rank != self.config_rank[0]):
                continue
            for side in sides:
                read = LowRankExperts(self.a, self.b, self.scale, packing, experts, side)
                if read.shape == (matrix[0], matrix[1]):
                    yield read

    def _misfit(self, shape: tuple[int, ...]) -> str:
        """Why they fit no stack of this shape, in words."""
        experts = self._likeliest.experts
        if self.config_rank and experts != shape[0]:
            rank, source = self.config_rank
            return f"with rank {rank}, as {source} says, they are those of {experts} matrices, and there are {shape[0]}"
        given, met = self.shape
        return f"their products are {given} × {met} or the transpose, for {experts} matrices"

    def _of_matrix(self, parameter: Parameter) -> LowRank:
        """PEFT's change of a parameter of two dimensions: B·A, whatever its module calls rows and columns."""
        a, b, shape = self.a.shape, self.b.shape, parameter.shape
        rank = self.config_rank or (a[0], "")
        if not is_matrix_pair(a, b) or (b[0], a[1]) != shape:
            raise ShapeError("their product is none for a parameter of this shape")
        if rank[0] != a[0]:
            raise ShapeError(f"the factors have rank {a[0]}, {rank[1]} says {rank[0]}")
        return LowRank(self.a, self.b, self.scale, folded=None if parameter.transposed else shape)


def _viewed(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """The same numbers as a tensor of another shape."""
    return replace(tensor, info=replace(tensor.info, shape=shape))


def _one(tensor: StoredTensor, index: int) -> StoredTensor:
    """One matrix of a stack, or that of all of them."""
    return tensor.part(index if tensor.shape[0] > 1 else 0)
