"""Tuners that turn, stretch or exchange what is there: on files, in parts of tensors, in pieces, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from models import read_tensors
from round_trips import contents, gaussian, lora, weights, write_adapter, write_base
from torch import Tensor

from lora_cli.adapters.adapter import Parameter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.region import Region
from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.errors import LoraCliError, MalformedFileError, NamesError, NumericError, UnsupportedError, UsageError
from lora_cli.surgery.edit import Contribution, Edit
from lora_cli.surgery.engine import Workshop
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify

Tensors = dict[str, Tensor]
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def write_tuned(folder: Path, kind: str, tensors: Tensors, **config: Any) -> Path:
    """The folder of an adapter of some tuner."""
    said = {"peft_type": kind, "r": None, "lora_alpha": None, "peft_version": "0.21.0"}
    return write_adapter(folder, tensors, **said | config)


def road(module: str, outputs: int, seed: int = 1) -> Tensors:
    return {
        f"{module}.road_theta": gaussian(seed, outputs),
        f"{module}.road_alpha": 1 + gaussian(seed + 1, outputs) * 0.3,
    }


def turned(weight: Tensor, tensors: Tensors, module: str, group: int) -> Tensor:
    """RoAd's second variant by its matrix."""
    angles, lengths = (tensors[f"{module}.road_{name}"].double() for name in ("theta", "alpha"))
    matrix = torch.diag(lengths * angles.cos())
    for row in range(len(angles)):
        half = row % group < group // 2
        partner = row + group // 2 if half else row - group // 2
        matrix[row, partner] = lengths[row] * angles[row].sin() * (-1 if half else 1)
    return matrix @ weight.double()


def deft(module: str, out: int, inner: int, seed: int = 1) -> Tensors:
    return {f"{module}.deft_P": gaussian(seed, out, 3) * 0.4, f"{module}.deft_R": gaussian(seed + 1, 3, inner)}


def exchanged(weight: Tensor, tensors: Tensors, module: str, scale: float = 1.0) -> Tensor:
    p, r = (tensors[f"{module}.deft_{name}"].double() for name in "PR")
    return weight.double() + p @ (scale * r - p.relu().T @ weight.double())


def assert_rounded(found: Tensor, expected: Tensor, spare: float = 1e-9) -> None:
    """A number is the expected one, rounded once."""
    spacing = expected.abs() * torch.finfo(found.dtype).eps / 2 + 1e-7 * (found.dtype == torch.float16)
    assert bool(((found.double() - expected).abs() <= spacing * 1.001 + spare).all())


def assert_goes_back(base: Path, adapters: list[Path], folder: Path) -> Path:
    """Merge, verify, and take it out again, bit for bit."""
    merged, back = folder / "merged", folder / "back"
    merge(base, adapters, merged)
    assert verify(merged, base, adapters, roundtrip=True).verified
    unmerge(merged, adapters, back)
    assert weights(back) == weights(base) != weights(merged)
    return merged


# In parts of tensors

FUSED: Final[dict[str, Any]] = {"architectures": ["NomicBertModel"], "model_type": "nomic_bert"}
WQKV: Final = "encoder.layers.0.attn.Wqkv"


