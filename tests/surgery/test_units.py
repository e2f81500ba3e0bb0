"""Units of work: together they write each byte of an output once, and copies take the bytes that belong there."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from round_trips import gaussian, lora, write_adapter, write_base, write_raw

from lora_cli.checkpoint import digests
from lora_cli.surgery import units
from lora_cli.surgery.budget import UNIT_BYTES
from lora_cli.surgery.edit import Edit
from lora_cli.surgery.merge import plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.plan import OutputFile, Plan
from lora_cli.surgery.units import Unit, units_of

UNTOUCHED = "model-00003-of-00003.safetensors"


def tensors() -> dict[str, Any]:
    """In three shards: what takes deltas beside what is copied, types of all widths, empty tensors; and what is left.

    Copies and what is computed alternate.
    """
    return {
        "ids": ("I64", [9], bytes(72)),
        "x.weight": gaussian(1, 30, 20),
        "x.bias": gaussian(2, 30),
        "y.weight": gaussian(3, 30, 20),
        "empty": ("F32", [0, 4], b""),
        "z.weight": gaussian(4, 11, 7),
        "half": ("F16", [5, 3], bytes(30)),
        "w.weight": gaussian(5, 25, 13),
        "packed": ("F4", [4, 3], b"654321"),
        "scalar": ("C64", [], b"76543210"),
        "last": gaussian(6, 100, 7),
        "very last": ("U8", [13], bytes(13)),
    }


def merged(folder: Path, options: PlanOptions | None = None, **others: Any) -> Plan:
    base = write_base(folder / "base", tensors(), 3)
    factors: dict[str, Any] = lora(20, "x", 30, 20) | lora(30, "y", 30, 20) | lora(40, "w", 25, 13) | others
    adapter = write_adapter(folder / "adapter", factors, modules_to_save=["z", "half", "head"])
    return plan_merge(base, [adapter], options)


def plain(folder: Path) -> Plan:
    return merged(folder)


def one_file(folder: Path) -> Plan:
    base = write_base(folder / "base", tensors())
    return plan_merge(base, [write_adapter(folder / "adapter", lora(20, "y", 30, 20))])


def other_types(folder: Path) -> Plan:
    """Every floating tensor is cast, and with it the untouched shard; what is no number here is copied."""
    return merged(folder, PlanOptions(dtype="bf16"))


def wider_types(folder: Path) -> Plan:
    return merged(folder, PlanOptions(dtype="fp32"))


def replaced(folder: Path) -> Plan:
    """Tensors of the adapter take the place of the base's, or come after them."""
    others: dict[str, Any] = {"z.weight": gaussian(50, 11, 7), "head.weight": gaussian(51, 9, 3)}
    return merged(folder, **others)


def renamed(folder: Path) -> Plan:
    """The base carries factors of its own, which go, and names that change; headers are written anew."""
    stored: dict[str, Any] = {
        "a": gaussian(1, 17),
        "x.base.weight": gaussian(2, 30, 20),
        "x.base.bias": gaussian(3, 30),
    }
    stored |= lora(4, "x", 30, 20) | {"b": gaussian(6, 40), "c": ("I16", [3], bytes(6))}
    base = write_base(folder / "base", stored)
    wrap = {"schema": "lora-cli/wrap/1", "alpha": 4, "rank": 4, "scaling": "alpha/rank"}
    (base / "lora_wrap.json").write_text(json.dumps(wrap))
    return plan_merge(base)


def odd_header(folder: Path) -> Plan:
    """No library writes such a header; it is kept where no tensor gets another name, type or shape."""
    raw = {"x.weight": ("F32", (30, 20), bytes(2400)), "rest": ("F32", (50,), bytes(200))}
    base = write_raw(folder / "odd.safetensors", raw, {"a": "b"}, odd=True)
    return plan_merge(base, [write_adapter(folder / "adapter", lora(20, "x", 30, 20))], out=folder / "o.safetensors")


PLANS: dict[str, Callable[[Path], Plan]] = {
    make.__name__: make for make in (plain, one_file, other_types, wider_types, replaced, renamed, odd_header)
}
SIZES = {"as they are": (UNIT_BYTES, digests.CUT_ELEMENTS), "small": (256, 300), "tiny": (7, 1)}
"""Most bytes that are copied at once, and most elements of a cut."""


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return PLANS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=SIZES)
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    copied, cut = SIZES[request.param]
    monkeypatch.setattr(units, "UNIT_BYTES", copied)
    monkeypatch.setattr(digests, "CUT_ELEMENTS", cut)
    return copied


def test_the_plans_are_what_they_are_for(tmp_path: Path) -> None:
    made = {name: make(tmp_path / name) for name, make in PLANS.items()}
    operations = {name: {edit.operation for edit in plan.edits} for name, plan in made.items()}
    assert "cast" in operations["other_types"] & operations["wider_types"]
    assert {"replace", "append"} <= operations["replaced"]
    assert {"keep", "rename"} <= operations["renamed"]
    assert all("add" in found and {"keep", "rename"} & found for found in operations.values())
    assert [file.name for file in made["plain"].files if file.untouched] == [UNTOUCHED]


def copies(found: list[Unit]) -> list[Unit]:
    return [unit for unit in found if unit.source is not None]


