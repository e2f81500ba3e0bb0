"""The format of undo files, said once more: one is built here from docs/undo-file.md by hand, and read by the program.

Only json, struct, zlib, zstd, blake3 and the safetensors library: nothing of the program's own code.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.numpy import save as save_numpy
from safetensors.torch import save
from undo_world import NEWER, NEWEST

from lora_cli.adapters.expert_layout import Packing
from lora_cli.adapters.tuners import METHODS
from lora_cli.checkpoint import manifest as records
from lora_cli.surgery.unmerge import unmerge

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PAGE = Path(__file__).parents[2] / "docs" / "undo-file.md"


def digest(*parts: bytes) -> str:
    """The digest of a file that holds no tensors, or of one cut."""
    return blake3(b"".join(parts)).hexdigest()


def split(file: bytes) -> tuple[bytes, bytes]:
    """What stands before the data of a safetensors file, and the data."""
    start = 8 + int.from_bytes(file[:8], "little")
    return file[:start], file[start:]


def packed(data: bytes) -> bytes:
    """Compressed, after its length."""
    return len(data).to_bytes(8, "little") + zstd.compress(data, 19)


def checked(header: bytes, content: bytes) -> bytes:
    """A header, the CRC-32 of it and of what follows, and what follows."""
    return header + struct.pack("<I", zlib.crc32(header + content)) + content


def fragment(head: bytes, tail: bytes) -> bytes:
    """One group of one stream."""
    frame = zstd.compress(head)
    return checked(struct.pack("<IIII", 1, len(frame), len(head), len(tail)), frame) + tail


# Two streams


def line(pattern: int, bits: int = 32) -> int:
    """The place of a float among all floats in order: +0.0 at 0, -0.0 at -1."""
    sign = 1 << (bits - 1)
    return pattern if pattern < sign else -1 - (pattern - sign)


def residual(base: Sequence[float], merged: Sequence[float]) -> bytes:
    """How far values of float32 lie from those that are there."""
    both = zip(np.array(base, "<f4").view("<u4").tolist(), np.array(merged, "<f4").view("<u4").tolist(), strict=True)
    steps = [(line(one) - line(other) + (1 << 31)) % (1 << 32) - (1 << 31) for one, other in both]
    folded = [2 * step if step >= 0 else -2 * step - 1 for step in steps]
    planes = [bytes(value >> 8 * plane & 0xFF for value in folded) for plane in range(4)]
    return fragment(checked(struct.pack("<HBBI", 1, 4, 1, len(folded)), b"".join(planes)), b"")


def preimages(indices: Sequence[int], spares: Sequence[int], at: Sequence[int], patterns: Sequence[int]) -> bytes:
    """Which value of its interval each element of bfloat16 was, and the exceptions; no interval reaches zero."""
    planes = b""
    for bit in range(max(spares).bit_length()):
        alive = [index for index, spare in zip(indices, spares, strict=True) if spare >> bit]
        number = sum((index >> bit & 1) << place for place, index in enumerate(alive))
        planes += number.to_bytes(-(-len(alive) // 8), "little")
    middle = struct.pack(f"<{len(at)}I{len(patterns)}H", *at, *patterns)
    header = struct.pack("<HHIIIII", 1, 1 << 8 | 1, len(spares), 0, 0, len(at), len(planes))
    stream = checked(header, middle + planes)
    return fragment(stream[: len(stream) - len(planes)], stream[len(stream) - len(planes) :])


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor([values]).to(torch.bfloat16)


STEP = 2.0**-7
"""Between numbers of bfloat16 from 1 to 2; from 2 to 4 it is twice that."""

# With 1 added, each of the three around 1.5 rounds to 2.5, which is even.
BASE_W = bf16(1.5, 1.5 + STEP, 1.5 - STEP)
MERGED_W = bf16(2.5, 2.5, 2.5)
PATTERNS = BASE_W.view(torch.int16).flatten().tolist()


@pytest.mark.parametrize("exception", [False, True])
def test_an_undo_file_that_was_written_by_hand(tmp_path: Path, exception: bool) -> None:
    base = {"gone": torch.arange(3), "head": torch.tensor([1.0, -2.0]), "old.name": torch.ones(2, dtype=torch.int32)}
    base |= {"kept": torch.tensor(7.0, dtype=torch.float64), "none": torch.ones(0, 2), "w": BASE_W}
    merged = {"head": torch.tensor([1.0000001, 3.0]), "kept": base["kept"], "new.name": base["old.name"], "w": MERGED_W}
    merged |= {"none": base["none"], "extra": torch.ones(2)}
    factors = {"b": torch.tensor([[2.0]]), "a": torch.tensor([[0.5, 0.5, 0.5]])}
    base_file, merged_file = save(base, {"format": "pt"}), save(merged, {"by": "hand"})
    header, data = split(base_file)
    named = json.loads(header[8:])
    spans = {key: data[slice(*said["data_offsets"])] for key, said in named.items() if key != "__metadata__"}
    there = {key: value.numpy().tobytes() for key, value in merged.items() if key != "w"}
    there["w"] = MERGED_W.view(torch.int16).numpy().tobytes()

    # An exception stands beside the index of its element, which is then of no use.
    streams = {
        "w": preimages([1, 0 if exception else 2, 0], [2, 2, 2], *(([1], [PATTERNS[1]]) if exception else ([], [])))
    }
    streams["head"] = residual([1.0, -2.0], [1.0000001, 3.0])
    term = {"kind": "lora", "adapter": 0, "tensors": ["a", "b"], "scale": 1.0}
    tensors: dict[str, dict[str, Any]] = {
        "gone": {"how": "stored", "digests": [digest(spans["gone"])]},
        "head": {
            "how": "residual",
            "digests": [digest(spans["head"])],
            "source_digests": [digest(there["head"])],
            "fragments": [len(streams["head"])],
        },
        "kept": {"how": "copy", "digests": [digest(spans["kept"])]},
        "none": {"how": "copy", "digests": []},
        "old.name": {"how": "copy", "digests": [digest(spans["old.name"])], "source": "new.name"},
        "w": {
            "how": "preimages",
            "digests": [digest(spans["w"])],
            "source_digests": [digest(there["w"])],
            "fragments": [len(streams["w"])],
            "terms": [term],
        },
    }
    order = sorted(tensors, key=lambda key: (*named[key]["data_offsets"], key))
    cuts = [bytes.fromhex(cut) for key in order for cut in tensors[key]["digests"]]
    card, config, older = b"# The base's own\n", b'{"model_type": "none"}', b"an older undo file"
    manifest: dict[str, Any] = {
        "arithmetic": 1,
        "tool": "by hand",
        "base": "some base",
        "files": [
            {
                "name": "model.safetensors",
                "size": len(base_file),
                "digest": digest(blake3(header).digest(), *cuts),
                "tensors": [{"key": key} | tensors[key] for key in order],
                "own_header": True,
                "merged_header": digest(split(merged_file)[0]),
            }
        ],
        "side_files": [
            {"name": "README.md", "size": len(card), "digest": digest(card), "stored": "packed"},
            {"name": "config.json", "size": len(config), "digest": digest(config)},
            {"name": "lora_merge.undo", "size": len(older), "digest": digest(older), "stored": "raw"},
        ],
        "adapters": [
            {
                "label": "some adapter",
                "digest": digest(b"whatever"),
                "factors": {
                    "a": f"F32 [1, 3] {digest(factors['a'].numpy().tobytes())}",
                    "b": f"F32 [1, 1] {digest(factors['b'].numpy().tobytes())}",
                },
                "held": "embedded",
            }
        ],
    }
    content = packed(json.dumps(manifest, indent=4).encode())
    raw = {f"undo/{key}": stream for key, stream in streams.items()}
    raw |= {"header/model.safetensors": packed(header[8:]), "side/README.md": packed(card), "manifest": content}
    raw["side/lora_merge.undo"] = older
    parts = {name: np.frombuffer(data, np.uint8) for name, data in raw.items()}
    parts |= {f"factor/0/{name}": factor.numpy() for name, factor in factors.items()}
    parts["stored/gone"] = base["gone"].numpy()
    undo = save_numpy(parts, {"format": "lora-cli/undo/1", "manifest": digest(content)})

    folder, back = tmp_path / "merged", tmp_path / "back"
    folder.mkdir()
    for name, data in {"model.safetensors": merged_file, "config.json": config, "README.md": b"# Merged\n"}.items():
        (folder / name).write_bytes(data)
    (folder / "lora_merge.undo").write_bytes(undo)
    result = unmerge(folder, [], back)
    assert result.exact
    files = {"model.safetensors": base_file, "README.md": card, "config.json": config, "lora_merge.undo": older}
    assert {path.name: path.read_bytes() for path in back.iterdir() if path.name != "lora_unmerge.json"} == files
    assert {file.name: file.digest for file in result.files if file.digest} == {
        "model.safetensors": manifest["files"][0]["digest"],
        **{side["name"]: side["digest"] for side in manifest["side_files"]},
    }


# The page


def test_the_page_has_every_field_of_the_manifest() -> None:
    text = PAGE.read_text("utf-8")
    kinds: list[type[msgspec.Struct]] = [records.Manifest, records.FileRecord, records.TensorRecord]
    kinds += [records.TermRecord, records.SideRecord, records.AdapterRecord]
    for kind in kinds:
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in text, f"{kind.__name__}.{field.name}"


def test_only_what_needs_a_newer_format_says_so() -> None:
    """Older readers know no other number than theirs."""
    term = records.TermRecord("lora", 0, ("a", "b"), 1.0, swapped=True, transposed=True)
    newer: list[dict[str, Any]] = [{"outputs": (0, 2, 3)}, {"rows": ((0, 2, 1),)}, {"blocks": 2}]
    tensor = records.TensorRecord("w", "preimages", ("0" * 64,), "v", ("0" * 64,), (7,), (term,))
    tensors = [msgspec.structs.replace(tensor, terms=(term, msgspec.structs.replace(term, **said))) for said in newer]
    tensors.append(msgspec.structs.replace(tensor, gains="0" * 64))
    newest: list[dict[str, Any]] = [{"matrix": 0}, {"at": 0, "count": 2}, {"layout": "packed"}, {"shape": (3, 2)}]
    newest.append({"outputs": (0, 3, 3, 2)})
    new = [msgspec.structs.replace(tensor, terms=(msgspec.structs.replace(term, **said),)) for said in newest]
    for number, said in [(1, tensor), *((2, other) for other in tensors), *((3, other) for other in new)]:
        file = records.FileRecord("f", 1, "0" * 64, (said,), own_header=True, appended={"x": ("0" * 64,)})
        assert records.Manifest(1, "t", "b", (file,), (), ()).format == number


@pytest.mark.parametrize(("number", "expected"), [(2, NEWER | {"gains/KEY"}), (3, NEWEST)])
def test_the_page_marks_what_newer_formats_have(number: int, expected: set[str]) -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    marked = {line.split("`")[1] for line in lines if line.startswith("| `") and f"| ({number})" in line}
    assert marked == expected


def test_the_page_has_every_layout_and_every_formula_with_its_tensors() -> None:
    """And no formula of which nothing is computed again."""
    lines = PAGE.read_text("utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert set(get_args(Packing)) <= rows.keys()
    together = " ".join(rows[kind] for kind in ("pvera", "vblora", "lokr"))
    for kind, method in METHODS.items():
        said = rows.get(kind, together if f"`{kind}`" in together else "")
        assert bool(said) == method.preimages, kind
        first = method.parts[0]
        assert not said or "pvera" in kind or f"`{first}`" in said or "the first two" in said, kind


def test_the_page_has_every_part() -> None:
    text = PAGE.read_text("utf-8")
    for part in ("stored/KEY", "factor/N/NAME", "undo/KEY", "gains/KEY", "header/FILE", "side/NAME", "manifest"):
        assert f"`{part}`" in text
