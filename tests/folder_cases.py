"""Folders that are no checkpoint, with the error that each must give. R… are of the catalogue of faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lora_cli.checkpoint.index import INDEX_LIMIT
from lora_cli.errors import LoraCliError, MalformedFileError, UnsafeInputError, UnsupportedError, UsageError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Build = Callable[[Path], object]
Case = tuple[Build, str]


def file_of(*names: str) -> bytes:
    return bytes(save({name: np.ones(3, np.float32) for name in names}))


def sharded(folder: Path, weight_map: object = None, *, total: object = 24, **files: bytes | None) -> Path:
    """Shards with the tensors a and b; files are changed or left out by `one=`, `two=`."""
    here = {"one": file_of("a"), "two": file_of("b")} | files
    for name, data in ((ONE, here["one"]), (TWO, here["two"])):
        if data is not None:
            (folder / name).write_bytes(data)
    document: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map or {"a": ONE, "b": TWO}}
    (folder / INDEX).write_text(json.dumps(document))
    return folder


def single(folder: Path, data: bytes | None = None) -> Path:
    (folder / "model.safetensors").write_bytes(file_of("a") if data is None else data)
    return folder / "model.safetensors"


def names_shard(name: str) -> Build:
    """An index that names a file which does exist where the name leads."""

    def build(folder: Path) -> None:
        (folder.parent / "x.safetensors").write_bytes(file_of("b"))
        for there in ("x.bin", "x.pkl", "x.safetensors.pkl", "x.SAFETENSORS", "aux", ".x.safetensors"):
            (folder / there).write_bytes(file_of("b"))
        sharded(folder, {"a": ONE, "b": name})

    return build


def text_index(text: str) -> Build:
    return lambda folder: (sharded(folder) / INDEX).write_text(text)


def linked(folder: Path, target: str, name: str = "model.safetensors") -> Path:
    (folder.parent / "outside.safetensors").write_bytes(file_of("a"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    return folder


def listening(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("model.safetensors")
    os.chdir(here)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"
PAGE = b"<!DOCTYPE html><html><head><title>401 - log in"
NAMES = {
    "R054": ["../x.safetensors", "/etc/x", "/etc/x.safetensors", "..\\x.safetensors", "C:x.safetensors"],
    "R054 more": ["\\\\host\\x.safetensors", "a/../../x.safetensors", "./x.safetensors", "sub/x.safetensors", ".."],
    "R055": ["x.bin", "x.pkl", "x.safetensors.pkl", "x.SAFETENSORS", "x.safetensors ", "x.safetensors\0", "x"],
    "R055 more": ["x\0.safetensors", "x\n.safetensors", "x.safetensors\n", ".x.safetensors", ".safetensors", ""],
    "R056": ["CON.safetensors", "aux", "aux.safetensors", "Nul.1.safetensors", "com1.safetensors", "LPT9.safetensors"],
    "R056 more": ["x.safetensors.", "x:y.safetensors", "x.safetensors:z", "x?.safetensors", 'x".safetensors'],
    "R056 of Windows alone": ["con .safetensors", "COM\u00b9.safetensors", "conin$.safetensors"],
}


def name_cases() -> Iterator[tuple[str, Case]]:
    for number, group in NAMES.items():
        for name in group:
            yield f"{number}: {name!a}", (names_shard(name), f"plain .safetensors file name|{name!a}")


UNSAFE: dict[str, Case] = {
    **dict(name_cases()),
    "R059 in two shards": (lambda f: sharded(f, two=file_of("a", "b")), f"two shards|a|{ONE} and {TWO}"),
    "R068 link out of the folder": (lambda f: linked(f, "../outside.safetensors"), "leads out|model.safetensors"),
    "R068 absolute link": (lambda f: linked(f, "/etc/passwd"), "leads out"),
    "R068 link to a device": (lambda f: linked(f, "/dev/zero"), "leads out"),
    "R068 shard": (lambda f: linked(sharded(f), "../outside.safetensors", TWO), f"leads out|{TWO}"),
    "R068 index": (lambda f: linked(sharded(f), "../outside.safetensors", INDEX), f"leads out|{INDEX}"),
    "R070 pipe": (lambda f: os.mkfifo(f / "model.safetensors"), "Not a regular file|model.safetensors"),
    "R070 socket": (listening, "Not a regular file|model.safetensors"),
    "R121 only pickles": (lambda f: (f / "model.bin").write_bytes(b"x"), "model.bin|weights_only=True"),
}
MALFORMED: dict[str, Case] = {
    "R057 all missing shards": (lambda f: sharded(f, one=None, two=None), f"2 of 2 shards are missing|{ONE}|{TWO}"),
    "R057 one shard": (lambda f: sharded(f, one=None), f"1 of 2 shards are missing|{ONE}|download"),
    "R058 in another": (
        lambda f: sharded(f, {"a": TWO, "b": ONE}),
        f"2 tensors|a: the index says {TWO}, found in {ONE}",
    ),
    "R058 in none": (lambda f: sharded(f, {"a": ONE, "b": TWO, "c": ONE, "d": TWO}), "2 tensors|c: the|d: the"),
    "R061 key twice": (text_index(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'), f"stands twice|{INDEX}"),
    **{
        f"R062 {text}": (text_index(text), f"weight_map|{INDEX}")
        for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', "[]", '"x"')
    },
    **{
        f"R062 {value}": (text_index(f'{{"weight_map": {{"a": {value}}}}}'), "not text")
        for value in ("1", "null", "[]", '{"a": 1}', "true")
    },
    "R062 no JSON": (text_index("weight_map"), f"not valid JSON|{INDEX}"),
    "R062 empty": (text_index(""), INDEX),
    "R064 index and single file": (lambda f: (sharded(f), single(f)), "both an index and a single"),
    "R066 index too long": (lambda f: sparse(sharded(f) / INDEX, INDEX_LIMIT + 1), f"too large|{INDEX}"),
    "R069 dangling link": (lambda f: linked(f, "nowhere"), "leads nowhere|model.safetensors"),
    "R069 loop": (lambda f: linked(f, "model.safetensors"), "leads nowhere|model.safetensors"),
    "R071 folder": (lambda f: (f / "model.safetensors").mkdir(), "A folder stands|model.safetensors"),
    "R079 pointer": (lambda f: single(f, POINTER), "Git LFS pointer|git lfs pull|model.safetensors"),
    "R079 shard": (lambda f: sharded(f, two=POINTER), f"Git LFS pointer|git lfs pull|{TWO}"),
    "R079 index": (text_index(POINTER.decode()), INDEX),
    "R080 web page": (lambda f: single(f, PAGE), "web page|log in"),
    "R122 pickle": (lambda f: single(f, b"\x80\x02}q\x00." + bytes(9)), "Python pickle|weights_only"),
    "R123 zip": (lambda f: single(f, b"PK\x03\x04" + bytes(30)), "zip archive"),
    "R037 cut off": (lambda f: single(f, file_of("a")[:-1]), "1 bytes are missing|download"),
    "several files": (lambda f: [(f / name).write_bytes(b"") for name in (ONE, TWO)], f"no index|{ONE}, {TWO}"),
}
OTHERS: dict[str, tuple[Build, str, type[LoraCliError]]] = {
    "nothing": (lambda f: None, "no safetensors checkpoint", UsageError),
    "other files": (lambda f: (f / "config.json").write_text("{}"), "no safetensors checkpoint", UsageError),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "an adapter|base checkpoint first",
        UsageError,
    ),
    "two indexes": (lambda f: shutil.copy(sharded(f) / INDEX, f / f"x.{INDEX}"), f"several|{INDEX}", UnsupportedError),
}
REFUSED: dict[str, tuple[Build, str, type[LoraCliError]]] = {
    **{name: (*case, UnsafeInputError) for name, case in UNSAFE.items()},
    **{name: (*case, MalformedFileError) for name, case in MALFORMED.items()},
    **OTHERS,
}


@contextmanager
def not_waiting(seconds: int = 20) -> Iterator[None]:
    """A pipe or device must be refused at once, not opened and waited for."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
