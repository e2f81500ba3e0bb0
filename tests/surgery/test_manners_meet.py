"""Changes of several manners on one tensor: adding, setting lengths, multiplying, turning; in parts, and on experts.

What is done to a part of a fused tensor is what is done to a tensor of its own, or it is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from models import read_tensors
from round_trips import contents, gaussian, lora, write_base
from test_turned_weights import FUSED, WQKV, write_tuned

from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.formula import Formula
from lora_cli.adapters.tuners import METHODS
from lora_cli.errors import LoraCliError, UnsupportedError, UsageError
from lora_cli.surgery.budget import settle_budget
from lora_cli.surgery.changing import deltas_alike
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify

WIDTH: Final = 16
LAYER: Final = "layers.0.self_attn"
Q, V = f"{LAYER}.q_proj", f"{LAYER}.v_proj"

ADDS: Final = (lora(1, Q, WIDTH, WIDTH, rank=2), {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
LENGTHS: Final = (
    ADDS[0] | {f"{Q}.lora_magnitude_vector": 1 + gaussian(5, WIDTH).abs()},
    {**ADDS[1], "use_dora": True},
)
TURNS: Final = ({f"{Q}.hra_u": gaussian(6, WIDTH, 2)}, {"peft_type": "HRA"})
GAINS: Final = ({f"{V}.ia3_l": 1 + gaussian(7, WIDTH, 1)}, {"peft_type": "IA3", "feedforward_modules": []})
OTHER_ADDS: Final = (lora(9, V, WIDTH, WIDTH, rank=2), ADDS[1])

Told = tuple[dict[str, torch.Tensor], dict[str, Any]]


def write(folder: Path, told: Told, **more: Any) -> Path:
    tensors, config = told
    return write_tuned(folder, config["peft_type"], tensors, **{**config, **more})


def bases(folder: Path) -> tuple[Path, Path]:
    """The same weights as one tensor and as three."""
    rows = gaussian(1, 3 * WIDTH, WIDTH)
    fused = write_base(folder / "fused", {f"{WQKV}.weight": rows}, **FUSED)
    parts = {f"{LAYER}.{name}_proj.weight": part.clone() for name, part in zip("qkv", rows.chunk(3), strict=True)}
    return fused, write_base(folder / "split", parts, **FUSED)


def rows_of(merged: Path) -> torch.Tensor:
    tensors = read_tensors(merged)
    if f"{WQKV}.weight" in tensors:
        return tensors[f"{WQKV}.weight"]
    return torch.cat([tensors[f"{LAYER}.{name}_proj.weight"] for name in "qkv"])


@pytest.mark.parametrize(
    ("one", "other"),
    [(LENGTHS, GAINS), (TURNS, GAINS), (TURNS, OTHER_ADDS)],
    ids=["lengths gains", "turns gains", "turns adds"],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["so", "so turned"])
def test_what_does_not_go_together_is_refused(tmp_path: Path, one: Told, other: Told, swapped: bool) -> None:
    fused, split = bases(tmp_path)
    adapters = [write(tmp_path / "one", one), write(tmp_path / "other", other)][:: -1 if swapped else 1]
    with pytest.raises(UnsupportedError, match="merge one after the other"):
        merge(fused, adapters, tmp_path / "out")
    assert merge(split, adapters, tmp_path / "apart").tensors["edited"] == 2


@pytest.mark.parametrize(("one", "other"), [(ADDS, GAINS), (LENGTHS, OTHER_ADDS)], ids=["adds gains", "lengths adds"])
def test_what_goes_together_is_what_it_is_apart(tmp_path: Path, one: Told, other: Told) -> None:
    fused, split = bases(tmp_path)
    adapters = [write(tmp_path / "one", one), write(tmp_path / "other", other)]
    found = []
    for name, base in (("a", fused), ("b", split)):
        merge(base, adapters, tmp_path / name)
        assert verify(tmp_path / name, base, adapters, roundtrip=True).verified
        found.append(rows_of(tmp_path / name))
    assert torch.equal(*found)


@pytest.mark.parametrize("told", [TURNS, ADDS], ids=["turns", "adds"])
def test_rows_beside_a_change_are_replaced(tmp_path: Path, told: Told) -> None:
    """A saved module is other rows of the tensor that is changed."""
    fused, split = bases(tmp_path)
    saved = gaussian(11, WIDTH, WIDTH)
    adapter = write(tmp_path / "a", (told[0] | {f"{V}.weight": saved}, told[1]), modules_to_save=["v_proj"])
    for name, base in (("m", fused), ("n", split)):
        merge(base, [adapter], tmp_path / name)
    assert torch.equal(rows_of(tmp_path / "m"), rows_of(tmp_path / "n"))
    assert torch.equal(rows_of(tmp_path / "m")[2 * WIDTH :], saved)
    unmerge(tmp_path / "m", [adapter], tmp_path / "back")
    assert {**contents(fused)}.items() <= contents(tmp_path / "back").items()


EXPERTS: Final[dict[str, Any]] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
EXPERT: Final = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "told",
    [
        ({f"{EXPERT}.1.gate_proj.ia3_l": 1 + gaussian(3, 6, 1)}, GAINS[1]),
        ({f"{EXPERT}.1.gate_proj.hra_u": gaussian(3, 8, 2)}, TURNS[1]),
        (
            lora(1, f"{EXPERT}.1.gate_proj", 6, 8, rank=2)
            | {f"{EXPERT}.1.gate_proj.lora_magnitude_vector": gaussian(4, 6).abs()},
            LENGTHS[1],
        ),
    ],
    ids=["gains", "turns", "lengths"],
)
def test_single_experts_of_a_stack_only_take_sums(tmp_path: Path, told: Told) -> None:
    stacks = {f"{EXPERT}.gate_up_proj": gaussian(1, 3, 12, 8), f"{EXPERT}.down_proj": gaussian(2, 3, 8, 6)}
    fused = write_base(tmp_path / "fused", stacks, **EXPERTS)
    gate_up, down = stacks.values()
    each = {f"{EXPERT}.{n}.gate_proj.weight": gate_up[n, :6].clone() for n in range(3)}
    each |= {f"{EXPERT}.{n}.up_proj.weight": gate_up[n, 6:].clone() for n in range(3)}
    each |= {f"{EXPERT}.{n}.down_proj.weight": down[n].clone() for n in range(3)}
    apart = write_base(tmp_path / "apart", each, **EXPERTS)
    adapter = write(tmp_path / "a", told)
    with pytest.raises(UnsupportedError, match="single experts"):
        merge(fused, [adapter], tmp_path / "out")
    assert merge(apart, [adapter], tmp_path / "merged").tensors["edited"] == 1


# Which way round


def hira(folder: Path, out: int, inner: int) -> Path:
    tensors = {"m.hira_A": gaussian(1, 2, inner), "m.hira_B": gaussian(2, out, 2)}
    return write_tuned(folder, "HIRA", tensors, r=2)


@pytest.mark.parametrize(("said", "transposed"), [("ba", False), ("ab", True)])
def test_a_square_lies_as_it_is_said(tmp_path: Path, said: Any, transposed: bool) -> None:
    adapter, weight = hira(tmp_path / "a", 8, 8), gaussian(3, 8, 8)
    base = write_base(tmp_path / "base", {"m.weight": weight})
    merge(base, [adapter], tmp_path / "m", PlanOptions(orientation=said))
    gains = 1 + (gaussian(2, 8, 2).double() @ gaussian(1, 2, 8).double())
    expected = weight.double() * (gains.T if transposed else gains)
    assert torch.allclose(read_tensors(tmp_path / "m")["m.weight"].double(), expected, atol=1e-6)
    assert plan_merge(base, [adapter], PlanOptions(orientation=said)).warnings == ()
    assert any("square" in words for words in plan_merge(base, [adapter]).warnings)


def test_a_shape_says_itself_how_it_lies(tmp_path: Path) -> None:
    adapter, weight = hira(tmp_path / "a", 6, 8), gaussian(3, 8, 6)
    base = write_base(tmp_path / "base", {"m.weight": weight})
    merge(base, [adapter], tmp_path / "m")
    gains = 1 + (gaussian(2, 6, 2).double() @ gaussian(1, 2, 8).double())
    assert torch.allclose(read_tensors(tmp_path / "m")["m.weight"].double(), weight.double() * gains.T, atol=1e-6)


# What config fields that all tuners have may say


def test_fields_of_every_tuner_have_their_types(tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", GAINS, modules_to_save=5)
    with pytest.raises(LoraCliError, match="wrong type"):
        merge(bases(tmp_path)[1], [adapter], tmp_path / "out")


# What it takes


def least_memory(base: Path, adapter: Path) -> int:
    """MiB that a merge asks for at least."""
    with pytest.raises(UsageError) as caught:
        settle_budget(plan_merge(base, [adapter]), memory=1, threads=1)
    return int(str(caught.value.expected).removeprefix("--memory ").partition("MiB")[0])


def test_the_tensors_of_a_formula_count(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.weight": gaussian(1, 512, 512)})
    asked = []
    for rank in (1, 64):
        tensors = {f"m.hada_w{side}_a": gaussian(side, 512, rank) for side in (1, 2)}
        tensors |= {f"m.hada_w{side}_b": gaussian(side + 2, rank, 512) for side in (1, 2)}
        adapter = write_tuned(tmp_path / f"rank-{rank}", "LOHA", tensors, r=rank, alpha=1)
        asked.append(least_memory(base, adapter))
    assert asked[1] - asked[0] >= 2 * 64 * 1024 * 8 * 5 >> 20


def test_what_is_read_of_the_base_counts(tmp_path: Path) -> None:
    asked, taken = [], []
    for width in (16, 1024):
        base = write_base(tmp_path / f"base-{width}", {"m.weight": gaussian(1, 512, width)})
        tensors = {"m.deft_P": gaussian(2, 512, 3), "m.deft_R": gaussian(3, 3, width)}
        adapter = write_tuned(tmp_path / f"deft-{width}", "DEFT", tensors)
        asked.append(least_memory(base, adapter))
        (delta,) = (term.delta for edit in plan_merge(base, [adapter]).edits for term in edit.terms)
        assert isinstance(delta, Formula)
        taken.append(delta.working_bytes + 2 * 512 * width * 4)
    assert asked[1] - asked[0] >= taken[1] - taken[0] >> 20


# What is one change


def test_equal_tensors_of_two_formulas_are_two_changes(tmp_path: Path) -> None:
    """As of a table and its head, which turn other sides of what they share."""
    tensors = {"m.oft_R.weight": gaussian(1, 4, 6), "n.oft_R.weight": gaussian(1, 4, 6)}
    write_tuned(tmp_path / "a", "OFT", tensors, oft_block_size=4)
    one, same = (target.delta for target in open_adapter(tmp_path / "a").targets)
    assert isinstance(one, Formula)
    other = next(method for method in METHODS.values() if method.acts == "map" and method.kind != one.kind)
    assert deltas_alike(one, same)
    assert not deltas_alike(one, replace(one, method=other))
    assert not deltas_alike(one, replace(one, settings={**one.settings, "something": 1}))
