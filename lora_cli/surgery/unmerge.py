"""Unmerge: take adapters out of a merged checkpoint again.

With the undo file of the merge the base comes back bit for bit; without it, approximately and only by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.adapters.source import look_at_adapter
from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.checkpoint.hub import locate
from lora_cli.checkpoint.links import is_there
from lora_cli.checkpoint.undo_file import UNDO_FILE, open_undo_file
from lora_cli.errors import UsageError, WrongInputError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.approximate import Undecided, can_subtract, kept, left_behind, plan_subtraction, prove_subtraction
from lora_cli.surgery.budget import Budget, settle_budget
from lora_cli.surgery.identity import adapter_records, merged_before
from lora_cli.surgery.merge import check_output, output_names, output_path, output_sizes, receipt_content
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import beside, find_receipt, make_receipt, written_by_us
from lora_cli.surgery.results import Reference, listed, measured, open_base
from lora_cli.surgery.undo.undoing import Undoing, plan_undoing
from lora_cli.surgery.workers import default_threads

if TYPE_CHECKING:
    from lora_cli.surgery.execute import Closing
    from lora_cli.surgery.filling import Tap


@dataclass(frozen=True)
class WrittenFile:
    """A file of the output, with its digest where it is proved to be the base's own (see `checkpoint.digests`)."""

    name: str
    digest: str | None


@dataclass(frozen=True)
class UnmergeResult:
    """What an unmerge wrote.

    Attributes:
        out: The output.
        exact: Whether every byte of the base is proved.
        proved: Whether the proofs hold: no weight contradicts that these adapters were merged here by lora-cli.
        files: The files written.
        tensors: Output tensors by what happened to them.
        undecided: The tensors that are not proved in full.
        kept: Tensors that the adapter had replaced: their base values are not in the merged file, so they stay.
        warnings: What a person should look at.
        bytes_written: Bytes of all output files.
        seconds: Wall time.
        peak_rss_bytes: Most memory that one process had: this one, or any that it has waited for.
    """

    out: str
    exact: bool
    proved: bool
    files: tuple[WrittenFile, ...]
    tensors: dict[str, int]
    undecided: tuple[Undecided, ...]
    kept: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_written: int
    seconds: float
    peak_rss_bytes: int


