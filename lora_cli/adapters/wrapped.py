"""Wrapped checkpoints: base weights and their own factors in one file.

A wrapped module X has its base weight at `X.base.weight` (or `X.base_layer.weight`, as PEFT's live models have it) and
its factors at `X.lora_A.weight` and `X.lora_B.weight`:

- of a matrix (rank × in) and (out × rank), also of an embedding's (entries × dim), whose in is entries and out is dim;
- of a convolution the kernels (rank, in/groups, k…) and (out, rank, 1…), or (out × rank);
- of a stack of matrices (experts, in, out), such as a grouped linear layer's, (experts, in, rank) and
  (experts, rank, out), as `torch.bmm` multiplies them.

A parameter P of X that `torch.nn.utils.parametrize` keeps is at `X.parametrizations.P.original`, and its factors are at
`.0.A` (rank × rest) and `.0.B` (first × rank): the matrix has the first dimension of P as rows, however that is used.
`lora_wrap.json` beside the checkpoint says the scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter, Delta, Scale, Target
from lora_cli.adapters.deltas import LowRank, LowRankKernel, LowRankStack, is_kernel_pair, is_stack_pair
from lora_cli.adapters.formats.pairs import Pair, check_pairs
from lora_cli.adapters.modules import is_embedding
from lora_cli.adapters.names import Chain, First, Identity, Mapper, Subtree, Unparametrize, Unwrap
from lora_cli.adapters.source import ReadOptions
from lora_cli.adapters.strength import check_alpha
from lora_cli.adapters.wrap_file import WRAP_FILE, check_wrap, read_wrap_file
from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.errors import NamesError, ShapeError, UnsupportedError, UsageError

_BASE = re.compile(r"(?P<module>.+)\.(?P<child>base|base_layer)\.(?P<parameter>weight|in_proj_weight)", re.DOTALL)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight", re.DOTALL)
_PARAMETRIZED = re.compile(
    r"(?P<holder>(?:(?P<module>.+)\.)?parametrizations\.(?P<parameter>[^.]+))\.(?P<rest>original|0\.[AB])", re.DOTALL
)


@dataclass(frozen=True)
class Wrapped:
    """How a wrapped checkpoint reads as a plain one.

    Attributes:
        mapper: Stored key → plain key; keys outside stay.
        adapter: The factors that it carries.
    """

    mapper: Mapper
    adapter: Adapter

    @property
    def carried(self) -> frozenset[str]:
        """Keys that hold factors, and have no place in a plain checkpoint."""
        return frozenset(tensor.key for tensor in self.adapter.tensors)


@dataclass(slots=True)
class _Site:
    """A parameter that has factors beside it; `holder` is what all names of a parametrized one begin with."""

    module: str
    parameter: str
    base: StoredTensor
    child: str = ""
    holder: str = ""
    pair: Pair = field(default_factory=Pair)

    @property
    def name(self) -> str:
        """Its plain name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def wrap_file_of(checkpoint: Checkpoint) -> Path:
    """Where the wrap's own description is, beside a folder's files or a bare file."""
    path = checkpoint.path
    return path / WRAP_FILE if checkpoint.folder else path.with_name(f"{path.stem}.{WRAP_FILE}")


