"""Pairs of factors: what every LoRA format collects while it reads names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_cli.checkpoint.checkpoint import StoredTensor
from lora_cli.errors import NamesError

INCOMPLETE = "the adapter file is incomplete"
"""What can be said to a person whose file lacks a tensor."""


@dataclass(slots=True)
class Pair:
    """Two factors of one module, as far as they were found."""

    a: StoredTensor | None = None
    b: StoredTensor | None = None

    def put(self, side: str, tensor: StoredTensor) -> None:
        """Store factor `A` or `B`.

        Raises:
            NamesError: The file has two of them.
        """
        present = self.a if side == "A" else self.b
        if present is not None:
            raise NamesError(
                "Two tensors are the same factor",
                file=tensor.shard.name,
                tensor=tensor.key,
                found=f"{present.key} and {tensor.key}",
            )
        if side == "A":
            self.a = tensor
        else:
            self.b = tensor

    @property
    def both(self) -> tuple[StoredTensor, StoredTensor]:
        """A and B of a complete pair."""
        if self.a is None or self.b is None:
            raise AssertionError("check_pairs comes first")
        return self.a, self.b


def check_pairs(pairs: Mapping[str, Pair], file: str) -> None:
    """Refuse factors without a partner.

    Raises:
        NamesError: With every orphan.
    """
    orphans = [
        f"{(pair.a or pair.b).key} has no {'B' if pair.a else 'A'}"  # type: ignore[union-attr]
        for pair in pairs.values()
        if pair.a is None or pair.b is None
    ]
    if orphans:
        raise NamesError(
            f"{len(orphans)} factors have no partner" if len(orphans) > 1 else "A factor has no partner",
            file=file,
            details=orphans,
            hint=INCOMPLETE,
        )
