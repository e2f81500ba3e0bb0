"""The singular values of what an adapter changes, from its factors alone, without a base.

Beside the factors nothing of their size is made: with B = Q₁R₁ and Aᵀ = Q₂R₂ the change s·B·A has the singular values
of s·R₁·R₂ᵀ, which is rank × rank (`arithmetic.lowrank`). Where the rank is larger than out or in, the change itself is
smaller than the factors, and is summed up in bands. All is float64. Each value is off by some 10⁻¹⁵·|s|·‖B‖_F·‖A‖_F at
most: Householder's QR and the SVD are those of matrices that are off by a few roundings (Higham 2002, "Accuracy and
Stability of Numerical Algorithms", theorem 19.4), and no singular value moves by more than the norm of what is added
(Weyl). So large values have nearly all of their digits, and what is a rank short comes out as rounding, not as zero.

The energy of a value is its square; ‖Δ‖_F² is the sum of all. The k largest values are what the best approximation of
rank k keeps (Eckart and Young 1936, Psychometrika 1).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from lora_cli.adapters.adapter import Adapter, Delta, Load, Target
from lora_cli.adapters.formula import Formula
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NumericError, UnsupportedError
from lora_cli.progress import Progress
from lora_cli.surgery.edit import MERGEABLE
from lora_cli.surgery.readers import Readers, open_readers
from lora_cli.surgery.workers import default_threads, run_units

if TYPE_CHECKING:
    import torch

    from lora_cli.arithmetic.product import Term

Values = tuple[tuple[float, ...], ...]
"""Singular values, for each matrix of a target."""

_UNIT_BYTES = 4 << 20
_BAND_ELEMENTS = 1 << 20
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one target's change, and what they come to.

    A target may be a stack of matrices: then the norm is that of all of them, and ranks are those of its `profile`. So
    `rank_90` is the rank to which every matrix can be cut while the stack keeps 90 % of its energy.

    Attributes:
        module: Name in the adapter's spelling, with the parameter where it is not the weight.
        kind: Kind of delta.
        shape: (out, in) of the change, or of each change of a stack.
        stack: How many matrices there are; None for a single one.
        rank: Rank as the factors have it; with those that are taken off again, of both together.
        magnitude: Whether each output of base and change together gets a length afterwards (DoRA): these are the values
            of the change alone, before that.
        norm: ‖Δ‖_F.
        largest: The largest singular value, ‖Δ‖₂.
        share: Share of the adapter's energy.
        rank_90: The least rank that keeps 90 % of the energy; 0 where nothing changes.
        rank_99: The least rank that keeps 99 %.
        stable_rank: Σσ² / σ₁² (Rudelson and Vershynin 2007, J. ACM 54(4)), from 1 to rank; 0 for no change.
        effective_rank: The exponential of the entropy of the values' shares in their sum (Roy and Vetterli 2007,
            EUSIPCO), from 1 to rank; 0 for no change.
        values: All singular values, largest first, at most min(out, in, rank): a list for each matrix of a stack, else
            a single one.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    stack: int | None
    rank: int
    magnitude: bool
    norm: float
    largest: float
    share: float
    rank_90: int
    rank_99: int
    stable_rank: float
    effective_rank: float
    values: Values

    @property
    def profile(self) -> tuple[float, ...]:
        """The values; of a stack the root of the mean square at each place."""
        return _profile(self.values)


@dataclass(frozen=True)
class AdapterSpectrum:
    """The singular values of all that an adapter changes by factors.

    Attributes:
        norm: The root of the sum of all squared norms.
        scaled: Whether the adapter's scale is in the values; without one they are those of B·A alone.
        modules: One entry for each target, in file order.
        initial: The init that took the first factors off the base; None where none did.
        before: The adapter as it was before training, whose changes are taken off again: then the values are those of
            what a merge adds. Without it, what `initial` took off the base is in them too.
    """

    norm: float
    scaled: bool
    modules: tuple[ModuleSpectrum, ...]
    initial: str | None = None
    before: str | None = None


def module_name(target: Target) -> str:
    """What a target is called for people: its module, or the parameter where that is not the weight."""
    return target.module if target.parameter == "weight" else target.name


def adapter_spectrum(adapter: Adapter, progress: Progress, *, scaled: bool) -> AdapterSpectrum:
    """Take every change of an adapter apart; memory is what the factors of one matrix need, for each worker.

    Where an init took the first factors off the base, and the adapter knows what it was then, that is taken off again.

    Args:
        adapter: Its factors are read.
        progress: Hears of every stretch.
        scaled: Whether something says how strong it is; else its scales are taken to be 1.

    Raises:
        NumericError: A factor holds NaN or infinity, or a product overflows; names the tensor.
        UnsupportedError: A factor of a type that takes no part in a merge, or changes that are not known from factors.
        LoraCliError: What reading the files raises.
    """
    _refuse_formulas(adapter)
    before = {target.name: target.delta for target in adapter.before.targets} if adapter.before else {}
    changes = [_Change(target, before.get(target.name)) for target in adapter.targets]
    found = _measured(changes, progress)
    total = math.hypot(*(_norm(values) for values in found))
    modules = tuple(_summed_up(change, values, total) for change, values in zip(changes, found, strict=True))
    return AdapterSpectrum(total, scaled, modules, adapter.initial, adapter.before.label if adapter.before else None)


def _refuse_formulas(adapter: Adapter) -> None:
    """Refuse changes that are no product of two stored factors: what they are, a base has a say in."""
    formulas = [module_name(target) for target in adapter.targets if isinstance(target.delta, Formula)]
    if formulas:
        raise UnsupportedError(
            f"Singular values are computed of LoRA's factors, and {adapter.kind} has others",
            file=adapter.label,
            found=f"{len(formulas)} modules",
            hint="merge the adapter, and compare with the base: lora-cli diff BASE MERGED --rank",
        )


@dataclass(frozen=True, slots=True)
class _Change:
    """What a merge adds for one target: its delta, less the one that it had before training."""

    target: Target
    before: Delta | None

    @property
    def deltas(self) -> tuple[Delta, ...]:
        return (self.target.delta,) if self.before is None else (self.target.delta, self.before)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for delta in self.deltas for tensor in delta.tensors)

    def terms(self, load: Load, index: int) -> list[Term]:
        """The products of matrix `index`; what was there before training is taken off."""
        return [delta.term(load, weight, index) for delta, weight in zip(self.deltas, (1.0, -1.0), strict=False)]


def _summed_up(change: _Change, values: Values, total: float) -> ModuleSpectrum:
    target = change.target
    norm, profile = _norm(values), _profile(values)
    # Relative to the first: squares neither overflow nor vanish.
    relative = [value / profile[0] for value in profile] if norm else []
    energies = [value**2 for value in relative]
    return ModuleSpectrum(
        module=module_name(target),
        kind=target.delta.kind,
        shape=target.delta.shape,
        stack=target.delta.stack,
        rank=sum(delta.rank for delta in change.deltas),
        magnitude=target.delta.magnitude is not None,
        norm=norm,
        largest=max((matrix[0] for matrix in values if matrix), default=0.0),
        share=(norm / total) ** 2 if total else 0.0,
        rank_90=_rank_for(0.9, energies),
        rank_99=_rank_for(0.99, energies),
        stable_rank=math.fsum(energies),
        effective_rank=_effective_rank(relative),
        values=values,
    )


def _norm(values: Values) -> float:
    return math.hypot(*(value for matrix in values for value in matrix))


def _profile(values: Values) -> tuple[float, ...]:
    return tuple(math.hypot(*place) / math.sqrt(len(place)) for place in zip(*values, strict=True))


def _effective_rank(values: Sequence[float]) -> float:
    total = math.fsum(values)
    shares = [value / total for value in values if value]
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def _rank_for(share: float, energies: Sequence[float]) -> int:
    """The least number of leading energies that are such a share of all, float64's rounding of the values apart."""
    enough = share * math.fsum(energies) * (1 - _ROUNDING)
    return bisect_left(list(accumulate(energies)), enough) + 1 if energies else 0