def wrapped_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the modules that have factors beside their weight; of other parameters than weights their own names."""
    sites = _sites(checkpoint)
    return _modules(sites, _mapper(sites))


def _modules(sites: Iterable[_Site], mapper: Mapper) -> tuple[str, ...]:
    return tuple(str(mapper(site.base.key)).removesuffix(".weight") for site in sites)


def _sites(checkpoint: Checkpoint) -> list[_Site]:
    return [*_wrapped(checkpoint.tensors), *_parametrized(checkpoint.tensors)]


def _wrapped(keys: Mapping[str, StoredTensor]) -> Iterator[_Site]:
    """Modules with a base weight and factors beside it."""
    found = {}
    for key, tensor in keys.items():
        match = _BASE.fullmatch(key) if ".base" in key else None
        if match and f"{match['module']}.{match['parameter']}" not in keys:
            module = match["module"]
            if f"{module}.lora_A.weight" in keys or f"{module}.lora_A.default.weight" in keys:
                found[module] = _Site(module, match["parameter"], tensor, child=match["child"])
    for key, tensor in keys.items() if found else ():
        match = _FACTOR.fullmatch(key)
        if match and match["module"] in found:
            found[match["module"]].pair.put(match["side"], tensor)
    yield from found.values()


def _parametrized(keys: Mapping[str, StoredTensor]) -> Iterator[_Site]:
    """Parameters that are kept by `torch.nn.utils.parametrize`, with factors as the first parametrization."""
    for key, tensor in keys.items():
        match = _PARAMETRIZED.fullmatch(key) if key.endswith(".original") else None
        if match and (f"{match['holder']}.0.A" in keys or f"{match['holder']}.0.B" in keys):
            site = _Site(match["module"] or "", match["parameter"], tensor, holder=match["holder"])
            for side in "AB":
                if f"{site.holder}.0.{side}" in keys:
                    site.pair.put(side, keys[f"{site.holder}.0.{side}"])
            yield site


def unwrap(checkpoint: Checkpoint, options: ReadOptions) -> Wrapped | None:
    """Read a wrapped checkpoint's own factors and the way back to plain names; None for a plain checkpoint.

    Raises:
        UnsupportedError: The checkpoint carries other factors besides, or instead.
        UsageError: Nothing says how strong the factors are.
        MalformedFileError: The wrap file is broken.
        NamesError: Folding would give two tensors one name, or a factor has no partner.
        ShapeError: Factors that share no rank, or do not fit the base weight.
    """
    sites = _sites(checkpoint)
    factors = {tensor.key for site in sites for tensor in (site.pair.a, site.pair.b) if tensor}
    refuse_other_factors(checkpoint, factors)
    if not sites:
        return None
    check_pairs({site.name: site.pair for site in sites}, checkpoint.label)
    mapper = _mapper(sites)
    path = wrap_file_of(checkpoint)
    said = read_wrap_file(path)
    targets = tuple(_target(site, mapper, _delta(site, said, options, checkpoint.label)) for site in sites)
    adapter = Adapter(
        label=f"{checkpoint.label} (its own factors)",
        path=checkpoint.path,
        format="wrapped",
        evidence=f"{len(targets)} modules hold a base weight and factors",
        targets=targets,
        config=said,
        transposed_hint=said.get("fan_in_fan_out"),
        orientation="ba",
        stored=2 * len(targets),
    )
    _check_folding(checkpoint, First((mapper, Identity())), factors)
    plain = {key: None if key in factors else mapper(key) or key for key in checkpoint.tensors}
    check_wrap(said, _modules(sites, mapper), plain, file=path.name)
    return Wrapped(mapper, adapter)


def _target(site: _Site, mapper: Mapper, delta: Delta) -> Target:
    module, _, parameter = str(mapper(site.base.key)).rpartition(".")
    return Target(module, parameter, delta)


def _mapper(sites: Iterable[_Site]) -> Mapper:
    """The way from stored names to plain ones, which are outside where they are the same."""
    by_child: dict[str, set[str]] = {}
    kept, around = set(), []
    for site in sites:
        if site.holder:
            kept.add(site.name)
        elif site.parameter == "weight":
            by_child.setdefault(site.child, set()).add(site.module)
        else:
            around.append(Subtree(f"{site.module}.{site.child}", site.module))
    unwraps: list[Mapper] = [Unwrap(frozenset(modules), child) for child, modules in sorted(by_child.items())]
    inner = (*unwraps, *([Unparametrize(frozenset(kept))] if kept else []))
    if not around:
        return First(inner)
    # From the inside out: a layer below a wrapped one was wrapped under the name that it then had.
    return Chain((First((*inner, Identity())), First((*around, Identity()))))


_FACTOR_PARTS = {
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude", "lora_magnitude_vector", "lora_diag"),
}


def refuse_other_factors(checkpoint: Checkpoint, carried: Collection[str]) -> None:
    """Refuse a checkpoint that holds factors of a kind that is not read from checkpoints: they would be lost in it.

    So would be further parametrizations of a parameter, and more of one than its factors.

    Raises:
        UnsupportedError: Names every such tensor.
    """
    holders = {site.holder: site.base.key for site in _parametrized(checkpoint.tensors)}
    others = [
        key
        for key in checkpoint.tensors
        if key not in carried
        and (not _FACTOR_PARTS.isdisjoint(key.split(".")) or (holders and _is_kept_beside(key, holders)))
    ]
    if others:
        raise UnsupportedError(
            "The checkpoint carries factors already, and they would be lost",
            file=checkpoint.label,
            details=others,
            hint="a wrapped checkpoint is folded with one adapter, and without DoRA: save others as adapters, and with "
            "DoRA the weights that the model merged",
        )


def _is_kept_beside(key: str, holders: Mapping[str, str]) -> bool:
    """Whether a tensor is part of what a parameter with factors is made of, and not the parameter itself."""
    before, _, rest = key.rpartition("parametrizations.")
    holder = f"{before}parametrizations.{rest.partition('.')[0]}"
    return holders.get(holder, key) != key


def _check_folding(checkpoint: Checkpoint, mapper: Mapper, factors: Collection[str]) -> None:
    lost = [key for key in checkpoint.tensors if key not in factors and mapper(key) is None]
    if lost:
        raise NamesError(
            "Folding the wrapped names would give two tensors one name", file=checkpoint.label, details=lost
        )


def _delta(site: _Site, said: Mapping[str, Any], options: ReadOptions, label: str) -> Delta:
    """The change that the factors of a site make, by their shapes and that of the base weight beside them."""
    a, b = (tensor.shape for tensor in site.pair.both)
    base = site.base.shape
    stack = not site.holder and is_stack_pair(a, b) and base == (a[0], a[1], b[2])
    kernel = not site.holder and not stack and is_kernel_pair(a, b)
    if not stack and not kernel and (len(a) != 2 or len(b) != 2 or a[0] != b[1]):
        raise ShapeError(
            "Ranks do not agree",
            file=label,
            tensor=site.name.removesuffix(".weight"),
            found=f"A is {list(a)}, B is {list(b)}, the base weight is {list(base)}",
        )
    scale = _scale(a[2] if stack else a[0], site.module, said, options, label)
    if stack:
        return LowRankStack(*site.pair.both, scale)
    if kernel:
        return LowRankKernel(*site.pair.both, scale)
    if not site.holder:
        table = is_embedding(site.module) and base == (a[1], b[0])
        return LowRank(*site.pair.both, scale, kind="lora-embedding" if table else "lora")
    if not base or (base[0], math.prod(base[1:])) != (b[0], a[1]):
        raise ShapeError(
            "The factors do not fit the parameter",
            file=label,
            tensor=site.name,
            expected=f"{list(base)}, as the parameter is stored",
            found=f"{b[0]} × {a[1]}",
        )
    return LowRank(*site.pair.both, scale, folded=base)


def _scale(rank: int, module: str, said: Mapping[str, Any], options: ReadOptions, label: str) -> Scale:
    if said.get("rank", rank) != rank:
        raise ShapeError("Ranks do not agree", file=WRAP_FILE, tensor=module, expected=rank, found=said["rank"])
    if options.scale is not None:
        return Scale(options.scale, None, False, "--scale")
    if options.alpha is not None:
        return Scale(options.alpha, rank, False, "--alpha / rank of the factors")
    alpha = said.get("alpha")
    if alpha is None:
        raise UsageError(
            "Nothing says how strong the checkpoint's own factors are",
            file=label,
            expected=f"{WRAP_FILE} beside it",
            hint="give --alpha A (scale is alpha / rank) or --scale S",
        )
    check_alpha(alpha, file=WRAP_FILE, field="alpha")
    rslora = said.get("scaling") == "alpha/sqrt(rank)"
    return Scale(float(alpha), rank, rslora, f"alpha of {WRAP_FILE} / {'√' if rslora else ''}rank of the factors")
