"""How adapters of experts are shown, and what `--expert-layout` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_world import ROOT, Call, call_fixture  # noqa: F401 (fixture)
from safetensors.numpy import load_file, save_file
from tiny import Array, numbers, write_adapter, write_base, write_json

NAME = "layers.0.experts"
A, B = numbers(8, 6, seed=1), numbers(6, 8, seed=2)
Square = tuple[Path, Path]


@pytest.fixture(name="square")
def square_fixture(tmp_path: Path) -> Square:
    """A base with square experts of no known architecture, and an adapter that names no version."""
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"{NAME}.up_proj": numbers(4, 6, 6)}, base)
    named = {f"base_model.model.{NAME}.lora_{side}.weight": factor for side, factor in (("A", A), ("B", B))}
    save_file(named, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.up_proj"]}
    write_json(adapter / "adapter_config.json", said)
    return base, adapter


def expected(layout: str) -> Array:
    a, b = A.astype(np.float64).reshape(4, 2, 6), B.astype(np.float64)
    stacked = b.reshape(6, 4, 2).transpose(1, 0, 2) if "slowest" in layout else b.reshape(6, 2, 4).transpose(2, 0, 1)
    delta = stacked @ a
    return numbers(4, 6, 6) + (delta.transpose(0, 2, 1) if "rows" in layout else delta)


@pytest.mark.parametrize("layout", ["rows", "columns", "rows-slowest", "slowest-columns", "columns-fastest"])
def test_a_layout_that_is_said(call: Call, square: Square, tmp_path: Path, layout: str) -> None:
    base, adapter = square
    out = tmp_path / "out.safetensors"
    ran = call("merge", base, adapter, "-o", out, "--expert-layout", layout)
    assert ran.code == 0, ran.err
    side, order = ("rows" if "rows" in layout else "columns"), ("slowest" if "slowest" in layout else "fastest")
    shown = " ".join((ran.out + ran.err).split())
    assert f"experts 1 stack: in B the expert is {order}; A meets {side} (--expert-layout)" in shown
    np.testing.assert_allclose(load_file(out)[f"{NAME}.up_proj"], expected(layout), rtol=1e-6)
    receipt = json.loads((tmp_path / "out.lora_merge.json").read_text())
    assert receipt["options"]["expert_layout"] == "-".join(
        sorted(layout.split("-"), key=["rows", "columns"].count)[::-1]
    )
    (used,) = receipt["adapters"][0]["layouts"]
    assert used["modules"] == 1
    assert side in used["layout"]
    for command in (
        ("verify", out, "--base", base, "--adapter", adapter),
        ("unmerge", out, adapter, "-o", tmp_path / "back.safetensors", "--approximate"),
    ):
        assert call(*command, "--expert-layout", layout).code == 0
        assert call(*command).code == 12
    ran = call("unmerge", out, adapter, "-o", tmp_path / "base.back.safetensors")
    assert ran.code == 0, ran.err
    assert (tmp_path / "base.back.safetensors").read_bytes() == base.read_bytes()


def test_squares_that_nothing_decides(call: Call, square: Square, tmp_path: Path) -> None:
    base, adapter = square
    ran = call("merge", base, adapter, "-o", tmp_path / "out.safetensors")
    assert ran.code == 12
    said = "try: --expert-layout rows (PEFT up to 0.18) or columns (PEFT from 0.19.1 on, except"
    assert said in " ".join(ran.err.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_a_look_at_squares_that_nothing_decides(call: Call, square: Square) -> None:
    base, adapter = square
    shown = " ".join(call("inspect", adapter, "--base", base).out.split())
    assert "try: --expert-layout rows (PEFT up to 0.18)" in shown
    assert "base 1 of 1 name found" in shown
    assert "a base tells" not in shown


def test_other_stacks_of_the_adapter_decide_of_squares(call: Call, square: Square, tmp_path: Path) -> None:
    """What their shapes say; not where they say two things."""
    base, adapter = square
    tensors, factors = load_file(base), load_file(adapter / "adapter_model.safetensors")

    def said(*sides: str) -> str:
        for number, side in enumerate(sides):
            name = f"layers.{number}.more"
            tensors[f"{name}.down_proj"] = numbers(4, 6, 9)
            met, given = (9, 6) if side == "columns" else (6, 9)
            named = f"base_model.model.{name}"
            factors[f"{named}.lora_A.weight"] = numbers(8, met, seed=3)
            factors[f"{named}.lora_B.weight"] = numbers(given, 8, seed=4)
        save_file(tensors, base)
        save_file(factors, adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        both = ["more.down_proj", "experts.up_proj"]
        write_json(adapter / "adapter_config.json", config | {"target_parameters": both})
        ran = call("inspect", adapter, "--base", base)
        return " ".join((ran.out + ran.err).split())

    assert "A meets columns (as of layers.0.more.down_proj, by its shape)" in said("columns")
    assert "A meets rows (as of layers.0.more.down_proj, by its shape)" in said("rows")
    assert "the experts are square" in said("rows", "columns")


def test_a_layout_that_concerns_nothing(call: Call, tmp_path: Path) -> None:
    adapter, base = write_adapter(tmp_path / "a"), write_base(tmp_path / "base")
    words = "--expert-layout rows concerns nothing"
    for command in (("inspect", adapter), ("merge", base, adapter, "-o", tmp_path / "out", "--dry-run")):
        assert words in " ".join(call(*command, "--expert-layout", "rows").err.split())
        assert "concerns nothing" not in call(*command).err


def test_squares_of_two_versions_are_not_compared(call: Call, square: Square, tmp_path: Path) -> None:
    _, adapter = square
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for folder, version in ((adapter, "0.18.0"), (other, "0.21.2")):
        write_json(folder / "adapter_config.json", config | {"peft_version": version})
    (change,) = call("diff", adapter, other, "--json").document["changed"]
    assert (change["key"], change["what"]) == (f"{NAME}.up_proj.side", "setting")
    assert (change["before"], change["after"]) == ("as in PEFT up to 0.18", "as in PEFT from 0.19.1 on")
    assert call("diff", adapter, other, "--expert-layout", "rows").code == 0


def test_words_that_are_none(call: Call, square: Square, tmp_path: Path) -> None:
    ran = call("merge", *square, "-o", tmp_path / "out.safetensors", "--expert-layout", "sideways", "--json")
    assert ran.code == 2
    assert ran.document["code"] == "usage"
    assert ran.document["found"] == "sideways"


def test_what_an_adapter_of_experts_is(call: Call, square: Square) -> None:
    base, adapter = square
    shown = " ".join(call("inspect", adapter).out.split())
    assert "experts 1 stack: in B the expert is fastest; a base tells which side A meets" in shown
    ran = call("inspect", adapter, "--base", base, "--expert-layout", "rows", "--json")
    assert ran.code == 0, ran.err
    (layout,) = ran.document["layouts"]
    assert layout == {"layout": "in B the expert is fastest; A meets rows (--expert-layout)", "modules": 1}
    (module,) = ran.document["modules"]
    assert (module["key"], module["rank"], module["shape"]) == (f"{NAME}.up_proj", 2, [6, 6])


def test_adapters_of_experts_are_compared(call: Call, square: Square, tmp_path: Path) -> None:
    """Packed in the one way, and in the other."""
    _, adapter = square
    other = tmp_path / "other"
    other.mkdir()
    named = load_file(adapter / "adapter_model.safetensors")
    grouped = np.ascontiguousarray(B.reshape(6, 2, 4).transpose(0, 2, 1).reshape(6, 8))
    save_file(named | {f"base_model.model.{NAME}.lora_B.weight": grouped}, other / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(other / "adapter_config.json", config)
    assert call("diff", adapter, other).code == 1
    write_json(other / "adapter_config.json", config | {"lora_B_layout": "grouped_by_expert"})
    assert call("diff", adapter, other).code == 0


def test_experts_that_lie_apart_are_told_in_one_line(call: Call, tmp_path: Path) -> None:
    """Each is changed whole; and the card says how the factors were read."""
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{number}.{part}_proj.weight" for number in range(4) for part in ("gate", "up", "down")]
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
    base = write_base(tmp_path / "apart", {name: numbers(6, 6) for name in names}, config=config)
    made = {"A": numbers(8, 6), "B": numbers(12, 8)}
    factors = {f"base_model.model.{experts}.lora_{side}.weight": factor for side, factor in made.items()}
    adapter = write_adapter(tmp_path / "a", factors, r=2, target_parameters=["mlp.experts.gate_up_proj"])
    ran = call("inspect", adapter, "--base", base)
    shown = " ".join(ran.out.split())
    assert f"8 tensors, {experts}.0-3.gate_proj/up_proj.weight" in shown, ran.out
    assert "[0:" not in ran.out
    ran = call("merge", base, adapter, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "parts" not in ran.out
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "in B the expert is fastest; A meets columns (by its shape) (1)" in card
