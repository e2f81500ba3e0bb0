"""One function for each parser of files that nobody vouches for: bytes go in as the program reads them, with laws.

A target returns where the bytes are accepted, raises a `LoraCliError` where they are refused, and an AssertionError
where a law is broken. Anything else that comes out is a fault of the program. Corpus and fuzzer share these functions:
`tests/reliability/test_corpus.py` runs every file of `tests/corpus` through them, `scripts/fuzz` what it makes of them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

import fuzz_worlds as worlds
import msgspec
import torch
import yaml
from blake3 import blake3
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from safetensors import SafetensorError, deserialize

from lora_cli.adapters.deltas import LowRank
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.resolve import parse_maps, resolve
from lora_cli.adapters.source import ReadOptions, look_at_adapter
from lora_cli.adapters.target_files import expand
from lora_cli.adapters.targets import select
from lora_cli.adapters.ties import ties
from lora_cli.adapters.wrap_file import WRAP_FILE
from lora_cli.adapters.wrapped import unwrap
from lora_cli.arithmetic.fragments import read_fragment
from lora_cli.arithmetic.zstd import compress
from lora_cli.checkpoint import strict_json
from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.header import parse_header, read_header_length, render_header
from lora_cli.checkpoint.index import parse_index
from lora_cli.checkpoint.journal import JOURNAL, Begun, read_journal
from lora_cli.checkpoint.quantised import Quantised
from lora_cli.checkpoint.repairs import numbered_layers, repaired, untied, with_dtype, with_layers, with_vocabulary
from lora_cli.checkpoint.sidefiles import SideFile
from lora_cli.checkpoint.undo_file import open_undo_file
from lora_cli.errors import LoraCliError
from lora_cli.progress import SILENT
from lora_cli.surgery.budget import STRIP_BYTES, Budget
from lora_cli.surgery.card import model_card
from lora_cli.surgery.card_section import HEADING
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.receipt import OPERATIONS, OWN_FILES, find_receipt, ours_beside, receipt_path, written_by_us
from lora_cli.surgery.undo.codecs import LENGTHS, How, Summand, decode
from lora_cli.surgery.undo.given import check_used
from lora_cli.surgery.undo.roundtrip import roundtrip
from lora_cli.surgery.undo.undoing import plan_undoing

Target = Callable[[bytes], None]

REFUSALS: Final = {2, 10, 11, 12, 20, 21, 22, 23}
"""Exit codes with which a file is refused."""
_LONGEST_MESSAGE: Final = 1000

_deserialize: Any = deserialize  # its stub has no types


def outcome(target: str, data: bytes) -> LoraCliError | None:
    """Run a target: None where it accepts, or the refusal, which is one that a person can act on."""
    try:
        TARGETS[target](data)
    except LoraCliError as error:
        refusal = error
    else:
        return None
    assert refusal.exit_code in REFUSALS, repr(refusal)
    assert refusal.message.strip(), "a refusal says nothing"
    assert len(refusal.message) < _LONGEST_MESSAGE, "a refusal says too much"
    assert not refusal.message.endswith(".")
    return refusal


# safetensors headers and JSON


def read_header(data: bytes) -> None:
    """What we accept, safetensors reads alike; written again it is the same bytes."""
    length = read_header_length(data[:16], len(data), file="m.safetensors")
    ours = parse_header(data[8 : 8 + length], len(data), file="m.safetensors")
    try:
        theirs = {name: (view["dtype"], (*view["shape"],), bytes(view["data"])) for name, view in _deserialize(data)}
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses it: {error}") from error
    start = ours.data_start
    assert theirs == {
        info.name: (info.dtype.name, info.shape, data[start + info.begin : start + info.end]) for info in ours.tensors
    }
    assert data.startswith(ours.prefix)
    assert ours.file_bytes == len(data)
    again = render_header([(info.name, info.dtype, info.shape) for info in ours.tensors], ours.metadata)
    assert (again.tensors, again.metadata) == (ours.tensors, ours.metadata)
    assert parse_header(again.raw, again.file_bytes, file="m.safetensors") == again


def read_json(data: bytes) -> None:
    """What we accept, Python's parser reads alike, and no key stands twice."""
    ours = strict_json.loads(data, file="a.json", limit=1 << 20, what="document")
    theirs = json.loads(data, object_pairs_hook=_once, parse_constant=_none_such)
    assert ours == theirs
    assert strict_json.loads(data, file="a.json", limit=1 << 20, what="document", keep_repeated=True) == ours
    json.dumps(ours, ensure_ascii=False, allow_nan=False).encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _none_such(name: str) -> None:
    raise AssertionError(name)


