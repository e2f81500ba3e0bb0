"""How a plan looks to a person, before the work and on `--dry-run`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_cli.checkpoint.targets import free_bytes
from lora_cli.cli import effects
from lora_cli.cli.draw import facts, grid, line
from lora_cli.cli.text import count, few, number, size
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.effects import effects_of
from lora_cli.surgery.plan import AdapterUse, Plan
from lora_cli.surgery.survival import WEAK, Survival
from lora_cli.surgery.workers import default_threads

if TYPE_CHECKING:
    from rich.console import RenderableType

Undo = Literal["alone", "with adapter"]

_COPIES = ("keep", "rename")
ROWS = 60
"""Tensors that a plan lists for people; JSON has all of them."""
NAMED = 2
"""Adapter tensors that are named of those with one fate."""
WHOLE = 0.995
"""Strength that is 1.00 in print."""


class DryRun:
    """A plan with what it would need of the machine.

    Args:
        plan: The plan.
        out: Where it would be written.
        threads: As the user said.
        memory: As the user said.
        undo: Whether an undo file would be written, and if so, whether with the factors in it.
        residual: The base that would be written besides, for an adapter whose factors are taken from it.
    """

    def __init__(
        self,
        plan: Plan,
        out: str,
        threads: int | None,
        memory: int | None,
        undo: Undo | None = None,
        residual: DryRun | None = None,
    ) -> None:
        self.plan = plan
        self.residual = residual
        self.out = out
        budget = settle_budget(plan, memory=memory, threads=threads or default_threads(), blocks=undo is not None)
        self.threads = budget.threads
        self.buffers = budget.peak_bytes
        self.free = free_bytes(Path(out)) if out else None
        self.undo_bytes: int | None = None
        if undo is not None:
            from lora_cli.surgery.undo.estimate import undo_bytes

            self.undo_bytes = undo_bytes(plan, budget, embed=undo == "with adapter")

    @property
    def fits(self) -> bool | None:
        """Whether the output fits on its disk; None when no output was named."""
        return None if self.free is None else self.free >= self.plan.bytes_to_write + (self.undo_bytes or 0)

    def as_dict(self) -> dict[str, Any]:
        """The plan and its needs as plain values."""
        return {
            **self.plan.as_dict(),
            "effects": effects_of(self.plan),
            "threads": self.threads,
            "buffer_bytes": self.buffers,
            "undo_bytes": self.undo_bytes,
            "free_disk_bytes": self.free,
            "fits": self.fits,
            **({"residual": self.residual.as_dict()} if self.residual else {}),
        }


def summary(plan: Plan, *, undo: bool = False) -> Iterator[RenderableType]:
    """A few lines that say what is going to happen."""
    tensors = plan.counts()
    changing = [count(tensors["edited"], "tensor") + " change", f"{tensors['copied']:,} copied"]
    changing += [f"{tensors['added']:,} added"] if tensors["added"] else []
    changing += [f"{tensors['dropped']:,} dropped"] if tensors["dropped"] else []
    yield line((f"plan: {plan.operation} ", "bold"), plan.base)
    files = f"{count(len(plan.files), 'file')} and {count(len(plan.side_files), 'side file')}"
    besides = "undo file and receipt" if undo else "a receipt"
    yield facts(
        [
            ("tensors", ", ".join(changing)),
            *(("adapter", use_words(use)) for use in plan.adapters),
            *(("names", use.rewrite) for use in plan.adapters[:1]),
            *(layout_rows(plan.adapters)),
            ("ledger", ledger_words(plan.ledger_counts())),
            ("writes", f"{size(plan.bytes_to_write)} in {files}, besides {besides}"),
            *(_reordered(plan)),
            *(_exceptions(plan)),
            *(effects.rows(effects_of(plan))),
            *_code(plan),
            ("left out", few(plan.left_out)),
        ]
    )


def _code(plan: Plan) -> Iterator[tuple[str, str]]:
    """Program text that comes with a model: people should know before they let anything run it."""
    if code := [side.name for side in plan.side_files if side.name.lower().endswith(".py")]:
        yield "code", f"{few(code, NAMED)}: copied, never run"


def _reordered(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is written besides the output while the plan is carried out."""
    if plan.strided:
        factors = count(len(plan.strided), "factor")
        yield "scratch", f"{size(plan.bytes_to_reorder)}: {factors} of experts are put in order first"


def _exceptions(plan: Plan) -> Iterator[tuple[str, str]]:
    """Adapter tensors that do not change a tensor of the base in the ordinary way."""
    for outcome in ("added", "ignored"):
        reasons: defaultdict[str | None, list[str]] = defaultdict(list)
        for entry in plan.ledger:
            if entry.outcome == outcome:
                reasons[entry.reason].append(entry.tensor)
        for reason, tensors in reasons.items():
            yield outcome, f"{few(tensors, NAMED)} ({reason})"


