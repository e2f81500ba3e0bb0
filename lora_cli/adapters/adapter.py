"""What an adapter says, whatever format it was read from.

An `Adapter` names modules and full tensors in its own spelling; it knows nothing of a base. Factors are references to
stored tensors: no data is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lora_cli.arithmetic.scale import exact_scale
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.source import SourceFile

if TYPE_CHECKING:
    import torch

    from lora_cli.arithmetic.product import Term

Load = Callable[[StoredTensor], "torch.Tensor"]

Acts = Literal["product", "sum", "gain", "map"]
"""What a change does to a matrix: adds a product of factors, adds what a formula gives, multiplies each element, or
makes new rows of the old ones."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a base tells of the parameter that a change is for.

    Attributes:
        shape: Its shape as the trained model holds it; of what a Conv1D of GPT-2 stores (in × out), still (out, in).
        transposed: The base stores each of its matrices the other way round.
        stack: Whether it is a stack of matrices, one for each expert.
        base_config: The base's `config.json`.
    """

    shape: tuple[int, ...]
    transposed: bool
    stack: bool
    base_config: Mapping[str, Any]


HAS_NONE = "there is none"
"""Where the scale of a change comes from that has none."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The number that multiplies a product, and where it came from.

    Attributes:
        alpha: Numerator; the scale itself where `rank` is None.
        rank: What alpha is divided by; None for a scale given directly.
        rslora: Divide by the square root of the rank instead.
        source: For people: the config field, tensor or option that said so.
        said: The alpha that a person knows, where `alpha` is what was made of it.
    """

    alpha: float
    rank: int | None
    rslora: bool
    source: str
    said: float | None = None

    @property
    def exists(self) -> bool:
        """Whether there is one; of what has none it is 1."""
        return self.source != HAS_NONE

    def times(self, weight: float = 1.0) -> float:
        """Return the scale times the user's weight, rounded once from the exact value."""
        return _exact_scale(self.alpha, self.rank or 1, weight, rslora=self.rslora)


@lru_cache(maxsize=4096)
def _exact_scale(alpha: float, rank: int, weight: float, *, rslora: bool) -> float:
    # Tens of thousands of modules share a few scales.
    return exact_scale(Fraction(alpha), rank, weight=weight, rslora=rslora)


@dataclass(frozen=True, slots=True)
class Strided:
    """A factor of a stack in whose tensor the numbers of one matrix lie apart.

    Attributes:
        tensor: It, (rows × all columns of all matrices).
        matrices: How many matrices there are.
        fastest: From one number to the next the matrix changes; else they lie in groups, a matrix after another in
            each row.
    """

    tensor: StoredTensor
    matrices: int
    fastest: bool

    @property
    def place(self) -> tuple[SourceFile, str]:
        """What tells it from others."""
        return self.tensor.shard.source, self.tensor.key

    @property
    def shape(self) -> tuple[int, int, int]:
        """(matrices, rows, rank) of a copy in which those of each matrix lie together."""
        rows, columns = self.tensor.shape
        return self.matrices, rows, columns // self.matrices


class Delta(Protocol):
    """The change of one target, before a base is known (the kinds are in `deltas`).

    Of kinds that are products the engine stacks the terms of all adapters on one target into one exact product; the
    others are `formula.Formula`. `shape` is (out, in) in the sense of the module, not of how a base stores it. A target
    may be a stack of such matrices: then there is a product for each of them.
    """

    @property
    def kind(self) -> str:
        """Name of the kind, for people."""
        ...

    @property
    def acts(self) -> Acts:
        """What it does to a matrix."""
        ...

    @property
    def preimages(self) -> bool:
        """Whether an undo can compute it again, element by element and with the same bits on every machine.

        Then it only needs to know which of its preimages each element was.
        """
        ...

    @property
    def scale(self) -> Scale:
        """What multiplies the product."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change, or of each change of a stack."""
        ...

    @property
    def stack(self) -> int | None:
        """How many matrices the target is a stack of; None for a single one."""
        ...

    @property
    def stored(self) -> Mapping[bool, tuple[int, ...]]:
        """Shapes under which a base may store the target: with its matrices (out × in), and transposed.

        Empty where factors alone do not tell: then it is asked to settle `on` a parameter.
        """
        ...

    def on(self, parameter: Parameter) -> Delta:
        """It, for this parameter: itself, where nothing was open.

        Raises:
            ShapeError: It does not fit.
            UnsupportedError: It may fit in several ways.
        """
        ...

    @property
    def magnitude(self) -> StoredTensor | None:
        """For DoRA (Liu et al. 2024), the length that each output's row of base and change together gets."""
        ...

    @property
    def rank(self) -> int:
        """Columns that the change takes up in the exact product."""
        ...

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is made of."""
        ...

    @property
    def strided(self) -> Strided | None:
        """Of a stack, the factor that would be read whole for each matrix; None where there is none."""
        ...

    def gathered(self, copy: StoredTensor) -> Delta:
        """It, with a copy of that factor in order, (matrices, rows, rank)."""
        ...

    def term(self, load: Load, weight: float, index: int = 0) -> Term:
        """Read the factors, of a stack those of matrix `index`, and return them with their scale."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor that the adapter changes by a delta.

    Attributes:
        module: Name of the module in the adapter's spelling; empty for that of the whole model.
        parameter: Which of its parameters, mostly `weight`.
        delta: The change.
        may_lack: Whether the base may have no such parameter, and then there is nothing to do.
        reads: Whether the change is computed from the module's weight besides.
    """

    module: str
    parameter: str
    delta: Delta
    may_lack: bool = False
    reads: bool = False

    @property
    def name(self) -> str:
        """Full name of the parameter in the adapter's spelling."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def weight(self) -> str:
        """Full name of the module's weight, likewise."""
        return f"{self.module}.weight" if self.module else "weight"


