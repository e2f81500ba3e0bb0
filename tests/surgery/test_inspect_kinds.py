"""What `inspect` finds in adapters that are more than factors of linear layers, or that no merge takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_worlds import HEAD, REFUSED, TABLE, TIED, VOCABULARY, WORLDS, table_factors, tied_base, tokens
from safetensors.numpy import save_file
from tiny import (
    ALPHA,
    LAYERS,
    MODULES,
    PREFIX,
    RANK,
    WIDTH,
    Array,
    adapter_tensors,
    numbers,
    out_of,
    write_adapter,
    write_base,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.errors import UnsupportedError, UsageError, WrongInputError
from lora_cli.surgery.effects import Effects
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.inspection import InspectResult, LeftOut, ModuleInfo, PlaceInfo
from lora_cli.surgery.placing import PlanOptions

UP = "model.layers.{}.mlp.up_proj"


def module(found: InspectResult, name: str) -> ModuleInfo:
    (one,) = (module for module in found.modules if module.module == name)
    return one


def begun_as(folder: Path) -> PlanOptions:
    return PlanOptions(read=ReadOptions(initial=(str(folder),)))


# What an adapter holds


@pytest.mark.parametrize("name", WORLDS)
def test_every_kind_is_shown_alone_and_on_its_base(name: str, tmp_path: Path) -> None:
    world = WORLDS[name](tmp_path)
    alone, based = inspect(world.adapter), inspect(world.adapter, base=world.base)
    assert [one.module for one in alone.modules] == [one.module for one in based.modules]
    assert (alone.effects, {one.key for one in alone.modules}) == (None, {None})
    assert all(one.key and one.places and one.key == one.places[0].key for one in based.modules)
    assert alone.refused == based.refused == ()


def test_lengths_are_told_of_each_module(tmp_path: Path) -> None:
    found = inspect(WORLDS["dora"](tmp_path).adapter)
    assert (found.adapter_kind, {one.magnitude for one in found.modules}) == ("DoRA", {True})
    assert not any(one.magnitude for one in inspect(WORLDS["plain"](tmp_path).adapter).modules)


def test_trained_rows_are_told_with_their_numbers(tmp_path: Path) -> None:
    world = WORLDS["trained_tokens"](tmp_path)
    rows = module(inspect(world.adapter, base=world.base), TABLE)
    assert (rows.rows, rows.shape, rows.rank, rows.kind) == (
        (3, 1, 19), (3, WIDTH), None, "rows (trainable_token_indices)"
    )  # fmt: skip
    assert rows.places == (PlaceInfo(TABLE),)


def test_rows_of_tied_tables_are_in_both(tmp_path: Path) -> None:
    """Where the embedding alone has rows it is no longer the head, but for these."""
    made = {f"{PREFIX}{TABLE}": numbers(VOCABULARY, WIDTH, seed=1)} | tokens(2)
    adapter = write_adapter(tmp_path / "a", made, modules_to_save=["embed_tokens"], trainable_token_indices=[1, 2])
    (rows,) = (one for one in inspect(adapter, base=tied_base(tmp_path)).modules if one.rows)
    assert rows.places == (PlaceInfo(TABLE), PlaceInfo(HEAD))


def test_layers_that_are_repeated(tmp_path: Path) -> None:
    world = WORLDS["repeated"](tmp_path)
    found = inspect(world.adapter, base=world.base)
    assert (found.layers, module(found, UP.format(3)).key) == ((0, 1, 0, 1), f"{UP.format(3)}.weight")
    assert found.effects is not None
    assert found.effects.layers == found.layers
    assert inspect(WORLDS["plain"](tmp_path).adapter).layers is None


def test_parts_of_fused_tensors(tmp_path: Path) -> None:
    world = WORLDS["parts"](tmp_path)
    place = PlaceInfo("model.layers.1.mlp.gate_up_proj.weight", (12, 24))
    assert module(inspect(world.adapter, base=world.base), UP.format(1)).places == (place,)


def test_blocks_on_the_diagonal(tmp_path: Path) -> None:
    found = inspect(WORLDS["blocks"](tmp_path).adapter)
    kinds = {one.module: (one.kind, one.shape) for one in found.modules}
    assert kinds == {
        name: ("lora-blocks-a" if name in MODULES[::2] else "lora", (out_of(name), WIDTH)) for name in MODULES
    }


def test_ties_of_an_adapter_and_of_checkpoints(tmp_path: Path) -> None:
    world = WORLDS["as_one"](tmp_path)
    found = inspect(world.adapter, base=world.base)
    assert (found.tied, found.effects) == (True, Effects())
    assert module(found, "model.embed_tokens").places == (PlaceInfo(TABLE),)
    base = inspect(world.base)
    assert (base.tied, base.ties) == (True, {HEAD: TABLE})
    both = inspect(write_base(tmp_path / "both", config=TIED))
    assert (both.tied, both.ties) == (True, {})
    assert inspect(WORLDS["untied"](tmp_path / "u").adapter).tied is None


def test_whole_tables_of_another_vocabulary(tmp_path: Path) -> None:
    world = WORLDS["resized"](tmp_path)
    found = inspect(world.adapter, base=world.base)
    table = module(found, TABLE)
    assert (table.shape, table.places) == ((VOCABULARY + 3, WIDTH), (PlaceInfo(TABLE),))
    assert "the base's own" in table.kind
    assert found.effects is not None
    assert found.effects.resized == dict.fromkeys((TABLE, HEAD), (VOCABULARY, VOCABULARY + 3))


def test_a_whole_table_that_was_the_head_too_is_in_both(tmp_path: Path) -> None:
    """The embedding has factors besides, so the head is stored apart, without them."""
    made = {f"{PREFIX}{TABLE}": numbers(VOCABULARY + 3, WIDTH)} | table_factors(entries=VOCABULARY + 3)
    found = inspect(write_adapter(tmp_path / "a", made), base=tied_base(tmp_path))
    assert module(found, "model.embed_tokens").places == (PlaceInfo(TABLE),)
    assert set(module(found, TABLE).places) == {PlaceInfo(TABLE), PlaceInfo(HEAD)}


def test_new_tensors_have_the_place_that_they_get(tmp_path: Path) -> None:
    made = adapter_tensors() | {f"{PREFIX}score.weight": numbers(3, WIDTH)}
    adapter = write_adapter(tmp_path / "a", made, modules_to_save=["score"])
    found = module(inspect(adapter, base=WORLDS["plain"](tmp_path).base), "score.weight")
    assert (found.key, found.places) == ("score.weight", (PlaceInfo("score.weight"),))


def test_what_is_in_the_file_and_not_applied(tmp_path: Path) -> None:
    name = f"{PREFIX}{MODULES[0]}.lora_velora_embed"
    adapter = write_adapter(tmp_path / "a", adapter_tensors() | {name: numbers(4)})
    found = inspect(adapter)
    assert found.left_out == (LeftOut(name, "how activations were kept in training"),)
    assert len(found.modules) == len(MODULES)


# Inits that changed the base


def test_an_init_that_changed_the_base_is_told_and_places_are_found_all_the_same(tmp_path: Path) -> None:
    world = WORLDS["taken"](tmp_path)
    found = inspect(world.adapter, base=world.base)
    assert (found.initial, found.before) == ("pissa", None)
    assert [one.key for one in found.modules] == [f"{name}.weight" for name in sorted(MODULES)]
    begun = inspect(world.adapter, base=world.base, options=begun_as(tmp_path / "begun"))
    assert (begun.initial, begun.before) == ("pissa", "begun (as it was before training)")
    assert begun.modules == found.modules


def test_a_beginning_must_be_needed_and_fit(tmp_path: Path) -> None:
    world, plain = WORLDS["taken"](tmp_path), WORLDS["plain"](tmp_path / "plain")
    with pytest.raises(UsageError, match="--initial"):
        inspect(plain.adapter, options=begun_as(tmp_path / "begun"))
    with pytest.raises(WrongInputError, match="before its training"):
        inspect(world.adapter, options=begun_as(WORLDS["repeated"](tmp_path / "r").adapter))


def dense(adapter: dict[str, Array], name: str) -> Array:
    a, b = (adapter[f"{PREFIX}{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    product: Array = ALPHA / RANK * b @ a
    return product


def test_the_spectrum_is_that_of_what_is_applied(tmp_path: Path) -> None:
    """With the beginning it is that of the difference, without it that of the factors as they are."""
    world = WORLDS["taken"](tmp_path)
    trained = adapter_tensors()
    begun = {key: tensor[::-1].copy() for key, tensor in trained.items()}
    without = inspect(world.adapter, spectrum=True).spectrum
    given = inspect(world.adapter, spectrum=True, options=begun_as(tmp_path / "begun")).spectrum
    assert without is not None
    assert given is not None
    assert (without.initial, without.before) == ("pissa", None)
    assert (given.initial, given.before) == ("pissa", "begun (as it was before training)")
    for name, one, other in zip(sorted(MODULES), without.modules, given.modules, strict=True):
        assert one.module == other.module == name
        assert (one.rank, other.rank) == (RANK, 2 * RANK)
        applied = dense(trained, name) - dense(begun, name)
        for found, matrix in ((one, dense(trained, name)), (other, applied)):
            expected = np.linalg.svd(matrix, compute_uv=False)[: found.rank]
            assert found.values[0] == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)
    assert inspect(WORLDS["plain"](tmp_path / "p").adapter, spectrum=True).spectrum.initial is None  # type: ignore[union-attr]


# What no merge takes


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_refused_is_shown_with_the_reason(word: str, tmp_path: Path) -> None:
    world = WORLDS["plain"](tmp_path)
    adapter = write_adapter(tmp_path / "refused", **REFUSED[word])
    found = inspect(adapter, base=world.base)
    (reason,) = found.refused
    assert word in reason
    assert found.modules == inspect(world.adapter, base=world.base).modules
    field = next(iter(REFUSED[word]))
    allowed = inspect(adapter, options=PlanOptions(read=ReadOptions(ignore_fields=(field,))))
    assert allowed.refused == ()


def test_several_reasons_are_all_told(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", use_qalora=True, init_lora_weights="loftq", alora_invocation_tokens=[1])
    assert [reason.split(" ")[0] for reason in inspect(adapter).refused] == [
        "use_qalora", "init_lora_weights", "alora_invocation_tokens"
    ]  # fmt: skip


def test_an_init_that_needs_a_beginning_is_told_beside_what_is_refused(tmp_path: Path) -> None:
    found = inspect(write_adapter(tmp_path / "a", use_qalora=True, init_lora_weights="olora"))
    assert (found.initial, len(found.refused)) == ("olora", 1)


NOT_UNDERSTOOD: dict[str, tuple[dict[str, Any], dict[str, Array], str, int]] = {
    "KaSA": ({"kasa_config": {"beta": 1}}, {f"{PREFIX}{MODULES[0]}.lora_diag": numbers(RANK)}, "LoRA", 2),
    "another tuner": ({"peft_type": "POLY", "rank_dropout": 0.1}, {f"{PREFIX}x.poly_lora_A": numbers(2, 3)}, "POLY", 1),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_shown_as_tensors(name: str, tmp_path: Path) -> None:
    config, more, kind, reasons = NOT_UNDERSTOOD[name]
    adapter = write_adapter(tmp_path / "a", adapter_tensors() | more, base_model_name_or_path="owner/name", **config)
    for base in (None, WORLDS["plain"](tmp_path).base):
        found = inspect(adapter, base=base)
        assert (found.kind, found.adapter_kind, found.base) == ("adapter", kind, "owner/name")
        assert (len(found.refused), found.modules) == (reasons, ())
        assert {one.key: one.shape for one in found.tensors} == {
            key: tensor.shape for key, tensor in (adapter_tensors() | more).items()
        }
    with pytest.raises(UnsupportedError):
        inspect(adapter, spectrum=True)


def test_factors_of_no_known_format_are_shown_as_tensors(tmp_path: Path) -> None:
    save_file({"x.lora_down.weight": numbers(2, 4), "x.lora_up.weight": numbers(4, 2)}, tmp_path / "k.safetensors")
    found = inspect(tmp_path / "k.safetensors")
    assert (found.kind, found.format, found.adapter_kind, len(found.tensors)) == ("adapter", "safetensors", None, 2)
    assert "kohya" in found.refused[0]


def test_a_checkpoint_has_no_such_things(tmp_path: Path) -> None:
    found = inspect(WORLDS["plain"](tmp_path).base)
    assert (found.refused, found.layers, found.initial, found.effects, found.left_out) == ((), None, None, None, ())
    assert len(found.tensors) == len(MODULES) + LAYERS + 3
