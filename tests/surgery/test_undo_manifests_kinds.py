"""Undo files with a right digest that say impossible things of parts of tensors, of gains, and of repeated tensors."""

from __future__ import annotations

import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from special_worlds import WORLDS
from test_undo_manifests import changed, of_part, without
from undo_world import UNDO, Change, Document, Parts, World, contents, read_undo, record, text_of, write_undo

from lora_cli.errors import LoraCliError
from lora_cli.surgery.unmerge import unmerge

SUMS, GAINED = (f"encoder.layers.{layer}.attn.Wqkv.weight" for layer in (0, 2))
GAINS = f"gains/{GAINED}"
REPEATED = "model.layers.{}.self_attn.q_proj.weight"


def made(folder: Any, name: str) -> World:
    """A merge with all factors in its undo file."""
    special = WORLDS[name](folder / "made", torch.bfloat16, 1)
    world = World(folder)
    world.base = special.base
    return world.merge(*special.adapters, options=special.options, embed_adapter=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("kinds"), "fused")


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("repeated"), "repeated")


def of_term(**said: Any) -> Change:
    return lambda manifest, _: record(manifest, SUMS)["terms"][0].update(said)


def of_gained(**said: Any) -> Change:
    return lambda manifest, _: record(manifest, GAINED).update(said)


