"""The kinds of change that factors make: of a matrix, an embedding, a convolution, a stack of matrices, a bias.

Each kind says under which shapes a base stores its target. Where it has one alone, nothing else is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from lora_cli.adapters.adapter import Acts, Load, Parameter, Scale, Strided
from lora_cli.checkpoint.checkpoint import StoredTensor

if TYPE_CHECKING:
    from lora_cli.arithmetic.product import Term

MatrixKind = Literal["lora", "lora-embedding"]
BlocksKind = Literal["lora-blocks-a", "lora-blocks-b"]

D = TypeVar("D", bound="Product")


class Product:
    """What is the same for all products."""

    __slots__ = ()

    @property
    def acts(self) -> Acts:
        """It adds a product."""
        return "product"

    @property
    def preimages(self) -> bool:
        """Products are exact."""
        return True

    @property
    def strided(self) -> Strided | None:
        """Each matrix's numbers lie together."""
        return None

    def gathered(self: D, copy: StoredTensor) -> D:
        """Nothing is to be put in order."""
        return self


class SettledProduct(Product):
    """What is the same for those that leave nothing open."""

    __slots__ = ()

    def on(self: D, parameter: Parameter) -> D:
        """Its factors say all."""
        return self


@dataclass(frozen=True, slots=True)
class LowRank(SettledProduct):
    """LoRA on a matrix: ΔW = scale · B·A with A (rank × in) and B (out × rank) (Hu et al. 2021).

    An embedding is the matrix of a module that takes one-hot vectors: with A (rank × entries) and B (dim × rank) its
    table, stored (entries × dim), changes by scale · (B·A)ᵀ.

    Attributes:
        a: The factor A.
        b: The factor B.
        scale: What multiplies the product.
        swapped: The file stores A as (in × rank) and B as (rank × out).
        kind: `lora-embedding` where it is known to be one: such a table is always stored (in × out).
        folded: The stored shape, where it is known: that of a tensor of other than two dimensions which is the
            (out × in) matrix row by row, or of a parameter whose rows are outputs whatever its module calls them.
        magnitude: For DoRA, the length that each output's row of W + ΔW gets.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    swapped: bool = False
    kind: MatrixKind = "lora"
    folded: tuple[int, ...] | None = None
    magnitude: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return (self.b.shape[1], self.a.shape[0]) if self.swapped else (self.b.shape[0], self.a.shape[1])

    @property
    def stack(self) -> None:
        """It is one matrix."""
        return

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """Both ways to store a matrix; one for an embedding, and where the shape was given."""
        if self.folded is not None:
            return {False: self.folded}
        both = {False: self.shape, True: self.shape[::-1]}
        return {True: both[True]} if self.kind == "lora-embedding" else both

    @property
    def rank(self) -> int:
        """Rank as the factors have it."""
        return self.a.shape[1] if self.swapped else self.a.shape[0]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B, and the magnitudes."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors and return them with their scale."""
        from lora_cli.arithmetic.product import Term

        a, b = load(self.a), load(self.b)
        if self.swapped:
            a, b = a.T, b.T
        return Term(b, a, self.scale.times(weight))


@dataclass(frozen=True, slots=True)
class LowRankKernel(SettledProduct):
    """LoRA on a convolution: ΔW = scale · B·A on the kernel as an (out × in/groups·k…) matrix.

    A is a convolution's kernel too, (rank, in/groups, k…), and B mixes what it gives: (out, rank), with ones behind it
    where it is stored as a convolution of size 1. With one group that is the convolution by A followed by the one by B.
    With more it is the same algebra on the stored kernel, in which each output sees the inputs of its own group.

    Attributes:
        a: The factor A.
        b: The factor B.
        scale: What multiplies the product.
        swapped: The file stores B as (rank × out).
        magnitude: For DoRA, the length that each output's row of W + ΔW gets.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    swapped: bool = False
    kind: Literal["lora-conv"] = "lora-conv"
    magnitude: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in/groups·k…) of the change."""
        return self.b.shape[1 if self.swapped else 0], math.prod(self.a.shape[1:])

    @property
    def stack(self) -> None:
        """It is one matrix."""
        return

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """(out, in/groups, k…), always."""
        return {False: (self.shape[0], *self.a.shape[1:])}

    @property
    def rank(self) -> int:
        """Rank as the factors have it."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B, and the magnitudes."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors and return them as matrices with their scale."""
        from lora_cli.arithmetic.product import Term

        a, b = load(self.a).flatten(1), load(self.b)
        return Term(b.T if self.swapped else b.flatten(1), a, self.scale.times(weight))


