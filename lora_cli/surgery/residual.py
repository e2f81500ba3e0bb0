"""The base that belongs to factors taken from its weights: what is left of it, as a checkpoint of its own.

It is made as `unmerge --approximate` makes one: base - scale·B·A, with the exact product of the factors as they are
stored and one rounding. So merging the adapter into it gives the base within that rounding and one more: each weight
to within one unit in the last place of the larger of the two, the base's weight and what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_cli.adapters.formats import read_adapter
from lora_cli.adapters.source import AdapterSource, ReadOptions
from lora_cli.checkpoint.checkpoint import ADAPTER_FILE, Shard, StoredTensor, open_shard
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.source import Identity, SourceFile
from lora_cli.checkpoint.staging import Staging
from lora_cli.checkpoint.targets import check_space
from lora_cli.progress import Progress
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.fitting import Mark, mark
from lora_cli.surgery.identity import adapter_records
from lora_cli.surgery.injection import Injection
from lora_cli.surgery.merge import check_output, output_names, output_sizes
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import OutputFile, Plan
from lora_cli.surgery.planning import plan
from lora_cli.surgery.receipt import make_receipt, written_by_us


@dataclass(frozen=True)
class Residual:
    """The changed base that an injection wrote beside the adapter.

    Attributes:
        out: Where it is.
        files: Names of the files written.
        left_out: Files of the base's folder that were not taken along.
        bytes_written: Bytes of all files.
    """

    out: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_written: int


@dataclass(frozen=True)
class ResidualBase:
    """What is left of a base, as it will be written.

    Attributes:
        injection: The adapter.
        adapter_out: Where the adapter is to be.
        out: Where this is to be.
    """

    injection: Injection
    adapter_out: Path
    out: Path

    def planned(self, made: Plan) -> Plan:
        """What will be written, before the adapter is.

        Args:
            made: The plan of the adapter.
        """
        (file,) = made.files
        return self._plan(_shard_to_be(self.adapter_out, file)).for_output(self.out)

    def check(self, made: Plan, *, force: bool) -> None:
        """Refuse an output that cannot be written, before any work; see `merge.check_output`.

        Raises:
            OutputExistsError: Something is there, or it is an input, or the adapter's own place.
            DiskFullError: There is no space for it.
        """
        planned = self.planned(made)
        check_output(planned, self.out, force=force)
        check_space(self.out, planned.bytes_to_write + made.bytes_to_write)

    @contextmanager
    def staged(
        self,
        adapter: Staging,
        content: dict[str, Any],
        *,
        force: bool,
        resume: bool,
        threads: int,
        memory: int | None,
        progress: Progress,
    ) -> Iterator[tuple[Staging, Residual]]:
        """Write it, not yet published.

        Args:
            adapter: The adapter, written and not yet published.
            content: What the receipt is to say.
            force: Replace what a receipt says that lora-cli wrote.
            resume: As for `inject`.
            threads: As for `inject`.
            memory: As for `inject`.
            progress: Hears of every unit.
        """
        from lora_cli.surgery.execute import staging_of
        from lora_cli.surgery.resuming import Request, options_of

        made = self._plan(open_shard(adapter.place / ADAPTER_FILE)).for_output(self.out)
        receipts: list[SideFile] = []

        def closing(_: Staging) -> list[SideFile]:
            (record,) = adapter_records(made, embed=False)
            said = {**content, "adapter": {"label": record.label, "digest": record.digest}}
            receipts.append(make_receipt(self.out, "inject", said, output_sizes(made, self.out)))
            return receipts

        may_replace: Callable[[], bool] = written_by_us(self.out) if force else lambda: False
        budget = settle_budget(made, memory=memory, threads=threads)
        # The factors are what they are by content: where they lie is another place each time.
        factors = {record.label: record.digest for record in adapter_records(made, embed=False)}
        request = Request(options_of(self.injection.options) | {"factors": factors}, resume, aside=adapter.place)
        staged = staging_of(
            made,
            self.out,
            budget,
            closing=closing,
            may_replace=may_replace,
            request=request,
            progress=progress,
        )
        with staged as staging:
            names = (*output_names(made, self.out), *(receipt.name for receipt in receipts))
            yield staging, Residual(str(self.out), names, made.left_out, staging.bytes_written)

    def mark(self, written: Staging) -> Mark:
        """What the adapter's receipt tells it by: the first weight that lost a product.

        Args:
            written: It, not yet published.
        """
        key = self.injection.modules[0].key
        name = self.injection.base.tensors[key].shard.name if written.folder else written.target.name
        shard = open_shard(written.place / name)
        (stored,) = (StoredTensor(shard, info) for info in shard.header.tensors if info.name == key)
        return mark(self.out.name, stored)

    def _plan(self, shard: Shard) -> Plan:
        """The base with the adapter of this file subtracted."""
        source = AdapterSource(
            self.adapter_out, self.adapter_out.name or "adapter", shard, self.injection.adapter_config()
        )
        adapter = read_adapter(source, ReadOptions())
        made = plan(self.injection.base, [adapter], PlanOptions(), operation="unmerge")
        return replace(made, operation="inject")


def _shard_to_be(folder: Path, file: OutputFile) -> Shard:
    """A planned file as if it were there."""
    return Shard(SourceFile(folder / file.name, file.name, Identity(0, 0, file.size, 0)), file.header)