def place(file: OutputFile, unit: Unit) -> tuple[int, int]:
    """Which bytes of the output file a unit writes."""
    if unit.edit is None:
        return unit.begin, unit.end
    start, rows = file.header.data_start + unit.edit.begin, unit.edit.matrix[0]
    return start + unit.edit.nbytes * unit.begin // rows, start + unit.edit.nbytes * unit.end // rows


def written(file: OutputFile, found: list[Unit]) -> list[Unit]:
    """Units that write: those that only look at a copied tensor are left out."""
    return [unit for unit in found if unit.edit is None or not unit.edit.copies]


@pytest.mark.parametrize("seen", [False, True])
def test_each_byte_of_the_output_is_written_once(plan: Plan, most: int, seen: bool) -> None:
    for number, file in enumerate(plan.files):
        found = list(units_of(number, file, seen=seen))
        assert {unit.file for unit in found} <= {number}
        places = [place(file, unit) for unit in written(file, found)]
        # The header is copied with the data where it is the same; else it is a unit of its own.
        own = [place(file, unit) for unit in found if unit.edit is None and unit.source is None]
        assert own == ([] if kept_header(file) else [(0, file.header.data_start)])
        at = 0
        for begin, end in places:  # in byte order
            assert begin == at
            assert end > begin
            at = end
        assert at == file.size
        assert all(unit.nbytes == end - begin for unit, (begin, end) in zip(written(file, found), places, strict=True))


def kept_header(file: OutputFile) -> bool:
    """Whether a file that tensors come from begins as the output does."""
    paths = {edit.source.shard.source.path for edit in file.edits}
    return any(path.read_bytes()[: file.header.data_start] == file.header.prefix for path in paths)


@pytest.mark.parametrize("seen", [False, True])
def test_copies_take_the_bytes_that_belong_there(plan: Plan, most: int, seen: bool) -> None:
    for number, file in enumerate(plan.files):
        start = file.header.data_start
        for unit in copies(list(units_of(number, file, seen=seen))):
            assert unit.source is not None  # or it would be no copy
            assert 0 < unit.nbytes <= most
            raw = unit.source.path.read_bytes()[unit.source_offset : unit.source_offset + unit.nbytes]
            assert raw == b"".join(expected(file, start, unit.begin, unit.end))


def expected(file: OutputFile, start: int, begin: int, end: int) -> Iterator[bytes]:
    """The bytes `begin` to `end` of an output file, which are header and copied tensors."""
    yield file.header.prefix[begin:end]
    for edit in file.edits:
        first, last = max(begin, start + edit.begin), min(end, start + edit.end)
        if first < last:
            assert edit.copies
            at = edit.source.offset + first - start - edit.begin
            yield edit.source.shard.source.path.read_bytes()[at : at + last - first]


def test_rows_are_whole_and_in_cuts(plan: Plan, most: int) -> None:
    for number, file in enumerate(plan.files):
        rows: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for unit in written(file, list(units_of(number, file))):
            if unit.edit is not None:
                assert (unit.source, unit.source_offset) == (None, 0)
                rows[unit.edit.key].append((unit.begin, unit.end))
        computed = {edit.key: edit for edit in file.edits if edit.nbytes and not edit.copies}
        assert rows.keys() == computed.keys()
        for key, found in rows.items():
            assert found == cuts_of(computed[key])


def cuts_of(edit: Edit) -> list[tuple[int, int]]:
    height = digests.rows_per_cut(edit.shape, edit.dtype)
    rows = edit.shape[0] if edit.shape else 1
    return [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]


def test_what_is_seen_comes_as_rows_beside_the_same_copies(plan: Plan, most: int) -> None:
    looked = 0
    for number, file in enumerate(plan.files):
        unseen, seen = list(units_of(number, file)), list(units_of(number, file, seen=True))
        assert copies(seen) == copies(unseen)
        assert written(file, seen) == unseen
        for edit in file.edits:
            found = [(unit.begin, unit.end) for unit in seen if unit.edit is edit]
            assert found == (cuts_of(edit) if edit.nbytes else [])
            looked += edit.copies * len(found)
        assert all(unit.source is None for unit in seen if unit.edit is not None)
    assert looked


@pytest.mark.parametrize("seen", [False, True])
def test_an_untouched_shard_is_one_copy_of_all_of_its_file(tmp_path: Path, most: int, seen: bool) -> None:
    plan = plain(tmp_path)
    number = [file.name for file in plan.files].index(UNTOUCHED)
    file = plan.files[number]
    found = copies(list(units_of(number, file, seen=seen)))
    assert {unit.source for unit in found} == {file.base.source}
    assert [(unit.source_offset, unit.begin, unit.end) for unit in found] == [
        (begin, begin, min(begin + most, file.size)) for begin in range(0, file.size, most)
    ]
    if most >= file.size:
        assert len(found) == 1


def test_neighbours_are_copied_together(tmp_path: Path) -> None:
    """Between tensors that are computed there is one copy, however many tensors are in it."""
    plan = plain(tmp_path)
    for number, file in enumerate(plan.files):
        kinds = [unit.edit is None for unit in units_of(number, file)]
        computed = sum(1 for edit in file.edits if edit.nbytes and not edit.copies)
        assert kinds.count(False) == computed
        assert kinds.count(True) <= computed + 1
        assert not any(one and other for one, other in itertools.pairwise(kinds))
