"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors` (huggingface/peft, `utils/save_and_load.py`).

Keys are `base_model.model.<module>.lora_A.weight` (rank × in), `.lora_B.weight` (out × rank), `.lora_B.bias` (out), and
whole tensors without infix. Of a convolution both are kernels, (rank, in, k…) and (out, rank, 1…); of an embedding they
are `.lora_embedding_A` (rank × entries) and `.lora_embedding_B` (dim × rank). DoRA has `.lora_magnitude_vector` (out)
besides. The scale is alpha/r, or alpha/√r for rsLoRA (Kalajdzievski 2023), with alpha and r taken from the first
matching entry of `alpha_pattern` and `rank_pattern`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lora_cli.adapters.adapter import Adapter, Delta, Replacement, Scale, Target
from lora_cli.adapters.deltas import LowRank, LowRankBias, LowRankKernel, is_kernel_pair
from lora_cli.adapters.formats.pairs import Pair, check_pairs
from lora_cli.adapters.patterns import PeftPatterns
from lora_cli.adapters.peft_config import check_fields
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.tied import EMBEDDINGS
from lora_cli.errors import NumericError, ShapeError, UnsupportedError

NAME = "peft"
PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<parameter>weight|bias)", re.DOTALL
)
_TABLE = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?", re.DOTALL)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", re.DOTALL)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>[^.]+)", re.DOTALL)
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)", re.DOTALL)
_ORIGINAL = re.compile(r".+\.original_module\.[^.]+")
_UNSUPPORTED = {
    "trainable_tokens_delta": "single trained token rows are not supported",
    "lora_diag": "KaSA is not supported",
}
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT saves for a task even where the config does not name them."""


def detect(source: AdapterSource) -> str | None:
    """Say why this is a PEFT adapter, or None."""
    if source.config is not None and "peft_type" in source.config:
        return f"{CONFIG_FILE} has peft_type"
    return None


def read(source: AdapterSource, options: ReadOptions) -> Adapter:
    """Read the adapter; see the module for the format.

    Raises:
        UnsupportedError: Another tuner, or a variant or field that is not supported.
        NamesError: A factor without its partner.
        ShapeError: Ranks that disagree.
    """
    config = source.config or {}
    ignored = check_fields(config, file=CONFIG_FILE, ignore=options.ignore_fields)
    found = _sort(source, config)
    pairs, biases = found.pairs, found.biases
    check_pairs(pairs, source.shard.name)
    _refuse_stacks(pairs, source.shard.name)
    numbers, rslora = _Numbers(config), bool(config.get("use_rslora"))
    scales = {module: _scale(module, numbers, options, rslora=rslora) for module in pairs}
    _check_ranks(pairs, numbers)
    targets = [
        Target(
            module, "weight", _delta(pair, scales[module], found.magnitudes.get(module), table=module in found.tables)
        )
        for module, pair in pairs.items()
    ]
    _check_magnitudes(targets, config)
    targets += [
        Target(module, "bias", LowRankBias(b, scales[module])) for module, b in biases.items() if module in pairs
    ]
    fan = config.get("fan_in_fan_out")
    return Adapter(
        label=source.label,
        path=source.path,
        format=NAME,
        evidence=detect(source) or "",
        targets=tuple(targets),
        replacements=tuple(found.replacements),
        unread=(*found.unread, *(t for more in (biases, found.magnitudes) for m, t in more.items() if m not in pairs)),
        skipped=tuple(found.skipped),
        config=config,
        transposed_hint=fan is True,  # as PEFT takes it where the config does not say
        orientation="ba",
        ignored_fields=ignored,
        stored=len(source.tensors),
        warnings=tuple(_ambiguous_patterns(numbers, pairs)),
    )


def _ambiguous_patterns(numbers: _Numbers, modules: Iterable[str]) -> list[str]:
    """Warn where the order of a pattern's entries matters: PEFT saves them sorted, whatever the trainer's order was."""
    warnings = []
    for name, patterns in numbers.patterns.items():
        found = ((module, patterns.all(module)) for module in modules) if len(patterns) > 1 else iter(())
        for module, values in islice(((m, v) for m, v in found if len(set(map(str, v))) > 1), 1):
            warnings.append(f"several entries of {name} match {module}; the first one, {values[0]}, is taken")
    return warnings


@dataclass(slots=True)
class _Found:
    """The tensors of a file by what they are."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    biases: dict[str, StoredTensor] = field(default_factory=dict)
    magnitudes: dict[str, StoredTensor] = field(default_factory=dict)
    replacements: list[Replacement] = field(default_factory=list)
    skipped: list[tuple[StoredTensor, str]] = field(default_factory=list)
    unread: list[StoredTensor] = field(default_factory=list)


