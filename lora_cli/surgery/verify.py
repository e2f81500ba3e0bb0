"""Verify: is a checkpoint exactly base + adapters? Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_cli.checkpoint.checkpoint import Checkpoint, StoredTensor
from lora_cli.errors import LoraCliError, UsageError
from lora_cli.progress import SILENT, Progress
from lora_cli.surgery.agreement import doubts
from lora_cli.surgery.budget import Budget, settle_budget
from lora_cli.surgery.effects import effects_of, not_said
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import AdapterUse, Plan
from lora_cli.surgery.planning import plan
from lora_cli.surgery.repacking import in_order
from lora_cli.surgery.results import Reference, listed, measured, open_adapters, open_base
from lora_cli.surgery.survival import Survival, Survivals, warnings_of
from lora_cli.surgery.undo.given import check_used
from lora_cli.surgery.unmerge import open_undoing
from lora_cli.surgery.workers import default_threads


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what the merge would have written.

    Attributes:
        key: Its name.
        what: `values`, `missing` (from the checkpoint), `unexpected` (in it), `dtype`, `shape`, or `roundtrip` where
            unmerging does not give the base; that may be a file. `config` where config.json says otherwise.
        elements: How many elements differ by more than is allowed.
        max_ulp: The largest difference in units in the last place; None where values cannot be compared, and for
            other than floating tensors.
        expected: What the merge would have written, where that is a type or shape.
        found: What is there.
        looks_like: What it looks like instead, or why it does not come back; None where neither is known.
        strength: How much of the whole delta is there, along the delta itself; NaN and infinity count as right. None
            for tensors without one, and where it is zero.
    """

    key: str
    what: str
    elements: int | None = None
    max_ulp: int | None = None
    expected: str | None = None
    found: str | None = None
    looks_like: str | None = None
    strength: float | None = None


