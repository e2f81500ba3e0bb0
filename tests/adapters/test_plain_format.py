"""Plain safetensors files of factors: every spelling, both layouts, and a scale that is said or asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import Array, numbers, write_base, write_json

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import (
    LoraCliError,
    MalformedFileError,
    MissingScaleError,
    NamesError,
    NumericError,
    ShapeError,
    UnsupportedError,
    UsageError,
)
from lora_cli.surgery.merge import plan_merge
from lora_cli.surgery.placing import PlanOptions

OUT, IN, RANK = 12, 8, 3
SAID = ReadOptions(scale=0.5)


def pair(a: str, b: str, *, swapped: bool = False) -> dict[str, Array]:
    """Two factors under these names, as PEFT lays them out or the other way round."""
    left, right = numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2)
    return {a: np.ascontiguousarray(left.T), b: np.ascontiguousarray(right.T)} if swapped else {a: left, b: right}


def opened(
    folder: Path,
    tensors: Mapping[str, Array] | None = None,
    options: ReadOptions = SAID,
    *,
    config: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Adapter:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors or pair("m.q.lora_A.weight", "m.q.lora_B.weight")), folder / "f.safetensors", metadata)
    if config is not None:
        write_json(folder / "adapter_config.json", config)
    return open_adapter(folder / "f.safetensors", options)


# Names


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
@pytest.mark.parametrize("letter", ["lora_", ""])
def test_spellings(tmp_path: Path, letter: str, ending: str, prefix: str) -> None:
    a, b = f"{prefix}m.q.{letter}A{ending}", f"{prefix}m.q.{letter}B{ending}"
    adapter = opened(tmp_path, pair(a, b))
    (target,) = adapter.targets
    assert (target.name, target.delta.rank, target.delta.shape) == ("m.q.weight", RANK, (OUT, IN))
    assert [tensor.key for tensor in target.delta.tensors] == [a, b]
    assert (adapter.format, adapter.unread, adapter.replacements) == ("plain", (), ())
    assert "2 tensors" in adapter.evidence


def test_spellings_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    adapter = opened(tmp_path, pair("m.q.A", "m.q.lora_B.weight") | pair("m.A.A", "m.A.B"))
    assert sorted(target.module for target in adapter.targets) == ["m.A", "m.q"]


@pytest.mark.parametrize(
    "name", ["A", ".A", "m.q.a", "m.q.lora_C.weight", "m.q.lora_A.bias", "m.qA", "m.q.lora_A.x.weight"]
)
def test_other_names_are_no_factors(tmp_path: Path, name: str) -> None:
    tensors = pair("m.k.A", "m.k.B") | {name: numbers(RANK, IN)}
    adapter = opened(tmp_path, tensors)
    assert [target.module for target in adapter.targets] == ["m.k"]
    assert [replacement.name for replacement in adapter.replacements] == [name]


@pytest.mark.parametrize(("twice", "other"), [("m.q.A", "m.q.lora_A.weight"), ("m.q.lora_B", "base_model.model.m.q.B")])
def test_two_tensors_for_one_factor(tmp_path: Path, twice: str, other: str) -> None:
    with pytest.raises(NamesError) as caught:
        opened(tmp_path, {twice: numbers(2, 2), other: numbers(2, 2)})
    assert twice in str(caught.value.found)
    assert other in str(caught.value.found)


def test_orphans_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(NamesError) as caught:
        opened(tmp_path, pair("m.q.A", "m.q.B") | {"m.k.A": numbers(2, 2), "m.v.lora_B.weight": numbers(2, 2)})
    assert caught.value.file == "f.safetensors"
    assert sorted(caught.value.details) == ["m.k.A has no B", "m.v.lora_B.weight has no A"]


# Layouts


@pytest.mark.parametrize("swapped", [False, True])
def test_both_layouts_are_the_same_change(tmp_path: Path, swapped: bool) -> None:
    (target,) = opened(tmp_path, pair("m.q.A", "m.q.B", swapped=swapped)).targets
    assert (target.delta.rank, target.delta.shape) == (RANK, (OUT, IN))


@pytest.mark.parametrize(("a", "b", "rank", "shape"), [
    ((3, 8), (12, 3), 3, (12, 8)),
    ((8, 3), (3, 12), 3, (12, 8)),
    # Where both dimensions are shared, the smaller one is the rank.
    ((3, 8), (8, 3), 3, (8, 8)),
    ((8, 3), (3, 8), 3, (8, 8)),
    ((4, 4), (4, 4), 4, (4, 4)),
    ((1, 1), (1, 1), 1, (1, 1)),
])  # fmt: skip
def test_rank_and_shape(
    tmp_path: Path, a: tuple[int, int], b: tuple[int, int], rank: int, shape: tuple[int, int]
) -> None:
    (target,) = opened(tmp_path, {"m.A": numbers(*a), "m.B": numbers(*b)}).targets
    assert (target.delta.rank, target.delta.shape) == (rank, shape)


BAD_SHAPES = {
    "no rank shared": ((3, 8), (12, 4)),
    "a vector": ((8,), (12, 1)),
    "a scalar": ((), (3, 3)),
    "a stack of no rank": ((2, 3, 8), (2, 12, 4)),
    "rank 0": ((0, 8), (12, 0)),
    "nothing out": ((3, 8), (0, 3)),
}


def test_shapes_that_are_no_factors_are_all_named(tmp_path: Path) -> None:
    tensors = pair("fine.A", "fine.B")
    for name, (a, b) in BAD_SHAPES.items():
        tensors |= {f"{name}.A": numbers(*a), f"{name}.B": numbers(*b)}
    with pytest.raises(ShapeError) as caught:
        opened(tmp_path, tensors)
    assert sorted(caught.value.details) == sorted(
        f"{name}: A is {list(a)}, B is {list(b)}" for name, (a, b) in BAD_SHAPES.items()
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("stored", [(OUT, IN), (IN, OUT)])
def test_the_base_decides_how_it_is_stored(tmp_path: Path, stored: tuple[int, int], swapped: bool) -> None:
    base = write_base(tmp_path / "base", {"m.q.weight": numbers(*stored)}, shards=1)
    opened(tmp_path, pair("m.q.A", "m.q.B", swapped=swapped))
    (edit,) = plan_merge(base, [tmp_path / "f.safetensors"], PlanOptions(read=SAID)).edits
    assert [term.transposed for term in edit.terms] == [stored == (IN, OUT)]


@pytest.mark.parametrize(("said", "transposed"), [("ba", False), ("ab", True), (None, None)])
def test_a_square_base_decides_nothing(tmp_path: Path, said: Any, transposed: bool | None) -> None:
    base = write_base(tmp_path / "base", {"q.weight": numbers(6, 6)}, shards=1, config={})
    opened(tmp_path, {"q.A": numbers(2, 6), "q.B": numbers(6, 2)})
    options = PlanOptions(read=SAID, orientation=said)
    if transposed is None:
        with pytest.raises(ShapeError) as caught:
            plan_merge(base, [tmp_path / "f.safetensors"], options)
        assert "--orientation" in caught.value.details[0]
        return
    (edit,) = plan_merge(base, [tmp_path / "f.safetensors"], options).edits
    assert [term.transposed for term in edit.terms] == [transposed]


# Scale

SCALES: dict[str, tuple[ReadOptions, dict[str, Any] | None, dict[str, str] | None, float, str]] = {
    "--scale": (ReadOptions(scale=0.7), {"lora_alpha": 9}, {"alpha": "9"}, 0.7, "--scale"),
    "--alpha": (ReadOptions(alpha=6), {"lora_alpha": 9}, {"alpha": "9"}, 2.0, "--alpha / rank of the factors"),
    "config": (ReadOptions(), {"lora_alpha": 6}, {"alpha": "6.0"}, 2.0, "lora_alpha of adapter_config.json"),
    "config scale": (ReadOptions(), {"scale": 20}, None, 20.0, "scale of adapter_config.json"),
    "config rslora": (ReadOptions(), {"lora_alpha": 6, "use_rslora": True}, None, 6 / math.sqrt(3), "lora_alpha of"),
    "metadata": (ReadOptions(), None, {"alpha": "6", "rank": "3"}, 2.0, "alpha of header metadata"),
    "metadata scale": (ReadOptions(), None, {"scale": "-0.5", "format": "pt"}, -0.5, "scale of header metadata"),
    "metadata rslora": (ReadOptions(), None, {"alpha": "6", "use_rslora": "true"}, 6 / math.sqrt(3), "alpha of"),
    "config without a scale": (ReadOptions(), {"r": 3}, {"lora_alpha": "6"}, 2.0, "lora_alpha of header metadata"),
}


@pytest.mark.parametrize(("options", "config", "metadata", "scale", "source"), SCALES.values(), ids=SCALES)
def test_where_the_scale_comes_from(
    tmp_path: Path,
    options: ReadOptions,
    config: dict[str, Any] | None,
    metadata: dict[str, str] | None,
    scale: float,
    source: str,
) -> None:
    (target,) = opened(tmp_path, options=options, config=config, metadata=metadata).targets
    assert math.isclose(target.delta.scale.times(), scale, rel_tol=2**-52)
    assert target.delta.scale.source.startswith(source)


DISAGREEING: list[tuple[dict[str, Any] | None, dict[str, str] | None]] = [
    ({"lora_alpha": 6}, {"alpha": "9"}),
    ({"lora_alpha": 6, "alpha": 9}, None),
    (None, {"scale": "2", "scaling": "3"}),
    (None, {"alpha": "6", "scale": "2"}),
    ({"scale": 2}, {"alpha": "6"}),
]


@pytest.mark.parametrize(("config", "metadata"), DISAGREEING, ids=str)
def test_fields_that_disagree_about_the_scale(
    tmp_path: Path, config: dict[str, Any] | None, metadata: dict[str, str] | None
) -> None:
    """R087: two readers of such a file would apply it at two strengths."""
    with pytest.raises(MalformedFileError, match="Two fields say how strong") as caught:
        opened(tmp_path, options=ReadOptions(), config=config, metadata=metadata)
    fields = [*(config or {}), *(metadata or {})]
    assert all(field in str(caught.value.found) for field in fields)
    (target,) = opened(tmp_path, options=ReadOptions(alpha=6), config=config, metadata=metadata).targets
    assert target.delta.scale.times() == 2


@pytest.mark.parametrize(("config", "metadata"), [(None, None), ({}, {}), ({"r": 3, "alpha": None}, {"format": "pt"})])
def test_a_scale_is_never_assumed(
    tmp_path: Path, config: dict[str, Any] | None, metadata: dict[str, str] | None
) -> None:
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, options=ReadOptions(), config=config, metadata=metadata)
    assert caught.value.exit_code == 2
    assert "--alpha" in str(caught.value.hint)
    assert "--scale" in str(caught.value.hint)


BAD_SCALES: list[tuple[dict[str, Any] | None, dict[str, str] | None, type[LoraCliError]]] = [
    ({"alpha": "six"}, None, MalformedFileError),
    ({"alpha": [6]}, None, MalformedFileError),
    ({"scale": {}}, None, MalformedFileError),
    ({"alpha": 10**400}, None, MalformedFileError),
    ({"alpha": True}, None, MalformedFileError),
    (None, {"alpha": "nan"}, MalformedFileError),
    (None, {"scale": "inf"}, MalformedFileError),
    (None, {"alpha": ""}, MalformedFileError),
    (None, {"alpha": "1e30"}, MalformedFileError),
    (None, {"alpha": "0"}, NumericError),
    (None, {"scale": "-0.0"}, NumericError),
    ({"alpha": 6, "r": 4}, None, ShapeError),
    (None, {"alpha": "6", "rank": "2"}, ShapeError),
    ({"alpha": 6, "r": "three"}, None, MalformedFileError),
]


@pytest.mark.parametrize(("config", "metadata", "error"), BAD_SCALES, ids=lambda value: str(value)[:40])
def test_a_scale_that_is_no_number(
    tmp_path: Path, config: dict[str, Any] | None, metadata: dict[str, str] | None, error: type[LoraCliError]
) -> None:
    with pytest.raises(error) as caught:
        opened(tmp_path, options=ReadOptions(), config=config, metadata=metadata)
    assert type(caught.value) is error
    assert caught.value.tensor in {*(config or {}), *(metadata or {})}
    assert caught.value.file == ("adapter_config.json" if config else "header metadata")


# What is no factor


def test_a_tensor_without_a_meaning_is_not_dropped(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.q.weight": numbers(OUT, IN)}, shards=1)
    opened(tmp_path, pair("m.q.A", "m.q.B") | {"m.q.alpha": numbers(), "m.k.weight": numbers(2, 2)})
    with pytest.raises(NamesError) as caught:
        plan_merge(base, [tmp_path / "f.safetensors"], PlanOptions(read=SAID))
    assert [line.split(" ")[0] for line in caught.value.details] == ["m.k.weight", "m.q.alpha"]
    plan = plan_merge(base, [tmp_path / "f.safetensors"], PlanOptions(read=SAID, allow_unmapped=True))
    assert {entry.tensor for entry in plan.ledger if entry.outcome == "ignored"} == {"m.q.alpha", "m.k.weight"}
    assert plan.ledger_counts() == {"applied": 2, "replaced": 0, "added": 0, "ignored": 2}


FOREIGN = {"lora_unet_x.lora_down.weight": "kohya", "m.lora_down.weight": "kohya", "m.hada_w1_a": "LoHa"}
FOREIGN |= {"m.lokr_w1": "LoKr", "m.q.lora_a": "MLX", "m.q.weight": "No known"}


@pytest.mark.parametrize(("name", "words"), FOREIGN.items())
def test_a_foreign_format_is_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        opened(tmp_path, {name: numbers(2, 2)})
    assert name in str(caught.value.found)


def test_a_folder_without_its_config_is_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(pair("m.q.lora_A.weight", "m.q.lora_B.weight"), folder / "adapter_model.safetensors")
    with pytest.raises(MissingScaleError, match=r"the folder has no adapter_config\.json") as caught:
        open_adapter(folder)
    assert caught.value.hint == "get its adapter_config.json, or give --alpha A (scale is alpha / rank) or --scale S"
    with pytest.raises(MissingScaleError) as caught:
        open_adapter(folder / "adapter_model.safetensors")
    assert "adapter_config.json" not in str(caught.value)
