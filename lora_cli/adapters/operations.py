"""What transformers does to the tensors of a checkpoint when it loads them, followed by rows instead of numbers.

Each operation is done to descriptions: which outputs of which stored tensors lie where. So a parameter that a model
cuts out of a stored tensor, or puts together from some, is a list of places. (transformers, `core_model_loading.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lora_cli.adapters.region import Place, Region, Run

EXPERTS = {"MergeModulelist", "SplitModulelist", "ErnieFuseAndSplitTextVisionExperts"}
"""Operations that put the experts of a layer, stored one by one, into one tensor."""


class NoPlaceError(Exception):
    """An operation after which a parameter is not some outputs of stored tensors; the text says what it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs of one stored tensor, one after the other, and where they are in a tensor that is being made.

    Attributes:
        key: The stored tensor.
        shape: Its shape.
        begin: The first of the outputs.
        rows: Where each lies in what is being made.
        turned: Whether rows and columns have changed places.
    """

    key: str
    shape: tuple[int, ...]
    begin: int
    rows: tuple[Run, ...]
    turned: bool = False

    @property
    def count(self) -> int:
        """How many outputs."""
        return sum(len(range(*run)) for run in self.rows)


Pieces = tuple[Piece, ...]


def stored(key: str, shape: tuple[int, ...]) -> Pieces:
    """A tensor as it is stored."""
    return (Piece(key, shape, 0, ((0, shape[0] if shape else 0, 1),)),)


def placed(pieces: Pieces) -> tuple[Place, ...]:
    """Where a tensor that is made of these lies."""
    first = pieces[0]
    rows = first.shape[0] if first.shape else 0
    if len(pieces) == 1 and (first.begin, first.rows) == (0, ((0, rows, 1),)):
        return (Place(first.key, None, first.turned),)
    if any(piece.turned for piece in pieces):
        raise NoPlaceError("the base stores its columns")
    regions = (Region((p.begin, p.begin + p.count), p.shape[0], p.rows) for p in pieces)
    return tuple(Place(piece.key, region) for piece, region in zip(pieces, regions, strict=True))


def followed(
    operations: Sequence[tuple[str, Mapping[str, Any]]],
    tensors: Mapping[str, Sequence[Pieces]],
    targets: Sequence[str],
    config: Mapping[str, Any],
) -> dict[str, Pieces]:
    """Do some operations to what is stored.

    Args:
        operations: Names and arguments, in order.
        tensors: Pattern → the stored tensors that it found.
        targets: Patterns of what comes out.
        config: The model's.

    Returns:
        Target → what it is made of.

    Raises:
        NoPlaceError: A target is not made of outputs.
    """
    current = {pattern: tuple(found) for pattern, found in tensors.items()}
    for name, arguments in operations:
        if name == "Concatenate" and arguments.get("dim", 0) == 0:
            current = {targets[0]: (_joined(piece for found in current.values() for piece in found),)}
        elif name == "Chunk" and arguments.get("dim", 0) == 0:
            current = {target: (cut,) for target, cut in zip(targets, _cut(_only(current), len(targets)), strict=True)}
        elif name == "PermuteForRope":
            wanted = arguments.get("permute_layer_names")
            current = {
                key: (_rotary(found, arguments, config),) if not wanted or any(w in key for w in wanted) else found
                for key, found in current.items()
            }
        elif name == "Interleave" and arguments.get("dim", 0) == 0:
            inverse = arguments.get("inverse", False)
            current = {key: (_dealt(_plain(found), 1, inverse=inverse),) for key, found in current.items()}
        elif name == "Transpose" and not arguments.get("check_dims") and _is_matrix(_only(current)):
            current = {targets[0]: (tuple(replace(piece, turned=not piece.turned) for piece in _only(current)),)}
        else:
            raise NoPlaceError(f"the base stores it in another form ({name})")
    if len(current) == 1 and len(targets) == 1:
        current = {targets[0]: next(iter(current.values()))}
    return {target: _only({target: current[target]}) for target in targets}


def _only(tensors: Mapping[str, Sequence[Pieces]]) -> Pieces:
    found = [pieces for several in tensors.values() for pieces in several]
    if len(found) != 1:
        raise NoPlaceError("the base stores several tensors for it")
    return found[0]


def _is_matrix(pieces: Pieces) -> bool:
    return len(pieces) == 1 and len(pieces[0].shape) == 2


def _joined(tensors: Iterable[Pieces]) -> Pieces:
    made: list[Piece] = []
    rows = 0
    for pieces in tensors:
        made += [replace(p, rows=tuple((a + rows, b + rows, step) for a, b, step in p.rows)) for p in pieces]
        rows += sum(piece.count for piece in pieces)
    return tuple(made)


def _plain(tensors: Sequence[Pieces]) -> Piece:
    """The only piece, where it is one run of outputs."""
    pieces = _only({"": tensors})
    if len(pieces) != 1 or len(pieces[0].rows) != 1 or pieces[0].rows[0][2] != 1 or not pieces[0].shape:
        raise NoPlaceError("the base stores its rows in turn with those of another one")
    return pieces[0]


def _cut(pieces: Pieces, number: int) -> list[Pieces]:
    """Equal parts, the last of them maybe smaller, as `torch.chunk` gives them."""
    piece = _plain((pieces,))
    size = -(-piece.count // number)
    cuts = [min(size * position, piece.count) for position in range(number + 1)]
    if cuts[-2] == cuts[-1]:
        raise NoPlaceError(f"the base stores {piece.count} rows for {number} of its kind")
    return [(replace(piece, begin=piece.begin + a, rows=((0, b - a, 1),)),) for a, b in pairwise(cuts)]


def _rotary(tensors: Sequence[Pieces], arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Pieces:
    """Rows of each head in the order of rotary embeddings by halves, from that by pairs."""
    inner = config.get(arguments.get("subconfig_key") or "", config)
    heads = inner.get("num_attention_heads") if isinstance(inner, dict) else None
    piece = _plain(tensors)
    if type(heads) is not int or heads < 1 or piece.count % (2 * heads):
        raise NoPlaceError("the base's config does not say how many heads its rows are of")
    return _dealt(piece, heads, inverse=arguments.get("inverse", False))


def _dealt(piece: Piece, groups: int, *, inverse: bool) -> Pieces:
    """Rows that lie in pairs, the first ones of all pairs before the second ones, within each group; or back."""
    size, left = divmod(piece.count, groups)
    if size % 2 or left:
        raise NoPlaceError(f"the base stores {piece.count} rows for pairs")
    half = size // 2
    runs: list[Run] = []
    for start in range(0, piece.count, size):
        if inverse:
            runs += [(start, start + size, 2), (start + 1, start + size, 2)]
        else:
            runs += [(start + i, start + size, half) for i in range(half)]
    return (replace(piece, rows=tuple(runs)),)
