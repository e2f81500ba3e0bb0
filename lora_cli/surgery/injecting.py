"""Writing an injection: the factors, what is left of the base where they are taken from it, and the receipts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.wrap_file import WRAP_FILE
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.staging import Staging, together
from lora_cli.progress import Progress
from lora_cli.surgery.budget import Budget, settle_budget
from lora_cli.surgery.filling import Tap
from lora_cli.surgery.fitting import Mark
from lora_cli.surgery.injection import Injection
from lora_cli.surgery.merge import output_names, output_sizes
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.principal import take
from lora_cli.surgery.receipt import make_receipt, receipt_path, written_by_us
from lora_cli.surgery.residual import Residual, ResidualBase


@dataclass(frozen=True)
class Writing:
    """What an injection writes, where, and with what.

    Attributes:
        injection: The fresh adapter.
        made: Its plan.
        target: Where it goes.
        left: What is left of the base, where that is written besides.
        force: Replace what a receipt says that lora-cli wrote.
        resume: As for `inject`.
        threads: As for `inject`.
        memory: As for `inject`.
        progress: Hears of every step.
    """

    injection: Injection
    made: Plan
    target: Path
    left: ResidualBase | None
    force: bool
    resume: bool
    threads: int
    memory: int | None
    progress: Progress

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files of the adapter, or of the wrapped checkpoint."""
        wrap = [wrap_name(self.target)] if self.injection.options.layout == "wrapped" else []
        return (*output_names(self.made, self.target), *wrap, receipt_path(self.target, "inject").name)

    def _extras(self, residual: Mark | None = None) -> list[SideFile]:
        return extra_files(self.injection, self.made, self.target, residual)

    def write(self) -> tuple[int, Residual | None]:
        """Write all of it, or nothing; returns the bytes of the adapter or wrapped checkpoint."""
        # torch is loaded only here, after the plan is on the screen.
        from lora_cli.surgery.execute import publish, staging_of
        from lora_cli.surgery.resuming import Request, options_of

        budget = settle_budget(self.made, memory=self.memory, threads=self.threads)
        staged = staging_of(
            self.made,
            self.target,
            budget,
            taps=lambda staging: self._take(staging, budget),
            closing=lambda _: [] if self.left else self._extras(),
            may_replace=written_by_us(self.target) if self.force else lambda: False,
            request=Request(options_of(self.injection.options), self.resume),
            progress=self.progress,
        )
        with staged as adapter:
            if self.left is None:
                publish(adapter, self._published)
                return adapter.bytes_written, None
            with self._residual(self.left, adapter) as (base, residual), together(base, adapter):
                # The receipt tells the base that the adapter fits by what was just written.
                for extra in self._extras(self.left.mark(base)):
                    adapter.write_small(extra.name, extra.read())
                publish(base)
                publish(adapter, self._published)
            return adapter.bytes_written, residual

    def _published(self) -> None:
        self.progress.published(str(self.target))

    def _take(self, staging: Staging, budget: Budget) -> Sequence[Tap]:
        """Compute factors that come from weights, before any are written. Nothing watches the writing itself."""
        injection = self.injection
        if injection.options.principal:
            weights = [(module, injection.base.tensors[module.key]) for module in injection.modules]
            taken, scratch = injection.taken, staging.scratch()
            take(weights, injection.options, taken, scratch, threads=budget.threads, progress=self.progress)
            self.progress.begin(self.made.operation, self.made.bytes_to_write)
        return ()

    def _residual(self, left: ResidualBase, adapter: Staging) -> AbstractContextManager[tuple[Staging, Residual]]:
        return left.staged(
            adapter,
            _receipt_content(self.injection, None),
            force=self.force,
            resume=self.resume,
            threads=self.threads,
            memory=self.memory,
            progress=self.progress,
        )


def extra_files(injection: Injection, made: Plan, target: Path, residual: Mark | None) -> list[SideFile]:
    """The wrap's description and the receipt, which come last."""
    extras = []
    if injection.options.layout == "wrapped":
        data = injection.wrap_file()
        extras.append(SideFile(wrap_name(target), None, len(data), data))
    sizes = {**output_sizes(made, target), **{extra.name: extra.size for extra in extras}}
    return [*extras, make_receipt(target, "inject", _receipt_content(injection, residual), sizes)]


def wrap_name(target: Path) -> str:
    """Name of the description of a wrapped checkpoint, in or beside the output."""
    return f"{target.stem}.{WRAP_FILE}" if target.suffix == ".safetensors" else WRAP_FILE


def _receipt_content(injection: Injection, residual: Mark | None) -> dict[str, Any]:
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in injection.options.arguments().items()}
    options["alpha"] = injection.options.scale.alpha
    options["std"] = injection.options.width if injection.options.init == "gaussian" else None
    return {
        "base": {"label": injection.base.label},
        **({"residual": residual.as_dict()} if residual else {}),
        "options": options,
        "modules": [module.module for module in injection.modules],
    }
