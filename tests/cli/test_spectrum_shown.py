"""`inspect --spectrum`: bars, words and numbers against the factors in the file, and its JSON against the schema."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from cli_world import ROOT, Call, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from rich.console import Console
from safetensors.numpy import save_file
from tiny import ALPHA, MODULES, PREFIX, RANK, Array, adapter_tensors, numbers, write_adapter, write_base

from lora_cli.cli.draw import Bars
from lora_cli.cli.spectrum import view
from lora_cli.surgery.spectrum import AdapterSpectrum, ModuleSpectrum

SCHEMA = json.loads((ROOT / "docs" / "schemas" / "inspect.json").read_text("utf-8"))


def factors_of(name: str, values: list[float], width: int = 24) -> dict[str, Array]:
    """Factors whose product has these singular values for the scale 1."""
    rank = len(values)
    left, right = (np.linalg.qr(numbers(width, rank, seed=seed))[0] for seed in (5, 6))
    b = (left * np.array(values)).astype(np.float32)
    return {f"{PREFIX}{name}.lora_A.weight": np.ascontiguousarray(right.T), f"{PREFIX}{name}.lora_B.weight": b}


def adapter_of(folder: Path, modules: Mapping[str, list[float]]) -> Path:
    tensors = {key: tensor for name, values in modules.items() for key, tensor in factors_of(name, values).items()}
    ranks = {name: len(values) for name, values in modules.items()}
    return write_adapter(folder, tensors, r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks)


def row_of(out: str, name: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    return line.split()


def summary_of(out: str) -> str:
    """The words above the table, as they were before they were folded."""
    return " ".join(" ".join(takewhile(lambda line: not line.startswith("module"), out.splitlines())).split())


# Bars


@pytest.mark.parametrize(
    ("values", "blocks", "ascii_only"),
    [
        ([8.0, 4.0, 2.0, 1.0, 0.0], "█▄▂▁ ", "@=:. "),
        ([1.0, 0.51, 0.01, 1e-9, 1e-13], "█▅▁▁ ", "@+.. "),
        ([3e-300, 3e-300], "██", "@@"),
        ([0.0, 0.0], "", ""),
        ([], "", ""),
        ([float(16 - at) for at in range(16)], "██▇▇▆▆▅▅▄▄▃▃▂▂▁▁", "@@##**++==--::.."),
        ([4.0, *[2.0] * 31], "▆" + "▄" * 15, "*" + "=" * 15),
        ([8.0] * 16 + [1.0], "█" * 15 + "▅", "@" * 15 + "+"),
    ],
)
def test_bars(values: list[float], blocks: str, ascii_only: str) -> None:
    bars = Bars(values)
    assert (bars.drawn(ascii_only=False), bars.drawn(ascii_only=True)) == (blocks, ascii_only)


# For people


def test_a_line_for_each_module_with_numbers_and_bars(call: Call, tmp_path: Path) -> None:
    ran = call("inspect", adapter_of(tmp_path / "a", {"x.one": [8, 4, 2, 0.5], "x.two": [3, 3, 3, 0]}), "--spectrum")
    assert (ran.code, ran.err) == (0, "")
    assert row_of(ran.out, "x.one") == ["x.one", "4", "9.18", "8", "2", "3", "█▄▂▁"]
    assert row_of(ran.out, "x.two") == ["x.two", "4", "5.2", "3", "3", "3", "███"]
    heads = next(line for line in ran.out.splitlines() if line.startswith("module "))
    assert heads.split() == ["module", "rank", "norm", "largest", "90%", "99%", "linear", "spectrum"]
    words = summary_of(ran.out)
    assert "norm 10.5, of 2 modules energy half in 1 of 2 modules: x.one 75.7%" in words
    assert "rank 4 99% of every module's energy is in 3 of 4 ranks (median 3): rank 3 would keep that" in words


def test_ranks_that_are_used_up_zeros_and_many_ranks_are_told(call: Call, tmp_path: Path) -> None:
    modules = {"e": [2.0] * 5, "a": [1.0] * 2, "b": [1.0, 0.0], "c": [1.0] * 3, "d": [1.0] * 4, "f": [1.0]}
    out = call("inspect", adapter_of(tmp_path / "a", {"zero": [0.0, 0.0], **modules}), "--spectrum").out
    words = summary_of(out)
    assert "of 7 modules, 1 of them zero" in words
    assert "half in 1 of 6 modules: e 64.5%" in words
    assert "rank 2 99% of the energy takes all 2 in 1 of 2 modules (median 1) rank 3 99%" in words
    assert "rank 1 " not in words
    assert words.endswith("and 1 other rank")
    assert row_of(out, "zero") == ["zero", "2", "0", "0", "0", "0"]


def test_a_fresh_adapter_changes_nothing(call: Call, world: World, tmp_path: Path) -> None:
    assert call("-q", "inject", world.base, "-o", tmp_path / "fresh", "--rank", "2").code == 0
    ran = call("inspect", tmp_path / "fresh", "--spectrum")
    assert ran.code == 0
    words = summary_of(ran.out)
    assert "norm 0, of 4 modules, 4 of them zero" in words
    assert "energy" not in words


@pytest.mark.parametrize("flags", [(), ("-v",)])
def test_many_modules_are_cut_for_people(call: Call, tmp_path: Path, flags: tuple[str, ...]) -> None:
    names = [f"x.{at:02}" for at in range(50)]
    tensors = {key: tensor for name in names for key, tensor in factors_of(name, [2.0, 1.0]).items()}
    tensors[f"{PREFIX}head.weight"] = numbers(4, 24)  # which is none of them
    path = write_adapter(tmp_path / "a", tensors, modules_to_save=["head"])
    out = call("inspect", path, "--spectrum", *flags).out
    assert out.count("█▄") == (50 if flags else 40)
    assert ("… and 10 more" in out) != bool(flags)


def test_an_adapter_without_a_scale_says_so_and_one_with_a_scale_does_not(call: Call, world: World) -> None:
    assert "of B·A alone, as if the scale were 1" in call("inspect", world.plain, "--spectrum").out
    assert "alone" not in call("inspect", world.plain, "--spectrum", "--scale", "2").out


@pytest.mark.parametrize("magnitude", [True, False])
def test_of_dora_it_says_what_it_is_the_spectrum_of(magnitude: bool) -> None:
    module = ModuleSpectrum("x", "lora", (9, 8), None, 2, magnitude, 5.0, 4.0, 1.0, 2, 2, 1.5, 1.9, ((4.0, 3.0),))
    stream = io.StringIO()
    Console(file=stream, width=200).print(*view(AdapterSpectrum(5.0, True, (module,)), 40))
    assert ("before outputs get their lengths" in stream.getvalue()) == magnitude


def test_a_wrapped_checkpoint_shows_its_own_factors(call: Call, world: World, tmp_path: Path) -> None:
    tensors: dict[str, Array] = {"x.base.weight": numbers(24, 24)}
    tensors |= {key.removeprefix(PREFIX): tensor for key, tensor in factors_of("x", [8, 4, 2, 0.5]).items()}
    base = write_base(tmp_path / "b", tensors)
    assert call("inspect", base, "--spectrum").code == 2
    ran = call("inspect", base, "--spectrum", "--scale", "0.5")
    assert row_of(ran.out, "x")[3:] == ["4", "2", "3", "█▄▂▁"]
    assert "x.base.weight" not in ran.out


def test_a_stack_is_one_line(call: Call, tmp_path: Path) -> None:
    tensors = {
        "x.base.weight": numbers(3, 5, 7),
        "x.lora_A.weight": numbers(3, 5, 2),
        "x.lora_B.weight": numbers(3, 2, 7),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    row = row_of(call("inspect", tmp_path / "w.safetensors", "--spectrum", "--scale", "1").out, "x:")
    assert row[:4] == ["x:", "3", "matrices", "2"]
    assert row[-1].startswith("█")


@pytest.mark.parametrize("width", [80, 39, 20])
def test_it_fits_the_terminal(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"model.layers.{at}.{name}" for at in (0, 10) for name in ("self_attn.q_proj", "mlp.down_proj")]
    out = call("inspect", adapter_of(tmp_path / "a", {name: [2.0] * 16 for name in names}), "--spectrum").out
    assert max(map(len, out.splitlines())) <= width
    assert "".join(out.split()).count("█" * 16) == 4
    if width == 80:
        assert [row_of(out, name.removeprefix("model.layers."))[-1] for name in names] == ["█" * 16] * 4


@pytest.mark.parametrize(
    "env", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_bars_are_drawn_where_a_terminal_has_no_blocks(tmp_path: Path, env: dict[str, str]) -> None:
    ran = process("inspect", adapter_of(tmp_path / "a", {"x": [8, 4, 2, 1], "y": [2, 2, 2, 2]}), "--spectrum", env=env)
    lines = [line.split() for line in ran.out.splitlines()]
    assert [line[-1] for line in lines if line[:1] in (["x"], ["y"])] == ["@=:.", "@@@@"]


# For scripts


def test_the_document_has_every_value_and_keeps_to_the_schema(call: Call, world: World) -> None:
    document = call("inspect", world.adapter, "--spectrum", "--base", world.base, "--json").document
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(document)
    tensors, said = adapter_tensors(), document["spectrum"]
    assert said["scaled"] is True
    assert [module["module"] for module in said["modules"]] == [module["module"] for module in document["modules"]]
    assert sorted(module["module"] for module in said["modules"]) == sorted(MODULES)
    energy = 0.0
    for module in said["modules"]:
        a, b = (tensors[f"{PREFIX}{module['module']}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        delta = ALPHA / RANK * b @ a
        assert module["values"] == [pytest.approx(np.linalg.svd(delta)[1][:RANK].tolist(), rel=1e-12)]
        assert module["norm"] == pytest.approx(np.linalg.norm(delta))
        energy += module["norm"] ** 2
    assert said["norm"] == pytest.approx(energy**0.5)
    broken: dict[str, Any] = {**document, "spectrum": {**said, "norm": "much"}}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(broken)


def test_without_it_the_document_has_none(call: Call, world: World) -> None:
    assert call("inspect", world.adapter, "--json").document["spectrum"] is None
