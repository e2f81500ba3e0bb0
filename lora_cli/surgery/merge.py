"""Merge: apply adapters to a checkpoint, as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import contains
from pathlib import Path
from typing import Any

from lora_cli.checkpoint.sidefiles import SideFile, tokenizer_files
from lora_cli.checkpoint.source import check_path
from lora_cli.checkpoint.staged import ASIDE
from lora_cli.checkpoint.targets import check_apart, check_target
from lora_cli.checkpoint.undo_file import UNDO_FILE
from lora_cli.errors import UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.approximate import beyond_subtraction
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.card import CARD, model_card
from lora_cli.surgery.effects import Effects, effects_of
from lora_cli.surgery.identity import BEGINNING, adapter_records, refuse_again
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import AdapterUse, LedgerEntry, Plan
from lora_cli.surgery.planning import plan
from lora_cli.surgery.receipt import beside, find_receipt, ours_beside, receipt_path, written_by_us
from lora_cli.surgery.results import Reference, measured, open_adapters, open_base
from lora_cli.surgery.survival import Survival, warnings_of
from lora_cli.surgery.workers import default_threads


@dataclass(frozen=True)
class WrittenUndo:
    """An undo file that was written: its name in or beside the output, and its length."""

    path: str
    bytes: int


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        out: The output.
        tensors: Output tensors by what happened to them: total, edited, copied, added, dropped.
        ledger: Adapter tensors by what became of them: applied, replaced, added, ignored.
        entries: The same, one by one.
        adapters: How each adapter was used.
        files: Names of the files written.
        left_out: Files of the base's folder that were not taken along.
        warnings: What a person should look at.
        effects: What was done besides adding to whole tensors.
        survival: What of the change survived rounding, tensor by tensor.
        undo: The undo file; None where none was wanted.
        bytes_written: Bytes of all output files.
        seconds: Wall time.
        peak_rss_bytes: Most memory that one process had: this one, or any that it has waited for.
    """

    out: str
    tensors: dict[str, int]
    ledger: dict[str, int]
    entries: tuple[LedgerEntry, ...]
    adapters: tuple[AdapterUse, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    effects: Effects
    survival: tuple[Survival, ...]
    undo: WrittenUndo | None
    bytes_written: int
    seconds: float
    peak_rss_bytes: int


def plan_merge(
    base: Reference,
    adapters: Sequence[Reference] = (),
    options: PlanOptions | None = None,
    *,
    out: Reference = "",
    undo: bool = True,
    again: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Plan a merge from headers, writing nothing.

    Args:
        base: A `.safetensors` file, a folder, or a Hub id. May be a wrapped checkpoint that carries its own factors,
            which are then adapter 0.
        adapters: PEFT folders, plain safetensors files of factors, or Hub ids.
        options: Weights, output type, and how names and files are read.
        out: Where it will be written; a single file has no side files.
        undo: Whether an undo file will be written, which the model card then speaks of.
        again: Allow an adapter that the base's receipt says is in it already.
        progress: Hears of downloads and warnings.

    Raises:
        LoraCliError: Anything that does not fit; see the error classes.
    """
    options = options or PlanOptions()
    opened = open_base(base, progress)
    made = plan(opened, open_adapters(adapters, options.read, progress), options)
    receipt = find_receipt(opened.path, opened.looks)
    if not again and (receipt or len(made.opened) > 1):
        refuse_again(made, adapter_records(made, embed=False), receipt)
    final = [] if undo else list(_never_undone(made))
    made = replace(made, warnings=(*made.warnings, *_other_tokenizers(made, options), *final))
    made = _with_card(_alone(made, Path(out)), undo=undo)
    for warning in made.warnings:
        progress.warn(warning)
    return made


def merge(
    base: Reference,
    adapters: Sequence[Reference] = (),
    out: Reference = "",
    options: PlanOptions | None = None,
    *,
    undo: bool = True,
    embed_adapter: bool = False,
    again: bool = False,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
    on_plan: Callable[[Plan], None] | None = None,
) -> MergeResult:
    """Write base + Σ weight·adapter to `out`; inputs are never touched, and the output is complete or absent.

    The bytes are the same on every machine, whatever `threads` and `memory` are.

    Args:
        base: As for `plan_merge`.
        adapters: As for `plan_merge`.
        out: A folder that is absent or empty, or a `.safetensors` file for a base of one file.
        options: As for `plan_merge`.
        undo: Write the undo file, from which `unmerge` makes the base again bit for bit.
        embed_adapter: Put the adapters' factors into it, so that unmerging needs nothing else.
        again: As for `plan_merge`.
        force: Replace `out` where a receipt says that lora-cli wrote all of it.
        resume: Go on with a run of the same request that was cut off, and leave finished files to another if this one
            is; see `surgery.resuming`.
        threads: Units of work at once; all cores by default.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        progress: Hears of every step.
        on_plan: Is given the plan before torch is loaded and anything is written.

    Raises:
        LoraCliError: Anything that does not fit; see the error classes.
    """
    if embed_adapter and not undo:
        raise UsageError("An adapter is embedded in the undo file, and none is wanted", hint="leave out --no-undo")
    options = options or PlanOptions()
    with measured() as run:
        target = output_path(out)
        made = plan_merge(base, adapters, options, out=target, undo=undo, again=again, progress=progress)
        check_output(made, target, force=force, beside=[beside(target, UNDO_FILE).name])
        if on_plan:
            on_plan(made)
        # torch is loaded only here, after the plan is on the screen.
        from lora_cli.surgery.execute import execute
        from lora_cli.surgery.finishing import Finishing
        from lora_cli.surgery.resuming import Request, options_of

        doubtful = [*_doubts(made, options)]
        for words in doubtful:
            progress.warn(words)
        finishing = Finishing(made, target, options, undo=undo, embed=embed_adapter)
        written = execute(
            made,
            target,
            settle_budget(made, memory=memory, threads=threads or default_threads(), blocks=undo),
            taps=finishing.taps,
            see_copies=undo,
            closing=finishing.close,
            may_replace=written_by_us(target) if force else lambda: False,
            request=Request(options_of(options) | {"undo": undo, "embed_adapter": embed_adapter}, resume),
            progress=progress,
        )
    survival = finishing.survivals.report()
    lost = warnings_of(survival)
    for warning in lost:
        progress.warn(warning)
    return MergeResult(
        out=str(out),
        tensors=made.counts(),
        ledger=made.ledger_counts(),
        entries=made.ledger,
        adapters=made.adapters,
        files=finishing.names,
        left_out=made.left_out,
        warnings=(*made.warnings, *doubtful, *lost),
        effects=effects_of(made),
        survival=survival,
        undo=finishing.written,
        bytes_written=written,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
    )


def _doubts(made: Plan, options: PlanOptions) -> Iterator[str]:
    """What the numbers of adapters leave in doubt. torch is loaded for it only where there is something to look at."""
    from lora_cli.surgery.looks.meanings import meanings_doubted

    if made.strided and not options.read.expert_layout.order:
        from lora_cli.surgery.looks.packing import doubts

        yield from doubts(made)
    yield from meanings_doubted(made)


def _never_undone(made: Plan) -> Iterator[str]:
    """What a person should know who wants no undo file."""
    beyond = beyond_subtraction(made)
    if beyond is not None:
        count = len(beyond.where)
        where = beyond.where[0] if count == 1 else f"{count:,}, {beyond.where[0]} first"
        yield f"{beyond.words} ({where}): only an undo file could bring the base back, and --no-undo leaves it out"


def _other_tokenizers(made: Plan, options: PlanOptions) -> list[str]:
    """What a person should know of tokenizers that adapters come with, and that are not taken."""
    if options.tokenizer == "adapter" or made.checkpoint.folder is None:
        return []
    others = {adapter.label: tokenizer_files(adapter.path, made.side_files) for adapter in made.opened}
    resized = effects_of(made).resized
    why = ", and the vocabulary has other entries now" if resized else ""
    return [
        f"{label} has tokenizer files that differ from the base's ({', '.join(side.name for side in files)}){why}; "
        "--tokenizer adapter takes them"
        for label, files in others.items()
        if files
    ]


def _alone(made: Plan, target: Path) -> Plan:
    """The plan for this output. Beside one file no config is written that could say what it has to say otherwise."""
    planned = made.for_output(target)
    left = [] if planned.side_files else effects_of(made).config
    words = ", ".join(f"{change.field} {json.dumps(change.after)}" for change in left)
    warning = f"no config.json is written beside a single file, and the one that it is used with has to say: {words}"
    return replace(planned, warnings=(*planned.warnings, *([warning] if left else [])))


def _with_card(made: Plan, *, undo: bool) -> Plan:
    """The plan with a model card that says what was merged, where the output has side files at all."""
    if made.checkpoint.folder is None or not made.side_files:
        return made
    data, warnings = model_card(
        made.checkpoint, made.side_files, made.opened, made.adapters, effects_of(made), undo=undo
    )
    sides = {side.name: side for side in made.side_files}
    if data is not None:
        sides[CARD] = SideFile(CARD, None, len(data), data)
    return replace(
        made,
        side_files=tuple(sorted(sides.values(), key=lambda side: side.name)),
        warnings=(*made.warnings, *warnings),
    )


def output_path(out: Reference) -> Path:
    """The place of an output.

    Raises:
        UsageError: None was given, or one that no file system takes.
    """
    if not str(out):
        raise UsageError("No output given", hint="say where with -o OUT")
    receipt = receipt_path(Path(out), "unmerge")  # the longest name of all that is written beside an output
    for place in (Path(out), receipt.with_name(receipt.name + ASIDE)):
        check_path(place)
    return Path(out)


def check_output(made: Plan, target: Path, *, force: bool, beside: Sequence[str] = ()) -> None:
    """Refuse an output that cannot be written, before any work.

    Args:
        made: What would be written.
        target: Where.
        force: Whether lora-cli's own output may be replaced.
        beside: Names of small files that come with an output of one file, besides its receipt.

    Raises:
        UsageError: No output given, or a single file asked for a checkpoint of several.
        OutputExistsError: Something is there, or it is an input.
    """
    folder = target.suffix != ".safetensors"
    if not folder and len(made.files) != 1:
        raise UsageError(
            f"The base has {len(made.files)} shards and cannot become one file",
            file=target,
            hint="name a folder with -o",
        )
    may_replace = written_by_us(target) if force else lambda: False
    check_apart(target, made.inputs)
    check_target(target, folder=folder, may_replace=may_replace)
    if folder:
        return
    # What is ours and tells of what was there before goes, or is replaced: with it. Alone it may be the way back for
    # a file that was moved elsewhere.
    ours = ours_beside(target)
    going = ours if may_replace() else []
    for name in dict.fromkeys((receipt_path(target, made.operation).name, *beside, *ours)):
        check_target(target.with_name(name), folder=False, may_replace=partial(contains, going, name))
    for name in going:
        check_apart(target.with_name(name), made.inputs)


def output_names(made: Plan, target: Path) -> tuple[str, ...]:
    """Names of every file that a plan writes for `target`, without the receipt."""
    if target.suffix == ".safetensors":
        return (target.name,)
    return (*(file.name for file in made.files), *(side.name for side in made.side_files))


def output_sizes(made: Plan, target: Path) -> dict[str, int]:
    """Name → size of every file that a plan writes for `target`, without the receipt."""
    sizes = [*(file.size for file in made.files), *(side.size for side in made.side_files)]
    return dict(zip(output_names(made, target), sizes, strict=True))


def receipt_content(made: Plan, options: PlanOptions) -> dict[str, Any]:
    """What a receipt says of a plan: inputs by label, scales with their sources, rewrites and options."""
    said, effects = made.as_dict(), effects_of(made)
    for use, adapter in zip(said["adapters"], made.opened, strict=True):
        if adapter.beginning:
            use["role"] = BEGINNING
    return {
        "base": {"label": made.base},
        "adapters": said["adapters"],
        "options": {
            "dtype": options.dtype,
            "map": list(options.maps),
            "allow_unmapped": options.allow_unmapped,
            "orientation": options.orientation,
            "ignore_field": list(options.read.ignore_fields),
            **({"expert_layout": str(options.read.expert_layout)} if str(options.read.expert_layout) else {}),
        },
        "tensors": said["tensors"],
        "ledger": said["ledger"],
        "edited": [edit.key for edit in made.edits if edit.operation not in ("keep", "rename")],
        **({"effects": asdict(effects)} if made.operation == "merge" and effects else {}),
    }
