"""What an exact unmerge refuses: it names what is wrong, writes nothing, and never gives out another base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from undo_world import (
    FIRST,
    INDEX,
    LORA,
    RECEIPT,
    SECOND,
    UNDO,
    Parts,
    World,
    adapter_tensors,
    base_tensors,
    command,
    contents,
    flip_tensor,
    lora,
    names_in,
    numbers,
    read_raw,
    shard_of,
    span_of,
    text_of,
    write_raw,
)

from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.placing import PlanOptions

Tensors = dict[str, torch.Tensor]
A, B = f"{LORA}x.lora_A.weight", f"{LORA}y.lora_B.weight"
FACTORS = {f"{LORA}{module}.lora_{side}.weight" for module in "xy" for side in "AB"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).write().merge()


# Adapters


def with_one_bit(tensors: Tensors) -> Tensors:
    changed = tensors[A].clone()
    changed.view(torch.int32)[1, 3] ^= 1
    return tensors | {A: changed}


def renamed(tensors: Tensors) -> Tensors:
    return {key.replace("y.lora_B", "z.lora_B"): tensor for key, tensor in tensors.items()}


ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], set[str]]] = {
    "other factors": (lambda tensors: tensors | lora("x", 6, 4, 90) | lora("y", 3, 5, 92), FACTORS),
    "one bit of a factor": (with_one_bit, {A}),
    "another name": (renamed, {f"{B} is missing"}),
    "a factor is missing": (lambda tensors: {k: v for k, v in tensors.items() if k != B}, {f"{B} is missing"}),
    "the same bytes of another type": (lambda tensors: tensors | {A: tensors[A].view(torch.int32)}, {A}),
    "the same bytes in another shape": (lambda tensors: tensors | {A: tensors[A].reshape(4, 2)}, {A}),
    "nothing of it": (lambda _: {"other": torch.ones(1)}, FACTORS),
}


@pytest.mark.parametrize(("change", "named"), ADAPTERS.values(), ids=ADAPTERS)
def test_another_adapter(world: World, change: Callable[[Tensors], Tensors], named: set[str]) -> None:
    other = world.write_adapter("other", change(adapter_tensors()))
    with world.refused(23) as caught:
        world.unmerge(other)
    assert (caught.value.file, caught.value.message) == ("other", "The adapter is not the one that was merged")
    assert names_in(caught.value.details, *named)
    assert str(caught.value.expected).startswith("adapter, content digest ")
    assert str(caught.value.hint).startswith("adapter was merged last; ")
    with world.refused(23):
        world.unmerge(world.adapter, other)


def test_an_adapter_too_many(world: World) -> None:
    one = world.write_adapter("one", adapter_tensors(20))
    two = world.write_adapter("two", adapter_tensors(20) | lora("x", 6, 4, 30))
    command("merge", world.base, one, two, "-o", world.folder / "both")
    with world.refused(23) as caught:
        world.unmerge(one, two, world.adapter, merged=world.folder / "both")
    assert caught.value.file == "adapter"
    assert str(caught.value.hint).startswith("2 adapters were merged last, one, two; ")


def test_no_adapter(world: World) -> None:
    with world.refused(2) as caught:
        world.unmerge(given=False)
    (said,) = json.loads((world.merged / RECEIPT).read_text())["adapters"]
    assert "The adapter adapter is needed" in caught.value.message
    assert caught.value.expected == f"content digest {said['digest']}"


def test_the_same_factors_in_another_file(world: World) -> None:
    tensors = dict(reversed(adapter_tensors().items()))
    again = world.folder / "again.safetensors"
    save_file({key: tensors[key] for key in sorted(FACTORS, reverse=True)}, again, {"saved": "by somebody else"})
    world.restored(again)
    # What the adapter replaced whole needs no adapter to come back.
    world.restored(world.write_adapter("head", tensors | {f"{LORA}head.weight": torch.zeros(3, 4)}))


def test_several_adapters(tmp_path: Path) -> None:
    world = World(tmp_path).write()
    second = world.write_adapter("second", lora("x", 6, 4, 30))
    third = world.write_adapter("third", lora("x", 6, 4, 40))
    world.merge(world.adapter, second, options=PlanOptions(weights=(1.0, 0.5)))
    world.restored(second, world.adapter)
    world.restored(world.adapter, second, second)
    for given, missing in ((world.adapter, "second"), (second, "adapter")):
        with world.refused(2) as caught:
            world.unmerge(given)
        assert f"The adapter {missing} is needed" in caught.value.message
    with world.refused(23) as caught:
        world.unmerge(world.adapter, third, second)
    assert caught.value.file == "third"
    # Of several it is told what is different from the one that is most alike.
    for name, tensors in (("adapter", adapter_tensors()), ("second", lora("x", 6, 4, 30))):
        tensors[A].view(torch.int32)[0, 0] ^= 1
        spoilt = world.write_adapter("spoilt", tensors)
        with world.refused(23) as caught:
            world.unmerge(spoilt)
        assert f"{name}, content digest " in str(caught.value.expected)
        assert names_in(caught.value.details, A)


def test_an_adapter_in_the_undo_file_is_not_asked_for_and_another_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path).write().merge(embed_adapter=True)
    world.restored(given=False)
    world.restored(world.adapter)
    other = world.write_adapter("other", with_one_bit(adapter_tensors()))
    with world.refused(23):
        world.unmerge(other)


# The merged checkpoint

CHANGED = (["x.weight"], ["y.weight"], ["norm.weight"], ["ids"], ["head.weight"], ["head.weight", "ids", "x.weight"])


@pytest.mark.parametrize("keys", CHANGED, ids="+".join)
def test_tensors_that_were_changed_since(world: World, keys: list[str]) -> None:
    for bit, key in enumerate(keys):
        flip_tensor(world.merged, key, bit)
    with world.refused(23) as caught:
        world.unmerge()
    assert caught.value.details == tuple(sorted(keys))
    assert caught.value.file == "merged"


@pytest.mark.parametrize("key", ["x.weight", "y.weight", "head.weight"])
def test_every_change_of_a_value_is_told_from_a_damaged_undo_file(world: World, key: str) -> None:
    """Streams do not decode with other values; that is the checkpoint's fault."""
    path = shard_of(world.merged, key)
    good, span = path.read_bytes(), span_of(path, key)
    fills = [bytes([byte]) * len(span) for byte in (0, 0x7F, 0x80, 0xFF)]
    flips = [good[span.start + at : span.start + at + 1] for at in range(len(span))]
    changes = [(span.start, fill) for fill in fills]
    changes += [(span.start + at, bytes([byte[0] ^ 1 << at % 8])) for at, byte in enumerate(flips)]
    for at, data in changes:
        path.write_bytes(good[:at] + data + good[at + len(data) :])
        with world.refused(23) as caught:
            world.unmerge()
        assert caught.value.details == (key,)


