"""What a merge does besides its tensors: it watches them, and then writes the undo file and the receipt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.arithmetic import ARITHMETIC
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staging import Staging
from lora_cli.checkpoint.undo_file import UNDO_FILE
from lora_cli.surgery.filling import Tap
from lora_cli.surgery.identity import adapter_records, merged_before
from lora_cli.surgery.merge import WrittenUndo, output_names, output_sizes, receipt_content
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import beside, find_receipt, make_receipt
from lora_cli.surgery.survival import Survivals

if TYPE_CHECKING:
    from lora_cli.surgery.undo.recording import Recorder


class Finishing:
    """One merge's taps and last files.

    Attributes:
        survivals: What survived rounding.
        written: The undo file, once it is written.
        names: Names of all files of the output, once they are.
    """

    def __init__(self, plan: Plan, target: Path, options: PlanOptions, *, undo: bool, embed: bool) -> None:
        self.survivals = Survivals()
        self.written: WrittenUndo | None = None
        self.names: tuple[str, ...] = ()
        self._plan = plan
        self._target = target
        self._options = options
        self._undo = undo
        self._adapters = adapter_records(plan, embed=embed)
        self._recorder: Recorder | None = None

    def taps(self, staging: Staging) -> Sequence[Tap]:
        """What watches the pieces."""
        if not self._undo:
            return [self.survivals]
        from lora_cli.surgery.undo.recording import Recorder

        self._recorder = Recorder(self._plan, staging.scratch())
        return [self._recorder, self.survivals]

    def close(self, staging: Staging) -> list[SideFile]:
        """Write the undo file, and return the receipt."""
        content: dict[str, Any] = receipt_content(self._plan, self._options)
        content["arithmetic"] = ARITHMETIC
        for said, record in zip(content["adapters"], self._adapters, strict=True):
            said["digest"] = record.digest
        earlier = merged_before(find_receipt(self._plan.checkpoint.path, self._plan.checkpoint.looks))
        if earlier:
            content["earlier"] = earlier
        others = []
        if self._recorder is not None:
            name = beside(self._target, UNDO_FILE).name
            from lora_cli.surgery.undo.writing import UndoWriter

            writer = UndoWriter(self._plan, self._recorder, self._adapters)
            self.written = WrittenUndo(name, writer.write(staging, name))
            content["base"]["digests"] = writer.base_digests
            content["digests"] = self._output_digests(self._recorder)
            others.append(name)
        receipt = make_receipt(self._target, "merge", content, output_sizes(self._plan, self._target), others)
        self.names = (*output_names(self._plan, self._target), *others, receipt.name)
        return [receipt]

    def _output_digests(self, recorder: Recorder) -> dict[str, str]:
        names = output_names(self._plan, self._target)[: len(self._plan.files)]
        return {name: recorder.digest(number) for number, name in enumerate(names)}
