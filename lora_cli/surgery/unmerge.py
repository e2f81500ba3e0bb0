"""Unmerge: take adapters out of a merged checkpoint again.

Here by subtraction: what the merge rounded away is lost, but for most weights only one value can have been there, and
that is proved for each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.checkpoint.checkpoint import Checkpoint
from lora_cli.errors import UnsupportedError, UsageError, WrongInputError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.merge import check_output, output_names, output_path, output_sizes, receipt_content
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.planning import KEPT, plan
from lora_cli.surgery.receipt import find_receipt, make_receipt, written_by_us
from lora_cli.surgery.results import Reference, measured, open_adapters, open_base
from lora_cli.surgery.workers import default_threads


@dataclass(frozen=True)
class Undecided:
    """A tensor whose base is not known for every weight.

    Attributes:
        key: Its name.
        elements: Weights in it.
        exact: Weights for which only one base value merges to what is there: these are proved.
        undecided: Weights that may differ from the base by a step or so, because several base values merge to the same.
        impossible: Weights that no base value merges to: a sign of another adapter, scale or tool.
    """

    key: str
    elements: int
    exact: int
    undecided: int
    impossible: int


@dataclass(frozen=True)
class WrittenFile:
    """A file of the output; its digest is None where the base's is not known to compare with."""

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
        peak_rss_bytes: Most memory that the process had.
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
    approximate: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Plan an unmerge from headers, writing nothing. Arguments and errors are those of `unmerge`."""
    if not approximate:
        raise WrongInputError(
            "There is no undo file, so the base cannot be recovered bit for bit",
            file=merged,
            hint="--approximate subtracts the adapter, proves most weights and counts the rest",
        )
    if not adapters:
        raise UsageError(
            "Name the adapter that was merged", hint="lora-cli unmerge MERGED ADAPTER -o OUT --approximate"
        )
    options = options or PlanOptions()
    if options.dtype != "keep":
        raise UsageError("Taking an adapter out keeps the storage types", found=f"dtype {options.dtype}")
    checkpoint = open_base(merged, progress)
    receipt = find_receipt(checkpoint.path) or {}
    if receipt.get("operation") != "merge":
        receipt = {}
    _refuse_other_type(checkpoint, receipt)
    opened = open_adapters(adapters, options.read, progress)
    made = plan(checkpoint, opened, options, operation="unmerge")
    _refuse_other_scales(checkpoint, receipt, made)
    for warning in made.warnings:
        progress.warn(warning)
    return made


def _refuse_other_type(merged: Checkpoint, receipt: Mapping[str, Any]) -> None:
    """Refuse what the receipt says was stored in another type before the merge: no proof would hold."""
    options = receipt.get("options")
    dtype = options.get("dtype") if isinstance(options, dict) else None
    if dtype not in (None, "keep"):
        raise UnsupportedError(
            "The merge changed the storage type, so the base cannot be found by subtracting",
            file=merged.label,
            found=f"--dtype {dtype} in its receipt",
        )


def _refuse_other_scales(merged: Checkpoint, receipt: Mapping[str, Any], made: Plan) -> None:
    """Refuse adapters of other scales than those that the receipt says were merged: every proof would be false."""
    recorded = receipt.get("adapters")
    uses = [use for use in recorded if isinstance(use, dict)] if isinstance(recorded, list) else []
    said: Counter[float] = Counter()
    for scale, modules in (pair for use in uses for pair in _recorded_scales(use)):
        said[scale] += modules
    planned: Counter[float] = Counter()
    for used in (scale for use in made.adapters for scale in use.scales):
        planned[used.scale] += used.modules
    if uses and said != planned:
        what = ", ".join(f"{use.get('label')} at weight {use.get('weight')}" for use in uses)
        raise WrongInputError(
            "These adapters and weights are not the ones of the merge",
            file=merged.label,
            expected=f"{what}, as its receipt says",
            hint="name the same adapters with the same --weight",
        )


def _recorded_scales(use: Mapping[str, Any]) -> list[tuple[float, int]]:
    scales = use.get("scales")
    found = [item for item in scales if isinstance(item, dict)] if isinstance(scales, list) else []
    pairs = [(item.get("scale"), item.get("modules")) for item in found]
    return [(float(s), n) for s, n in pairs if isinstance(s, int | float) and isinstance(n, int)]


def unmerge(
    merged: Reference,
    adapters: Sequence[Reference] = (),
    out: Reference = "",
    options: PlanOptions | None = None,
    *,
    approximate: bool = False,
    force: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
    on_plan: Callable[[Plan], None] | None = None,
) -> UnmergeResult:
    """Write merged - Σ weight·adapter to `out`, with a proof per weight of whether that is the base.

    Args:
        merged: The merged checkpoint.
        adapters: The adapters that were merged into it.
        out: A folder that is absent or empty, or a `.safetensors` file for a checkpoint of one file.
        options: The weights and the rest, as they were in the merge.
        approximate: Must be True: the caller says that a base with undecided weights will do.
        force: Replace `out` where a receipt says that lora-cli wrote all of it.
        threads: Units of work at once; all cores by default.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        progress: Hears of every step.
        on_plan: Is given the plan before anything is written.

    Raises:
        WrongInputError: `approximate` is False: without an undo file the base cannot be recovered bit for bit.
        LoraCliError: Inputs that do not fit together.
    """
    options = options or PlanOptions()
    with measured() as run:
        target = output_path(out)
        made = plan_unmerge(merged, adapters, options, approximate=approximate, progress=progress).for_output(target)
        check_output(made, target, force=force)
        if on_plan:
            on_plan(made)
        stays = tuple(entry.key for entry in made.ledger if entry.reason == KEPT and entry.key)
        for name in stays:
            progress.warn(f"{name}: the adapter replaced it whole; its base values are lost, the merged ones stay")
        receipt = make_receipt(target, "unmerge", receipt_content(made, options), output_sizes(made, target))
        from lora_cli.surgery.execute import execute
        from lora_cli.surgery.proof import prove

        budget = settle_budget(made, memory=memory, threads=threads or default_threads())
        written = execute(
            made,
            target,
            budget,
            extra_files=[receipt],
            may_replace=written_by_us(target) if force else lambda: False,
            progress=progress,
        )
        undecided = tuple(
            Undecided(key, count.elements, count.exact, count.undecided, count.impossible)
            for key, count in prove(made, budget, progress)
            if count.exact < count.elements
        )
    _warn_impossible(undecided, progress)
    return UnmergeResult(
        out=str(out),
        exact=not undecided and not stays,
        proved=not any(proof.impossible for proof in undecided),
        files=tuple(WrittenFile(name, None) for name in (*output_names(made, target), receipt.name)),
        tensors=made.counts(),
        undecided=undecided,
        kept=stays,
        warnings=made.warnings,
        bytes_written=written + receipt.size,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
    )


def _warn_impossible(undecided: Sequence[Undecided], progress: Progress) -> None:
    impossible = sum(proof.impossible for proof in undecided)
    if impossible:
        progress.warn(
            f"{impossible} weights cannot come from a lora-cli merge of this adapter at this weight: "
            "another adapter, another scale, or a tool that rounds differently"
        )