def test_a_renamed_tensor_is_named_as_it_is_called_there(tmp_path: Path) -> None:
    world = World(tmp_path)
    wrapped = {"x.base.weight": numbers(6, 4, seed=1), "ln.base.weight": numbers(6, seed=2)}
    wrapped |= {key.removeprefix(LORA): tensor for key, tensor in lora("x", 6, 4, 5).items()}
    wrapped |= {key.removeprefix(LORA): tensor for key, tensor in lora("ln", 6, 4, 7).items()}
    wrapped["ln.base.weight"] = numbers(6, 4, seed=2)
    world.write_base(world.base, wrapped)
    world.merge(world.write_adapter("y", lora("x", 6, 4, 9)), options=PlanOptions(read=ReadOptions(scale=0.5)))
    world.restored(world.folder / "y")
    for key in ("x.weight", "ln.weight"):
        flip_tensor(world.merged, key)
    with world.refused(23) as caught:
        world.unmerge(world.folder / "y")
    assert caught.value.details == ("ln.weight", "x.weight")


def test_what_the_merge_added_does_not_matter(world: World) -> None:
    flip_tensor(world.merged, "score.weight")
    result = world.restored()
    assert result.tensors["dropped"] == 1


def resharded(world: World) -> None:
    tensors = load_file(world.merged / FIRST) | load_file(world.merged / SECOND)
    for name in (FIRST, SECOND, INDEX):
        (world.merged / name).unlink()
    save_file(tensors, world.merged / "model.safetensors", {"format": "pt"})


def reheaded(change: Callable[[dict[str, str], Parts], object]) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        metadata, parts = read_raw(world.merged / FIRST)
        change(metadata, parts)
        write_raw(world.merged / FIRST, metadata, parts)

    return spoil