def _sort(source: AdapterSource, config: Mapping[str, Any]) -> _Found:
    found = _Found()
    adapter_names: set[str] = set()
    for key, tensor in source.tensors.items():
        name = key.removeprefix(PREFIX)
        _refuse_unsupported(name, tensor, source)
        if match := _FACTOR.fullmatch(name):
            module, side, adapter, parameter = match.groups()
            adapter_names.add(adapter or "default")
            _refuse_several(adapter_names, source)
            if parameter == "weight":
                found.pairs.setdefault(module, Pair()).put(side, tensor)
            elif side == "B" and module not in found.biases:
                found.biases[module] = tensor
            else:
                found.unread.append(tensor)
        elif match := _TABLE.fullmatch(name):
            module, side, adapter = match.groups()
            adapter_names.add(adapter or "default")
            _refuse_several(adapter_names, source)
            found.pairs.setdefault(module, Pair()).put(side, tensor)
            found.tables.add(module)
        elif (match := _MAGNITUDE.fullmatch(name)) and match["module"] not in found.magnitudes:
            found.magnitudes[match["module"]] = tensor
        elif _ORIGINAL.fullmatch(name):
            found.skipped.append((tensor, "a copy of the base's own tensor"))
        else:
            found.replacements.append(_replacement(name, tensor, config))
    return found


def _refuse_several(adapter_names: set[str], source: AdapterSource) -> None:
    if len(adapter_names) > 1:
        raise UnsupportedError(
            "The file holds several adapters",
            file=source.shard.name,
            found=", ".join(sorted(adapter_names)),
            hint="save each of them on its own",
        )


def _refuse_unsupported(name: str, tensor: StoredTensor, source: AdapterSource) -> None:
    parts = name.split(".")
    refused = not _UNSUPPORTED.keys().isdisjoint(parts)  # of tens of thousands nearly none
    reason = next(_UNSUPPORTED[part] for part in parts if part in _UNSUPPORTED) if refused else None
    if ".base_layer.lora_" in name:
        reason = "nested LoRA (several expert parameters of one module) is not supported"
    if reason:
        raise UnsupportedError(reason, file=source.shard.name, tensor=tensor.key, found=f"shape {list(tensor.shape)}")


def _replacement(name: str, tensor: StoredTensor, config: Mapping[str, Any]) -> Replacement:
    if match := _SAVED.fullmatch(name) or _BASE_LAYER.fullmatch(name):
        name = f"{match['module']}.{match['parameter']}"
    module, _, parameter = name.rpartition(".")
    saved = config.get("modules_to_save") or ()
    if any(_is_part(module, str(entry)) for entry in saved):
        # An embedding that the base calls otherwise is a mismatch of names; any other saved module may be a new head.
        new = module.rpartition(".")[2] not in EMBEDDINGS
        return Replacement(name, tensor, "modules_to_save", may_be_new=new)
    if parameter == "bias" and config.get("bias") in ("all", "lora_only"):
        return Replacement(name, tensor, f"bias = {config['bias']}")
    head = any(_is_part(module, entry) for entry in HEADS.get(str(config.get("task_type")), ()))
    reason = (
        f"head of task_type {config['task_type']}" if head else "in the file whole, though the config names it nowhere"
    )
    return Replacement(name, tensor, reason, may_be_new=head)


def _is_part(module: str, entry: str) -> bool:
    """Whether `module` is the saved module `entry`, or lies inside it, counted in whole dotted parts."""
    return f".{entry}." in f".{module}."