@dataclass(frozen=True, slots=True)
class Replacement:
    """One tensor that the adapter holds whole.

    Attributes:
        name: Full name in the adapter's spelling.
        tensor: The new content.
        reason: Why it is in the adapter: a config field.
        may_be_new: Whether the base may lack it (a head that the fine-tune added).
        of_base: It is the base's own table as the adapter was trained on it, stored since its rows may be others.
    """

    name: str
    tensor: StoredTensor
    reason: str
    may_be_new: bool = False
    of_base: bool = False


@dataclass(frozen=True, slots=True)
class RowReplacement:
    """Single rows of a table that the adapter holds whole, such as those of trained tokens.

    Attributes:
        name: Full name of the table in the adapter's spelling.
        rows: Which rows, in the order of the tensor's; each once.
        tensor: Their new content, (rows × columns).
        reason: Why it is in the adapter: a config field.
    """

    name: str
    rows: tuple[int, ...]
    tensor: StoredTensor
    reason: str


@dataclass(frozen=True)
class Adapter:
    """What a fine-tune changed.

    Attributes:
        label: What messages and receipts call it.
        path: The file or folder.
        format: Name of the format it was read as.
        evidence: Why it was taken for that format.
        targets: Deltas, in file order.
        replacements: Whole tensors, in file order.
        rows: Single rows of tables.
        layers: For a model whose layers repeat those of the files: the stored layer of each.
        tied: Its config ties what it does to tied tensors (`ensure_weight_tying`), and its file holds it for several.
            Whether the base ties them, and the changes are one, is seen where both are at hand.
        initial: The init that took the first factors off the base, where the file holds no more than the trained ones.
        before: The adapter as it was before training, whose deltas are taken off again where `initial` is set.
        beginning: It is what another was before training, and is only taken off with it.
        tuner: What people call the tuner that made it, if that is another than LoRA.
        unread: Tensors of the file that the format gives no meaning; an error unless the user allows them.
        skipped: Tensors that need not be applied, each with the reason.
        config: The config that gives the tensors meaning; empty when there is none.
        transposed_hint: What the config claims of the base's layout: True for (in, out), None for nothing.
        orientation: `ba` when the format fixes that A is (rank × in), else None: shapes decide.
        ignored_fields: Config fields that the user told us to ignore.
        stored: How many tensors its file holds; the ledger must account for as many.
        warnings: What a person should know about it.
    """

    label: str
    path: Path
    format: str
    evidence: str
    targets: tuple[Target, ...]
    replacements: tuple[Replacement, ...] = ()
    rows: tuple[RowReplacement, ...] = ()
    layers: tuple[int, ...] | None = None
    tied: bool = False
    initial: str | None = None
    before: Adapter | None = None
    beginning: bool = False
    tuner: str | None = None
    unread: tuple[StoredTensor, ...] = ()
    skipped: tuple[tuple[StoredTensor, str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    transposed_hint: bool | None = None
    orientation: Literal["ba"] | None = None
    ignored_fields: tuple[str, ...] = ()
    stored: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What a person would call it: LoRA, rsLoRA or DoRA, or the name of another tuner."""
        if self.tuner:
            return self.tuner
        if any(target.delta.magnitude for target in self.targets):
            return "DoRA"
        return "rsLoRA" if any(target.delta.scale.rslora for target in self.targets) else "LoRA"

    @property
    def tensors(self) -> list[StoredTensor]:
        """Every stored tensor of it, once."""
        deltas = {tensor.key: tensor for target in self.targets for tensor in target.delta.tensors}
        return [
            *deltas.values(),
            *(change.tensor for change in self.replacements),
            *(change.tensor for change in self.rows),
        ]

    @property
    def names(self) -> list[str]:
        """Every parameter that it changes or reads, in its own spelling; one may stand there twice."""
        names = [target.name for target in self.targets]
        names += [target.weight for target in self.targets if target.reads]
        return [*names, *(change.name for change in self.replacements), *(change.name for change in self.rows)]

    @property
    def paths(self) -> list[Path]:
        """Every place that must not be written to while this adapter is an input."""
        return [self.path, *sorted({tensor.shard.source.path for tensor in self.tensors})]
