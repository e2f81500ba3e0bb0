"""Verify: is a checkpoint exactly base + adapters? Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.errors import UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.planning import plan
from lora_cli.surgery.results import Reference, measured, open_adapters, open_base
from lora_cli.surgery.workers import default_threads


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what the merge would have written.

    Attributes:
        key: Its name.
        what: `values`, `missing` (from the checkpoint), `unexpected` (in it), `dtype` or `shape`.
        elements: How many elements differ by more than is allowed.
        max_ulp: The largest difference in units in the last place; None where values cannot be compared, and for
            other than floating tensors.
        expected: What the merge would have written, where that is a type or shape.
        found: What is there.
    """

    key: str
    what: str
    elements: int | None = None
    max_ulp: int | None = None
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        verified: Whether no tensor differs.
        max_ulp: What was allowed.
        tensors: How many were checked, and how many differ.
        different: Those that differ.
        seconds: Wall time.
        peak_rss_bytes: Most memory that the process had.
    """

    verified: bool
    max_ulp: int
    tensors: dict[str, int]
    different: tuple[Difference, ...]
    seconds: float
    peak_rss_bytes: int


def verify(
    merged: Reference,
    base: Reference,
    adapters: Sequence[Reference] = (),
    options: PlanOptions | None = None,
    *,
    max_ulp: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Compare a checkpoint with what merging `adapters` into `base` gives, element by element.

    Args:
        merged: The checkpoint in question.
        base: What it is said to be made from.
        adapters: What is said to be in it.
        options: Weights and the rest, as for the merge.
        max_ulp: Units in the last place by which an element of a tensor that the adapters change may differ, measured
            at its own magnitude. 0 means the same bytes. Tensors that they do not change must always be the same bytes.
        threads: Units of work at once; all cores by default.
        memory: Bytes that buffers and factors may take; 256 MiB, or what one tensor needs, unless given.
        progress: Hears of every step.

    Raises:
        LoraCliError: Inputs that do not fit together.
    """
    if max_ulp < 0:
        raise UsageError("--max-ulp cannot be negative", found=max_ulp)
    options = options or PlanOptions()
    with measured() as run:
        candidate = open_base(merged, progress)
        made = plan(open_base(base, progress), open_adapters(adapters, options.read, progress), options)
        for warning in (*(f"{candidate.label}: {text}" for text in candidate.warnings), *made.warnings):
            progress.warn(warning)
        different, checked = _compare_names(made, candidate)
        comparable = {key for key, tensor in candidate.tensors.items() if key in checked}
        found = _compare_values(made, candidate, comparable, max_ulp, threads, memory, progress)
    different += found
    different.sort(key=lambda difference: difference.key)
    return VerifyResult(
        verified=not different,
        max_ulp=max_ulp,
        tensors={"checked": len(checked), "different": len(different)},
        different=tuple(different),
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
    )


def _compare_names(made: Plan, candidate: Checkpoint) -> tuple[list[Difference], set[str]]:
    """Compare names, types and shapes; returns what differs and the keys whose values can be compared."""
    planned = {edit.key: edit for edit in made.edits}
    different = [Difference(key, "missing") for key in planned if key not in candidate.tensors]
    different += [Difference(key, "unexpected") for key in candidate.tensors if key not in planned]
    checked = set()
    for key, edit in planned.items():
        tensor = candidate.tensors.get(key)
        if tensor is None:
            continue
        if tensor.shape != edit.shape:
            different.append(Difference(key, "shape", expected=str(list(edit.shape)), found=str(list(tensor.shape))))
        elif tensor.dtype != edit.dtype:
            different.append(Difference(key, "dtype", expected=edit.dtype.name, found=tensor.dtype.name))
        else:
            checked.add(key)
    return different, checked


@dataclass
class _Tally:
    elements: int = 0
    max_ulp: int = 0
    floating: bool = False


def _compare_values(
    made: Plan,
    candidate: Checkpoint,
    keys: set[str],
    max_ulp: int,
    threads: int | None,
    memory: int | None,
    progress: Progress,
) -> list[Difference]:
    from lora_cli.surgery.compare import compare_plan

    budget = settle_budget(made, memory=memory, threads=threads or default_threads())
    compared = {edit.key: file.name for file in made.files for edit in file.edits if edit.key in keys}
    left = Counter({file.name: sum(e.nbytes for e in file.edits if e.key in keys) for file in made.files})
    progress.begin("verify", left.total())
    sizes = dict(left)
    tallies: dict[str, _Tally] = {}
    tensors: dict[str, StoredTensor] = {key: candidate.tensors[key] for key in keys}
    for key, nbytes, elements, ulp in compare_plan(made, tensors, budget, max_ulp):
        progress.advance(nbytes)
        left[compared[key]] -= nbytes
        if not left[compared[key]]:
            progress.file_done(compared[key], sizes[compared[key]])
        if elements:
            tally = tallies.setdefault(key, _Tally())
            tally.elements += elements
            if ulp is not None:
                tally.floating = True
                tally.max_ulp = max(tally.max_ulp, ulp)
    return [
        Difference(key, "values", tally.elements, tally.max_ulp if tally.floating else None)
        for key, tally in tallies.items()
    ]