def padded(world: World) -> None:
    data = (world.merged / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    data = (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    (world.merged / FIRST).write_bytes(data)


FILES: dict[str, tuple[Callable[[World], object], set[str]]] = {
    "one file": (resharded, {f"{FIRST}: missing", f"{SECOND}: missing"}),
    "other metadata": (reheaded(lambda said, _: said.update(format="np")), {f"{FIRST}: another header"}),
    "no metadata": (reheaded(lambda said, _: said.clear()), {f"{FIRST}: another header"}),
    "spaces after the header": (padded, {f"{FIRST}: another header"}),
    "another type": (
        reheaded(lambda _, parts: parts.update({"x.weight": ("F16", *parts["x.weight"][1:])})),
        {f"{FIRST}: another header"},
    ),
    "another shape": (
        reheaded(lambda _, parts: parts.update({"x.weight": ("BF16", [4, 6], parts["x.weight"][2])})),
        {f"{FIRST}: another header"},
    ),
}


@pytest.mark.parametrize(("spoil", "named"), FILES.values(), ids=FILES)
def test_files_that_were_written_anew(world: World, spoil: Callable[[World], object], named: set[str]) -> None:
    spoil(world)
    with world.refused(23) as caught:
        world.unmerge()
    assert set(caught.value.details) == named
    assert (caught.value.file, caught.value.expected) == ("merged", "what merging into base gave")


def test_a_shard_is_missing(world: World) -> None:
    (world.merged / SECOND).unlink()
    with world.refused(10) as caught:
        world.unmerge()
    assert SECOND in text_of(caught.value)


# The undo file of something else


def other_worlds(folder: Path) -> Iterator[tuple[str, World]]:
    """Merges of which every file has the same header as those of the usual one."""
    for name in ("another weight", "another base", "one tensor of another base"):
        (folder / name).mkdir()
        world = World(folder / name)
        if name == "another base":
            world.write({key: tensor.flip(0) for key, tensor in base_tensors().items()})
        else:
            world.write(base_tensors() | ({"ids": torch.ones(4, dtype=torch.int64)} if name[:3] == "one" else {}))
        weights = PlanOptions(read=ReadOptions(alpha=4.5)) if name == "another weight" else None
        yield name, world.merge(options=weights)


def test_the_undo_file_of_another_merge(world: World, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    edited = ("x.weight", "y.weight")
    expected = {"another weight": edited, "another base": ("ids", "norm.weight", *edited)}
    for name, other in other_worlds(tmp_path / "others"):
        with world.refused(23) as caught:
            world.unmerge(undo=other.merged / UNDO)
        # The head is the adapter's in all of them.
        assert caught.value.details == expected.get(name, ("ids",)), name
        with other.refused(23):
            other.unmerge(undo=world.merged / UNDO)


def test_the_undo_file_of_a_merge_of_another_adapter(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other").write()
    other.merge(other.write_adapter("b", adapter_tensors(seed=50)), embed_adapter=True)
    with world.refused(23) as caught:
        world.unmerge(undo=other.merged / UNDO)
    assert "b, content digest" in str(caught.value.expected)
    with world.refused(23) as caught:
        world.unmerge(undo=other.merged / UNDO, given=False)
    assert caught.value.details == ("head.weight", "x.weight", "y.weight")


def test_the_undo_file_lies_elsewhere(world: World, tmp_path: Path) -> None:
    elsewhere = tmp_path / "kept.safe"
    shutil.move(world.merged / UNDO, elsewhere)
    with world.refused(23) as caught:
        world.unmerge()
    assert "--undo" in text_of(caught.value)
    assert "--approximate" in text_of(caught.value)
    world.restored(undo=elsewhere)
    (tmp_path / "link").symlink_to(elsewhere)
    world.restored(undo=tmp_path / "link")


# Options


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(weights=(1.0,)),
        PlanOptions(maps=("a=b",)),
        PlanOptions(dtype="bf16"),
        PlanOptions(allow_unmapped=True),
        PlanOptions(orientation="ba"),
        PlanOptions(read=ReadOptions(scale=2.0)),
        PlanOptions(read=ReadOptions(alpha=2.0)),
        PlanOptions(read=ReadOptions(ignore_fields=("x",))),
    ],
    ids=repr,
)
def test_options_that_the_undo_file_knows_itself(world: World, options: PlanOptions) -> None:
    with world.refused(2) as caught:
        world.unmerge(options=options)
    assert "--approximate" in str(caught.value.hint)


def test_either_an_undo_file_or_an_approximation(world: World) -> None:
    with world.refused(2) as caught:
        world.unmerge(undo=world.merged / UNDO, approximate=True)
    assert "--approximate" in caught.value.message
    assert contents(world.place) == {}


# The command line


LINES: dict[str, tuple[int, str, list[str]]] = {
    "no adapter": (2, "content digest", []),
    "a weight": (2, "--approximate", ["{adapter}", "--weight", "1"]),
    "a scale": (2, "--approximate", ["{adapter}", "--scale", "1"]),
    "both ways": (2, "--approximate", ["{adapter}", "--undo", "{undo}", "--approximate"]),
    "no such undo file": (2, "nothing.undo", ["{adapter}", "--undo", "nothing.undo"]),
    "no undo file": (10, "config.json", ["{adapter}", "--undo", "{merged}/config.json"]),
    "a device": (11, "regular file", ["{adapter}", "--undo", "/dev/null"]),
    "another adapter": (23, "is not the one that was merged", ["{other}"]),
}


@pytest.mark.parametrize(("code", "words", "line"), LINES.values(), ids=LINES)
@pytest.mark.parametrize("dry", [False, True])
def test_exit_codes(
    world: World, capsys: pytest.CaptureFixture[str], code: int, words: str, line: list[str], dry: bool
) -> None:
    places = {"adapter": world.adapter, "merged": world.merged, "undo": world.merged / UNDO}
    places["other"] = world.write_adapter("other", lora("x", 6, 4, 90))
    given = [part.format(**places) for part in line]
    found = command("unmerge", world.merged, *given, "-o", world.out, *(["--dry-run"] if dry else []))
    said = capsys.readouterr()
    assert (found, said.out) == (code, "")
    assert said.err.startswith("error: ")
    assert words in said.err
    assert "Traceback" not in said.err
    assert contents(world.place) == {}
