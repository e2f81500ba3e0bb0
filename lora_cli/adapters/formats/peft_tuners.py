"""PEFT folders of tuners other than LoRA: names of tensors are sorted here, and what they do is said in `tuners`.

A key is `base_model.model.<module>.<part>`, maybe with `.weight` or the adapter's own name behind it. What belongs to
the whole model is `base_model.<part>`, maybe with a further name behind it; some files have a copy in every
module. All else is held whole, as in LoRA's files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lora_cli.adapters.adapter import HAS_NONE, Adapter, Replacement, Scale, Target
from lora_cli.adapters.formats.pairs import INCOMPLETE
from lora_cli.adapters.formats.peft_keys import PREFIX, Found, sort_wholes
from lora_cli.adapters.formats.peft_wholes import check_unnamed, content_of, replacements, trained_rows
from lora_cli.adapters.patterns import PeftPatterns
from lora_cli.adapters.peft_config import COMMON, refuse_set_fields
from lora_cli.adapters.peft_types import check_types
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions
from lora_cli.adapters.tuners.tuner import Module, Tuner
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import MalformedFileError, NamesError, UnsupportedError, UsageError


def read_tuner(source: AdapterSource, options: ReadOptions, tuner: Tuner, evidence: str) -> Adapter:
    """Read the adapter of a tuner other than LoRA.

    Raises:
        UnsupportedError: The config asks for what is not supported, or the file lacks what cannot be made again.
        MalformedFileError: A field has the wrong type.
        NamesError: Two tensors are one part of a module, copies of one tensor differ, or a part is missing.
    """
    config, file = source.config or {}, source.shard.name
    refused = {**tuner.refused}
    ignored = refuse_set_fields(
        config,
        {*COMMON, *tuner.understood},
        file=CONFIG_FILE,
        ignore=options.ignore_fields,
        neutral=tuner.neutral,
        refused=refused,
    )
    check_types({name: value for name, value in config.items() if name in COMMON}, CONFIG_FILE)
    _check_types(config, tuner)
    sorted_ = _Sorter(source, tuner)
    names = {*sorted_.shared, *(part for tensors in sorted_.modules.values() for part in tensors)}
    reason = tuner.unmergeable(config, names)
    if reason:
        raise UnsupportedError(reason, file=file)
    _check_whole(sorted_.modules, tuner, file)
    whole, copies = replacements(sorted_.found, config, file)
    unnamed = check_unnamed(whole, sorted_.modules, file)
    rows, empty = trained_rows(sorted_.found, config, file)
    targets: list[Target] = []
    scaler = _scaler(options, tuner)

    @cache
    def patterns(field: str) -> PeftPatterns:
        return PeftPatterns(config.get(field) or {}, file=CONFIG_FILE, field=field)

    for name, tensors in sorted_.modules.items():
        for change in tuner.read(Module(name, tensors, config, sorted_.shared, scaler, patterns)):
            if isinstance(change, Target):
                targets.append(change)
            elif isinstance(change, Replacement):
                whole.append(change)
            else:
                rows.append(change)
    used = {tensor.key for target in targets for tensor in target.delta.tensors}
    used |= {change.tensor.key for change in whole} | {change.tensor.key for change in rows}
    idle = [
        (t, tuner.idle[part]) for parts in sorted_.modules.values() for part, t in parts.items() if part in tuner.idle
    ]
    used |= {tensor.key for tensor, _ in idle}
    given = [*sorted_.shared.values(), *(t for tensors in sorted_.modules.values() for t in tensors.values())]
    return Adapter(
        label=source.label,
        path=source.path,
        format="peft",
        evidence=evidence,
        targets=tuple(targets),
        replacements=tuple(whole),
        rows=tuple(rows),
        tuner=tuner.name,
        unread=tuple(tensor for tensor in given if tensor.key not in used),
        skipped=(*sorted_.found.skipped, *sorted_.copies, *copies, *empty, *idle),
        config=config,
        transposed_hint=config.get("fan_in_fan_out"),
        orientation="ba",
        ignored_fields=ignored,
        stored=len(source.tensors),
        warnings=unnamed,
    )


class _Sorter:
    """Says of every tensor of a file what it is.

    Attributes:
        modules: Module → part → tensor.
        shared: Part → tensor, of what belongs to the whole model. A further name stands behind the part's, after a dot.
        copies: The same tensors once more, in a module.
        found: All else.
    """

    def __init__(self, source: AdapterSource, tuner: Tuner) -> None:
        self.modules: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
        self.shared: dict[str, StoredTensor] = {}
        self.copies: list[tuple[StoredTensor, str]] = []
        self.found = Found()
        self._file = source.shard.name
        suffix = r"(?:\.default)?(?:\.weight)?"
        in_module = re.compile(
            rf"(?:(?P<module>.+)\.)?(?P<part>{_any((*tuner.parts, *tuner.shared))}){suffix}", re.DOTALL
        )
        of_model = re.compile(rf"base_model\.(?P<part>{_any(tuner.shared)}(?:\.[^.]+?)?){suffix}")
        within: list[tuple[str, StoredTensor]] = []
        for key, tensor in source.tensors.items():
            name = key.removeprefix(PREFIX)
            if tuner.shared and (match := of_model.fullmatch(name)):
                self._put(self.shared, match["part"].removesuffix(".default"), tensor)
            elif not (tuner.parts or tuner.shared) or not (match := in_module.fullmatch(name)):
                sort_wholes(name, tensor, self.found)
            elif match["part"] in tuner.shared:
                within.append((match["part"], tensor))
            else:
                self._put(self.modules[match["module"] or ""], match["part"], tensor)
        self._take_copies(within)

    def _take_copies(self, found: list[tuple[str, StoredTensor]]) -> None:
        """Take what modules hold of what belongs to the model: in PEFT it is one tensor."""
        wrong = []
        for part, tensor in found:
            first = self.shared.setdefault(part, tensor)
            if first is tensor:
                continue
            if content_of(first) == content_of(tensor):
                self.copies.append((tensor, "a second copy of the same tensor"))
            else:
                wrong.append(f"{first.key} and {tensor.key}")
        if wrong:
            raise NamesError("Copies of a tensor of the whole model differ", file=self._file, details=wrong)

    def _put(self, tensors: dict[str, StoredTensor], part: str, tensor: StoredTensor) -> None:
        if part in tensors:
            raise NamesError(
                "Two tensors are one part of a module",
                file=self._file,
                tensor=tensor.key,
                found=f"{tensors[part].key} and {tensor.key}",
            )
        tensors[part] = tensor


def _any(names: Iterable[str]) -> str:
    """A pattern of any of these names, the longest first: one may begin like another."""
    return f"(?:{'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})"


def _scaler(options: ReadOptions, tuner: Tuner) -> Any:
    """Makes scales, of which the user may have said what they are."""

    def scale(alpha: float, rank: int | None, rslora: bool, source: str) -> Scale:
        if options.scale is not None:
            return Scale(options.scale, None, False, "--scale")
        if options.alpha is not None and source == HAS_NONE:
            raise UsageError(f"{tuner.name} has no scale", hint="leave out --alpha")
        if options.alpha is not None and rank is None:
            raise UsageError(f"{tuner.name} divides no alpha by a rank", hint="say --scale, or leave out --alpha")
        if options.alpha is not None:
            return Scale(options.alpha, rank, rslora, f"--alpha / {source.rpartition('/')[2].strip()}")
        return Scale(float(alpha), rank, rslora, source)

    return scale


def _check_whole(modules: Mapping[str, Mapping[str, StoredTensor]], tuner: Tuner, file: str) -> None:
    """Refuse modules that lack a part."""
    lost = [f"{name} has no {words}" for name, parts in modules.items() if (words := tuner.lacks(parts))]
    if lost:
        raise NamesError(
            f"{len(lost)} modules lack a tensor" if len(lost) > 1 else "A module lacks a tensor",
            file=file,
            details=lost,
            hint=INCOMPLETE,
        )


def _check_types(config: Mapping[str, Any], tuner: Tuner) -> None:
    for name, field in tuner.understood.items():
        value = config.get(name)
        if value is not None and not field.fits(value):
            raise MalformedFileError(
                "A field of the adapter's config has the wrong type",
                file=CONFIG_FILE,
                tensor=name,
                expected=field.type,
                found=repr(value)[:60],
            )
