"""What adapters do to one name of a base, and what becomes of names that share a tensor."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

from lora_cli.adapters.adapter import Replacement
from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import LoraCliError, ShapeError, UnsupportedError
from lora_cli.surgery.edit import Contribution, Rows
from lora_cli.surgery.views import Views

_STEP = 1 << 20


@dataclass
class Change:
    """What is done to one name.

    Attributes:
        terms: Deltas on it.
        replaced: What takes its place, under the deltas.
        rows: Rows that go over all else.
    """

    terms: list[Contribution] = field(default_factory=list)
    replaced: Replacement | None = None
    rows: list[Rows] = field(default_factory=list)

    def add(self, added: Contribution) -> tuple[type[LoraCliError], str] | None:
        """Add a delta; returns what is wrong with it beside the others, if anything is."""
        first = next(iter(self.terms), added)
        self.terms.append(added)
        if first.delta.stack != added.delta.stack:
            return ShapeError, "one adapter changes a stack of matrices, another one a convolution"
        if first.transposed != added.transposed:
            return ShapeError, "square, and two adapters read it in two ways; give --orientation ba or ab"
        together = [other for other in self.terms if self._overlap(added, other)]
        if together and any(term.delta.magnitude for term in (added, *together)):
            words = "DoRA sets the lengths of rows, so nothing can be added along with it; merge one after the other"
            return UnsupportedError, words
        return None

    @staticmethod
    def _overlap(one: Contribution, other: Contribution) -> bool:
        (begin, end), (first, last) = one.outputs, other.outputs
        return one is not other and begin < last and first < end

    def like(self, other: Change) -> bool:
        """Whether both do the same."""
        same = [id(term) for term in self.terms] == [id(term) for term in other.terms] and self.rows == other.rows
        one, two = self.replaced, other.replaced
        if one is None or two is None:
            return same and one is two
        return same and contents_alike(one.tensor, two.tensor)


def settle_ties(views: Views, changes: MutableMapping[str, Change]) -> tuple[str, ...]:
    """Say which names can no longer share a tensor; of others only what is done to the shared one is left.

    Args:
        views: The names.
        changes: What is done to each.
    """
    apart: list[str] = []
    untouched = Change()
    for key in dict.fromkeys(views.tied.values()):
        _, *aliases = views.group(key)
        own = changes.get(key, untouched)
        if all(changes.get(alias, untouched).like(own) for alias in aliases):
            for alias in aliases:
                changes.pop(alias, None)
        else:
            apart += aliases
    return tuple(apart)


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