@dataclass(frozen=True, slots=True)
class LowRankStack(SettledProduct):
    """LoRA on a stack of matrices, such as a grouped linear layer's, one for each expert: ΔW[e] = scale · A[e]·B[e].

    A is (experts, in, rank) and B (experts, rank, out), the layouts that `torch.bmm` multiplies; the base stores
    (experts, in, out). Only one expert's factors are read at a time.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    kind: Literal["lora-stack"] = "lora-stack"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each change."""
        return self.b.shape[2], self.a.shape[1]

    @property
    def stack(self) -> int:
        """How many matrices there are."""
        return self.a.shape[0]

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """(experts, in, out), always."""
        return {True: (self.stack, *self.shape[::-1])}

    @property
    def magnitude(self) -> None:
        """There are no lengths apart from directions."""
        return

    @property
    def rank(self) -> int:
        """Rank of each change, as the factors have it."""
        return self.a.shape[2]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors of one expert and return them with their scale."""
        from lora_cli.arithmetic.product import Term

        a, b = load(self.a.part(index)), load(self.b.part(index))
        return Term(b.T, a.T, self.scale.times(weight))


@dataclass(frozen=True, slots=True)
class LowRankBlocks(SettledProduct):
    """LoRA of which one factor is block-diagonal (PEFT's BD-LoRA): ΔW = scale · B·A with that factor expanded.

    Its blocks are stored one below the other: A = diag(A₁ … Aₙ) as (rank × in/n), B = diag(B₁ … Bₙ) as (out × rank/n).

    Attributes:
        a: The factor A.
        b: The factor B.
        scale: What multiplies the product.
        kind: Which of the two has the blocks.
        blocks: How many there are.
    """

    a: StoredTensor
    b: StoredTensor
    scale: Scale
    kind: BlocksKind
    blocks: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change."""
        return self.b.shape[0], self.a.shape[1] * (self.blocks if self.kind == "lora-blocks-a" else 1)

    @property
    def stack(self) -> None:
        """It is one matrix."""
        return

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """Both ways to store a matrix."""
        return {False: self.shape, True: self.shape[::-1]}

    @property
    def magnitude(self) -> None:
        """There are no lengths apart from directions."""
        return

    @property
    def rank(self) -> int:
        """Rank as the expanded factors have it."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors and return them expanded, with their scale."""
        import torch

        from lora_cli.arithmetic.product import Term

        a, b = load(self.a), load(self.b)
        if self.kind == "lora-blocks-a":
            a = torch.block_diag(*a.chunk(self.blocks))
        else:
            b = torch.block_diag(*b.chunk(self.blocks))
        return Term(b, a, self.scale.times(weight))


@dataclass(frozen=True, slots=True)
class LowRankBias(SettledProduct):
    """The bias of a LoRA B factor: Δbias = scale · b, a product of rank one with a single column."""

    b: StoredTensor
    scale: Scale
    kind: Literal["lora-bias"] = "lora-bias"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, 1)."""
        return (self.b.shape[0], 1)

    @property
    def stack(self) -> None:
        """It is one column."""
        return

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """A vector."""
        return {False: self.shape[:1]}

    @property
    def magnitude(self) -> None:
        """There are no lengths apart from directions."""
        return

    @property
    def rank(self) -> int:
        """Always one."""
        return 1

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The bias of B."""
        return (self.b,)

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the vector and return it as a product with one."""
        from lora_cli.arithmetic.product import Term

        b = load(self.b).reshape(-1, 1)
        return Term(b, b.new_ones((1, 1)), self.scale.times(weight))


def is_matrix_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are A (rank, in) and B (out, rank) of a matrix."""
    return len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a + b


def is_block_pair(a: tuple[int, ...], b: tuple[int, ...], kind: BlocksKind, blocks: int) -> bool:
    """Whether shapes are A (rank, in/blocks) and B (out, rank), or A (rank, in) and B (out, rank/blocks)."""
    if not (len(a) == len(b) == 2 and 0 not in a + b and blocks > 0):
        return False
    if kind == "lora-blocks-a":
        return a[0] == b[1] and a[0] % blocks == 0
    return a[0] == b[1] * blocks and b[0] % blocks == 0


def is_kernel_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are A (rank, in/groups, k…) and B (out, rank, 1…) or (out, rank) of a convolution."""
    return len(a) > 2 and len(b) in (2, len(a)) and b[1] == a[0] and set(b[2:]) <= {1} and 0 not in a + b


def is_stack_pair(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are A (experts, in, rank) and B (experts, rank, out)."""
    return len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1] and 0 not in a + b