def plan_unmerge(
    merged: Reference,
    adapters: Sequence[Reference] = (),
    options: PlanOptions | None = None,
    *,
    undo: Reference | None = None,
    approximate: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Plan an unmerge from headers, writing nothing. Arguments and errors are those of `unmerge`."""
    found = _planned(merged, adapters, options or PlanOptions(), undo, approximate=approximate, progress=progress)
    return found.plan if isinstance(found, Undoing) else found


def _planned(
    merged: Reference,
    adapters: Sequence[Reference],
    options: PlanOptions,
    undo: Reference | None,
    *,
    approximate: bool,
    progress: Progress,
) -> Undoing | Plan:
    checkpoint = open_base(merged, progress)
    if approximate:
        if undo is not None:
            raise UsageError("--approximate is for when there is no undo file", hint="leave out one of the two")
        found: Undoing | Plan = plan_subtraction(checkpoint, adapters, options, progress)
    else:
        if options.says_how:
            raise UsageError(
                "The undo file knows scales, weights and names itself", hint="such options belong to --approximate"
            )
        found = open_undoing(checkpoint, [*listed(adapters), *options.read.initial], undo, progress)
    for warning in (found.plan if isinstance(found, Undoing) else found).warnings:
        progress.warn(warning)
    return found


def open_undoing(
    merged: Checkpoint,
    adapters: Sequence[Reference],
    undo: Reference | None,
    progress: Progress,
    *,
    whole: bool = False,
) -> Undoing:
    """Plan an exact unmerge with the undo file that is named, or found beside the merged checkpoint.

    Raises:
        WrongInputError: There is none, or it does not belong to these.
        LoraCliError: What `plan_undoing` raises.
    """
    place = Path(undo) if undo is not None else beside(merged.path, UNDO_FILE)
    if undo is None and not is_there(place):
        raise WrongInputError(
            "There is no undo file, so the base cannot be recovered bit for bit",
            file=merged.label,
            expected=place.name,
            hint="name it with --undo; or unmerge --approximate subtracts, proves most weights, and counts the rest"
            if can_subtract(merged, adapters)
            else "name it with --undo: the merge did more than add to weights, and no subtraction takes that back",
        )
    located = [locate(str(adapter), role="adapter", progress=progress) for adapter in listed(adapters)]
    sources = [look_at_adapter(adapter.path, label=adapter.label) for adapter in located]
    return plan_undoing(merged, open_undo_file(place), sources, whole=whole)


def unmerge(
    merged: Reference,
    adapters: Sequence[Reference] = (),
    out: Reference = "",
    options: PlanOptions | None = None,
    *,
    undo: Reference | None = None,
    approximate: bool = False,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
    on_plan: Callable[[Plan], None] | None = None,
) -> UnmergeResult:
    """Write the base of a merged checkpoint to `out`.

    With an undo file its files come back bit for bit; digests of what goes in and what comes out are compared before
    anything is published. Of stacked merges the last one comes off. Without one, `approximate` writes
    merged - Σ weight·adapter, with a proof per weight of whether that is the base.

    Args:
        merged: The merged checkpoint.
        adapters: The adapters that were merged into it; not needed where the undo file holds them.
        out: A folder that is absent or empty, or a `.safetensors` file for a checkpoint of one file.
        options: With `approximate`, the weights and the rest, as they were in the merge.
        undo: The undo file; the one beside the merged checkpoint unless given.
        approximate: Subtract: the caller says that a base with undecided weights will do.
        force: Replace `out` where a receipt says that lora-cli wrote all of it.
        resume: Go on with a run of the same request that was cut off, and leave finished files to another if this one
            is; see `surgery.resuming`.
        threads: Units of work at once; all cores by default.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        progress: Hears of every step.
        on_plan: Is given the plan before anything is written.

    Raises:
        WrongInputError: There is no undo file, or the merged tensors or adapters are not those of the merge.
        MalformedFileError: The undo file is damaged.
        LoraCliError: Inputs that do not fit together.
    """
    options = options or PlanOptions()
    with measured() as run:
        target = output_path(out)
        found = _planned(merged, adapters, options, undo, approximate=approximate, progress=progress)
        made = (found.plan if isinstance(found, Undoing) else found).for_output(target)
        own = [beside(target, side.name).name for side in found.own] if isinstance(found, Undoing) else []
        check_output(made, target, force=force, beside=own)
        if on_plan:
            on_plan(made)
        how = _How(target, made, force, options, resume, threads or default_threads(), memory, progress)
        outcome = how.restore(found) if isinstance(found, Undoing) else how.subtract()
    return UnmergeResult(
        out=str(out),
        exact=outcome.exact,
        proved=not any(proof.impossible for proof in outcome.undecided),
        files=outcome.files,
        tensors=made.counts(),
        undecided=outcome.undecided,
        kept=outcome.kept,
        warnings=made.warnings,
        bytes_written=outcome.bytes_written,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
    )


class _Outcome(NamedTuple):
    """What the two ways differ in."""

    exact: bool
    files: tuple[WrittenFile, ...]
    bytes_written: int
    undecided: tuple[Undecided, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class _How:
    """Where and with what the output is written."""

    target: Path
    made: Plan
    force: bool
    options: PlanOptions
    resume: bool
    threads: int
    memory: int | None
    progress: Progress

    def restore(self, found: Undoing) -> _Outcome:
        """Write the base's own files."""
        from lora_cli.surgery.undo.restoring import Restoring

        restoring = Restoring(found, self.made, self.target)
        written = self._execute(self._budget(blocks=True), [restoring.checker], restoring.close, see_copies=True)
        return _Outcome(not found.lost, restoring.files, written)

    def subtract(self) -> _Outcome:
        """Write what subtracting gives, and prove what can be proved."""
        stays = kept(self.made)
        for name in stays:
            self.progress.warn(f"{name}: the adapter replaced it, or rows of it; these stay, what was there is lost")
        sizes = output_sizes(self.made, self.target)
        content = receipt_content(self.made, self.options)
        taken = {record.digest for record in adapter_records(self.made, embed=False)}
        before = merged_before(find_receipt(self.made.checkpoint.path, self.made.checkpoint.looks))
        content["earlier"] = [said for said in before if said["digest"] not in taken]
        receipt = make_receipt(self.target, "unmerge", content, sizes)
        budget = self._budget(blocks=False)
        written = self._execute(budget, [], lambda _: [receipt], see_copies=False)
        undecided = prove_subtraction(self.made, budget, self.progress)
        names = (*output_names(self.made, self.target), receipt.name)
        exact = not (undecided or stays or left_behind(self.made.checkpoint))
        return _Outcome(exact, tuple(WrittenFile(name, None) for name in names), written, undecided, stays)

    def _budget(self, *, blocks: bool) -> Budget:
        return settle_budget(self.made, memory=self.memory, threads=self.threads, blocks=blocks)

    def _execute(self, budget: Budget, taps: Sequence[Tap], closing: Closing, *, see_copies: bool) -> int:
        from lora_cli.surgery.execute import execute
        from lora_cli.surgery.resuming import Request, options_of

        return execute(
            self.made,
            self.target,
            budget,
            taps=lambda _: taps,
            see_copies=see_copies,
            closing=closing,
            may_replace=written_by_us(self.target) if self.force else lambda: False,
            request=Request({**options_of(self.options), "approximate": not see_copies}, self.resume),
            progress=self.progress,
        )
