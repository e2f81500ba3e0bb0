"""Undo files that would take time or memory without end: they are refused before they do."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from undo_world import SECOND, Document, Parts, World, as_part, frame, pack, record, unpack

from lora_cli.checkpoint import digests, undo_file
from lora_cli.surgery.placing import PlanOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A merge with its factors in the undo file."""
    return World(tmp_path_factory.mktemp("limits")).write().merge(embed_adapter=True)


TEXTS: dict[str, bytes] = {
    "no JSON": b"{",
    "two documents": b"{}{}",
    "nothing": b"",
    "not UTF-8": b'{"base":"\xff"}',
    "half a pair": b'{"base":"\\ud800"}',
    "NaN": b'{"arithmetic":NaN}',
    "deep": b"[" * 200_000,
    "deep in a field": b'{"files":' + b"[" * 200_000,
    "a long number": b'{"arithmetic":' + b"9" * 100_000 + b"}",
    "zeros": bytes(5000),
    "an array": b"[1, 2, 3]",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_manifest(world: World, text: bytes) -> None:
    place = world.spoilt(lambda *_: pack(text))
    with tiny.within(5), world.refused(10) as caught:
        world.unmerge(given=False, undo=place)
    assert "manifest" in caught.value.message


# Compressed parts

ZEROS = bytes(64 << 20)


def sized(size: int, frame: bytes) -> bytes:
    return size.to_bytes(8, "little") + frame


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "one byte more": lambda data: sized(len(data) - 1, frame(data)),
    "one byte less": lambda data: sized(len(data) + 1, frame(data)),
    "a bomb": lambda data: sized(len(data), frame(ZEROS)),
    "a bomb that says so": lambda _: sized(1 << 40, frame(ZEROS)),
    "the longest number": lambda data: sized((1 << 64) - 1, frame(data)),
    "bytes after it": lambda data: sized(len(data), frame(data) + b"x"),
    "another frame": lambda data: sized(len(data), frame(data) + frame(b"x")),
    "half a frame": lambda data: sized(len(data), frame(data)[:-4]),
    "no frame": lambda data: sized(len(data), data),
    "seven bytes": lambda _: b"1234567",
    "nothing": lambda _: b"",
    "a long window": lambda data: sized(len(data), frame(data, window_log=27)),
}


@pytest.mark.parametrize("part", ["manifest", f"header/{SECOND}", "side/README.md"])
@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_nothing_expands_beyond_what_it_was_said_to_be(world: World, make: Callable[[bytes], bytes], part: str) -> None:
    """R130, R131: bombs, long windows, several frames, more bytes: nothing is made beyond what is said."""

    def change(manifest: Document, parts: Parts) -> bytes | None:
        if part == "manifest":
            return make(json.dumps(manifest).encode())
        parts[part] = as_part(make(unpack(parts[part][2])))
        return None

    place = world.spoilt(change)
    tracemalloc.start()
    try:
        with tiny.within(5), world.refused(10):
            world.unmerge(given=False, undo=place)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_fragments_that_add_up_and_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a cut had at most 8 elements."""
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 8)
    world = World(tmp_path).write().merge(embed_adapter=True)

    def change(manifest: Document, _: Parts) -> None:
        first, second, third = record(manifest, "x.weight")["fragments"]
        record(manifest, "x.weight")["fragments"] = [-first, second + 2 * first, third]

    place = world.spoilt(change)
    with world.refused(10) as caught:
        world.unmerge(given=False, undo=place)
    assert "x.weight: what its shape" in str(caught.value.expected)


def test_nothing_is_written_that_would_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path).write()
    (world.base / "tokenizer.json").write_text('{"' + "a" * (3 << 20) + '": 1}')
    (world.adapter / "tokenizer.json").write_text("{}")
    with world.refused(12) as caught:
        world.merge(options=PlanOptions(tokenizer="adapter"))
    assert caught.value.file == "side/tokenizer.json"
    assert "--no-undo" in str(caught.value.hint)
    monkeypatch.setattr(undo_file, "MANIFEST_LIMIT", 1000)
    with world.refused(12) as caught:
        world.merge()
    assert caught.value.file == "manifest"
    world.merge(undo=False)


HUGE = (1 << 32) - 1
GROUPS = {"blocks": (HUGE, 9, 9, 9), "heads": (1, HUGE, 9, 9), "lengths": (1, 9, HUGE, 9), "tails": (1, 9, 9, HUGE)}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("key", ["x.weight", "head.weight"])
def test_a_group_that_claims_to_be_huge(world: World, key: str, group: tuple[int, ...]) -> None:
    def change(manifest: Document, parts: Parts) -> None:
        head = struct.pack("<IIII", *group)
        data = head + struct.pack("<I", zlib.crc32(bytes(9), zlib.crc32(head))) + bytes(30)
        parts[f"undo/{key}"] = as_part(data)
        record(manifest, key)["fragments"] = [len(data)]

    place = world.spoilt(change)
    with tiny.within(5), world.refused(10) as caught:
        world.unmerge(given=False, undo=place)
    assert caught.value.tensor == key
