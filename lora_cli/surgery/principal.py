"""Factors that an injection takes from the weights of its base (see `arithmetic.principal`).

Both factors of a module come from one decomposition. All of them are computed first, module by module, and kept in a
file beside the output, from which they are then written like any other tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.adapters.fresh import FreshOptions
from lora_cli.adapters.inits import BLOCK_ELEMENTS, FreshTensor, normals, stored
from lora_cli.adapters.targets import Selected, is_turned
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.staged import Scratch, Span
from lora_cli.errors import LoraCliError, NumericError, ShapeError
from lora_cli.progress import Progress
from lora_cli.surgery.readers import open_readers, torch_dtype
from lora_cli.surgery.workers import run_units

if TYPE_CHECKING:
    import torch

FRESH_KEYS = ("{}.lora_A.weight", "{}.lora_B.weight")
"""Names of the factors of a module, whatever they are called in a file."""


@dataclass(slots=True)
class Taken:
    """The factors of one injection, once they are computed: where each of them is, by its name."""

    scratch: Scratch | None = None
    spans: dict[str, Span] = field(default_factory=dict)

    def read(self, key: str) -> bytes:
        """A factor as it is stored."""
        assert self.scratch is not None  # noqa: S101 (nothing is written before all are computed)
        return self.scratch.read(self.spans[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenTensor(FreshTensor):
    """A factor that is taken from a weight.

    Attributes:
        matrix: (out, in) of the weight.
        options: What was said of the adapter.
        taken: Where it will be found.
    """

    matrix: tuple[int, int]
    options: FreshOptions
    taken: Taken = field(compare=False)

    def __str__(self) -> str:
        """Describe the rule for a person."""
        return self.rule if self.options.iterations is None else f"{self.rule}, seed {self.seed}"

    @property
    def working_bytes(self) -> int:
        """Bytes of memory that taking it takes: the weight in float64, with what its decomposition needs (measured)."""
        (out, inner), least = self.matrix, min(self.matrix)
        if self.options.init == "pissa":
            return 8 * 4 * (out * inner + least * least)
        return 8 * (2 * out * inner + 6 * (out + inner) * (self.options.rank + 8))

    def blocks(self, begin: int, end: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield elements `begin` to `end` as stored, in order, each block with the index of its first element."""
        width = self.dtype.bits // 8
        data = np.frombuffer(bytearray(self.taken.read(self.key)), np.uint8)
        for start in range(begin, end, BLOCK_ELEMENTS):
            yield start, data[start * width : min(start + BLOCK_ELEMENTS, end) * width]


def check_sides(modules: Sequence[Selected], rank: int, label: str) -> None:
    """Refuse weights that do not have so many directions.

    Raises:
        ShapeError: Names all of them.
    """
    small = [module for module in modules if min(module.out, module.inner) < rank]
    if small:
        raise ShapeError(
            f"{len(small)} weights are too small to take factors of rank {rank} from",
            file=label,
            details=[f"{module.module} is ({module.out} × {module.inner})" for module in small],
            hint="give a smaller --rank, or leave them out with --exclude",
        )


def take(
    modules: Sequence[tuple[Selected, StoredTensor]],
    options: FreshOptions,
    taken: Taken,
    scratch: Scratch,
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Compute the factors of all modules; one weight in each worker is in memory at a time.

    Raises:
        NumericError: A weight that cannot be decomposed, or factors that their type cannot hold; names the tensor.
    """
    import torch  # noqa: F401 (before the work begins, which holds torch to one thread: LAPACK's sums depend on that)

    taken.scratch = scratch
    nbytes = sum(weight.nbytes for _, weight in modules)
    progress.begin(options.init, nbytes)

    def work(unit: tuple[Selected, StoredTensor], _: None) -> dict[str, Span]:
        return {key: scratch.append(data) for key, data in _factors(*unit, options).items()}

    for (_, weight), spans in run_units(modules, work, lambda: None, threads, nbytes=nbytes):
        taken.spans |= spans
        progress.advance(weight.nbytes)


def take_from(matrix: torch.Tensor, module: str, options: FreshOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in float64, taken from a weight.

    Args:
        matrix: The weight, (out, in).
        module: The name of its module, which with the seed decides what a randomised decomposition begins with.
        options: What was said of the adapter.

    Raises:
        ShapeError: The rank is larger than a side of the weight.
        NumericError: The weight holds NaN or infinity.
    """
    from lora_cli.arithmetic.principal import olora, pissa

    if options.init == "olora":
        return olora(matrix, options.rank)
    test = None if options.iterations is None else _test(matrix, module, options)
    return pissa(matrix, options.rank, options.scale.times(), iterations=options.iterations or 0, test=test)


def _factors(module: Selected, weight: StoredTensor, options: FreshOptions) -> dict[str, bytes]:
    """Both factors of a module as they are stored, by their names."""
    keys = [form.format(module.module) for form in FRESH_KEYS]
    try:
        factors = take_from(_matrix(module, weight), module.module, options)
        return {key: _stored(factor, options) for key, factor in zip(keys, factors, strict=True)}
    except LoraCliError as error:
        error.tensor = error.tensor or weight.key
        raise


def _matrix(module: Selected, weight: StoredTensor) -> torch.Tensor:
    """A weight as (out × in) in float64."""
    import torch

    with open_readers() as readers:
        matrix = readers.load(weight).to(torch.float64).reshape(weight.shape[0], -1)
    return matrix.T if is_turned(module.kind, module.transposed) else matrix


def _test(matrix: torch.Tensor, module: str, options: FreshOptions) -> torch.Tensor:
    """The random matrix of a decomposition: normal numbers from the stream that would make A."""
    import torch

    from lora_cli.arithmetic.principal import sample_width

    out, inner = matrix.shape
    width = sample_width((out, inner), options.rank)
    numbers = normals(FRESH_KEYS[0].format(module), 0, inner * width, seed=options.seed)
    return torch.from_numpy(numbers).view(inner, width)


def _stored(factor: torch.Tensor, options: FreshOptions) -> bytes:
    import torch

    largest = torch.finfo(torch_dtype(options.storage)).max
    found = float(factor.abs().max())
    if found > largest:
        raise NumericError(
            f"A factor taken from this weight does not fit in {options.dtype}",
            expected=f"at most {largest:g}",
            found=f"{found:g}",
            hint="store the factors as fp32 or bf16",
        )
    return stored(factor.contiguous().numpy(), options.storage).tobytes()
