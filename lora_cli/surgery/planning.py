"""Making the plan of a merge, or of its reverse, from headers: where every output byte comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from lora_cli.adapters.adapter import Adapter, Replacement
from lora_cli.adapters.strength import doubts
from lora_cli.checkpoint.checkpoint import Checkpoint, Shard, StoredTensor
from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.checkpoint.header import Header, render_header
from lora_cli.checkpoint.repairs import repaired, with_dtype
from lora_cli.checkpoint.sidefiles import SideFile, side_files, taken_tokenizer
from lora_cli.surgery.changing import Change
from lora_cli.surgery.edit import Edit, Operation
from lora_cli.surgery.fitting import check_base
from lora_cli.surgery.matching import unused_layout
from lora_cli.surgery.passed_over import passed_over
from lora_cli.surgery.placing import Placement, PlanOptions
from lora_cli.surgery.plan import OutputFile, Plan

OUTPUT_DTYPES: Mapping[str, str | None] = {"keep": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}

KEPT = "it replaced a tensor whole, whose base values are lost"
"""Why an unmerge leaves a tensor as it is."""


class _Row(NamedTuple):
    key: str
    operation: Operation
    source: StoredTensor
    dtype: DType
    displaced: StoredTensor | None = None


def plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    options: PlanOptions,
    *,
    operation: Literal["merge", "unmerge"] = "merge",
) -> Plan:
    """Resolve names, check everything that headers can tell, and lay out the output.

    Raises:
        WrongInputError: An adapter that fits what is left of another base alone; see `fitting`.
        LoraCliError: What `Placement` raises.
    """
    placement = Placement(base, adapters, options)
    if operation == "merge":
        # What an adapter is taken out of is not the base that it fits, but that with the adapter in it.
        placement.warnings += check_base(placement)
        for adapter, weight in zip(placement.adapters, placement.weights, strict=True):
            placement.warnings += [f"{adapter.label}: {words}" for words in doubts(adapter, weight)]
    placement.warnings += unused_layout(options.read.expert_layout, placement.adapters)
    made = _Layout(placement, operation).plan()
    return replace(made, warnings=(*made.warnings, *passed_over(made))) if operation == "merge" else made


class _Layout:
    """Lays out the output's files for a placement. Used once."""

    def __init__(self, placement: Placement, operation: Literal["merge", "unmerge"]) -> None:
        self.placement = placement
        self.base = placement.base
        self.operation: Literal["merge", "unmerge"] = operation
        self.wanted = OUTPUT_DTYPES[placement.options.dtype]

    def plan(self) -> Plan:
        placed = self.placement
        if self.operation == "unmerge":
            self._keep_what_was_replaced()
        files = tuple(file for shard in self.base.shards if (file := self._output_file(shard)).edits)
        sides, left_out = self._side_files()
        return Plan(
            operation=self.operation,
            checkpoint=self.base,
            files=files,
            side_files=(*sides, *self._index(files)),
            left_out=tuple(left_out),
            adapters=tuple(placed.uses),
            opened=tuple(placed.adapters),
            ledger=placed.accounts.ledger,
            dropped=tuple(sorted({*placed.carried, *self._left_layers()})),
            inputs=(*self.base.paths, *(path for adapter in placed.adapters for path in adapter.paths)),
            warnings=(*self._own_warnings(), *placed.warnings),
            untied={name: placed.views.tied[name] for name in placed.apart},
            layers=placed.views.layers,
        )

    def _own_warnings(self) -> list[str]:
        placed = self.placement
        added = placed.appended.items()
        return [
            *(f"{self.base.label}: {text}" for text in self.base.warnings),
            *(f"{name} is not in the base and is added ({replacement.reason})" for name, replacement in added),
        ]

    def _left_layers(self) -> list[str]:
        """Tensors of layers that the trained model does not have."""
        placed = self.placement
        return [
            key for key, stored in self.base.tensors.items() if key not in placed.carried and not self._names(stored)
        ]

    def _names(self, stored: StoredTensor) -> tuple[str, ...]:
        """Names of a stored tensor in the output; it goes on under the first, and is repeated under others."""
        placed = self.placement
        names = placed.views.names(stored)
        return (*names, *(alias for alias in placed.apart if placed.views.tied[alias] in names))

    def _keep_what_was_replaced(self) -> None:
        """Taking an adapter out cannot bring back what it replaced whole: such tensors stay as they are."""
        placed = self.placement
        placed.accounts.keep_replaced(KEPT)
        for change in placed.changes.values():
            change.replaced = None
            if not change.terms:
                change.rows.clear()
        placed.appended.clear()

    def _output_file(self, shard: Shard) -> OutputFile:
        """Lay out the output file that takes the place of one shard; the base's header stands if nothing changed."""
        carried = self.placement.carried
        stored = [self.base.tensors[info.name] for info in shard.header.tensors if info.name not in carried]
        rows = [self._row(tensor, names[0]) for tensor in stored if (names := self._names(tensor))]
        rows += [self._repeated(tensor, name) for tensor in stored for name in self._names(tensor)[1:]]
        if shard is self.base.shards[-1]:
            rows += [self._new_row(name, replacement) for name, replacement in self.placement.appended.items()]
        same = [(info.name, info.dtype, info.shape) for info in shard.header.tensors]
        wanted = [(row.key, row.dtype, row.source.shape) for row in rows]
        header = shard.header if wanted == same else render_header(wanted, shard.header.metadata)
        return OutputFile(shard.name, header, self._edits(rows, header), shard)

    def _edits(self, rows: Sequence[_Row], header: Header) -> tuple[Edit, ...]:
        places = {info.name: info for info in header.tensors}
        edits = [
            Edit(
                row.key,
                row.operation,
                row.source,
                row.dtype,
                row.source.shape,
                places[row.key].begin,
                places[row.key].end,
                tuple(self._change(row.key).terms),
                tuple(self._change(row.key).rows),
                row.displaced,
            )
            for row in rows
        ]
        return tuple(sorted(edits, key=lambda edit: (edit.begin, edit.end)))

    def _change(self, name: str) -> Change:
        return self.placement.changes.get(name) or Change()

    def _row(self, stored: StoredTensor, key: str) -> _Row:
        change, dtype = self._change(key), self._output_dtype(stored.dtype)
        source, displaced = stored, None
        operation: Operation = "keep" if key == stored.key else "rename"
        if dtype != stored.dtype:
            operation = "cast"
        if change.replaced:
            source, displaced = change.replaced.tensor, stored
        if change.replaced or change.rows:
            operation = "replace"
        if change.terms:
            operation = "add" if self.operation == "merge" else "subtract"
        return _Row(key, operation, source, dtype, displaced)

    def _repeated(self, stored: StoredTensor, name: str) -> _Row:
        """A tensor of the base under a further name; what an adapter holds whole is as good as new."""
        replaced = self._change(name).replaced
        if replaced:
            return self._new_row(name, replaced)
        return _Row(name, "repeat", stored, self._output_dtype(stored.dtype))

    def _new_row(self, name: str, replacement: Replacement) -> _Row:
        tensor = replacement.tensor
        return _Row(name, "append", tensor, self._output_dtype(tensor.dtype))

    def _output_dtype(self, stored: DType) -> DType:
        return DTYPES[self.wanted] if self.wanted and stored.floating and stored.bits >= 16 else stored

    def _index(self, files: Sequence[OutputFile]) -> tuple[SideFile, ...]:
        index = self.base.index
        if index is None:
            return ()
        if all(file.header is file.base.header for file in files) and len(files) == len(self.base.shards):
            return (SideFile.of(index.name, self.base.looks.at(self.base.path / index.name)),)
        weight_map = {edit.key: file.name for file in files for edit in file.edits}
        total = sum(edit.nbytes for file in files for edit in file.edits)
        data = index.rewritten(weight_map, total)
        return (SideFile(index.name, None, len(data), data),)

    def _side_files(self) -> tuple[list[SideFile], list[str]]:
        """The small files of the output, and what is left out."""
        sides, left_out = side_files(self.base)
        repairs = [*self.placement.repairs]
        if self.wanted is not None:
            repairs.append(with_dtype(str(DTYPES[self.wanted].torch_name)))
        if repairs:
            data = repaired(self.base.config, *repairs)
            sides = [SideFile(s.name, None, len(data), data) if s.name == "config.json" else s for s in sides]
        if self.placement.options.tokenizer == "adapter" and self.base.folder:
            for adapter in self.placement.adapters:
                taken = {side.name: side for side in taken_tokenizer(adapter.path, sides)}
                sides = sorted(({side.name: side for side in sides} | taken).values(), key=lambda side: side.name)
        return sides, left_out
