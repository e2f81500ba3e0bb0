"""What an undo file says of each kind of delta, and what it cannot have meant."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import gaussian
from safetensors.torch import save_file

from lora_cli.adapters.adapter import Delta, Scale
from lora_cli.adapters.deltas import LowRank, LowRankBias, LowRankBlocks, LowRankKernel, LowRankStack
from lora_cli.adapters.formula import Formula, Setting
from lora_cli.adapters.region import Region
from lora_cli.adapters.tuners import METHODS
from lora_cli.checkpoint.checkpoint import StoredTensor, open_checkpoint
from lora_cli.checkpoint.manifest import TermRecord
from lora_cli.errors import MalformedFileError, UnsupportedError
from lora_cli.surgery.edit import Contribution
from lora_cli.surgery.undo.terms import recall, record

SHAPES: dict[str, tuple[int, ...]] = {
    "a": (2, 12), "b": (9, 2), "at": (12, 2), "bt": (2, 9), "bias": (9,),
    "ka": (2, 4, 3), "kb": (9, 2, 1), "kc": (9, 2, 3), "kt": (1, 2, 9),
    "sa": (3, 12, 2), "sb": (3, 2, 9), "sc": (4, 2, 9),
    "a0": (0, 12), "b0": (1 << 40, 0), "at0": (12, 0), "bt0": (0, 1 << 40), "bias0": (0,),
    "gain": (9, 1), "few": (4,), "da": (6, 4), "db": (9, 6), "ea": (6, 12), "eb": (9, 2),
}  # fmt: skip


VERA: dict[str, Setting] = {"rank": 4, "inputs": 12, "outputs": 9}


@pytest.fixture(name="stored")
def stored_fixture(tmp_path: Path) -> Mapping[str, StoredTensor]:
    tensors = {name: gaussian(at, *shape) for at, (name, shape) in enumerate(SHAPES.items())}
    places = {"ids": gaussian(1, 2, 12).int(), "places": torch.zeros(2, 4, dtype=torch.int64)}
    save_file(tensors | places, tmp_path / "f.safetensors")
    return open_checkpoint(tmp_path / "f.safetensors").tensors


def test_what_is_recorded_is_recalled(stored: Mapping[str, StoredTensor]) -> None:
    scale = Scale(0.5, None, rslora=False, source="undo file")
    s = stored
    deltas: list[tuple[Delta, bool]] = [
        (LowRank(s["a"], s["b"], scale), False),
        (LowRank(s["at"], s["bt"], scale, True), True),
        (LowRank(s["a"], s["b"], scale, kind="lora-embedding"), True),
        (LowRank(s["at"], s["bt"], scale, True, "lora-embedding"), True),
        (LowRankKernel(s["ka"], s["kb"], scale), False),
        (LowRankKernel(s["ka"], s["b"], scale), False),
        (LowRankKernel(s["ka"], s["bt"], scale, True), False),
        (LowRankStack(s["sa"], s["sb"], scale), True),
        (LowRankBias(s["bias"], scale), False),
        (LowRankBlocks(s["da"], s["db"], scale, "lora-blocks-a", 3), False),
        (LowRankBlocks(s["ea"], s["eb"], scale, "lora-blocks-b", 3), True),
    ]
    for delta, transposed in deltas:
        found = recall(record(Contribution(3, "m", delta, 1.0, transposed)), "key", (9,), lambda number, name: s[name])
        assert found == Contribution(3, "key", delta, 1.0, transposed, count=delta.stack)


FORMULAS: list[tuple[str, dict[str, str], dict[str, Setting], tuple[int, ...]]] = [
    ("loha", {"hada_w1_a": "b", "hada_w1_b": "a", "hada_w2_a": "eb", "hada_w2_b": "a"}, {}, (9, 12)),
    ("ia3", {"ia3_l": "gain"}, {"inputs": False}, (9, 4, 3)),
    ("shira", {"shira_weight": "few", "shira_indices": "places"}, {}, (9, 12)),
    ("vera-drawn", {"vera_lambda_b": "bias", "vera_lambda_d": "few"}, {**VERA, "seed": -3}, (9, 12)),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kind", "parts", "settings", "shape"), FORMULAS, ids=lambda one: str(one)[:9])
def test_formulas_are_recalled(
    stored: Mapping[str, StoredTensor],
    kind: str,
    parts: dict[str, str],
    settings: dict[str, Setting],
    shape: tuple[int, ...],
    transposed: bool,
) -> None:
    scale = Scale(0.5, None, rslora=False, source="undo file")
    tensors = {part: stored[name] for part, name in parts.items()}
    formula = Formula(METHODS[kind], tensors, scale, settings, shape, transposed)
    for term in (
        Contribution(1, "key", formula, 1.0, transposed),
        Contribution(1, "key", formula, 1.0, transposed, Region((0, 9), 20, ((0, 5, 1),), 2), None, 2, 3),
    ):
        said = record(term)
        assert (said.parts, said.settings, said.shape) == (tuple(parts), settings, shape)
        assert recall(said, "key", (3, 20, 20), lambda number, name: stored[name]) == term


def test_parts_of_outputs_are_recalled(stored: Mapping[str, StoredTensor]) -> None:
    """And lengths are not: what they came to is kept apart."""
    scale = Scale(0.5, None, rslora=False, source="undo file")
    for region in (Region((3, 12), 20, ((0, 9, 1),)), Region((0, 4), 5, ((8, 0, -2),)), None):
        lengthened = LowRank(stored["a"], stored["b"], scale, magnitude=stored["bias"])
        recorded = record(Contribution(3, "m", lengthened, 1.0, False, region))
        assert recorded.tensors == (stored["a"].key, stored["b"].key)
        found = recall(recorded, "key", (20, 12), lambda number, name: stored[name])
        assert found == Contribution(3, "key", LowRank(stored["a"], stored["b"], scale), 1.0, False, region)


def said(kind: str, *tensors: str, **more: Any) -> TermRecord:
    return TermRecord(kind, 0, tensors, 1.0, **more)


BROKEN = [
    said("lora", "a"),
    said("lora", "a", "bt"),
    said("lora", "a", "b", swapped=True),
    said("lora", "ka", "kb"),
    said("lora", "ids", "b"),
    said("lora", "a0", "b0"),
    said("lora", "a0", "b0", outputs=(0, 1 << 40, 1 << 40), rows=((0, 1 << 40, 1),)),
    said("lora", "at0", "bt0", swapped=True),
    said("lora-embedding", "a0", "b0"),
    said("lora-embedding", "a", "bt"),
    said("lora-embedding", "a", "b", "b"),
    said("lora-conv", "ka"),
    said("lora-conv", "ka", "kc"),
    said("lora-conv", "ka", "bt"),
    said("lora-conv", "ka", "kb", swapped=True),
    said("lora-conv", "ka", "kt", swapped=True),
    said("lora-conv", "a", "b"),
    said("lora-stack", "sa"),
    said("lora-stack", "sa", "sc"),
    said("lora-stack", "ka", "kb"),
    said("lora-blocks-a", "da", "db", blocks=0),
    said("lora-blocks-a", "da", "db", blocks=4),
    said("lora-blocks-a", "da", "eb", blocks=3),
    said("lora-blocks-a", "da", blocks=3),
    said("lora-blocks-b", "ea", "eb", blocks=2),
    said("lora-blocks-b", "ea", "db", blocks=3),
    said("lora-blocks-b", "ka", "kb", blocks=1),
    said("lora-bias", "b"),
    said("lora-bias", "bias", "bias"),
    said("lora-bias", "bias0"),
    said("deft", "b", "a", parts=("deft_P", "deft_R"), settings={"by": "relu"}, shape=(9, 12)),
    said("hra", "at", parts=("hra_u",), shape=(9, 12)),
    said("ia3", "gain", parts=("ia3_l",), shape=(9, 1 << 40), outputs=(0, 9, 9), rows=((0, 9, 1),)),
]


@pytest.mark.parametrize("term", BROKEN, ids=lambda term: f"{term.kind} {' '.join(term.tensors)}")
def test_factors_of_another_kind_are_damage(stored: Mapping[str, StoredTensor], term: TermRecord) -> None:
    with pytest.raises(MalformedFileError, match="damaged"):
        recall(term, "key", (9, 12), lambda number, name: stored[name])


PARTS = [
    ((0, 9, 13), ((0, 9, 1),)),
    ((0, 9, 12), ((0, 10, 1),)),
    ((0, 9, 12), ((-1, 8, 1),)),
    ((0, 9, 12), ((7, -2, -1),)),
    ((0, 1 << 40, 1 << 40), ((0, 1 << 40, 1),)),
]


@pytest.mark.parametrize(("outputs", "rows"), PARTS)
def test_parts_that_are_not_there_are_damage(stored: Mapping[str, StoredTensor], outputs: Any, rows: Any) -> None:
    with pytest.raises(MalformedFileError, match="damaged"):
        recall(said("lora", "a", "b", outputs=outputs, rows=rows), "key", (9, 12), lambda number, name: stored[name])


def test_rows_are_looked_at_without_a_list_of_them(tmp_path: Path) -> None:
    many = 1 << 22
    save_file({"a": gaussian(1, 1, 1), "b": gaussian(2, many, 1).half()}, tmp_path / "f.safetensors")
    stored = open_checkpoint(tmp_path / "f.safetensors").tensors
    term = said("lora", "a", "b", outputs=(0, many, many), rows=((many - 1, -1, -1),))
    tracemalloc.start()
    try:
        assert recall(term, "key", (many, 1), lambda number, name: stored[name]).region
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_kind_that_is_not_known_is_refused(stored: Mapping[str, StoredTensor]) -> None:
    with pytest.raises(UnsupportedError, match="not known here") as caught:
        recall(said("nothing-known", "a", "b"), "key", (9, 12), lambda number, name: stored[name])
    assert caught.value.found == "nothing-known"


@pytest.mark.parametrize(("delta", "transposed", "fits", "fails"), [
    (lambda s, scale: LowRank(s["a"], s["b"], scale), False, [(9, 12), (9, 4, 3), (9, 12, 1)], [(12, 9), (108,)]),
    (lambda s, scale: LowRank(s["a"], s["b"], scale), True, [(12, 9), (12, 3, 3)], [(9, 12), ()]),
    (lambda s, scale: LowRankKernel(s["ka"], s["kb"], scale), False, [(9, 4, 3)], [(9, 12, 3), (4, 9, 3)]),
    (lambda s, scale: LowRankStack(s["sa"], s["sb"], scale), True, [(3, 12, 9)], [(3, 9, 12), (36, 9), (3, 108)]),
    (lambda s, scale: LowRankBias(s["bias"], scale), False, [(9,)], [(10,), ()]),
    (lambda s, scale: LowRankBlocks(s["da"], s["db"], scale, "lora-blocks-a", 3), False, [(9, 12)], [(9, 4), (12, 9)]),
    (lambda s, scale: LowRankBlocks(s["ea"], s["eb"], scale, "lora-blocks-b", 3), True, [(12, 9)], [(9, 12)]),
])  # fmt: skip
def test_a_delta_covers_tensors_of_its_shape(
    stored: Mapping[str, StoredTensor], delta: Any, transposed: bool, fits: list[Any], fails: list[Any]
) -> None:
    made = delta(stored, Scale(1.0, None, False, ""))
    term = Contribution(0, "m", made, 1.0, transposed, count=made.stack)
    assert all(term.covers(shape) for shape in fits)
    assert not any(term.covers(shape) for shape in fails)
