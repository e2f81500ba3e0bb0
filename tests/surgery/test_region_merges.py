"""Changes of parts of a tensor: their sum in float64, a fused change in parts, and layouts that do not show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import read_tensors
from round_trips import gaussian, weights, write_adapter, write_base
from safetensors.torch import save_file
from special_worlds import fused
from torch import Tensor

from lora_cli.adapters.adapter import Scale
from lora_cli.adapters.deltas import LowRank
from lora_cli.adapters.region import Region
from lora_cli.checkpoint.checkpoint import StoredTensor, open_checkpoint
from lora_cli.surgery.changing import Change
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.engine import Workshop
from lora_cli.surgery.merge import merge

OUT, INNER = 36, 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_and_wholes_add_up(tmp_path: Path, dtype: torch.dtype) -> None:
    """Disjoint parts, one over another, the tensor under its own name on top, and outputs that nobody changes."""
    world = fused(tmp_path, dtype, 1)
    merge(world.base, world.adapters, tmp_path / "merged", world.options, undo=False)
    base, found = read_tensors(world.base), read_tensors(tmp_path / "merged")
    tensors = [read_tensors(adapter) for adapter in world.adapters]
    for layer in range(2):
        key = f"encoder.layers.{layer}.attn.Wqkv.weight"
        expected = base[key].double()
        for adapter, weight in zip(tensors, world.options.weights, strict=True):
            for at, name in enumerate("qkv"):
                change = _product(adapter, f"layers.{layer}.self_attn.{name}_proj")
                if change is not None:
                    expected[12 * at : 12 * at + 12] += weight * change
            whole = _product(adapter, f"encoder.layers.{layer}.attn.Wqkv")
            expected += 0 if whole is None else weight * whole
        size = (expected - base[key].double()).abs().max()
        off = (found[key].double() - expected).abs()
        assert bool((off <= expected.abs() * torch.finfo(dtype).eps / 2 + size * 2**-20).all())
    key = "encoder.layers.2.attn.Wqkv.weight"
    same = [torch.equal(*parts) for parts in zip(found[key].split(12), base[key].split(12), strict=True)]
    assert same == [True, False, False]


def _product(tensors: dict[str, Tensor], module: str) -> Tensor | None:
    a, b = (tensors.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
    return None if a is None or b is None else b.double() @ a.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_three_parts_are_one_fused_change(tmp_path: Path, dtype: torch.dtype) -> None:
    """R098: Where the largest entry of each column of B is alike in all three, so are the grids, and so every byte."""
    a, b = gaussian(1, 4, INNER), torch.rand((OUT, 4), generator=torch.Generator().manual_seed(2)) - 0.5
    b[::12] = 0.75
    key = "encoder.layers.0.attn.Wqkv"
    base = write_base(
        tmp_path / "base",
        {f"{key}.weight": gaussian(3, OUT, INNER, dtype=dtype)},
        architectures=["NomicBertModel"],
        model_type="nomic_bert",
    )
    parts: dict[str, Tensor] = {}
    for at, name in enumerate("qkv"):
        module = f"layers.0.self_attn.{name}_proj"
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b[12 * at : 12 * at + 12]}
    three = [
        write_adapter(tmp_path / name, {key: t for key, t in parts.items() if f".{name}_proj" in key}) for name in "qkv"
    ]
    ways = {
        "whole": [write_adapter(tmp_path / "one", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})],
        "parts": [write_adapter(tmp_path / "parts of one", parts)],
        "three": three,
        "back to front": three[::-1],
    }
    for name, adapters in ways.items():
        merge(base, adapters, tmp_path / f"merged {name}", undo=False)
    found = [weights(tmp_path / f"merged {name}") for name in ways]
    assert found[1:] == found[:-1]
    assert found[0] != weights(base)


def test_outputs_in_turn_are_rounded_as_those_side_by_side(tmp_path: Path) -> None:
    """Two changes of every second output have the grids that they have apart."""
    weight = gaussian(1, 12, 11)
    tensors = {"side by side": torch.cat([weight[::2], weight[1::2]]), "in turn": weight}
    for at in range(2):
        tensors |= {f"a{at}": gaussian(10 + at, 2, 11), f"b{at}": gaussian(20 + at, 6, 2) * 10**at}
    stored = store(tmp_path, tensors)
    scale = Scale(0.3, None, rslora=False, source="")
    deltas = [LowRank(stored[f"a{at}"], stored[f"b{at}"], scale) for at in range(2)]
    rows = ((0, 6, 1),)
    places = {
        "side by side": [Region((0, 6), 12, rows), Region((6, 12), 12, rows)],
        "in turn": [Region((0, 11), 12, rows, 2), Region((1, 12), 12, rows, 2)],
    }
    made = {}
    for name, regions in places.items():
        terms = [Contribution(0, "x", delta, 1.0, False, r) for delta, r in zip(deltas, regions, strict=True)]
        made[name] = computed(stored[name], terms, tensors[name])
    assert torch.equal(torch.cat([made["in turn"][::2], made["in turn"][1::2]]), made["side by side"])
    assert not torch.equal(made["in turn"], weight)


def test_which_rows_some_outputs_are() -> None:
    delta = LowRank.__new__(LowRank)
    plain = Contribution(0, "x", delta, 1.0, False, Region((2, 8), 9, ((5, 11, 1),)))
    in_turn = Contribution(0, "x", delta, 1.0, False, Region((1, 8), 9, ((0, 4, 1),), 2))
    assert [list(plain.changed(*part)) for part in ((0, 4), (3, 5), (8, 9))] == [[2, 3], [3, 4], []]
    assert [list(in_turn.changed(*part)) for part in ((0, 4), (2, 6), (4, 5), (8, 9))] == [[1, 3], [3, 5], [], []]
    assert list(plain.rows(range(3, 8, 2))) == [6, 8, 10]
    assert list(in_turn.rows(range(3, 6, 2))) == [1, 2]
    assert list(in_turn.rows(range(3, 8, 4))) == [1, 3]


def test_what_is_alone_may_take_turns(tmp_path: Path) -> None:
    """DoRA on every second output leaves the others to another one."""
    tensors = {"a": gaussian(1, 2, 11), "b": gaussian(2, 6, 2), "m": gaussian(3, 6)}
    stored = store(tmp_path, tensors)
    delta = LowRank(stored["a"], stored["b"], Scale(0.3, None, rslora=False, source=""), magnitude=stored["m"])
    rows = ((0, 6, 1),)
    first, other, same = (Region(outputs, 12, rows, 2) for outputs in ((0, 11), (1, 12), (0, 11)))
    change = Change()
    assert [change.add(Contribution(0, "x", delta, 1.0, False, region)) for region in (first, other)] == [None, None]
    assert change.add(Contribution(1, "x", delta, 1.0, False, same)) is not None


# Both layouts


def store(folder: Path, tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "t.safetensors")
    return dict(open_checkpoint(folder / "t.safetensors").tensors)


def computed(stored: StoredTensor, terms: Sequence[Contribution], like: Tensor) -> Tensor:
    """What the engine makes of a tensor."""
    edit = Edit("x", "add", stored, stored.dtype, stored.shape, 0, stored.nbytes, tuple(terms))
    found = torch.empty(like.numel(), dtype=like.dtype)
    for piece in Workshop(1 << 20).pieces(edit, 0, stored.shape[0]):
        found[piece.offset : piece.offset + piece.result.numel()] = piece.result
    return found.view(like.shape)


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    """Parts of nine outputs: over each other, beside each other or in turn, with rows in any order."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        begin, end = sorted(draw(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True)))
        step = draw(st.integers(1, 3))
        rows = draw(st.permutations(range(9)))[: len(range(begin, end, step))]
        found.append(Region((begin, end), 9, tuple((row, row + 1, 1) for row in rows), step))
    return found


