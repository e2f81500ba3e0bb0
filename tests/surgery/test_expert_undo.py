"""Stacks of experts in undo files: what is recorded is recalled, and what cannot have been meant is damage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from kinds import gaussian
from safetensors.torch import save_file

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.expert_deltas import LowRankExperts
from lora_cli.adapters.region import Region
from lora_cli.checkpoint.checkpoint import StoredTensor, open_checkpoint
from lora_cli.checkpoint.manifest import FileRecord, Manifest, TensorRecord, TermRecord
from lora_cli.errors import MalformedFileError
from lora_cli.surgery.edit import Contribution
from lora_cli.surgery.undo.terms import recall, record

SHAPES: Final[dict[str, tuple[int, ...]]] = {
    "pa": (6, 12), "pb": (9, 6), "sa": (3, 2, 12), "sb": (3, 9, 2), "lb": (9, 2, 3), "ta": (3, 12, 2), "tb": (3, 2, 9),
    "one": (1, 2, 12), "vast": (3, 1 << 20, 2),
}  # fmt: skip
FACTORS: Final[dict[Any, tuple[str, str]]] = {
    "packed": ("pa", "pb"), "packed-by-expert": ("pa", "pb"), "stacked": ("sa", "sb"), "stacked-last": ("sa", "lb"),
    "stacked-turned": ("ta", "tb"),
}  # fmt: skip
SCALE: Final = Scale(0.5, None, rslora=False, source="undo file")


@pytest.fixture(name="stored")
def stored_fixture(tmp_path: Path) -> Mapping[str, StoredTensor]:
    save_file({name: gaussian(1, *shape).half() for name, shape in SHAPES.items()}, tmp_path / "f.safetensors")
    return open_checkpoint(tmp_path / "f.safetensors").tensors


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("packing", FACTORS)
def test_what_is_recorded_is_recalled(
    stored: Mapping[str, StoredTensor], packing: Any, side: Any, transposed: bool
) -> None:
    a, b = (stored[name] for name in FACTORS[packing])
    delta = LowRankExperts(a, b, SCALE, packing, 3, side, transposed)
    matrix = (12, 9) if side == "rows" else (9, 12)
    shape = (3, *(matrix[::-1] if transposed else matrix))
    turns = Region((0, 7), matrix[0], ((0, 4, 1),), 2)
    for term in (
        Contribution(0, "key", delta, 1.0, transposed, None, None, None, 3),
        Contribution(0, "key", delta, 1.0, transposed, None, 2, None, None),
        Contribution(0, "key", delta, 1.0, transposed, turns, 1, 4, 6),
    ):
        said = record(term)
        assert (said.kind, said.layout, said.shape) == ("lora-stack", packing, (3, *matrix))
        found = recall(said, "key", shape, lambda number, name: stored[name])
        assert found == term
        assert found.term is not None


def test_a_factor_of_all_is_recalled(stored: Mapping[str, StoredTensor]) -> None:
    delta = LowRankExperts(stored["one"], stored["sb"], SCALE, "stacked", 3, "columns")
    term = Contribution(0, "key", delta, 1.0, False, None, None, None, 3)
    assert recall(record(term), "key", (3, 9, 12), lambda number, name: stored[name]) == term


def said(*tensors: str, layout: str = "packed", shape: tuple[int, ...] = (3, 9, 12), **more: Any) -> TermRecord:
    return TermRecord("lora-stack", 0, tensors, 1.0, layout=layout, shape=shape, **more)


BROKEN: Final = [
    said("pa"),
    said("pa", "pb", "pb"),
    said("pa", "pb", layout="sideways"),
    said("pa", "pb", shape=()),
    said("pa", "pb", shape=(9, 12)),
    said("pa", "pb", shape=(3, 9, 12, 1)),
    said("pa", "pb", shape=(4, 9, 12)),
    said("pa", "pb", shape=(0, 9, 12)),
    said("pa", "pb", shape=(-3, 9, 12)),
    said("pa", "pb", shape=(3, 12, 9)),
    said("pa", "pb", shape=(3, 9, 12), swapped=True),
    said("pa", "sb"),
    said("sa", "pb", layout="stacked"),
    said("sa", "lb", layout="stacked"),
    said("one", "lb", layout="stacked-last"),
    said("one", "sb", layout="stacked", shape=(1, 9, 12)),
    said("sa", "vast", layout="stacked"),
    said("pa", "pb", matrix=3),
    said("pa", "pb", matrix=-1),
    said("pa", "pb", matrix=1, at=5, count=5),
    said("pa", "pb", outputs=(0, 9, 9, 0), rows=((0, 9, 1),)),
    said("pa", "pb", outputs=(0, 9, 9, -1), rows=((0, 9, 1),)),
    said("pa", "pb", outputs=(0, 9, 9, 2), rows=((0, 9, 1),)),
    said("pa", "pb", outputs=(0, 9, 9, 1, 1), rows=((0, 9, 1),)),
    said("pa", "pb", outputs=(0, 9), rows=((0, 9, 1),)),
]


@pytest.mark.parametrize("term", BROKEN, ids=str)
def test_what_cannot_have_been_meant_is_damage(stored: Mapping[str, StoredTensor], term: TermRecord) -> None:
    with pytest.raises(MalformedFileError, match="damaged"):
        recall(term, "key", (3, 9, 12), lambda number, name: stored[name])


def test_such_undo_files_have_the_newest_format() -> None:
    """An older reader would take turns of outputs for all of them."""
    plain = TermRecord("lora", 0, ("a", "b"), 1.0, outputs=(0, 7, 9), rows=((0, 7, 1),))
    turns = TermRecord("lora", 0, ("a", "b"), 1.0, outputs=(0, 7, 9, 2), rows=((0, 4, 1),))
    for term, expected in ((plain, 2), (turns, 3), (said("a", "b"), 3)):
        tensor = TensorRecord("w", "preimages", ("0" * 64,), terms=(term,))
        manifest = Manifest(1, "t", "b", (FileRecord("f", 1, "0" * 64, (tensor,)),), (), ())
        assert manifest.format == expected
