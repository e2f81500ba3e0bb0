"""Whether a base is the one that an adapter fits, where the adapter's receipt says that its factors were taken off it.

One tensor tells: the first that lost a product. Its digest is in the receipt of the adapter, so that neither the
original base, which still has what the factors took, nor any other is taken for what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.checkpoint.digests import cuts, span_digest
from lora_cli.errors import WrongInputError
from lora_cli.surgery.receipt import find_receipt

if TYPE_CHECKING:
    from lora_cli.surgery.placing import Placement


@dataclass(frozen=True, slots=True)
class Mark:
    """What a residual is told by.

    Attributes:
        label: What the residual is called.
        tensor: The key of one of its tensors.
        dtype: How that is stored, as headers say it.
        shape: Its shape.
        digest: Digest of its first cut (see `digests`), so that the largest tensor is quickly compared as well.
    """

    label: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def module(self) -> str:
        """The module that the tensor is the weight of."""
        return self.tensor.removesuffix(".weight")

    def as_dict(self) -> dict[str, Any]:
        """What a receipt says of it."""
        return {
            "label": self.label,
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "digest": self.digest,
        }

    def compare(
        self, dtype: str, shape: Sequence[int], digest: Callable[[], str], *, adapter: str, base: str
    ) -> str | None:
        """Compare with the tensor of a base; returns a warning where that was stored anew and nothing can be told.

        Args:
            dtype: How the base stores it.
            shape: Its shape there.
            digest: Gives the digest of its first cut; not called where it cannot be the same.
            adapter: What the adapter is called.
            base: What the base is called.

        Raises:
            WrongInputError: It is another base.
        """
        if (dtype, tuple(shape)) != (self.dtype, self.shape):
            found = f"{dtype} {list(shape)} and not {self.dtype} {list(self.shape)}"
            return (
                f"{adapter}: fits {self.label} alone, a base from which its first factors were taken off; "
                f"{self.tensor} of {base} is {found}, so nothing tells if this is it"
            )
        if digest() != self.digest:
            raise WrongInputError(
                "This adapter was made for a base from which its first factors were taken off",
                file=adapter,
                tensor=self.tensor,
                expected=f"{self.label}, as the adapter's lora_inject.json says",
                found=f"other numbers in {base}",
                hint=f"use it with {self.label}, which inject wrote to --base-out; name all adapters at once",
            )
        return None


def mark(label: str, tensor: StoredTensor) -> Mark:
    """Make the mark of a residual.

    Args:
        label: What the residual is called.
        tensor: One of its tensors that is not as in the original base.
    """
    return Mark(label, tensor.key, tensor.dtype.name, tensor.shape, _first_cut(tensor))


def mark_of(adapter: Path) -> Mark | None:
    """The mark of the residual that an adapter fits alone; None where no receipt speaks of one."""
    said = (find_receipt(adapter) or {}).get("residual")
    if not isinstance(said, dict):
        return None
    texts, shape = [said.get(name) for name in ("label", "tensor", "dtype", "digest")], said.get("shape")
    if not all(isinstance(text, str) for text in texts) or not isinstance(shape, list):
        return None
    label, tensor, dtype, digest = map(str, texts)
    return Mark(label, tensor, dtype, tuple(shape), digest)


def check_base(placement: Placement) -> list[str]:
    """Refuse a base that one of the adapters does not fit; returns warnings where nothing can be told.

    Raises:
        WrongInputError: With the adapter's label.
    """
    warnings = []
    for position, adapter in enumerate(placement.adapters):
        said = mark_of(adapter.path) if placement.weights[position] else None
        if said is not None:
            warnings.append(_check(said, placement, position))
    return [warning for warning in warnings if warning]


def _check(said: Mark, placement: Placement, position: int) -> str | None:
    """Compare the base with the mark of one adapter."""
    adapter, base = placement.adapters[position].label, placement.base.label
    # By the module's name in the adapter: the base may call it otherwise than the residual did.
    places = (
        key
        for key, change in placement.changes.items()
        if any((term.adapter, term.name) == (position, said.module) for term in change.terms)
    )
    key = next(places, None)
    if key is None:
        return f"{adapter}: fits {said.label} alone, and nothing tells if {base} is it: {said.module} is not changed"
    tensor = placement.tensors[key]
    return said.compare(tensor.dtype.name, tensor.shape, lambda: _first_cut(tensor), adapter=adapter, base=base)


def _first_cut(tensor: StoredTensor) -> str:
    begin, end = next(cuts(tensor), (0, 0))
    with tensor.shard.source.open() as reader:
        return span_digest(reader, tensor.offset + begin, end - begin)
