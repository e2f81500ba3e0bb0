"""Undo files with a right digest and a wrong manifest or part: forged, or written by something that is broken."""

from __future__ import annotations

import copy
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
from blake3 import blake3
from undo_world import (
    FIRST,
    INDEX,
    LORA,
    SECOND,
    UNDO,
    Change,
    Document,
    Parts,
    World,
    as_part,
    contents,
    frame,
    pack,
    read_undo,
    record,
    text_of,
    write_undo,
)

from lora_cli.errors import LoraCliError
from lora_cli.surgery.unmerge import unmerge

A = f"{LORA}x.lora_A.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A merge with its factors in the undo file."""
    return World(tmp_path_factory.mktemp("manifests")).write().merge(embed_adapter=True)


def test_an_undo_file_that_is_written_again_is_the_same(world: World) -> None:
    world.restored(given=False, undo=world.spoilt(lambda manifest, parts: None))


# One thing wrong


def of_file(**said: Any) -> Change:
    return lambda manifest, _: manifest["files"][0].update(said)


def of_tensor(key: str, /, **said: Any) -> Change:
    return lambda manifest, _: record(manifest, key).update(said)


def of_term(**said: Any) -> Change:
    return lambda manifest, _: record(manifest, "x.weight")["terms"][0].update(said)


def of_side(name: str, /, **said: Any) -> Change:
    return lambda manifest, _: next(s for s in manifest["side_files"] if s["name"] == name).update(said)


def of_part(name: str, data: Callable[[bytes], bytes] = lambda data: data, **said: Any) -> Change:
    def change(_: Document, parts: Parts) -> None:
        dtype, shape, old = parts[name]
        new = data(old)
        parts[name] = (said.get("dtype", dtype), said.get("shape", [len(new)] if dtype == "U8" else shape), new)

    return change


def without(name: str) -> Change:
    return lambda _, parts: parts.pop(name)


def both(*changes: Change) -> Change:
    return lambda manifest, parts: [change(manifest, parts) for change in changes] and None


def named(name: str) -> Change:
    """A small file of this name, which the undo file holds."""
    side = {"name": name, "size": 3, "digest": blake3(b"abc").hexdigest(), "stored": "packed"}

    def change(manifest: Document, parts: Parts) -> None:
        manifest["side_files"].append(side)
        parts[f"side/{name}"] = as_part(pack(b"abc"))

    return change


def older(name: str, stored: str, part: bytes | None = None) -> Change:
    """A file of ours that was with the base, and holds three letters."""

    def change(manifest: Document, parts: Parts) -> None:
        said = {"name": name, "size": 3, "digest": blake3(b"abc").hexdigest(), "stored": stored}
        manifest["side_files"].append(said)
        if part is not None:
            parts[f"side/{name}"] = as_part(part)

    return change


def second_of(field: str) -> Change:
    return lambda manifest, _: manifest[field].append(copy.deepcopy(manifest[field][0]))