def fused(folder: Path, dtype: torch.dtype) -> Path:
    tensors = {
        f"{WQKV}.weight": gaussian(1, 36, 14, dtype=dtype),
        f"{WQKV}.bias": gaussian(2, 36, dtype=dtype),
        "encoder.layers.0.attn.out_proj.weight": gaussian(3, 14, 12, dtype=dtype),
    }
    return write_base(folder / "base", tensors, **FUSED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_begin_where_the_part_does(tmp_path: Path, dtype: torch.dtype) -> None:
    """Twelve outputs of each: groups of four neither begin at the tensor's own fours nor end with its blocks."""
    base, names = fused(tmp_path, dtype), {name: f"layers.0.self_attn.{name}_proj" for name in "qv"}
    tensors = road(names["q"], 12) | road(names["v"], 12, 5)
    adapter = write_tuned(tmp_path / "adapter", "ROAD", tensors, variant="road_2", group_size=6)
    merged = read_tensors(assert_goes_back(base, [adapter], tmp_path))
    for kind in ("weight", "bias"):
        before, found = read_tensors(base)[f"{WQKV}.{kind}"].split(12), merged[f"{WQKV}.{kind}"].split(12)
        for at, name in ((0, "q"), (2, "v")):
            assert_rounded(found[at], turned(before[at], tensors, names[name], 6))
        assert torch.equal(found[1], before[1])


def test_a_part_is_computed_from_itself_alone(tmp_path: Path) -> None:
    base, name = fused(tmp_path, torch.float32), "layers.0.self_attn.k_proj"
    tensors = deft(name, 12, 14)
    adapter = write_tuned(tmp_path / "adapter", "DEFT", tensors, alpha=6)
    merged = read_tensors(assert_goes_back(base, [adapter], tmp_path))[f"{WQKV}.weight"]
    before = read_tensors(base)[f"{WQKV}.weight"]
    assert_rounded(merged[12:24], exchanged(before[12:24], tensors, name, 6 / 3))
    assert torch.equal(merged[:12], before[:12])
    assert torch.equal(merged[24:], before[24:])


def test_a_bias_is_computed_from_its_own_part_of_a_weight(tmp_path: Path) -> None:
    base, name = fused(tmp_path, torch.float32), "layers.0.self_attn.v_proj"
    tensors = {f"{name}.glora_C.X": gaussian(7, 14, 1), f"{name}.glora_D.X": gaussian(8, 12)}
    tensors |= {f"{name}.glora_{path}.zeros": torch.zeros(12, 14) for path in "AB"}
    adapter = write_tuned(tmp_path / "adapter", "GLORA", tensors, config_A_B="none", config_C="vector")
    found = read_tensors(assert_goes_back(base, [adapter], tmp_path))
    weight, bias = (read_tensors(base)[f"{WQKV}.{kind}"][24:].double() for kind in ("weight", "bias"))
    column, gains = (tensors[f"{name}.glora_{path}.X"].double() for path in "CD")
    assert_rounded(found[f"{WQKV}.bias"][24:], bias + bias * gains + (weight @ column).view(-1))
    assert torch.equal(found[f"{WQKV}.weight"], read_tensors(base)[f"{WQKV}.weight"])
    ledger = merge(base, [adapter], tmp_path / "again", undo=False).ledger
    assert (ledger["applied"], ledger["ignored"]) == (2, 2)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_is_stored_in_parts_is_seen_whole(tmp_path: Path, first: torch.dtype) -> None:
    """Also where the parts are of two types."""
    kind: dict[str, Any] = {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl"}
    keys = [f"language_model.model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    parts = [gaussian(at, 21, 10, dtype=dtype) for at, dtype in enumerate((first, torch.float32))]
    base = write_base(tmp_path / "base", dict(zip(keys, parts, strict=True)), **kind)
    name = "model.language_model.layers.0.mlp.gate_up_proj"
    tensors = deft(name, 42, 10)
    adapter = write_tuned(tmp_path / "adapter", "DEFT", tensors)
    found, before = read_tensors(assert_goes_back(base, [adapter], tmp_path)), read_tensors(base)
    expected = exchanged(torch.cat([before[key] for key in keys]), tensors, name)
    for key, part in zip(keys, expected.split(21), strict=True):
        assert_rounded(found[key], part)


# In pieces


def large(folder: Path) -> tuple[Path, list[Path]]:
    """A module for each tuner, of more than a block, and a bias."""
    out, inner = 1080, 1030
    tensors = {f"{name}.weight": gaussian(at, out, inner, std=0.02) for at, name in enumerate("abcdef")}
    tensors |= {f"{name}.bias": gaussian(10, out) for name in "bf"}
    adapters: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "OFT": ({"a.oft_R.weight": gaussian(1, 103, 45) * 0.1}, {}),
        "ROAD": (road("b", out), {"variant": "road_2", "group_size": 360}),
        "HRA": ({"c.hra_u": gaussian(2, inner, 5)}, {}),
        "DEFT": (deft("d", out, inner), {}),
        "HIRA": ({"e.hira_A": gaussian(3, 4, inner) * 0.5, "e.hira_B": gaussian(4, out, 4)}, {}),
        "GLORA": ({"f.glora_A.X": gaussian(5, out, 1), "f.glora_C.X": gaussian(6, inner, 1)}, {}),
    }
    base = write_base(folder / "base", tensors)
    return base, [write_tuned(folder / kind, kind, tensors, **said) for kind, (tensors, said) in adapters.items()]


def test_bytes_depend_on_neither_memory_nor_workers(tmp_path: Path) -> None:
    base, adapters = large(tmp_path)
    merge(base, adapters, tmp_path / "one", threads=1)
    merge(base, adapters, tmp_path / "three", threads=3, memory=600 << 20)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    with pytest.raises(UsageError, match="memory budget") as refused:
        merge(base, adapters, tmp_path / "none", memory=1 << 20)
    least = int(str(refused.value.expected).split()[1].removesuffix("MiB")) << 20
    assert verify(tmp_path / "one", base, adapters, roundtrip=True, threads=2, memory=least).verified
    unmerge(tmp_path / "one", adapters, tmp_path / "back", memory=least)
    assert weights(tmp_path / "back") == weights(base)


@pytest.mark.parametrize(("first", "step"), [(0, 1), (5, 1), (3, 2), (1, 3)])
def test_groups_come_together_wherever_blocks_end(tmp_path: Path, first: int, step: int) -> None:
    """Rows are so long that thirteen are a block; the part begins within one, and may be every second or third row."""
    tensors = road("m", 12)
    adapter = open_adapter(write_tuned(tmp_path / "adapter", "ROAD", tensors, variant="road_2", group_size=6))
    weight = gaussian(3, 41, 20000)
    base = write_base(tmp_path / "base", {"m.weight": weight})
    stored = open_checkpoint(base).tensors["m.weight"]
    target = next(target for target in adapter.targets if target.parameter == "weight")
    delta = target.delta.on(Parameter((12, 20000), False, False, {}))
    outputs = slice(first, first + 11 * step + 1, step)
    region = Region((outputs.start, outputs.stop), 41, ((0, 12, 1),), step)
    term = Contribution(0, "m", delta, 1.0, False, region)
    edit = Edit("m.weight", "add", stored, stored.dtype, stored.shape, 0, stored.nbytes, (term,))
    found = torch.cat([piece.result.clone() for piece in Workshop(4 << 20).pieces(edit, 0, 41)]).view(41, 20000)
    expected = weight.double()
    expected[outputs] = turned(weight[outputs], tensors, "m", 6)
    assert_rounded(found, expected)


# Gains


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gains_of_every_size_are_undone(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of HiRA 1 + B·A: zero, negative, tiny, huge; and the base has zeros of both signs."""
    gains = torch.tensor([0.0, 1.0, -1.0, 2.0**-20, -3.0, 700.0, 1 + 2.0**-9, 1 - 2.0**-9])
    weight = gaussian(1, 64, 8).to(dtype)
    weight[:2] = torch.tensor([0.0, -0.0]).repeat(4).to(dtype)
    base = write_base(tmp_path / "base", {"m.weight": weight, "n.weight": gaussian(2, 8, 8).to(dtype)})
    hira = {"m.hira_A": (gains - 1).view(1, 8), "m.hira_B": torch.ones(64, 1)}
    ia3 = {"n.ia3_l": gains.view(8, 1)}
    adapters = [
        write_tuned(tmp_path / "hira", "HIRA", hira),
        write_tuned(tmp_path / "ia3", "IA3", ia3, feedforward_modules=[]),
    ]
    found = read_tensors(assert_goes_back(base, adapters, tmp_path))
    assert_rounded(found["m.weight"], weight.double() * gains.double())
    assert_rounded(found["n.weight"], read_tensors(base)["n.weight"].double() * gains.double().view(8, 1))


# What cannot be


def one_module(folder: Path, kind: str, tensors: Tensors, **config: Any) -> tuple[Path, Path]:
    base = write_base(folder / "base", {"m.weight": gaussian(1, 12, 16), "m.bias": gaussian(2, 12)})
    return base, write_tuned(folder / "adapter", kind, tensors, **config)


OFT: Final = {"m.oft_R.weight": gaussian(1, 4, 6) * 0.3}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (PlanOptions(read=ReadOptions(scale=0.5)), UsageError),
        (PlanOptions(read=ReadOptions(alpha=8)), UsageError),
        (PlanOptions(weights=(0.5,)), UnsupportedError),
    ],
)
def test_what_is_turned_has_no_strength(tmp_path: Path, options: PlanOptions, kind: type[LoraCliError]) -> None:
    base, adapter = one_module(tmp_path, "OFT", OFT)
    with pytest.raises(kind):
        merge(base, [adapter], tmp_path / "merged", options)
    assert not (tmp_path / "merged").exists()


def test_nothing_is_added_along_with_a_turn(tmp_path: Path) -> None:
    base, adapter = one_module(tmp_path, "OFT", OFT)
    other = write_adapter(tmp_path / "other", lora(1, "m", 12, 16))
    with pytest.raises(UnsupportedError) as refused:
        merge(base, [adapter, other], tmp_path / "merged")
    assert "one after the other" in str(refused.value)


def test_what_is_computed_from_the_base_adds_up_in_any_order(tmp_path: Path) -> None:
    base, adapter = one_module(tmp_path, "DEFT", deft("m", 12, 16))
    other = write_adapter(tmp_path / "other", lora(1, "m", 12, 16))
    merge(base, [adapter, other], tmp_path / "one", undo=False)
    merge(base, [other, adapter], tmp_path / "two", undo=False)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    merge(base, [adapter, other], tmp_path / "half", PlanOptions(weights=(0.5, 0.0)), undo=False)
    before, tensors = read_tensors(base)["m.weight"].double(), deft("m", 12, 16)
    assert_rounded(read_tensors(tmp_path / "half")["m.weight"], (before + exchanged(before, tensors, "m")) / 2)


def test_no_subtraction_takes_back_what_was_computed_from_the_base(tmp_path: Path) -> None:
    base, adapter = one_module(tmp_path, "DEFT", deft("m", 12, 16))
    merge(base, [adapter], tmp_path / "merged", undo=False)
    with pytest.raises(UnsupportedError, match="DEFT"):
        unmerge(tmp_path / "merged", [adapter], tmp_path / "back", approximate=True)


def test_a_bias_whose_weight_is_not_there_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.bias": gaussian(2, 12), "n.weight": gaussian(1, 3, 3)})
    tensors = {"m.glora_C.X": gaussian(3, 16, 1), "m.glora_E.X": gaussian(4, 12)}
    adapter = write_tuned(tmp_path / "adapter", "GLORA", tensors)
    for options in (PlanOptions(), PlanOptions(allow_unmapped=True)):
        with pytest.raises(NamesError) as refused:
            merge(base, [adapter], tmp_path / "merged", options)
        assert "m.weight" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"use_cayley_neumann": "yes"}, MalformedFileError),
        ({"num_cayley_neumann_terms": 5.5}, MalformedFileError),
        ({"num_cayley_neumann_terms": 65}, LoraCliError),
        ({"coft": True, "eps": -1.0}, LoraCliError),
        ({"eps": "6e-5"}, MalformedFileError),
        ({"turns": 2}, UnsupportedError),
    ],
)
def test_fields_of_oft_that_make_no_sense(tmp_path: Path, config: dict[str, Any], kind: type[LoraCliError]) -> None:
    base, adapter = one_module(tmp_path, "OFT", OFT, **config)
    with pytest.raises(kind):
        merge(base, [adapter], tmp_path / "merged")


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.17.1", True), ("0.18.0", False), ("0.21.2.dev0@abc", False), ("1.0", False), (None, True), ("?", True)],
)
def test_the_version_says_how_the_last_term_counts(tmp_path: Path, version: str | None, old: bool) -> None:
    base, adapter = one_module(tmp_path, "OFT", OFT, peft_version=version)
    merge(base, [adapter], tmp_path / "merged", undo=False)
    found, before = read_tensors(tmp_path / "merged")["m.weight"], read_tensors(base)["m.weight"].double()
    turns = []
    for numbers in OFT["m.oft_R.weight"].double():
        skew = torch.zeros(4, 4, dtype=torch.float64)
        skew[tuple(torch.triu_indices(4, 4, 1))] = numbers
        skew = skew - skew.T
        powers = [torch.linalg.matrix_power(skew, power) for power in range(5)]
        turns.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + (2 if old else 1) * powers[4])
    assert_rounded(found, before @ torch.block_diag(*turns).T)


def test_a_kernel_of_ia3_needs_the_config(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.weight": gaussian(1, 8, 8, 3, 3)})
    adapter = write_tuned(tmp_path / "adapter", "IA3", {"m.ia3_l": gaussian(2, 1, 8, 1, 1)})
    with pytest.raises(MalformedFileError, match="inputs"):
        merge(base, [adapter], tmp_path / "merged")


@pytest.mark.parametrize(("said", "inputs"), [(["m"], True), (["x.m"], False), ("deep.+m", True), ("deep", False)])
def test_an_ending_or_a_pattern_names_what_is_fed_forward(tmp_path: Path, said: list[str] | str, inputs: bool) -> None:
    base = write_base(tmp_path / "base", {"deeper.m.weight": gaussian(1, 8, 8, 3, 3)})
    gains = gaussian(2, 1, 8, 1, 1)
    adapter = write_tuned(tmp_path / "adapter", "IA3", {"deeper.m.ia3_l": gains}, feedforward_modules=said)
    merge(base, [adapter], tmp_path / "merged", undo=False)
    before = read_tensors(base)["deeper.m.weight"].double()
    expected = before * (gains if inputs else gains.transpose(0, 1)).double()
    assert_rounded(read_tensors(tmp_path / "merged")["deeper.m.weight"], expected)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(tmp_path: Path, number: float) -> None:
    wrong = OFT["m.oft_R.weight"].clone()
    wrong[1, 2] = number
    base, adapter = one_module(tmp_path, "OFT", {"m.oft_R.weight": wrong})
    with pytest.raises(NumericError):
        merge(base, [adapter], tmp_path / "merged")
