"""What an exact unmerge does besides its tensors: it checks them, and writes what else was with the base."""

from __future__ import annotations

from pathlib import Path

from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staging import Staging
from lora_cli.surgery.merge import output_names, output_sizes
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import beside, make_receipt
from lora_cli.surgery.undo.checking import Checker
from lora_cli.surgery.undo.undoing import Undoing
from lora_cli.surgery.unmerge import WrittenFile


class Restoring:
    """One unmerge's tap and last files.

    Args:
        undoing: What was planned.
        plan: The same plan for this output.
        target: The output.

    Attributes:
        checker: Watches the pieces.
        files: All files of the output, with their digests; the receipt has none.
    """

    def __init__(self, undoing: Undoing, plan: Plan, target: Path) -> None:
        self.checker = Checker(undoing)
        said = undoing.undo.manifest
        self._own = {beside(target, own.name).name: own for own in undoing.own}
        known = {file.name: record.digest for file, record in zip(plan.files, said.files, strict=True)}
        known |= {side.name: side.digest for side in said.side_files if side.name not in undoing.lost}
        planned = [*(file.name for file in plan.files), *(side.name for side in plan.side_files)]
        names = output_names(plan, target)
        digests = {name: known.get(base) for name, base in zip(names, planned, strict=False)}
        digests |= {name: own.digest for name, own in self._own.items()}
        sizes = output_sizes(plan, target) | {name: own.size for name, own in self._own.items()}
        content = {
            "base": {"label": plan.base},
            "restored": said.base,
            "exact": not undoing.lost,
            "adapters": [{"label": adapter.label, "digest": adapter.digest} for adapter in said.adapters],
            "digests": {name: digest for name, digest in digests.items() if digest},
        }
        self._receipt = make_receipt(target, "unmerge", content, sizes)
        self.files = (*(WrittenFile(name, digests[name]) for name in digests), WrittenFile(self._receipt.name, None))

    def close(self, staging: Staging) -> list[SideFile]:
        """Refuse to go on unless all is right; then write what else was with the base, and return the receipt."""
        self.checker.verdict()
        for name, own in self._own.items():
            if isinstance(own.content, bytes):
                staging.write_small(name, own.content)
                continue
            file = staging.create(name, own.size)
            with own.content.shard.source.open() as reader:
                file.copy(reader, own.content.offset, 0, own.size)
            file.finish()
        return [self._receipt]