def read_index(data: bytes) -> None:
    """Every shard is a plain name on every system, and an index written anew says the same."""
    index = parse_index(data, name="model.safetensors.index.json")
    for shard in index.weight_map.values():
        assert shard == PurePosixPath(shard).name == PureWindowsPath(shard).name
        assert not PureWindowsPath(shard).is_reserved()
        assert "\0" not in shard
    again = parse_index(index.rewritten(index.weight_map, 1), name="model.safetensors.index.json")
    assert (again.weight_map, again.total_size) == (index.weight_map, 1)
    assert {**again.document, "metadata": 0} == {**index.document, "metadata": 0}


# Adapters and what is said of them


def read_adapter_config(data: bytes) -> None:
    """No scale is anything but a number."""
    folder = worlds.adapter_folder()
    (folder / "adapter_config.json").write_bytes(data)
    adapter = open_adapter(folder)
    for target in adapter.targets:
        assert math.isfinite(target.delta.scale.times())


def read_adapter_file(data: bytes) -> None:
    """Every tensor of a file of factors is used, or said to be left out."""
    path = worlds.folder("factors") / "adapter_model.safetensors"
    path.write_bytes(data)
    adapter = open_adapter(path)
    for target in adapter.targets:
        assert math.isfinite(target.delta.scale.times())
        if isinstance(target.delta, LowRank):
            assert target.delta.rank in target.delta.a.shape
            assert target.delta.rank in target.delta.b.shape
    used = {tensor.key for tensor in adapter.tensors}
    assert used <= {info.name for info in look_at_adapter(path).shard.header.tensors}


def read_target_file(data: bytes) -> None:
    """YAML's own loader reads the same lists; the modules chosen are some of the checkpoint's."""
    path = worlds.folder("targets") / "targets.yaml"
    path.write_bytes(data)
    targets, exclude = expand([str(path)])
    theirs = yaml.safe_load(data)
    assert (list(targets), list(exclude)) == (theirs["targets"], theirs.get("exclude") or [])
    base = worlds.base()
    chosen = select(base, targets, exclude)
    assert {selected.key for selected in chosen.modules} <= base.tensors.keys()


def read_names(data: bytes) -> None:
    """Names are resolved alike whatever their order, each to a key that is there, no key for two of them."""
    said = strict_json.loads(data, file="names.json", limit=1 << 20, what="list of names")
    if not _is_names(said):
        return
    names, config, maps = list(said["names"]), said.get("config", {}), parse_maps(said.get("maps", []))
    base = {key: worlds.Shape(tuple(shape)) for key, shape in said["base"].items()}

    def run(names: list[str], keys: list[str]) -> object:
        try:
            found = resolve(names, {key: base[key] for key in keys}, config=config, maps=maps, file="a")
        except LoraCliError as error:
            return type(error), error.message, error.exit_code
        assert {place.key for places in found.places.values() for place in places} <= base.keys()
        assert sorted([*found.places, *(lost.name for lost in found.unmapped)]) == sorted(names)
        return dict(found.places), {lost.name for lost in found.unmapped}

    first = run(names, list(base))
    dice = random.Random(len(data))
    for _ in range(2):
        assert run(dice.sample(names, len(names)), dice.sample(list(base), len(base))) == first
    resolve(names, base, config=config, maps=maps, file="a")


