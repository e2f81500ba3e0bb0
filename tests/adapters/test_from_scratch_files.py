"""Files of factors that are no plain matrices: what is read from shapes and names, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import Array, numbers, write_adapter

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.errors import NamesError, ShapeError, UnsupportedError
from lora_cli.surgery.inspect import inspect, is_adapter

Shape = tuple[int, ...]
SAID = ReadOptions(scale=0.5)


def opened(folder: Path, a: Shape, b: Shape, names: tuple[str, str] = ("m.lora_A", "m.lora_B")) -> Adapter:
    save_file({names[0]: numbers(*a), names[1]: numbers(*b)}, folder / "f.safetensors")
    return open_adapter(folder / "f.safetensors", SAID)


@pytest.mark.parametrize(("a", "b", "rank", "stored"), [
    ((4, 5, 3, 2), (4, 9), 4, (9, 5, 3, 2)),
    ((4, 5, 3, 2), (9, 4), 4, (9, 5, 3, 2)),
    ((4, 5, 3, 2), (4, 4), 4, (4, 5, 3, 2)),
    ((4, 5, 3, 2), (9, 4, 1, 1), 4, (9, 5, 3, 2)),
    ((4, 5, 3, 2), (4, 4, 1, 1), 4, (4, 5, 3, 2)),
    ((4, 5, 3), (9, 4, 1), 4, (9, 5, 3)),
    ((4, 5, 3, 2, 2), (9, 4, 1, 1, 1), 4, (9, 5, 3, 2, 2)),
    ((4, 5, 1, 1), (9, 4, 1, 1), 4, (9, 5, 1, 1)),
])  # fmt: skip
def test_kernels(tmp_path: Path, a: Shape, b: Shape, rank: int, stored: Shape) -> None:
    (target,) = opened(tmp_path, a, b).targets
    assert (target.delta.kind, target.delta.rank, target.delta.stack) == ("lora-conv", rank, None)
    assert target.delta.shape == (stored[0], int(np.prod(stored[1:])))
    assert target.delta.stored == {False: stored}


@pytest.mark.parametrize(("a", "b"), [
    ((4, 5, 3, 2), (9, 3)),
    ((4, 5, 3, 2), (9, 4, 2, 1)),
    ((4, 5, 3, 2), (9, 4, 1)),
    ((4, 5, 3, 2), (9, 2, 1, 1)),
    ((4, 5, 3, 2), (4,)),
    ((4, 5, 0, 2), (9, 4, 1, 1)),
    ((9, 4), (9, 4, 1, 1)),
    ((2, 8, 3), (2, 4, 12)),
])  # fmt: skip
def test_shapes_that_are_no_kernels(tmp_path: Path, a: Shape, b: Shape) -> None:
    with pytest.raises(ShapeError, match="share no rank"):
        opened(tmp_path, a, b)


@pytest.mark.parametrize("ending", ["", ".default"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_table_by_its_name_lies_in_one_way(tmp_path: Path, swapped: bool, ending: str) -> None:
    names = (f"base_model.model.m.lora_embedding_A{ending}", f"base_model.model.m.lora_embedding_B{ending}")
    shapes: tuple[Shape, Shape] = ((30, 2), (2, 8)) if swapped else ((2, 30), (8, 2))
    (target,) = opened(tmp_path, *shapes, names).targets
    assert (target.name, target.delta.kind, target.delta.stored) == ("m.weight", "lora-embedding", {True: (30, 8)})


def test_what_is_no_factor_is_whole(tmp_path: Path) -> None:
    tensors = {"lora_model.m.lora_A": numbers(8, 2), "lora_model.m.lora_B": numbers(2, 12)}
    tensors |= {"lora_model.m.bias": numbers(12), "base_model.model.n.weight": numbers(3, 3)}
    save_file(tensors, tmp_path / "f.safetensors")
    adapter = open_adapter(tmp_path / "f.safetensors", SAID)
    assert sorted(replacement.name for replacement in adapter.replacements) == ["lora_model.m.bias", "n.weight"]
    assert {r.reason for r in adapter.replacements} == {"in the file whole"}
    assert not any(replacement.may_be_new for replacement in adapter.replacements)
    assert (adapter.stored, adapter.unread) == (4, ())


# PEFT folders


def peft(folder: Path, **tensors: Array) -> Adapter:
    write_adapter(folder, {f"base_model.model.m.{name}": tensor for name, tensor in tensors.items()})
    return open_adapter(folder)


def test_kernels_and_tables_of_peft(tmp_path: Path) -> None:
    adapter = peft(tmp_path / "e", lora_embedding_A=numbers(2, 30), lora_embedding_B=numbers(8, 2))
    (target,) = adapter.targets
    assert (target.name, target.delta.kind, target.delta.stored) == ("m.weight", "lora-embedding", {True: (30, 8)})
    factors = {"lora_A.weight": numbers(2, 5, 3), "lora_B.weight": numbers(9, 2, 1), "lora_B.bias": numbers(9)}
    kernel, bias = peft(tmp_path / "c", **factors).targets
    assert (kernel.delta.kind, kernel.delta.stored) == ("lora-conv", {False: (9, 5, 3)})
    assert (bias.name, bias.delta.kind, bias.delta.stored) == ("m.bias", "lora-bias", {False: (9,)})


@pytest.mark.parametrize(("a", "b", "kind", "words"), [
    ((2, 5, 3), (9, 1, 1), ShapeError, "2 groups"),
    ((2, 5, 3), (9, 3, 1), ShapeError, "A is [2, 5, 3], B is [9, 3, 1]"),
    ((3, 2, 8), (3, 12, 3), ShapeError, "A is [3, 2, 8]"),
    ((2, 8, 3), (12, 2), UnsupportedError, "A is [2, 8, 3]"),
    ((3, 5, 3), (9, 3, 1), ShapeError, "rank 3, r says 2"),
])  # fmt: skip
def test_what_peft_would_not_multiply(tmp_path: Path, a: Shape, b: Shape, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        peft(tmp_path / "a", **{"lora_A.weight": numbers(*a), "lora_B.weight": numbers(*b)})
    (line,) = caught.value.details  # type: ignore[attr-defined]
    assert words in line


@pytest.mark.parametrize("name", ["lora_embedding_A", "lora_embedding_B"])
def test_half_a_table(tmp_path: Path, name: str) -> None:
    with pytest.raises(NamesError, match="no partner"):
        peft(tmp_path / "a", **{name: numbers(2, 2)})


# What inspect takes them for


@pytest.mark.parametrize(("names", "adapter"), [
    (("lora_model.m.lora_A", "lora_model.m.lora_B"), True),
    (("m.lora_embedding_A", "m.lora_embedding_B"), True),
    (("m.A", "m.B", "m.bias"), True),
    (("l.m.lora_A", "l.m.lora_B", "l.m.bias", "l.n.bias", "l.norm.weight"), True),
    (("m.weight", "m.lora_A", "m.lora_B", "m.bias", "n.weight"), False),
    (("m.A", "m.B", "m.bias", "n.bias", "norm.weight"), False),
    (("m.parametrizations.weight.0.A", "m.parametrizations.weight.0.B", "m.parametrizations.weight.original"), False),
    (("m.base.weight", "m.lora_A.weight", "m.lora_B.weight"), False),
])  # fmt: skip
def test_an_adapter_is_told_from_a_checkpoint(tmp_path: Path, names: tuple[str, ...], adapter: bool) -> None:
    save_file({name: numbers(2, 2) for name in names}, tmp_path / "f.safetensors")
    assert is_adapter(tmp_path / "f.safetensors") == adapter


def test_inspect_names_what_carries_factors(tmp_path: Path) -> None:
    tensors = {"x.base.weight": numbers(5, 4), "x.lora_A.weight": numbers(2, 4), "x.lora_B.weight": numbers(5, 2)}
    for name, shape in {"original": (6, 4), "0.A": (2, 4), "0.B": (6, 2)}.items():
        tensors |= {f"y.parametrizations.weight.{name}": numbers(*shape)}
        tensors |= {f"z.parametrizations.in_proj.{name}": numbers(*shape)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert inspect(tmp_path / "w.safetensors").wrapped == ("x", "y", "z.in_proj")
    assert len(open_checkpoint(tmp_path / "w.safetensors").tensors) == 9


def test_inspect_shows_kinds_and_what_is_whole(tmp_path: Path) -> None:
    tensors = {"c.lora_A": numbers(2, 5, 3), "c.lora_B": numbers(2, 9), "c.bias": numbers(9)}
    save_file(tensors, tmp_path / "f.safetensors")
    found = inspect(tmp_path / "f.safetensors")
    assert {module.module: module.kind for module in found.modules} == {
        "c": "lora-conv",
        "c.bias": "whole tensor (in the file whole)",
    }
    assert len(found.warnings) == 1  # that nothing says how strong it is