class _Numbers:
    """Ranks and alphas of single modules, each with the field that says it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.patterns = {name: PeftPatterns(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}

    def rank(self, module: str) -> tuple[Any, str] | None:
        return self._value("rank_pattern", "r", module)

    def alpha(self, module: str) -> tuple[Any, str] | None:
        return self._value("alpha_pattern", "lora_alpha", module)

    def _value(self, patterns: str, field: str, module: str) -> tuple[Any, str] | None:
        found = self.patterns[patterns].first(module)
        if found is not None:
            return found[1], f"{patterns}[{found[0]!r}]"
        return (self._config[field], field) if field in self._config else None


def _scale(module: str, numbers: _Numbers, options: ReadOptions, *, rslora: bool) -> Scale:
    if options.scale is not None:
        return Scale(options.scale, None, False, "--scale")
    rank, rank_source = numbers.rank(module) or (8, "PEFT's default r")
    alpha, alpha_source = numbers.alpha(module) or (8, "PEFT's default lora_alpha")
    if options.alpha is not None:
        alpha, alpha_source = options.alpha, "--alpha"
    elif not alpha:
        raise NumericError(
            "The adapter's alpha is 0, so it would change nothing",
            file=CONFIG_FILE,
            tensor=alpha_source,
            hint="give the alpha it was trained with by --alpha A; to apply nothing on purpose use --weight 0",
        )
    root = "√" if rslora else ""
    return Scale(float(alpha), int(rank), rslora, f"{alpha_source} / {root}{rank_source}")


def _delta(pair: Pair, scale: Scale, magnitude: StoredTensor | None, *, table: bool) -> Delta:
    a, b = pair.both
    if len(a.shape) > 2:
        return LowRankKernel(a, b, scale, magnitude=magnitude)
    return LowRank(a, b, scale, kind="lora-embedding" if table else "lora", magnitude=magnitude)


def _check_magnitudes(targets: Iterable[Target], config: Mapping[str, Any]) -> None:
    """Each output has one magnitude; of a convolution they are in the shape of what it gives."""
    found = [(target, target.delta.magnitude) for target in targets]
    lost = [target.module for target, magnitude in found if magnitude is None and config.get("use_dora")]
    if lost:
        raise UnsupportedError("The config says DoRA, and the file lacks magnitudes", file=CONFIG_FILE, details=lost)
    wrong = [
        f"{target.module}: {list(magnitude.shape)} for {target.delta.shape[0]} outputs"
        for target, magnitude in found
        if magnitude is not None and math.prod(magnitude.shape) != target.delta.shape[0]
    ]
    if wrong:
        raise ShapeError("There is not one magnitude for each output", file=CONFIG_FILE, details=wrong)


def _refuse_stacks(pairs: Mapping[str, Pair], file: str) -> None:
    """Refuse factors of three dimensions that are no kernels: a convolution's B ends in ones."""
    stacks = [
        f"{module}: A is {list(a.shape)}, B is {list(b.shape)}"
        for module, (a, b) in ((module, pair.both) for module, pair in pairs.items())
        if max(len(a.shape), len(b.shape)) > 2 and not (len(a.shape) == len(b.shape) and set(b.shape[2:]) <= {1})
    ]
    if stacks:
        raise UnsupportedError("LoRA on expert stacks is not supported", file=file, details=stacks)


def _check_ranks(pairs: Mapping[str, Pair], numbers: _Numbers) -> None:
    wrong = []
    for module, pair in pairs.items():
        a, b = (tensor.shape for tensor in pair.both)
        matrices = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a + b
        if not matrices and not is_kernel_pair(a, b):
            wrong.append(f"{module}: A is {list(a)}, B is {list(b)}{_groups_words(a, b)}")
            continue
        said = numbers.rank(module)
        if said is not None and said[0] != a[0]:
            wrong.append(f"{module}: the factors have rank {a[0]}, {said[1]} says {said[0]}")
    if wrong:
        raise ShapeError("Ranks do not agree", file=CONFIG_FILE, details=wrong)


def _groups_words(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Words for a convolution with groups, where PEFT's A sees all inputs, and each group of B only a part of A's."""
    if len(a) > 2 and b[1] and a[0] > b[1] and a[0] % b[1] == 0:
        return f"; a convolution in {a[0] // b[1]} groups, whose factors no kernel in groups is the product of"
    return ""