def _is_names(said: Any) -> bool:
    """Whether it is what a file of this target holds: names once each, shapes by key, maybe a config and maps."""
    if not isinstance(said, dict) or not said.keys() <= {"names", "base", "config", "maps"}:
        return False
    names: Any = said.get("names")
    base, maps = said.get("base"), said.get("maps", [])
    shapes = base.values() if isinstance(base, dict) else [None]
    return (
        all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in (names, maps))
        and len(set(names)) == len(names) < 300
        and len(shapes) < 300
        and all(isinstance(shape, list) and _are_sizes(shape) for shape in shapes)
        and isinstance(said.get("config", {}), dict)
    )


def _are_sizes(shape: list[Any]) -> bool:
    return len(shape) < 6 and all(type(size) is int and 0 <= size < 1 << 20 for size in shape)


def read_wrap_file(data: bytes) -> None:
    """The factors that a wrapped checkpoint carries have scales, and its names lead back."""
    base = worlds.wrapped()
    (base.path / WRAP_FILE).write_bytes(data)
    wrapped = unwrap(base, ReadOptions())
    assert wrapped is not None
    assert all(math.isfinite(target.delta.scale.times()) for target in wrapped.adapter.targets)
    for key in base.tensors:
        plain = wrapped.mapper(key)
        assert plain is None or wrapped.mapper.inverse(plain) == key


def read_wrapped_file(data: bytes) -> None:
    """A checkpoint with factors of its own: every factor is folded, and no two tensors get one name."""
    path = worlds.folder("wrapped-file") / "model.safetensors"
    path.write_bytes(data)
    base = open_checkpoint(path)
    wrapped = unwrap(base, ReadOptions(alpha=4.0))
    if wrapped is None:
        return
    kept = [key for key in base.tensors if key not in wrapped.carried]
    assert len(wrapped.carried) == 2 * len(wrapped.adapter.targets)
    assert len({wrapped.mapper(key) or key for key in kept}) == len(kept)


def read_config(data: bytes) -> None:
    """A model's config, as plans and repairs read it; a config that was repaired is not repaired again."""
    folder = worlds.model_folder()
    (folder / "config.json").write_bytes(data)
    base = open_checkpoint(folder)
    config, keys = base.config, base.tensors
    resolve(list(keys), keys, config=config, file="a")
    assert all(key in keys for key in ties(config, keys).values())
    quantised = Quantised(base)
    for key in keys:
        assert quantised(key) is None or config
    numbered_layers(config, 2)
    for repair in (with_dtype("float16"), untied, with_vocabulary(20, 24)):
        once = repaired(config, repair)
        again = strict_json.loads(once, file="config.json", limit=1 << 22, what="config")
        assert repaired(again, repair) == once
    longer = strict_json.loads(repaired(config, with_layers((0, 1, 1), 2)), file="c", limit=1 << 22, what="config")
    assert longer.keys() == config.keys()


def read_card(data: bytes) -> None:
    """A model's card tells of the merge and keeps what it said, or it stays and a warning says why."""
    side = SideFile("README.md", None, len(data), data)
    made, warnings = model_card(worlds.base(), [side], (), ())
    if made is None:
        assert warnings
        return
    old, new = data.decode(), made.decode()
    assert new.removeprefix("\ufeff").lstrip().startswith("---")
    assert HEADING in new
    again, _ = model_card(worlds.base(), [SideFile("README.md", None, len(made), made)], (), ())
    assert again is not None
    before, after = (_metadata(text) for text in (old, new))
    changed = {"tags", "base_model", "base_model_relation", "model-index", "library_name"}
    assert {name: repr(said) for name, said in before.items() if name not in changed} == {
        name: repr(said) for name, said in after.items() if name not in changed
    }


def _metadata(text: str) -> dict[str, Any]:
    """What the Hub takes for metadata, by YAML's own loader."""
    match = REGEX_YAML_BLOCK.search(text.removeprefix("\ufeff"))
    return (yaml.safe_load(match[2] + "\n") if match else None) or {}