# From files


def _measured(changes: Sequence[_Change], progress: Progress) -> list[Values]:
    """The values of each change."""
    import torch  # noqa: F401 (before processes are forked, which then share it)

    nbytes = sum(change.nbytes for change in changes)
    progress.begin("spectrum", nbytes)
    found: dict[int, Values] = {}
    units = run_units(_units(changes), _unit_values, lambda: None, default_threads(), nbytes=nbytes)
    for unit, results in units:
        found |= {number: values for (number, _), values in zip(unit, results, strict=True)}
        progress.advance(sum(change.nbytes for _, change in unit))
    return [found[number] for number in range(len(changes))]


_Unit = tuple[tuple[int, _Change], ...]
"""Changes with their numbers: a thousand small ones are not worth a thousand tasks."""


def _units(changes: Iterable[_Change]) -> Iterator[_Unit]:
    unit: list[tuple[int, _Change]] = []
    size = 0
    for number, change in enumerate(changes):
        unit.append((number, change))
        size += change.nbytes
        if size >= _UNIT_BYTES:
            yield tuple(unit)
            unit, size = [], 0
    if unit:
        yield tuple(unit)


def _unit_values(unit: _Unit, _: None) -> list[Values]:
    with open_readers() as readers:
        return [_values(change, readers) for _, change in unit]


def _values(change: _Change, readers: Readers) -> Values:
    from lora_cli.arithmetic.lowrank import singular_values

    load = partial(_load, readers)
    try:
        matrices = (change.terms(load, index) for index in range(change.target.delta.stack or 1))
        return tuple(tuple(singular_values(terms).tolist()) for terms in matrices)
    except NumericError as error:
        error.tensor = error.tensor or change.target.name
        raise


def _load(readers: Readers, tensor: StoredTensor) -> torch.Tensor:
    """Read a factor as it is stored, or bytes as bfloat16, which has all their values; refuse what cannot be meant."""
    import torch

    if tensor.dtype.name not in MERGEABLE:
        raise UnsupportedError(
            "Factors of this storage type are not supported",
            file=tensor.shard.name,
            tensor=tensor.key,
            found=tensor.dtype.name,
            expected=", ".join(MERGEABLE),
        )
    factor = readers.load(tensor)
    factor = factor.to(torch.bfloat16) if factor.itemsize == 1 else factor
    broken = sum(int((~torch.isfinite(band)).sum()) for band in factor.flatten().split(_BAND_ELEMENTS))
    if broken:
        raise NumericError(
            "The factor holds NaN or infinity",
            file=tensor.shard.name,
            tensor=tensor.key,
            found=f"{broken} of {factor.numel()} values",
        )
    return factor
