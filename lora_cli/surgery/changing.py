"""What adapters do to one name of a base, and what becomes of names that share a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_cli.adapters.adapter import Delta, Replacement, Target
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.tuners import NAMES
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import LoraCliError, ShapeError, UnsupportedError
from lora_cli.surgery.edit import Contribution, Rows
from lora_cli.surgery.lying import Placed
from lora_cli.surgery.views import Views

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STEP = 1 << 20


@dataclass
class Change:
    """What is done to one name.

    Attributes:
        terms: Deltas on it.
        replaced: What takes its place, under the deltas.
        rows: Rows that take the place of single ones, under the deltas.
        holder: Position of the adapter that holds it whole.
        row_holders: Positions of the adapters that hold the rows.
    """

    terms: list[Contribution] = field(default_factory=list)
    replaced: Replacement | None = None
    rows: list[Rows] = field(default_factory=list)
    holder: int | None = None
    row_holders: list[int] = field(default_factory=list)
    _on_matrix: defaultdict[int | None, list[Contribution]] = field(default_factory=lambda: defaultdict(list))

    def add(self, added: Contribution) -> tuple[type[LoraCliError], str] | None:
        """Add a delta; returns what is wrong with it beside the others, if anything is."""
        first = next(iter(self.terms), added)
        others = self.terms if added.at is None else [*self._on_matrix[None], *self._on_matrix[added.at]]
        together = [other for other in others if self._overlap(added, other)]
        self.terms.append(added)
        self._on_matrix[added.at].append(added)
        if first.count != added.count:
            return ShapeError, "one adapter changes a stack of matrices, another one a convolution"
        if first.transposed != added.transposed:
            return ShapeError, "square, and two adapters read it in two ways; give --orientation ba or ab"
        if added.alone and added.count is not None:
            words = f"{kind_words(added.delta)} for single experts, of which the base stores several in one tensor"
            return UnsupportedError, f"{words}; this needs a base that stores each of them by itself"
        if not _go_together({_manner(term) for term in self.terms}):
            return UnsupportedError, (
                f"{kind_words(added.delta)} and {kind_words(first.delta)} for parts of one tensor; "
                "merge one after the other"
            )
        alone = next((term for term in (added, *together) if term.alone), None) if together else None
        if alone is not None:
            words = "sets the lengths of rows" if alone.adds else "makes something of what is there"
            return UnsupportedError, (
                f"{kind_words(alone.delta)} {words}, so nothing can be added along with it; merge one after the other"
            )
        return None

    def lay(self, rows: Rows, adapter: int) -> bool:
        """Take rows of an adapter; returns whether none of them is another one already."""
        if any(_rows_alike(rows, other) for other in self.rows):
            return True
        free = all(set(rows.at).isdisjoint(other.at) for other in self.rows)
        self.rows.append(rows)
        self.row_holders.append(adapter)
        return free

    def mixed(self) -> str | None:
        """Say what is wrong where rows meet other changes of the same outputs, if anything is."""
        other = "rows of one adapter, and a change of another that was trained without them; merge one after the other"
        for rows, holder in zip(self.rows, self.row_holders, strict=True):
            meeting = [term for term in self.terms if term.weight and _meet(rows, term)]
            if any(term.adapter != holder for term in meeting) or self.holder not in (None, holder):
                return other
            alone = next((term for term in meeting if term.alone), None)
            if alone is not None:
                return f"trained rows, and {kind_words(alone.delta)}, which was trained on other rows"
        return None

    @staticmethod
    def _overlap(one: Contribution, other: Contribution) -> bool:
        (begin, end), (first, last) = one.outputs, other.outputs
        in_turn = one.step == other.step and (begin - first) % one.step != 0
        return begin < last and first < end and not in_turn

    def like(self, other: Change) -> bool:
        """Whether both do the same."""
        terms, others = ([id(term) for term in one.terms if term.weight] for one in (self, other))
        same = terms == others
        same = same and len(self.rows) == len(other.rows) and all(map(_rows_alike, self.rows, other.rows))
        one, two = self.replaced, other.replaced
        if one is None or two is None:
            return same and one is two
        return same and contents_alike(one.tensor, two.tensor)


def kind_words(delta: Delta) -> str:
    """What people call a change that is not added to others."""
    return "DoRA" if delta.magnitude is not None else NAMES.get(delta.kind, delta.kind)


def _manner(term: Contribution) -> str:
    return "length" if term.delta.magnitude is not None else term.delta.acts if term.alone else "sum"


def _go_together(manners: Set[str]) -> bool:
    """Whether deltas that change a tensor in these ways can do so in one pass, each its own outputs."""
    return len(manners) == 1 or not ("map" in manners or {"length", "gain"} <= manners)


def _meet(rows: Rows, term: Contribution) -> bool:
    """Whether a delta changes any of some rows; where outputs are columns it changes all of them."""
    begin, end = term.outputs
    return term.transposed or any(begin <= at < end for at in rows.at)


def settle_ties(views: Views, changes: MutableMapping[str, Change]) -> tuple[str, ...]:
    """Say which names can no longer share a tensor; if there are none, only what is done to the shared ones is left.

    A config says at once of all ties of a model whether there are any, so that none are left if one cannot be.

    Args:
        views: The names.
        changes: What is done to each.
    """
    untouched = Change()
    if not all(changes.get(alias, untouched).like(changes.get(key, untouched)) for alias, key in views.tied.items()):
        return tuple(views.tied)
    for alias in views.tied:
        changes.pop(alias, None)
    return ()


def twins_in(placed: Sequence[Placed], views: Views) -> dict[int, Target]:
    """Find what an adapter holds for every one of some tied tensors, all the same: `id` of each → the one that stays.

    PEFT stores so what it ties itself: the factors of a head are those of the embedding, turned and exchanged.
    """
    groups: defaultdict[str, dict[str, Target]] = defaultdict(dict)
    for target, place in placed:
        names = views.group(place.key)
        if len(names) > 1 and place.region is None:
            groups[names[0]][place.key] = target
    found = {}
    for key, targets in groups.items():
        if targets.keys() == set(views.group(key)):
            tables = (target for target in targets.values() if target.delta.kind == "lora-embedding")
            first = next(tables, next(iter(targets.values())))
            if all(target is first or deltas_alike(target.delta, first.delta) for target in targets.values()):
                found.update({id(target): first for target in targets.values()})
    return found


def apart_words(label: str, placed: Sequence[Placed], twins: Mapping[int, Target], views: Views) -> list[str]:
    """Tell of tied tensors that were to be trained as one, and were not.

    PEFT lets them share their factors. In a model of 16 bits it makes float32 of each on its own, which then are
    trained apart, and the live model has two tensors.
    """
    apart = {
        place.key: target.module
        for target, place in placed
        if len(views.group(place.key)) > 1 and id(target) not in twins and place.region is None
    }
    if len(apart) < 2:
        return []
    return [
        f"{label}: {' and '.join(apart.values())} were to be trained as one (ensure_weight_tying), "
        "and their factors differ; each is applied to a tensor of its own"
    ]


def deltas_alike(one: Delta, other: Delta) -> bool:
    """Whether the factors of two deltas are the same, or each the other's transposed, as of a table and its head."""
    if one.scale.times() != other.scale.times() or len(one.tensors) != len(other.tensors):
        return False
    formulas = [(d.kind, d.settings, [*d.parts]) for d in (one, other) if isinstance(d, Formula)]
    if formulas and (len(formulas) == 1 or formulas[0] != formulas[1]):
        return False
    if all(contents_alike(mine, theirs) for mine, theirs in zip(one.tensors, other.tensors, strict=True)):
        return True
    pairs = zip(one.tensors[:2], reversed(other.tensors[:2]), strict=True)
    return len(one.tensors) == 2 and all(_transposed_alike(mine, theirs) for mine, theirs in pairs)


def _transposed_alike(one: StoredTensor, other: StoredTensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape[::-1] or len(one.shape) != 2:
        return False
    return bool((_bits(one) == _bits(other).T).all())


def _bits(tensor: StoredTensor) -> NDArray[np.unsignedinteger[Any]]:
    import numpy as np  # only here: plans are made without it

    with tensor.shard.source.open() as reader:
        data = reader.read(tensor.offset, tensor.nbytes)
    return np.frombuffer(data, f"u{tensor.dtype.bits // 8}").reshape(tensor.shape)


def _rows_alike(one: Rows, other: Rows) -> bool:
    return (one.rows, one.at) == (other.rows, other.at) and contents_alike(one.tensor, other.tensor)


def contents_alike(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.shard.source.open() as left, other.shard.source.open() as right:
        for start in range(0, one.nbytes, _STEP):
            size = min(_STEP, one.nbytes - start)
            if left.read(one.offset + start, size) != right.read(other.offset + start, size):
                return False
    return True