def dry_run(planned: DryRun) -> Iterator[RenderableType]:
    """The whole plan, tensor by tensor, and what it needs."""
    yield from _drawn(planned)
    if planned.residual:
        yield line()
        yield from _drawn(planned.residual)
    yield line("nothing was written", style="dim")


def _drawn(planned: DryRun) -> Iterator[RenderableType]:
    plan = planned.plan
    yield from summary(plan, undo=planned.undo_bytes is not None)
    needs = [
        ("reads", size(plan.bytes_to_read)),
        ("buffers", f"{size(planned.buffers)} on {count(planned.threads, 'thread')}"),
    ]
    if planned.undo_bytes is not None:
        needs.append(("undo file", f"about {size(planned.undo_bytes)}, from a sample"))
    if planned.free is not None:
        verdict = "it fits" if planned.fits else "it does not fit"
        needs.append(("free disk", f"{size(planned.free)}: {verdict}"))
    yield facts(needs)
    rows = [
        (edit.key, _edit_words(edit), "×".join(map(str, edit.shape)), edit.dtype.name, _scales_words(edit, plan))
        for edit in plan.edits
        if edit.operation not in _COPIES
    ]
    yield line()
    scales = "scale" if len(plan.adapters) == 1 else "scales, by adapter"
    yield grid(("tensor", "edit", "shape", "type", scales), rows[:ROWS])
    if len(rows) > ROWS:
        yield line(f"… and {len(rows) - ROWS:,} more (--json lists all)", style="dim")


def _edit_words(edit: Edit) -> str:
    """What is done to a tensor, and where that is not plain, to what of it."""
    words: str = edit.operation
    if edit.operation == "add":
        words = " and ".join(sorted({_DOES.get(term.delta.acts, words) for term in edit.terms})) or words
    if edit.rows:
        changed = count(sum(len(rows.at) for rows in edit.rows), "row")
        words = changed if edit.operation == "replace" and not edit.displaced else f"{words}, {changed}"
    if any(term.part for term in edit.terms):
        words += " to parts"
    return words + (" (DoRA)" if any(term.delta.magnitude for term in edit.terms) else "")


_DOES = {"gain": "multiply", "map": "transform"}
"""What deltas do that are no summands."""


def _scales_words(edit: Edit, plan: Plan) -> str:
    """What `_scale_words` says of each adapter, in their order."""
    by_adapter = [[term for term in edit.terms if term.adapter == at] for at in range(len(plan.adapters))]
    if len(by_adapter) == 1 or not edit.terms:
        return _scale_words(edit.terms)
    return " / ".join((_scale_words(terms) or "yes") if terms else "–" for terms in by_adapter)


def _scale_words(terms: Sequence[Contribution]) -> str:
    """Scale and rank of each delta of one adapter, as far as it has them."""
    said: Counter[str] = Counter()
    for term in terms:
        scale, rank = term.delta.scale, term.delta.rank
        words = [number(scale.times(term.weight))] if scale.exists else []
        words += [f"(rank {rank})"] if rank else []
        said[" ".join(words)] += 1
    return ", ".join(words if times == 1 else f"{words} {times} times" for words, times in said.items() if words)


def use_words(use: AdapterUse) -> str:
    """What one adapter is and how strongly it is applied."""
    scales = [f"scale {number(scaled.scale)} = {scaled.source}" for scaled in use.scales[:3]]
    more = [f"{len(use.scales) - 3} more scales"] if len(use.scales) > 3 else []
    weight = [f"weight {number(use.weight)}"] if use.weight != 1 else []
    strength = "; ".join([*weight, *scales, *more])
    return f"{use.label} ({use.kind}, {use.format})" + (f": {strength}" if strength else "")


def layout_rows(uses: Sequence[AdapterUse]) -> Iterator[tuple[str, str]]:
    """How factors of stacks are read, and why."""
    layouts = [layout for use in uses for layout in use.layouts]
    yield from (("experts", f"{count(layout.modules, 'stack')}: {layout.layout}") for layout in layouts)


def ledger_words(ledger: dict[str, int]) -> str:
    """What became of the adapter's tensors: 28 applied, 2 added."""
    said = ", ".join(f"{amount:,} {outcome}" for outcome, amount in ledger.items() if amount)
    return f"{said} (adapter tensors)" if said else ""


def survival_words(survival: Sequence[Survival]) -> str:
    """What of the change survived rounding: the least strength, and the range of weights that changed."""
    strengths = [(tensor.strength, tensor.key) for tensor in survival if tensor.strength is not None]
    if not strengths:
        return ""
    least, key = min(strengths)
    shares = sorted(tensor.changed_fraction for tensor in survival)
    which = f" (least: {key})" if least < WEAK else ""
    # Rounding takes and gives: of a change that is there as a whole, a little more or less is.
    kept = "all of the change survived" if least >= WHOLE else f"strength {least:.2f} or more{which}"
    few, many = f"{shares[0]:.0%}", f"{shares[-1]:.0%}"
    return f"{kept}; {few if few == many else f'{few} to {many}'} of the weights changed"
