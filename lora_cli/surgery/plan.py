"""The plan: what will be done to every output byte, as a value.

A plan is made from headers only. `--dry-run` prints it, the engine executes it, verify compares with it: there is no
second implementation of what an operation does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_cli.adapters.adapter import Adapter, Strided
from lora_cli.checkpoint.checkpoint import Checkpoint, Shard
from lora_cli.checkpoint.header import Header
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.surgery.edit import Edit

Outcome = Literal["applied", "replaced", "added", "ignored"]


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output.

    Attributes:
        name: File name.
        header: Its header; the base's own bytes when no name, type or shape changed.
        edits: Its tensors in byte order.
        replaces: The shard of the base that it takes the place of; None for a new adapter's file.
    """

    name: str
    header: Header
    edits: tuple[Edit, ...]
    replaces: Shard | None

    @property
    def base(self) -> Shard:
        """The shard of the base that it takes the place of; only where there is one."""
        assert self.replaces is not None  # noqa: S101 (every file of a checkpoint has one)
        return self.replaces

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.header.file_bytes

    @property
    def untouched(self) -> bool:
        """Whether the file is the base's file, byte for byte."""
        same = self.replaces is not None and self.header is self.replaces.header
        return same and all(edit.operation == "keep" for edit in self.edits)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What became of one adapter tensor.

    Attributes:
        adapter: The adapter's label.
        tensor: Name of the tensor in the adapter's file.
        outcome: Applied as part of a delta, replaced a base tensor, added as a new one, or ignored.
        key: The tensor of the output that it went into.
        reason: Why, where that is not plain.
    """

    adapter: str
    tensor: str
    outcome: Outcome
    key: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ScaleUse:
    """One scale of an adapter, where it came from, and how many modules have it."""

    scale: float
    source: str
    modules: int


@dataclass(frozen=True, slots=True)
class LayoutUse:
    """How factors of stacks are read, and why, and how many parameters have such."""

    layout: str
    modules: int


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """How one adapter is used.

    Attributes:
        label: What it is called.
        format: The format it was read as.
        kind: LoRA, rsLoRA or DoRA.
        weight: The user's weight.
        rewrite: How its names became the base's names.
        scales: Each distinct scale, the weight included.
        layouts: How factors of stacks, such as those of experts, are read.
    """

    label: str
    format: str
    kind: str
    weight: float
    rewrite: str
    scales: tuple[ScaleUse, ...]
    layouts: tuple[LayoutUse, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that an operation will write.

    Attributes:
        operation: `merge`, `unmerge` or `inject`.
        checkpoint: The input checkpoint.
        files: The safetensors files.
        side_files: Small files, the index among them.
        left_out: Names of files of the base's folder that are not written.
        adapters: How each adapter is used.
        opened: The adapters themselves, in the same order.
        ledger: What becomes of every adapter tensor.
        dropped: Base tensors that the output lacks (the factors that a wrapped checkpoint carried).
        inputs: Every place that must not be written to.
        warnings: What a person should look at.
        untied: Name that gets a tensor of its own → the key whose tensor it is in the base.
        layers: The former layer of each layer, where layers of the base are repeated or left out.
    """

    operation: Literal["merge", "unmerge", "inject"]
    checkpoint: Checkpoint
    files: tuple[OutputFile, ...]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    adapters: tuple[AdapterUse, ...]
    opened: tuple[Adapter, ...]
    ledger: tuple[LedgerEntry, ...]
    dropped: tuple[str, ...]
    inputs: tuple[Path, ...]
    warnings: tuple[str, ...]
    untied: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None

    @property
    def base(self) -> str:
        """Label of the input checkpoint."""
        return self.checkpoint.label

    def for_output(self, target: Path) -> Plan:
        """The plan for this output: one file alone has no side files."""
        if target.suffix != ".safetensors":
            return self
        left_out = sorted([*self.left_out, *(side.name for side in self.side_files)])
        return replace(self, side_files=(), left_out=tuple(left_out))

    @property
    def edits(self) -> Iterable[Edit]:
        """Every edit, in file and byte order."""
        return (edit for file in self.files for edit in file.edits)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files) + sum(side.size for side in self.side_files)

    @property
    def strided(self) -> list[Strided]:
        """Factors that are put in order first, each once; see `repacking`."""
        found = (term.delta.strided for edit in self.edits for term in edit.terms)
        return list({one.place: one for one in found if one is not None}.values())

    @property
    def bytes_to_reorder(self) -> int:
        """Bytes of them, which are in a scratch file while the plan is carried out."""
        return sum(one.tensor.nbytes for one in self.strided)

    @property
    def bytes_to_undo(self) -> int:
        """Bytes that an undo file has at least: what replaced and narrowed tensors lose, and what is dropped."""
        lost = [
            e.displaced.nbytes if e.displaced else max(0, e.source.nbytes - e.nbytes) + _row_bytes(e)
            for e in self._changed
        ]
        return sum(lost) + sum(self.checkpoint.tensors[key].nbytes for key in self.dropped if self.operation == "merge")

    @property
    def _changed(self) -> Iterable[Edit]:
        return (e for e in self.edits if e.fresh is None and (e.displaced or e.rows or e.operation in ("add", "cast")))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of base and adapter tensors that are read."""
        factors = {id(tensor): tensor.nbytes for e in self.edits for t in e.terms for tensor in t.delta.tensors}
        factors |= {id(rows.tensor): rows.tensor.nbytes for e in self.edits for rows in e.rows}
        return sum(edit.source.nbytes for edit in self.edits if edit.fresh is None) + sum(factors.values())

    @property
    def _gone(self) -> list[str]:
        """What is dropped, and does not come back under its name from elsewhere, such as an undo file."""
        kept = {edit.key for edit in self.edits} if self.dropped else set()
        return [key for key in self.dropped if key not in kept]

    def counts(self) -> dict[str, int]:
        """Tensors by what happens to them: total, edited, copied, added, dropped."""
        operations = Counter(edit.operation for edit in self.edits)
        copied = operations["keep"] + operations["rename"]
        added = operations["append"] + operations["repeat"]
        return {
            "total": sum(operations.values()),
            "edited": sum(operations.values()) - copied - added,
            "copied": copied,
            "added": added,
            "dropped": len(self._gone),
        }

    def ledger_counts(self) -> dict[str, int]:
        """Adapter tensors by what became of them."""
        outcomes = Counter(entry.outcome for entry in self.ledger)
        return {name: outcomes[name] for name in ("applied", "replaced", "added", "ignored")}

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for printing as JSON; no path of this machine is in it."""
        return {
            "operation": self.operation,
            "base": self.base,
            "tensors": self.counts(),
            "ledger": self.ledger_counts(),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "bytes_to_reorder": self.bytes_to_reorder,
            "adapters": [
                {
                    "label": use.label,
                    "format": use.format,
                    "kind": use.kind,
                    "weight": use.weight,
                    "rewrite": use.rewrite,
                    "scales": [{"scale": u.scale, "source": u.source, "modules": u.modules} for u in use.scales],
                    **({"layouts": [asdict(used) for used in use.layouts]} if use.layouts else {}),
                }
                for use in self.adapters
            ],
            "files": [
                {
                    "name": file.name,
                    "bytes": file.size,
                    "header_bytes": file.header.data_start,
                    "untouched": file.untouched,
                    "edits": [edit.as_dict() for edit in file.edits],
                }
                for file in self.files
            ],
            "side_files": [
                {"name": side.name, "bytes": side.size, "changed": side.data is not None} for side in self.side_files
            ],
            "entries": [
                {"adapter": e.adapter, "tensor": e.tensor, "outcome": e.outcome, "key": e.key, "reason": e.reason}
                for e in self.ledger
            ],
            "left_out": list(self.left_out),
            "dropped": self._gone,
            "warnings": list(self.warnings),
        }


def _row_bytes(edit: Edit) -> int:
    """Bytes of the rows that are replaced."""
    return sum(len(rows.at) for rows in edit.rows) * (edit.source.nbytes // max(1, edit.matrix[0]))
