"""PEFT folders of tuners other than LoRA: names of tensors are sorted here, and what they do is said in `tuners`.

A key is `base_model.model.<module>.<part>`, maybe with `.weight` or the adapter's own name behind it; what belongs to
the whole model has no module. All else is held whole, as in LoRA's files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lora_cli.adapters.adapter import Adapter, Scale, Target
from lora_cli.adapters.formats.peft_keys import PREFIX, Found, sort_wholes
from lora_cli.adapters.formats.peft_wholes import replacements, trained_rows
from lora_cli.adapters.peft_config import COMMON, refuse_set_fields
from lora_cli.adapters.source import CONFIG_FILE, AdapterSource, ReadOptions
from lora_cli.adapters.tuners.tuner import Module, Tuner
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import MalformedFileError, NamesError


def read_tuner(source: AdapterSource, options: ReadOptions, tuner: Tuner, evidence: str) -> Adapter:
    """Read the adapter of a tuner other than LoRA.

    Raises:
        UnsupportedError: The config asks for what is not supported.
        MalformedFileError: A field has the wrong type.
        NamesError: Two tensors are one part of a module.
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
    _check_types(config, tuner)
    sorted_ = _Sorter(source, tuner)
    whole, copies = replacements(sorted_.found, config, file)
    rows, empty = trained_rows(sorted_.found, config, file)
    targets: list[Target] = []
    for name, tensors in sorted_.modules.items():
        for change in tuner.read(Module(name, tensors, config, sorted_.shared, _scaler(options))):
            if isinstance(change, Target):
                targets.append(change)
            else:
                whole.append(change)
    used = {tensor.key for target in targets for tensor in target.delta.tensors}
    used |= {change.tensor.key for change in whole}
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
        skipped=(*sorted_.found.skipped, *copies, *empty),
        config=config,
        transposed_hint=config.get("fan_in_fan_out") is True,
        orientation="ba",
        ignored_fields=ignored,
        stored=len(source.tensors),
    )


class _Sorter:
    """Says of every tensor of a file what it is.

    Attributes:
        modules: Module → part → tensor.
        shared: Part → tensor, of what belongs to the whole model.
        found: All else.
    """

    def __init__(self, source: AdapterSource, tuner: Tuner) -> None:
        self.modules: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
        self.shared: dict[str, StoredTensor] = {}
        self.found = Found()
        self._file = source.shard.name
        # The longest first: one name may begin like another.
        parts = "|".join(re.escape(part) for part in sorted((*tuner.parts, *tuner.shared), key=len, reverse=True))
        pattern = re.compile(rf"(?:(?P<module>.+)\.)?(?P<part>{parts})(?:\.default)?(?:\.weight)?", re.DOTALL)
        for key, tensor in source.tensors.items():
            name = key.removeprefix(PREFIX)
            match = pattern.fullmatch(name) if parts else None
            if match is None:
                sort_wholes(name, tensor, self.found)
            elif match["part"] in tuner.shared:
                self._put(self.shared, match["part"], tensor)
            else:
                self._put(self.modules[match["module"] or ""], match["part"], tensor)

    def _put(self, tensors: dict[str, StoredTensor], part: str, tensor: StoredTensor) -> None:
        if part in tensors:
            raise NamesError(
                "Two tensors are one part of a module",
                file=self._file,
                tensor=tensor.key,
                found=f"{tensors[part].key} and {tensor.key}",
            )
        tensors[part] = tensor


def _scaler(options: ReadOptions) -> Any:
    """Makes scales, of which the user may have said what they are."""

    def scale(alpha: float, rank: int | None, rslora: bool, source: str) -> Scale:
        if options.scale is not None:
            return Scale(options.scale, None, False, "--scale")
        if options.alpha is not None and rank is not None:
            return Scale(options.alpha, rank, rslora, f"--alpha / {source.rpartition('/')[2].strip()}")
        return Scale(float(alpha), rank, rslora, source)

    return scale


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