def gains(change: Callable[[bytes], bytes], **said: Any) -> Change:
    """Other gains, under their right digest."""

    def change_both(manifest: Document, parts: Parts) -> None:
        dtype, _, data = parts[GAINS]
        new = change(data)
        parts[GAINS] = (said.get("dtype", dtype), said.get("shape", [len(new) // 4]), new)
        record(manifest, GAINED)["gains"] = blake3(new).hexdigest()

    return change_both


def moved(key: str, *names: str) -> Change:
    """The gains of one tensor said of another."""

    def change(manifest: Document, parts: Parts) -> None:
        parts[f"gains/{key}"] = parts[GAINS]
        record(manifest, key)["gains"] = record(manifest, GAINED)["gains"]

    return change


def filled(pattern: bytes) -> Callable[[bytes], bytes]:
    return lambda data: pattern * (len(data) // 4)


def twice(data: bytes) -> bytes:
    return data * 2


NOT_THE_BASE = "what comes out is not the base"
PART = "a part of 12 outputs"
CASES: dict[str, tuple[int, str, Change]] = {
    # Parts of outputs
    "a run without end": (10, PART, of_term(rows=[[0, 1 << 40, 1]])),
    "runs without end": (10, PART, of_term(rows=[[0, 12, 1]] * 100_000)),
    "as many rows as fit, each a run without end": (10, PART, of_term(rows=[[0, 1 << 62, 1]] * 12)),
    "a number beyond all": (10, PART, of_term(rows=[[0, 1 << 80, 1]])),
    "a run of two numbers": (10, "manifest", of_term(rows=[[0, 12]])),
    "a run backwards": (10, NOT_THE_BASE, of_term(rows=[[11, -1, -1]])),
    "rows below zero": (10, PART, of_term(rows=[[-12, 0, 1]])),
    "rows beyond the last": (10, PART, of_term(rows=[[1, 13, 1]])),
    "a row too few": (10, PART, of_term(rows=[[0, 11, 1]])),
    "rows twice": (10, NOT_THE_BASE, of_term(rows=[[0, 6, 1], [0, 6, 1]])),
    "no steps": (10, PART, of_term(rows=[[0, 12, 0]])),
    "no rows": (10, PART, of_term(rows=[])),
    "rows and no outputs": (10, PART, of_term(outputs=[])),
    "neither": (10, SUMS, of_term(rows=[], outputs=[])),
    "two numbers for outputs": (10, PART, of_term(outputs=[0, 12])),
    "five numbers for outputs": (10, PART, of_term(outputs=[0, 12, 36, 1, 1])),
    "no step between outputs": (10, PART, of_term(outputs=[0, 12, 36, 0])),
    "a step back between outputs": (10, PART, of_term(outputs=[11, -1, 36, -1])),
    "a step over outputs": (10, PART, of_term(outputs=[0, 12, 36, 2])),
    "a step beyond all": (10, PART, of_term(outputs=[0, 12, 36, 1 << 62])),
    "other outputs by a step": (10, NOT_THE_BASE, of_term(outputs=[0, 24, 36, 2])),
    "outputs below zero": (10, PART, of_term(outputs=[-12, 0, 36])),
    "outputs beyond the last": (10, PART, of_term(outputs=[30, 42, 36])),
    "outputs the other way round": (10, PART, of_term(outputs=[12, 0, 36])),
    "other outputs": (10, NOT_THE_BASE, of_term(outputs=[12, 24, 36])),
    "of a longer tensor": (10, PART, of_term(outputs=[0, 12, 37])),
    "of the longest tensor": (10, PART, of_term(outputs=[0, 12, 1 << 48])),
    "of nearly the longest tensor": (10, PART, of_term(outputs=[0, 12, (1 << 48) - 1])),
    "of a shorter tensor": (10, "what its shape", of_term(outputs=[0, 12, 12])),
    "on columns": (10, "what its shape", of_term(transposed=True)),
    # Gains
    "no gains": (10, NOT_THE_BASE, of_gained(gains="")),
    "another digest of gains": (10, "gains that were recorded", of_gained(gains="0" * 64)),
    "gains that are no digest": (10, "manifest", of_gained(gains="00")),
    "other gains": (10, "gains that were recorded", of_part(GAINS, lambda data: data[::-1])),
    "gains that are not there": (10, GAINS, without(GAINS)),
    "too few gains": (10, "the gains of its outputs", gains(lambda data: data[4:])),
    "too many gains": (10, "the gains of its outputs", gains(twice)),
    "no gain at all": (10, "the gains of its outputs", gains(lambda data: b"")),
    "gains of two dimensions": (10, "the gains of its outputs", gains(lambda data: data, shape=[6, 6])),
    "gains of another type": (10, "the gains of its outputs", gains(lambda data: data, dtype="I32")),
    "gains in another precision": (
        10,
        "the gains of its outputs",
        gains(twice, dtype="F64", shape=[36]),
    ),
    "gains that are ones": (10, NOT_THE_BASE, gains(filled(b"\0\0\x80\x3f"))),
    "gains of one bit more": (10, NOT_THE_BASE, gains(lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    "gains that are zero": (10, "", gains(filled(bytes(4)))),
    "gains that are NaN": (10, "", gains(filled(b"\xff\xff\xff\x7f"))),
    "gains that are infinite": (10, "", gains(filled(b"\0\0\x80\x7f"))),
    "gains that are least": (10, "", gains(filled(b"\1\0\0\0"))),
    "gains of another tensor": (10, NOT_THE_BASE, moved(SUMS)),
    "gains of what was copied": (10, "gains", moved("encoder.layers.0.attn.out_proj.weight")),
    "gains of a bias": (10, NOT_THE_BASE, moved("encoder.layers.0.attn.Wqkv.bias")),
    "gains without terms": (10, "the gains of its outputs", of_gained(terms=[])),
    "gains of a residual": (10, "the gains of its outputs", of_gained(how="residual")),
}


@pytest.mark.parametrize(("code", "words", "change"), CASES.values(), ids=CASES)
def test_one_thing_wrong(world: World, code: int, words: str, change: Change) -> None:
    place = world.spoilt(change)
    tracemalloc.start()
    try:
        with tiny.within(10), world.refused(code) as caught:
            world.unmerge(given=False, undo=place)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert words in text_of(caught.value)


def test_nothing_wrong(world: World, repeated: World) -> None:
    for each in (world, repeated):
        each.restored(given=False, undo=each.spoilt(lambda manifest, parts: None))


FINE: dict[str, Change] = {
    "all outputs": lambda m, _: record(m, SUMS)["terms"][-1].update(outputs=[0, 36, 36], rows=[[0, 36, 1]]),
    "rows one by one": of_term(rows=[[row, row + 1, 1] for row in range(12)]),
    "a step between outputs": of_term(outputs=[0, 12, 36, 1]),
    "long steps": of_term(rows=[[row, 12, 12] for row in range(12)]),
    "terms in another order": lambda manifest, _: record(manifest, SUMS)["terms"].reverse(),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_what_means_the_same_is_accepted(world: World, change: Change) -> None:
    world.restored(given=False, undo=world.spoilt(change))


# Repeated and added tensors


def source(key: str, name: str) -> Change:
    return lambda manifest, _: record(manifest, REPEATED.format(key)).update(source=name and REPEATED.format(name))


SOURCES: dict[str, tuple[int, Change]] = {
    "an added tensor": (23, source("0", "1")),
    "a tensor of another layer": (23, source("2", "0")),
    "its own name, which is now another layer's": (23, source("1", "")),
    "two from one": (23, lambda manifest, parts: [source(key, "0")(manifest, parts) for key in "12"] and None),
    "no such layer": (10, source("0", "9")),
}


@pytest.mark.parametrize(("code", "change"), SOURCES.values(), ids=SOURCES)
def test_another_source(repeated: World, code: int, change: Change) -> None:
    place = repeated.spoilt(change)
    with repeated.refused(code):
        repeated.unmerge(given=False, undo=place)


# Anything wrong


def outcome(world: World, document: object, parts: Parts) -> int:
    """How it is refused, or 0: then the very base came out."""
    place = world.folder / "spoilt"
    write_undo(place, document, parts)
    try:
        with tiny.within(10):
            unmerge(world.merged, [], world.out, undo=place, threads=1)
    except LoraCliError as error:
        assert list(world.place.iterdir()) == []
        return error.exit_code
    found, base = contents(world.out), contents(world.base)
    assert all(base[name] == data for name, data in found.items() if name.endswith(".safetensors"))
    shutil.rmtree(world.out)
    return 0


def test_any_value_of_what_is_said_of_a_tensor(world: World) -> None:
    manifest, parts = read_undo(world.merged / UNDO)
    codes: Counter[int] = Counter()
    for file in manifest["files"]:
        for at, said in enumerate(file["tensors"]):
            if said["key"] != GAINED:
                continue
            for other in changed(said):
                tensors = [*file["tensors"][:at], other, *file["tensors"][at + 1 :]]
                codes[outcome(world, manifest | {"files": [file | {"tensors": tensors}]}, parts)] += 1
    assert codes.total() > 500
    assert codes[10] > 0.9 * codes.total()
    assert set(codes) <= {0, 10, 12, 23}


NUMBER = st.one_of(st.integers(-40, 40), st.integers(-(1 << 63), (1 << 63) - 1))


@given(st.lists(NUMBER, max_size=4), st.lists(st.tuples(NUMBER, NUMBER, NUMBER), max_size=5), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_any_part_of_outputs(world: World, outputs: list[int], rows: list[Any], number: int) -> None:
    manifest, parts = read_undo(world.merged / UNDO)
    before: dict[str, Any] = {"outputs": [], "rows": []} | dict(record(manifest, SUMS)["terms"][number])
    record(manifest, SUMS)["terms"][number].update(outputs=outputs, rows=rows)
    code = outcome(world, manifest, parts)
    assert code == 10 or (code == 0 and before == record(manifest, SUMS)["terms"][number])


@given(st.lists(st.floats(width=32), min_size=36, max_size=36))
@settings(max_examples=60, deadline=None)
def test_any_gains(world: World, values: list[float]) -> None:
    manifest, parts = read_undo(world.merged / UNDO)
    data = torch.tensor(values).numpy().tobytes()
    parts[GAINS] = ("F32", [36], data)
    record(manifest, GAINED)["gains"] = blake3(data).hexdigest()
    assert outcome(world, manifest, parts) == 10
