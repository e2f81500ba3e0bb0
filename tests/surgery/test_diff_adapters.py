"""Comparing what adapters hold besides factors, and checkpoints that were untied, resized or repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_worlds import HEAD, TABLE, VOCABULARY, WORLDS, lengths, tokens
from safetensors.numpy import save_file
from tiny import MODULES, PREFIX, WIDTH, Array, adapter_tensors, numbers, read_tensors, write_adapter

from lora_cli.surgery import equal_rows
from lora_cli.surgery.changes import Changed
from lora_cli.surgery.diff import diff
from lora_cli.surgery.merge import merge

ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


def adapter(folder: Path, ids: list[int], rows: Array, **config: Any) -> Path:
    return write_adapter(folder, adapter_tensors() | {ROWS: rows}, trainable_token_indices=ids, **config)


def row(number: int) -> str:
    return f"{TABLE}[{number}]"


def test_trained_rows_are_compared_one_by_one_in_whatever_order_they_are(tmp_path: Path) -> None:
    mine = tokens(3)[ROWS]
    theirs = np.stack([numbers(WIDTH, seed=5), mine[2], mine[0] + np.float32(0.5)])
    one, two = adapter(tmp_path / "a", [3, 1, 7], mine), adapter(tmp_path / "b", [9, 7, 3], theirs)
    found = diff(one, two)
    assert (found.only_in_a, found.only_in_b) == ((row(1),), (row(9),))
    (changed,) = found.changed
    assert (changed.key, changed.what, changed.changed_fraction) == (row(3), "values", 1.0)
    assert changed.max_abs == pytest.approx(0.5, rel=1e-6)
    assert found.unchanged == len(MODULES) + 1
    again = diff(one, adapter(tmp_path / "c", [7, 3, 1], np.roll(mine, 1, axis=0)))
    assert (again.same, again.unchanged) == (True, len(MODULES) + 3)


def test_a_pattern_finds_rows_by_their_table(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", [3, 1, 7], tokens(3)[ROWS])
    assert diff(one, one, only="model.embed_tokens").unchanged == 3


def test_lengths_are_compared_and_missing_ones_told(tmp_path: Path) -> None:
    made = adapter_tensors()
    magnitudes = lengths(made)
    one = write_adapter(tmp_path / "a", made | magnitudes, use_dora=True)
    name = next(iter(magnitudes))
    other = write_adapter(tmp_path / "b", made | magnitudes | {name: magnitudes[name] * 2}, use_dora=True)
    (changed,) = diff(one, other).changed
    assert changed.key == name
    assert changed.relative_norm == pytest.approx(1.0)
    plain = diff(one, write_adapter(tmp_path / "c", made))
    assert (plain.only_in_a, plain.changed) == (tuple(sorted(magnitudes)), ())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, ("layer_replication", "None", "[0, 1, 0, 1]")),
        ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights", "None", "pissa_niter_4")),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.5}, None),
    ],
)
def test_adapters_differ_where_the_same_factors_mean_another_thing(
    config: dict[str, Any], expected: tuple[str, str, str] | None, tmp_path: Path
) -> None:
    one, other = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", **config)
    found = diff(one, other)
    said = [(change.key, change.before, change.after) for change in found.changed]
    assert said == ([expected] if expected else [])
    assert {change.what for change in found.changed} <= {"setting"}
    assert (found.same, found.unchanged) == (not expected, len(MODULES))
    assert diff(one, other, only="*.mlp.**").same


def test_ties_are_a_setting(tmp_path: Path) -> None:
    world = WORLDS["as_one"](tmp_path)
    other = write_adapter(tmp_path / "other", read_tensors(world.adapter))
    (changed,) = diff(world.adapter, other).changed
    assert changed == Changed("ensure_weight_tying", "setting", before="True", after="False")


# Checkpoints


def test_tensors_of_one_side_only_are_named(tmp_path: Path) -> None:
    for name, lost in (("untied", {HEAD}), ("repeated", None)):
        world = WORLDS[name](tmp_path / name)
        result = merge(world.base, [world.adapter], tmp_path / name / "merged", undo=False)
        found = diff(world.base, tmp_path / name / "merged")
        assert set(found.only_in_b) == (lost or set(result.effects.repeated))
        assert found.only_in_a == ()


def test_of_tables_of_other_lengths_it_is_told_how_many_rows_are_equal(tmp_path: Path) -> None:
    world = WORLDS["resized"](tmp_path)
    merge(world.base, [world.adapter], tmp_path / "merged", undo=False)
    for a, b in ((world.base, tmp_path / "merged"), (tmp_path / "merged", world.base)):
        tables = {change.key: change for change in diff(a, b).changed if change.what == "shape"}
        assert {key: change.equal_rows for key, change in tables.items()} == dict.fromkeys((TABLE, HEAD), VOCABULARY)


@pytest.mark.parametrize("step", [1, 100, 1 << 20])
def test_equal_rows_are_counted_in_steps(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_rows, "_STEP", step)
    one, other = numbers(13, 5), np.concatenate([numbers(13, 5), numbers(4, 5)])
    other[3, 4] += 1
    other[11] = -other[11]
    save_file({"x": one}, tmp_path / "a.safetensors")
    save_file({"x": other}, tmp_path / "b.safetensors")
    (changed,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").changed
    assert (changed.what, changed.equal_rows) == ("shape", 11)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (numbers(4, 5), numbers(4, 6)),
        (numbers(4), numbers(5)),
        (numbers(4, 5), numbers(5, 5).astype(np.float16)),
        (numbers(4, 5), numbers(20)),
        (numbers(4, 0), numbers(5, 0)),
    ],
    ids=["width", "vectors", "types", "dimensions", "empty"],
)
def test_what_has_no_rows_in_common_has_no_equal_ones(one: Array, other: Array, tmp_path: Path) -> None:
    save_file({"x": one}, tmp_path / "a.safetensors")
    save_file({"x": other}, tmp_path / "b.safetensors")
    (changed,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").changed
    assert (changed.what, changed.equal_rows) == ("shape", None)