@given(regions(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_how_the_base_stores_it_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, found: list[Region], lengths: bool
) -> None:
    weight = gaussian(1, 9, 11, dtype=torch.bfloat16)
    tensors = {"w": weight, "t": weight.T, "m": gaussian(30, 9)}
    for at in range(len(found)):
        tensors |= {f"a{at}": gaussian(10 + at, 2, 11), f"b{at}": gaussian(20 + at, 9, 2)}
    stored = store(tmp_path_factory.mktemp("region"), tensors)
    magnitude = stored["m"] if len(found) == 1 and lengths else None
    scale = Scale(0.5, None, rslora=False, source="")
    deltas = [LowRank(stored[f"a{at}"], stored[f"b{at}"], scale, magnitude=magnitude) for at in range(len(found))]
    results = []
    for transposed in (False, True):
        both = zip(deltas, found, strict=True)
        terms = [Contribution(0, "x", delta, 1.0, transposed, region) for delta, region in both]
        result = computed(stored["t" if transposed else "w"], terms, weight.T if transposed else weight)
        results.append(result.T if transposed else result)
    assert torch.equal(*results)
    expected = weight.double()
    for at, region in enumerate(found):
        outputs, rows = slice(*region.outputs, region.step), region.indices()
        expected[outputs] += 0.5 * tensors[f"b{at}"].double()[rows] @ tensors[f"a{at}"].double()
        if magnitude:
            lengths_now = expected[outputs].norm(dim=1, keepdim=True)
            expected[outputs] *= tensors["m"].double()[rows].unsqueeze(1) / lengths_now
    assert bool(((results[0].double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-5).all())