@dataclass(frozen=True)
class RoundTrip:
    """What unmerging in memory showed.

    Attributes:
        exact: Whether every byte of the base came back, and merges to what is there.
        against: What it was compared with: `base`, or the `digests` in the undo file.
        files: Digest of each file of the base, as the undo file has it.
        different: How many tensors and files are not right.
    """

    exact: bool
    against: str
    files: Mapping[str, str]
    different: int


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        verified: Whether nothing differs.
        merged: What the checkpoint is called.
        base: What the base is called.
        adapters: How each adapter is used.
        max_ulp: What was allowed.
        tensors: How many were checked, and how many differ.
        different: Those that differ.
        looks_like: What all of them look like, in one sentence, or that the base is another one; None where they do not
            look alike, or none differs.
        edited: Names of the tensors that the adapters change or add, in the order of the files.
        survival: What of each delta is in the checkpoint.
        roundtrip: What unmerging in memory showed; None where it was not asked for.
        seconds: Wall time.
        peak_rss_bytes: Most memory that one process had: this one, or any that it has waited for.
    """

    verified: bool
    merged: str
    base: str
    adapters: tuple[AdapterUse, ...]
    max_ulp: int
    tensors: dict[str, int]
    different: tuple[Difference, ...]
    looks_like: str | None
    edited: tuple[str, ...]
    survival: tuple[Survival, ...]
    roundtrip: RoundTrip | None
    seconds: float
    peak_rss_bytes: int


def verify(
    merged: Reference,
    base: Reference | None = None,
    adapters: Sequence[Reference] = (),
    options: PlanOptions | None = None,
    *,
    roundtrip: bool = False,
    undo: Reference | None = None,
    max_ulp: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Compare a checkpoint with what merging `adapters` into `base` gives, element by element.

    Tensors that differ are looked at once more, to say what they look like.

    Args:
        merged: The checkpoint in question.
        base: What it is said to be made from. With `roundtrip` it may be left out.
        adapters: What is said to be in it.
        options: Weights and the rest, as for the merge.
        roundtrip: Also unmerge in memory with the undo file beside `merged`, and compare with the base; without a base,
            with the digests in the undo file, and what comes out is merged again and compared with what is there. The
            undo file is then taken at its word for what the base is, and for weights and scales.
        undo: The undo file; the one beside `merged` unless given.
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
    if base is None and not roundtrip:
        raise UsageError("Name the base, or ask for the round trip that needs none", hint="--base BASE or --roundtrip")
    if base is None and (options.says_how or max_ulp):
        raise UsageError("Without --base the undo file says how the merge was made", hint="name the base with --base")
    with measured() as run:
        candidate = open_base(merged, progress)
        opened = None if base is None else open_base(base, progress)
        work = _Work(candidate, opened, adapters, threads or default_threads(), memory, progress, roundtrip)
        found = work.compare(options, max_ulp) if opened else _Found()
        trip = work.roundtrip(found, undo, options.read.initial) if roundtrip else None
    different = sorted(found.different, key=lambda difference: difference.key)
    return VerifyResult(
        verified=not different,
        merged=candidate.label,
        base=found.base,
        adapters=found.adapters,
        max_ulp=max_ulp,
        tensors={"checked": found.checked, "different": sum(one.what != "config" for one in different)},
        different=tuple(different),
        looks_like=found.looks_like,
        edited=found.edited,
        survival=found.survival,
        roundtrip=trip,
        seconds=run.seconds,
        peak_rss_bytes=run.peak_rss_bytes,
    )


@dataclass
class _Found:
    """What is known so far."""

    base: str = ""
    adapters: tuple[AdapterUse, ...] = ()
    checked: int = 0
    different: list[Difference] = field(default_factory=list)
    looks_like: str | None = None
    edited: tuple[str, ...] = ()
    survival: tuple[Survival, ...] = ()


@dataclass(frozen=True)
class _Work:
    """The two ways to look at a checkpoint.

    With `whole_blocks` a budget that the second is going to find too small is refused before the first.
    """

    candidate: Checkpoint
    base: Checkpoint | None
    adapters: Sequence[Reference]
    threads: int
    memory: int | None
    progress: Progress
    whole_blocks: bool

    def compare(self, options: PlanOptions, max_ulp: int) -> _Found:
        """Compare with what merging gives."""
        assert self.base is not None  # noqa: S101 (who calls has looked)
        candidate, progress = self.candidate, self.progress
        made = plan(self.base, open_adapters(self.adapters, options.read, progress), options)
        for warning in (*(f"{candidate.label}: {text}" for text in candidate.warnings), *made.warnings):
            progress.warn(warning)
        different, checked = _compare_names(made, candidate)
        comparable = {key: tensor for key, tensor in candidate.tensors.items() if key in checked}
        budget = settle_budget(made, memory=self.memory, threads=self.threads, blocks=self.whole_blocks)
        with in_order(made) as ready:
            found, survival = _compare_values(ready, comparable, max_ulp, budget, progress)
            different += found
            different.sort(key=lambda difference: difference.key)
            _warn(different, survival, progress)
            different, looks_like = _look(ready, comparable, different, budget, progress)
            looks_like = self._another_base(ready, different) or looks_like
        different += _compare_config(made, candidate)
        edited = tuple(edit.key for edit in made.edits if edit.terms or edit.operation in ("replace", "append"))
        return _Found(made.base, made.adapters, len(checked), different, looks_like, edited, survival)

    def _another_base(self, made: Plan, different: Sequence[Difference]) -> str | None:
        from lora_cli.surgery.looks.bases import another_base

        return another_base(made, self.candidate, different) if different else None

    def roundtrip(self, found: _Found, undo: Reference | None, initial: Sequence[Reference]) -> RoundTrip:
        """Unmerge in memory; what is wrong is added to what was found. What adapters were at first is needed, too."""
        against = "base" if self.base else "digests"
        try:
            given = [*listed(self.adapters), *initial]
            undoing = open_undoing(self.candidate, given, undo, self.progress, whole=self.base is None)
            if self.base is None:
                check_used(undoing.undo.manifest, undoing.undo.shard.name)
        except LoraCliError as error:
            if not found.different:
                raise
            # Of what is known to be wrong the differences say more than the undo file's refusal.
            self.progress.warn(f"no round trip: {error.message}")
            return RoundTrip(exact=False, against=against, files={}, different=0)
        for warning in undoing.plan.warnings:
            self.progress.warn(warning)
        from lora_cli.surgery.undo.roundtrip import roundtrip

        budget = settle_budget(undoing.plan, memory=self.memory, threads=self.threads, blocks=True)
        wrong = roundtrip(undoing, self.base, budget, self.progress)
        known = {difference.key for difference in found.different}
        found.different += [
            Difference(key, "roundtrip", looks_like=what) for key, what in wrong.items() if key not in known
        ]
        manifest = undoing.undo.manifest
        if self.base is None:
            for doubt in doubts(undoing, self.adapters, self.progress):
                self.progress.warn(doubt)
            found.base = manifest.base
            found.adapters = undoing.uses()
            found.checked = len(list(undoing.plan.edits))
            found.edited = tuple(edit.key for edit in undoing.plan.edits if edit.forgotten is not None)
        files = {file.name: file.digest for file in manifest.files}
        files |= {side.name: side.digest for side in manifest.side_files}
        return RoundTrip(not wrong, against, files, len(wrong))


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


def _compare_config(made: Plan, candidate: Checkpoint) -> list[Difference]:
    """Look at the fields of config.json that the merge changes; of others anybody may say what they like."""
    if candidate.folder is None:
        return []
    wrong = "; ".join(not_said(effects_of(made), candidate.config))
    return [Difference("config.json", "config", looks_like=wrong)] if wrong else []


@dataclass
class _Tally:
    elements: int = 0
    max_ulp: int = 0
    floating: bool = False


def _compare_values(
    made: Plan, tensors: Mapping[str, StoredTensor], max_ulp: int, budget: Budget, progress: Progress
) -> tuple[list[Difference], tuple[Survival, ...]]:
    """Compare values of tensors of the same types and shapes; returns what differs, and what of each delta is there."""
    from lora_cli.surgery.compare import compare_plan

    compared = {edit.key: file.name for file in made.files for edit in file.edits if edit.key in tensors}
    left = Counter({file.name: sum(e.nbytes for e in file.edits if e.key in tensors) for file in made.files})
    progress.begin("verify", left.total())
    sizes = dict(left)
    tallies: dict[str, _Tally] = {}
    survivals = Survivals()
    for part in compare_plan(made, tensors, budget, max_ulp):
        progress.advance(part.nbytes)
        left[compared[part.key]] -= part.nbytes
        if not left[compared[part.key]]:
            progress.file_done(compared[part.key], sizes[compared[part.key]])
        if part.elements:
            tally = tallies.setdefault(part.key, _Tally())
            tally.elements += part.elements
            if part.max_ulp is not None:
                tally.floating = True
                tally.max_ulp = max(tally.max_ulp, part.max_ulp)
        if part.strength is not None:
            survivals.add(part.key, part.begin, part.strength)
    different = [
        Difference(key, "values", tally.elements, tally.max_ulp if tally.floating else None)
        for key, tally in tallies.items()
    ]
    return different, survivals.report()


def _warn(different: Sequence[Difference], survival: tuple[Survival, ...], progress: Progress) -> None:
    """Say what rounding took; of tensors that differ other things are said."""
    wrong = {difference.key for difference in different}
    for warning in warnings_of(tuple(survived for survived in survival if survived.key not in wrong)):
        progress.warn(warning)


def _look(
    made: Plan,
    tensors: Mapping[str, StoredTensor],
    different: list[Difference],
    budget: Budget,
    progress: Progress,
) -> tuple[list[Difference], str | None]:
    """Say what the tensors look like that differ."""
    if not different:
        return [], None
    from lora_cli.surgery.looks.likeness import likenesses, summary

    found = likenesses(made, tensors, different, budget, progress)
    sentence = summary(different, found)
    named = [
        replace(d, looks_like=found[d.key].words, strength=found[d.key].strength) if d.key in found else d
        for d in different
    ]
    return named, sentence