# Outputs: receipts and undo files


def read_receipt(data: bytes) -> None:
    """Nothing is replaced but what it lists, and only names of ours are ours."""
    folder = worlds.receipt_folder()
    for operation in OPERATIONS:
        receipt_path(folder, operation).unlink(missing_ok=True)
    receipt_path(folder, "merge").write_bytes(data)
    receipt = find_receipt(folder)
    if written_by_us(folder)():
        assert receipt is not None
        assert {path.name for path in folder.iterdir()} <= set(json.loads(data)["files"])
    alone = folder / "model.safetensors"
    receipt_path(alone, "merge").write_bytes(data)
    ours = {receipt_path(alone, "merge").name, *(f"model.{name}" for name in OWN_FILES)}
    assert set(ours_beside(alone)) <= ours
    receipt_path(alone, "merge").unlink()
    shown = inspect(folder)
    assert shown.receipt == receipt


def read_journal_of_a_run(data: bytes) -> None:
    """What another run has left says which files are finished, or nothing."""
    folder = worlds.folder("journal")
    (folder / JOURNAL).write_bytes(data)
    read = read_journal(folder)
    if read is not None:
        begun, finished = read
        assert begun == msgspec.json.decode(data.split(b"\n")[0], type=Begun)
        assert len(finished) <= data.count(b"\n")
        assert all(isinstance(one.name, str) for one in finished)


def read_undo_file(data: bytes) -> None:
    """A whole undo file: opened, planned, and unmerged in memory."""
    path = worlds.folder("undo") / "lora_merge.undo"
    path.write_bytes(data)
    undoing = plan_undoing(worlds.merged(), open_undo_file(path), [look_at_adapter(worlds.UNDO_WORLD / "adapter")])
    wrong = roundtrip(undoing, None, Budget(1, STRIP_BYTES, 1 << 28), SILENT)
    assert all(isinstance(what, str) for what in wrong.values())
    check_used(undoing.undo.manifest, path.name)
    if not wrong:
        assert {file.name: file.header.file_bytes for file in undoing.plan.files} == {
            said.name: said.size for said in undoing.undo.manifest.files
        }


def read_manifest(data: bytes) -> None:
    """The manifest of an undo file, as JSON, under its right digest and beside the parts of a good one."""
    packed = len(data).to_bytes(8, "little") + compress(data)
    header: dict[str, Any] = {"__metadata__": {"format": "lora-cli/undo/3", "manifest": blake3(packed).hexdigest()}}
    content = b""
    for name, (dtype, shape, part) in (worlds.undo_parts() | {"manifest": ("U8", [len(packed)], packed)}).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(part)]}
        content += part
    raw = json.dumps(header).encode()
    read_undo_file(len(raw).to_bytes(8, "little") + raw + content)


def read_streams(data: bytes) -> None:
    """A fragment of an undo file, its first byte saying of which codec: what it decodes to has the block's size."""
    how: How = "residual" if data[:1] == b"r" else "preimages"
    content = data[1:]
    base, merged, delta = worlds.block()
    out = torch.empty_like(base)
    for stream in read_fragment(lambda at, size: content[at : at + size], len(content), LENGTHS[how]):
        assert len(stream) <= 1 << 23
        decode(how, merged, Summand(delta if how == "preimages" else None), stream, out)


TARGETS: Final[Mapping[str, Target]] = {
    "adapter-config": read_adapter_config,
    "adapter-file": read_adapter_file,
    "card": read_card,
    "config": read_config,
    "header": read_header,
    "index": read_index,
    "journal": read_journal_of_a_run,
    "json": read_json,
    "manifest": read_manifest,
    "names": read_names,
    "receipt": read_receipt,
    "streams": read_streams,
    "target-file": read_target_file,
    "undo-file": read_undo_file,
    "wrap-file": read_wrap_file,
    "wrapped-file": read_wrapped_file,
}
"""Parser → its target. Each has a folder of this name in the corpus."""
