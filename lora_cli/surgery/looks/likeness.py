"""What the tensors look like that are not what a merge would have written, one by one and all together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.progress import Progress
from lora_cli.surgery import distance
from lora_cli.surgery.budget import Budget
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.looks.evidence import as_one, asked_of, gather
from lora_cli.surgery.looks.judgement import FEW, Subject, judge
from lora_cli.surgery.looks.phrases import Likeness, bare, but_for, elements, percent
from lora_cli.surgery.plan import Plan

if TYPE_CHECKING:
    from lora_cli.surgery.verify import Difference

_ALIKE = 0.02
"""Numbers that are as near to their median are called alike."""


def likenesses(
    plan: Plan,
    candidates: Mapping[str, StoredTensor],
    different: Sequence[Difference],
    budget: Budget,
    progress: Progress,
) -> dict[str, Likeness]:
    """Say what each tensor looks like whose values differ.

    Args:
        plan: What should be there.
        candidates: What is there.
        different: What was found; only values can be looked at.
        budget: Threads and buffer sizes.
        progress: Hears of every step.
    """
    values = {difference.key: difference for difference in different if difference.what == "values"}
    edits = [edit for edit in plan.edits if edit.key in values]
    with_terms = [edit for edit in edits if edit.terms]
    if with_terms:
        progress.begin("look at differences", sum(edit.nbytes for edit in with_terms))
    evidence = gather(with_terms, candidates, budget, progress.advance)
    found = {}
    for edit in with_terms:
        difference, subject = values[edit.key], _subject(plan, edit)
        found[edit.key] = judge(evidence[edit.key], subject, difference.elements or 0, difference.max_ulp)
    wholes = [edit for edit in edits if not edit.terms]
    return found | _wholes(plan, wholes, candidates, values, budget, progress)


def summary(different: Sequence[Difference], likenesses: Mapping[str, Likeness]) -> str | None:
    """Say in one sentence what all tensors look like that differ; None where they do not look alike."""
    found = [likenesses.get(difference.key) for difference in different]
    alike = [likeness for likeness in found if likeness is not None]
    if not alike or len(alike) < len(found):
        return None
    if len(alike) == 1:
        return f"the tensor that differs looks like {alike[0].words}"
    generals = {likeness.general for likeness in alike}
    if len(generals) > 1:
        # "The bare base" is what all are, whichever adapter each of them lacks.
        generals = {general.partition(":")[0] for general in generals}
    times = [(likeness.times, likeness.doubt) for likeness in alike if likeness.times is not None]
    middle = median(value for value, _ in times) if times else 0.0
    apart = any(abs(value - middle) > max(doubt, _ALIKE * abs(middle)) for value, doubt in times)
    if len(generals) > 1 or apart:
        return None
    ulp = max((difference.max_ulp or 0 for difference in different), default=0)
    words = generals.pop().replace("{times}", f"{middle:.3g}").replace("{ulp}", str(ulp))
    return f"all {len(alike):,} tensors that differ look like {words}"


def _subject(plan: Plan, edit: Edit) -> Subject:
    alone = len(plan.adapters) == 1
    labels = tuple("the adapter" if alone else plan.adapters[term.adapter].label for term in edit.terms)
    count = Counter(term.adapter for term in edit.terms)
    names = tuple(
        f"{label} on {term.name}" if count[term.adapter] > 1 else label
        for term, label in zip(edit.terms, labels, strict=True)
    )
    sole = labels[0] if len(count) == 1 else None
    if as_one(edit):
        names = (sole or "the change of all adapters",)
        labels = names if sole else labels
    adds = all(term.adds for term in edit.terms)
    return Subject(asked_of(edit), labels, names, sole, edit.stretched, edit.displaced is None, adds)


def _wholes(
    plan: Plan,
    edits: Sequence[Edit],
    candidates: Mapping[str, StoredTensor],
    values: Mapping[str, Difference],
    budget: Budget,
    progress: Progress,
) -> dict[str, Likeness]:
    """What tensors look like that take no delta: kept, or taken from an adapter whole."""
    threads = max(1, min(budget.threads, budget.peak_bytes // distance.WORKER_BYTES))
    # What was cast is not compared: rounding differs from an error by nothing but its size.
    wanted = [
        distance.Pair(edit.key, edit.source, candidates[edit.key])
        for edit in edits
        if edit.fresh is None and not edit.rows and edit.source.dtype == edit.dtype
    ]
    from_base = [
        distance.Pair(edit.key, edit.former, candidates[edit.key])
        for edit in edits
        if edit.former is not None and (edit.displaced or edit.rows)
    ]
    apart = distance.measure(wanted, threads, progress)
    apart_from_base = distance.measure([pair for pair in from_base if pair.by_value], threads, progress)
    found = {}
    for edit in edits:
        near = apart_from_base.get(edit.key)
        if near is not None and not near.changed:
            found[edit.key] = bare("the adapter" if len(plan.adapters) == 1 else None)
        else:
            found[edit.key] = _whole(edit, values[edit.key], apart.get(edit.key))
    return found


def _whole(edit: Edit, difference: Difference, apart: distance.Distance | None) -> Likeness:
    kept = edit.operation not in ("replace", "append")
    count, size = difference.elements or 0, math.prod(edit.shape)
    if count <= max(1, size // FEW):
        likeness = but_for("the base" if kept else "this merge", count)
    else:
        general = "the base, but changed since" if kept else "another tensor than the adapter's"
        norm = math.sqrt(apart.squares / apart.reference) if apart and 0 < apart.reference < math.inf else math.inf
        by = f", by {percent(norm)} of its norm" if 0 < norm < math.inf else ""
        likeness = Likeness(f"{general}: {elements(count)} of {size:,} differ{by}", general)
    if apart is None or apart.largest < math.inf:
        return likeness
    return Likeness(f"{likeness.words}, and NaN or infinity", f"{likeness.general}, and NaN or infinity")
