"""Wrapped checkpoints: base weights and their own factors in one file.

A wrapped module X has its base weight at `X.base.weight` (or `X.base_layer.weight`, as PEFT's live models have it) and
its factors at `X.lora_A.weight` (rank × in) and `X.lora_B.weight` (out × rank). `lora_wrap.json` beside the checkpoint
says the scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter, LowRank, Scale, Target
from lora_cli.adapters.formats.pairs import Pair, check_pairs
from lora_cli.adapters.names import First, Identity, Mapper, Unwrap
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import Checkpoint, read_config
from lora_cli.errors import MalformedFileError, NamesError, ShapeError, UnsupportedError, UsageError

WRAP_FILE = "lora_wrap.json"
WRAP_SCHEMA = "lora-cli/wrap/1"

_BASE = re.compile(r"(?P<module>.+)\.(?P<child>base|base_layer)\.(?P<parameter>weight|bias)", re.DOTALL)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight", re.DOTALL)


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


def wrap_file_of(checkpoint: Checkpoint) -> Path:
    """Where the wrap's own description is, beside a folder's files or a bare file."""
    path = checkpoint.path
    return path / WRAP_FILE if checkpoint.folder else path.with_name(f"{path.stem}.{WRAP_FILE}")


def wrapped_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """Module → name of the child that holds its base weight, for each module that has factors beside it."""
    keys = checkpoint.tensors
    found = {}
    for key in keys:
        match = _BASE.fullmatch(key) if ".base" in key else None
        if match and match["parameter"] == "weight" and f"{match['module']}.weight" not in keys:
            module = match["module"]
            if f"{module}.lora_A.weight" in keys or f"{module}.lora_A.default.weight" in keys:
                found[module] = match["child"]
    return found


def unwrap(checkpoint: Checkpoint, options: ReadOptions) -> Wrapped | None:
    """Read a wrapped checkpoint's own factors and the way back to plain names; None for a plain checkpoint.

    Raises:
        UsageError: Nothing says how strong the factors are.
        NamesError: Folding would give two tensors one name, or a factor has no partner.
    """
    children = wrapped_modules(checkpoint)
    if not children:
        return None
    mapper = First(
        tuple(
            Unwrap(frozenset(module for module, c in children.items() if c == child), child)
            for child in sorted(set(children.values()))
        )
    )
    pairs: dict[str, Pair] = {}
    for key, tensor in checkpoint.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match and match["module"] in children:
            pairs.setdefault(match["module"], Pair()).put(match["side"], tensor)
    check_pairs(pairs, checkpoint.label)
    said = _read_wrap_file(checkpoint)
    targets = tuple(
        Target(module, "weight", LowRank(*pair.both, _scale(module, pair, said, options, checkpoint.label)))
        for module, pair in pairs.items()
    )
    adapter = Adapter(
        label=f"{checkpoint.label} (its own factors)",
        path=checkpoint.path,
        format="wrapped",
        evidence=f"{len(targets)} modules hold a base weight and factors",
        targets=targets,
        config=said,
        transposed_hint=said.get("fan_in_fan_out") is True,
        orientation="ba",
        stored=2 * len(targets),
    )
    plain = First((mapper, Identity()))
    _check_folding(checkpoint, plain)
    return Wrapped(mapper, adapter)


_FACTOR_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag"}


def refuse_other_factors(checkpoint: Checkpoint, carried: Collection[str]) -> None:
    """Refuse a checkpoint that holds factors of a kind that is not read from checkpoints: they would be lost in it.

    Raises:
        UnsupportedError: Names every such tensor.
    """
    others = [key for key in checkpoint.tensors if key not in carried and not _FACTOR_PARTS.isdisjoint(key.split("."))]
    if others:
        raise UnsupportedError(
            "The checkpoint carries factors already, and they would be lost",
            file=checkpoint.label,
            details=others,
            hint="merge a wrapped checkpoint first (lora-cli merge BASE -o OUT), or export these factors as an adapter",
        )


def _check_folding(checkpoint: Checkpoint, mapper: Mapper) -> None:
    lost = [key for key in checkpoint.tensors if mapper(key) is None]
    if lost:
        raise NamesError(
            "Folding the wrapped names would give two tensors one name", file=checkpoint.label, details=lost
        )


def _read_wrap_file(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = wrap_file_of(checkpoint)
    if not path.exists():
        return {}
    said = read_config(path)
    if said.get("schema") != WRAP_SCHEMA:
        raise MalformedFileError("Not a wrap file that this version knows", file=path.name, expected=WRAP_SCHEMA)
    if said.get("scaling") not in ("alpha/rank", "alpha/sqrt(rank)"):
        raise MalformedFileError(
            "The wrap file has no scaling that is known",
            file=path.name,
            tensor="scaling",
            expected="alpha/rank or alpha/sqrt(rank)",
            found=repr(said.get("scaling"))[:60],
        )
    return said


def _scale(module: str, pair: Pair, said: Mapping[str, Any], options: ReadOptions, label: str) -> Scale:
    a, b = pair.both
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(
            "Ranks do not agree",
            file=label,
            tensor=module,
            found=f"A is {list(a.shape)}, B is {list(b.shape)}",
        )
    rank = a.shape[0]
    if said.get("rank", rank) != rank:
        raise ShapeError("Ranks do not agree", file=WRAP_FILE, tensor=module, expected=rank, found=said["rank"])
    if options.scale is not None:
        return Scale(options.scale, None, False, "--scale")
    if options.alpha is not None:
        return Scale(options.alpha, rank, False, "--alpha / rank of the factors")
    alpha = said.get("alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UsageError(
            "Nothing says how strong the checkpoint's own factors are",
            file=label,
            expected=f"{WRAP_FILE} beside it",
            hint="give --alpha A (scale is alpha / rank) or --scale S",
        )
    rslora = said.get("scaling") == "alpha/sqrt(rank)"
    return Scale(float(alpha), rank, rslora, f"alpha of {WRAP_FILE} / {'√' if rslora else ''}rank of the factors")
