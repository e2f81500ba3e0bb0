"""Whether the factors of experts look packed in another way than they are read: no file of the older writers says it.

B starts at zero and grows with what its expert has to learn, so that its columns are about equally long within each
expert. Columns are grouped by expert in both ways that they can be packed, and the ways are told apart by how much of
the variance of log lengths lies between groups. Where lengths fall from rank to rank, as those of a truncated SVD do,
columns that follow one another are alike too: so what is monotone from rank to rank, as the factors are read, is taken
off first. What comes of shuffled columns says how much is chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lora_cli.adapters.expert_deltas import LowRankExperts
from lora_cli.surgery.edit import MERGEABLE
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.readers import Readers, open_readers, torch_dtype

SURE = 6.0
"""Standard deviations from chance at which something is said."""

_STACKS = 16
"""Stacks that are looked at of one adapter."""
_ROWS = 256
"""Rows of B by which the lengths of columns are judged."""
_SHUFFLES = 64
_LEAST = 1e-6
"""Columns that are shorter, against the longest, count as being so long: those of experts that had nothing to learn."""


def doubts(plan: Plan) -> Iterator[str]:
    """Say for each adapter whose factors look packed otherwise than they are read.

    Args:
        plan: A plan. Adapters whose config says how they are packed are not asked.
    """
    for position, adapter in enumerate(plan.opened):
        if adapter.config.get("lora_B_layout"):
            continue
        found = {
            term.delta.b.key: term.delta
            for edit in plan.edits
            for term in edit.terms
            if term.adapter == position and isinstance(term.delta, LowRankExperts) and _is_open(term.delta)
        }
        deltas = list(found.values())
        if deltas and looks_otherwise(deltas[:: -(-len(deltas) // _STACKS)]):
            yield f"{adapter.label}: {_words(deltas[0])}"


def looks_otherwise(deltas: Sequence[LowRankExperts]) -> bool:
    """Whether factors that are all packed in one way look packed in the other one."""
    excess, variance = 0.0, 0.0
    with open_readers() as readers:
        for delta in deltas:
            lengths = _lengths(delta, readers)
            if lengths is None:
                continue
            shares = _shares(_shuffled(lengths), delta.experts, slowest=delta.packing == "packed")
            excess += float(shares[0] - shares[1:].mean())
            variance += float(shares[1:].var())
    return variance > 0 and excess > SURE * variance**0.5


def _is_open(delta: LowRankExperts) -> bool:
    """Whether the two packings are not the same for it."""
    return delta.packing in ("packed", "packed-by-expert") and delta.experts > 1 and delta.rank > 1


def _lengths(delta: LowRankExperts, readers: Readers) -> torch.Tensor | None:
    """Log lengths of B's columns; None where there is nothing to see."""
    if delta.b.dtype.name not in MERGEABLE:
        return None
    rows, columns = delta.b.shape
    count = min(rows, _ROWS)
    part = readers.load_part(delta.b, torch_dtype(delta.b.dtype), 0, count * columns)
    lengths = part.view(count, columns).double().square().sum(0).sqrt()
    longest = float(lengths.max())
    if not 0 < longest < float("inf"):
        return None
    return lengths.clamp(min=_LEAST * longest).log()


def _shuffled(lengths: torch.Tensor) -> torch.Tensor:
    """The lengths as they are, and in many other orders, below each other; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(lengths), generator=generator) for _ in range(_SHUFFLES)]
    return torch.stack([lengths, *(lengths[order] for order in orders)])


def _shares(lengths: torch.Tensor, experts: int, *, slowest: bool) -> torch.Tensor:
    """How much more of the variance lies between experts in the packing that is asked for than in the one that is read.

    Args:
        lengths: (orders × columns).
        experts: How many there are.
        slowest: Whether the one that is asked for has the expert slowest, and the one that is read fastest.
    """
    ranks = lengths.shape[1] // experts
    read = lengths.view((-1, ranks, experts) if slowest else (-1, experts, ranks))
    across = 2 if slowest else 1
    of_rank = torch.tensor([monotone(means) for means in read.mean(across).tolist()], dtype=torch.float64)
    read = read - of_rank.unsqueeze(across)
    asked = read.reshape((-1, experts, ranks) if slowest else (-1, ranks, experts))
    total = (read - read.mean((1, 2), keepdim=True)).square().mean((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    between = [one.var(1, correction=0) for one in (asked.mean(across), read.mean(3 - across))]
    return (between[0] - between[1]) / total


def monotone(values: Sequence[float]) -> list[float]:
    """The numbers that never rise, or never fall, and are nearest to some numbers (pool adjacent violators)."""
    fits = [_falling(values), [-value for value in _falling([-value for value in values])]]
    return min(fits, key=lambda fit: sum((a - b) ** 2 for a, b in zip(fit, values, strict=True)))


def _falling(values: Sequence[float]) -> list[float]:
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count < total * pools[-1][1]:
            before, several = pools.pop()
            total, count = total + before, count + several
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _words(delta: LowRankExperts) -> str:
    slowest = delta.packing == "packed"
    seen, read = ("slowest", "PEFT packs it") if slowest else ("fastest", "Unsloth packed it")
    unsloth = ", as Unsloth packed it before September 2026" if slowest else ", as PEFT packs it"
    return (
        f"B of its experts looks as if the expert were {seen} in it{unsloth}; it is read as {read}. "
        f"If that is wrong, say --expert-layout {seen}"
    )