def residual(values: bytes) -> bytes:
    """A whole fragment that says how far a bfloat16 tensor is from what is there, under right checksums."""
    head = struct.pack("<HBBI", 1, 2, 1, len(values) // 2)
    stream = head + struct.pack("<I", zlib.crc32(values, zlib.crc32(head))) + values
    packed = frame(stream)
    group = struct.pack("<IIII", 1, len(packed), len(stream), 0)
    return group + struct.pack("<I", zlib.crc32(packed, zlib.crc32(group))) + packed


def another_residual(manifest: Document, parts: Parts) -> None:
    parts["undo/head.weight"] = as_part(residual(bytes(24)))
    record(manifest, "head.weight")["fragments"] = [parts["undo/head.weight"][1][0]]


def stored(data: Callable[[bytes], bytes]) -> Change:
    """A tensor that nobody touched comes from the undo file."""

    def change(manifest: Document, parts: Parts) -> None:
        record(manifest, "ids")["how"] = "stored"
        parts["stored/ids"] = ("I64", [4], data(bytes(byte for n in range(4) for byte in n.to_bytes(8, "little"))))

    return change


def another_rank(manifest: Document, parts: Parts) -> None:
    """A factor as tall as the right one, with a column more than the other has rows."""
    parts["factor/0/b"] = ("F32", [6, 3], bytes(72))
    manifest["adapters"][0]["factors"]["b"] = f"F32 [6, 3] {blake3(bytes(72)).hexdigest()}"
    record(manifest, "x.weight")["terms"][0]["tensors"][1] = "b"


def shortened(manifest: Document, parts: Parts) -> None:
    parts["undo/x.weight"] = as_part(b"")
    record(manifest, "x.weight")["fragments"] = [0]


def doubled(manifest: Document, parts: Parts) -> None:
    data = parts["undo/x.weight"][2] * 2
    parts["undo/x.weight"] = as_part(data)
    record(manifest, "x.weight")["fragments"] = [len(data)]


DIGEST, UNHEX = "0" * 64, "g" * 64
FACTOR = f"factor/0/{A}"
OTHER = {"name": "other", "size": 1, "digest": DIGEST}
CASES: dict[str, tuple[int, str, Change]] = {
    # Names of files
    "../x": (11, "../x", of_file(name="../x.safetensors")),
    "..": (11, "'..'", of_file(name="..")),
    "up": (11, "../x", named("../x.txt")),
    "absolute": (11, "/etc/x", named("/etc/x.txt")),
    "up and down": (11, "a/../../x", named("a/../../x.txt")),
    "hidden": (11, ".x", named(".x.txt")),
    "in a hidden folder": (11, ".git/config", named(".git/config.txt")),
    "hidden in a folder": (11, "a/.x", named("a/.x.txt")),
    "backslash": (11, "x", named("a\\x.txt")),
    "backslash in a shard": (11, "x", of_file(name="a\\x.safetensors")),
    "three deep": (11, "a/b/c", named("a/b/c.txt")),
    "a shard in a folder": (11, "a/x", of_file(name="a/x.safetensors")),
    "no name": (11, "''", named("")),
    "a folder's": (11, "a.txt/", named("a.txt/")),
    "two slashes": (11, "a//b", named("a//b.txt")),
    "this folder": (11, "./b", named("./b.txt")),
    "NUL": (11, "x00", named("a\0b.txt")),
    "NUL in a shard": (11, "x00", of_file(name="a\0b.safetensors")),
    "an escape": (11, "x1b", named("a\x1b[2Jb.txt")),
    "too long": (11, "aaa", named("a" * 252 + ".txt")),
    "too long a folder": (11, "ééé", named("é" * 128 + "/x.txt")),
    "what does not belong there": (11, "x.exe", named("x.exe")),
    "a pickle": (11, "x.bin", named("x.bin")),
    "a pickle as a shard": (11, "x.pt", of_file(name="x.pt")),
    "weights as a small file": (11, "x.safetensors", named("x.safetensors")),
    "the same file twice": (10, "a place of its own", second_of("files")),
    "the same small file twice": (10, "a place of its own", second_of("side_files")),
    "a small file like a shard": (10, "a place of its own", named(FIRST)),
    "a file as a folder": (10, "a place of its own", named("config.json/x.txt")),
    "the receipt": (10, "a place of its own", named("lora_unmerge.json")),
    # Fields that are not known, at each place
    "of the manifest": (10, "unknown field", lambda manifest, _: manifest.update(new=1)),
    "of a file": (10, "unknown field", of_file(new=1)),
    "of a tensor": (10, "unknown field", of_tensor("x.weight", new=1)),
    "of a term": (10, "unknown field", of_term(new=1)),
    "of a small file": (10, "unknown field", of_side(INDEX, new=1)),
    "of an adapter": (10, "unknown field", lambda manifest, _: manifest["adapters"][0].update(new=1)),
    # Files
    "no files": (10, "a place of its own", lambda manifest, _: manifest.update(files=[])),
    "an absent file": (23, "other.safetensors: missing", of_file(name="other.safetensors")),
    "another length": (10, FIRST, of_file(size=1)),
    "a negative length": (10, FIRST, of_file(size=-1)),
    "a huge length": (10, FIRST, of_file(size=1 << 62)),
    "an impossible length": (10, FIRST, of_file(size=1 << 80)),
    "another digest": (10, f"{FIRST}: the digests", of_file(digest=DIGEST)),
    "a digest that is none": (10, "digest", of_file(digest=UNHEX)),
    "another merged header": (23, f"{FIRST}: another header", of_file(merged_header=DIGEST)),
    "a header that is not there": (10, f"header/{FIRST}", of_file(own_header=True)),
    "the merged header for the base's": (10, SECOND, lambda manifest, _: manifest["files"][1].pop("own_header")),
    "a header of zeros": (10, SECOND, of_part(f"header/{SECOND}", lambda _: pack(bytes(64)))),
    "an empty header": (11, SECOND, of_part(f"header/{SECOND}", lambda _: pack(b"{}"))),
    "a header with a tensor twice": (11, SECOND, of_part(f"header/{SECOND}", lambda _: pack(b'{"a":1,"a":1}'))),
    # Tensors
    "a tensor too few": (10, f"{FIRST}: the tensors", lambda manifest, _: manifest["files"][0]["tensors"].pop()),
    "a tensor twice": (
        10,
        f"{FIRST}: the tensors",
        lambda manifest, _: manifest["files"][0]["tensors"].append(record(manifest, "x.weight")),
    ),
    "another key": (10, f"{FIRST}: the tensors", of_tensor("x.weight", key="z")),
    "an odd digest": (10, "digests", of_tensor("x.weight", digests=["abc"])),
    "a digest that is no hexadecimal": (10, "digests", of_tensor("x.weight", digests=[UNHEX])),
    "a digest and a line break": (10, "matching", of_tensor("x.weight", digests=[DIGEST + "\n"])),
    "two digests": (10, FIRST, of_tensor("x.weight", digests=[DIGEST, DIGEST])),
    "no digests": (10, FIRST, of_tensor("x.weight", digests=[])),
    "two digests of the source": (10, "x.weight", of_tensor("x.weight", source_digests=[DIGEST] * 2)),
    "another digest of the source": (23, "x.weight", of_tensor("x.weight", source_digests=[DIGEST])),
    "another stored tensor": (10, "ids: what comes out is not the base", stored(lambda data: data[::-1])),
    "no such source": (10, "nope", of_tensor("x.weight", source="nope")),
    "a source of another shape": (10, "x.weight", of_tensor("x.weight", source="y.weight")),
    "a source of another type": (10, "norm.weight", of_tensor("norm.weight", source="score.weight")),
    "stored, and is not": (10, "stored/norm.weight", of_tensor("norm.weight", how="stored")),
    "preimages, and are not": (10, "undo/norm.weight", of_tensor("norm.weight", how="preimages")),
    "a copy with terms": (10, "x.weight: what its", of_tensor("x.weight", how="copy", fragments=[])),
    "a residual with terms": (10, "x.weight: what its", of_tensor("x.weight", how="residual")),
    "a copy with fragments": (10, "norm.weight: what its", of_tensor("norm.weight", fragments=[0])),
    "preimages of integers": (
        10,
        "ids: what its",
        both(of_tensor("ids", how="preimages", fragments=[0]), lambda _, p: p.update({"undo/ids": as_part(b"")})),
    ),
    "a residual of integers": (
        10,
        "ids",
        both(of_tensor("ids", how="residual", fragments=[0]), lambda _, p: p.update({"undo/ids": as_part(b"")})),
    ),
    "no terms": (10, "x.weight", of_tensor("x.weight", terms=[])),
    "another way": (10, "how", of_tensor("x.weight", how="magic")),
    # Streams
    "no fragments": (10, "x.weight", of_tensor("x.weight", fragments=[])),
    "two fragments": (10, "x.weight", of_tensor("x.weight", fragments=[1, 1])),
    "a fragment that is too long": (10, "x.weight", of_tensor("x.weight", fragments=[1 << 40])),
    "a fragment beyond all numbers": (10, "x.weight", of_tensor("x.weight", fragments=[1 << 80])),
    "a negative fragment": (10, "x.weight", of_tensor("x.weight", fragments=[-1])),
    "fewer streams": (10, "x.weight", shortened),
    "more streams": (10, "x.weight", doubled),
    "the streams of another": (10, "x.weight", lambda _, p: p.update({"undo/x.weight": p["undo/y.weight"]})),
    "a sound residual of another head": (10, "head.weight: what comes out is not the base", another_residual),
    "no streams at all": (10, "undo/x.weight", without("undo/x.weight")),
    # Terms
    "no such adapter": (10, "adapter 7", of_term(adapter=7)),
    "the last adapter from the end": (10, "adapter -1", of_term(adapter=-1)),
    "no such factor": (10, "nope", of_term(tensors=["nope", A])),
    "factors in another order": (10, "x.weight", of_term(tensors=[A.replace("_A", "_B"), A])),
    "one factor twice": (10, "x.weight", of_term(tensors=[A, A])),
    "factors of another rank": (10, "factors of lora", another_rank),
    "three factors": (10, "x.weight", of_term(tensors=[A, A, A])),
    "swapped": (10, "x.weight", of_term(swapped=True)),
    "transposed": (10, "x.weight", of_term(transposed=True)),
    "another scale": (10, "x.weight", of_term(scale=1.25)),
    "a scale of zero": (10, "x.weight", of_term(scale=0)),
    "a scale out of range": (10, "scale", of_term(scale=10**400)),
    "a kind that is not known": (12, "x.weight", of_term(kind="dora")),
    "another kind": (10, "x.weight", of_term(kind="lora-bias")),
    # Adapters
    "no adapters": (10, "adapter 0", lambda manifest, _: manifest.update(adapters=[])),
    "held apart": (2, "adapter adapter is needed", lambda manifest, _: manifest["adapters"][0].update(held="apart")),
    "held in the base": (10, "stored/", lambda manifest, _: manifest["adapters"][0].update(held="in the base")),
    "a factor is missing": (10, FACTOR, without(FACTOR)),
    "a factor of NaN": (10, f"{A} is another tensor", of_part(FACTOR, lambda data: b"\xff" * len(data))),
    "a factor of integers": (10, f"{A} is another tensor", of_part(FACTOR, dtype="I32")),
    "a factor of another shape": (10, f"{A} is another tensor", of_part(FACTOR, shape=[4, 2])),
    # Small files
    "a small file that is not there": (10, "side/config.json", of_side("config.json", stored="packed")),
    "another small file": (10, "README.md", of_part("side/README.md", lambda _: pack(b"# Forged\n"))),
    "a small file as it is": (10, "side/config.json", of_side("config.json", stored="raw")),
    "another digest of a small file": (10, INDEX, of_side(INDEX, digest=DIGEST)),
    "an older receipt that is not there": (10, "side/lora_merge.json", older("lora_merge.json", "packed")),
    "an older receipt that is not stored": (10, "side/lora_merge.json", older("lora_merge.json", "")),
    "an older undo file that is not there": (10, "side/lora_merge.undo", older("lora_merge.undo", "raw")),
    "another older undo file": (10, "lora_merge.undo", older("lora_merge.undo", "raw", b"abd")),
    "a longer older undo file": (10, "lora_merge.undo", older("lora_merge.undo", "raw", b"abcd")),
    "another older receipt": (10, "lora_merge.json", older("lora_merge.json", "packed", pack(b"abd"))),
}


@pytest.mark.parametrize(("code", "words", "change"), CASES.values(), ids=CASES)
def test_one_thing_wrong(world: World, code: int, words: str, change: Change) -> None:
    place = world.spoilt(change)
    with world.refused(code) as caught:
        world.unmerge(given=False, undo=place)
    assert words in text_of(caught.value)


FINE: dict[str, Change] = {
    "another label": lambda manifest, _: manifest.update(base="x"),
    "another tool": lambda manifest, _: manifest.update(tool="mine 7"),
    "no digest of the merged header": lambda manifest, _: manifest["files"][0].pop("merged_header"),
    "what is the default": of_tensor("x.weight", source=""),
    "parts that nobody speaks of": lambda _, parts: parts.update({"note": as_part(b"of somebody")}),
    "a tensor in the undo file": stored(lambda data: data),
    "parts in another order": lambda _, parts: parts.update({FACTOR: parts.pop(FACTOR)}),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_what_changes_nothing_is_accepted(world: World, change: Change) -> None:
    world.restored(given=False, undo=world.spoilt(change))


# Anything wrong

WRONG: list[Any] = [None, True, -1, 0, 1 << 70, 0.5, "", "x", "../x", [], [0], ["x"], {}, {"x": 0}]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    made = copy.copy(document)
    made[path[0]] = replaced(document[path[0]], path[1:], value)
    return made


def changed(document: Any) -> Iterator[Any]:
    """Documents in which one value is another, or of another type, is absent, or has company."""
    for path in paths(document):
        for value in WRONG:
            yield replaced(document, path, value)
        if path and isinstance(path[-1], str):
            made = copy.deepcopy(document)
            inner = made
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            yield made
            inner["an unknown field"] = 1
            yield made


def test_any_value_of_the_manifest(world: World) -> None:
    """Whatever it says, no tensor comes out that is not the base's, and nothing but a refusal stops the program."""
    manifest, parts = read_undo(world.merged / UNDO)
    base, place = contents(world.base), world.folder / "spoilt"
    done, codes = 0, Counter[int]()
    for document in changed(manifest):
        write_undo(place, document, parts)
        try:
            with tiny.within(10):
                unmerge(world.merged, [], world.out, undo=place, threads=1)
        except LoraCliError as error:
            codes[error.exit_code] += 1
        else:
            found = contents(world.out)
            assert all(base[name] == data for name, data in found.items() if name.endswith(".safetensors"))
            shutil.rmtree(world.out)
        done += 1
        assert list(world.place.iterdir()) == []
    assert done > 1500
    assert codes.total() > 0.9 * done
    assert set(codes) <= {2, 10, 11, 12, 23}
