"""R132: what a file says is never a path.

No command opens, lists, changes or imports what a config, card, index, receipt, wrap record or undo file names. Every
call of a run that Python's audit hooks hear of is recorded, and looked at.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from catalogue import check_refused, entries
from cli_world import ROOT, Call, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, write_adapter, write_base, write_json

from lora_cli.arithmetic.zstd import compress, decompress
from lora_cli.checkpoint.digests import bytes_digest

PRIVATE: Final = "what nobody asked for"
PLACES: Final = ("open", "shutil.rmtree", *(f"os.{name}" for name in (
    "listdir", "scandir", "remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "utime",
)))  # fmt: skip
"""Events whose first thing is a path."""
NEVER: Final = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect",
                "socket.getaddrinfo", "pickle.find_class")  # fmt: skip
RECORDER: Final = """
import json, os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
seen = {*json.loads(sys.argv[2]), "import"}
def hook(event, args):
    if event in seen:
        said = [os.fsdecode(arg) if isinstance(arg, (str, bytes, os.PathLike)) else None for arg in args[:2]]
        os.write(log, (json.dumps([event, *said]) + "\\n").encode())
sys.addaudithook(hook)
from lora_cli.cli.app import run
print(json.dumps([run(line) for line in json.loads(sys.argv[3])]))
"""


class Trap:
    """Inputs full of names of a place that is none of them; `codes` are the exits of the command lines.

    Args:
        folder: Where all of it is made.
        world: The small world, whose inputs are copied.
        call: Runs the program, to make what it makes itself.
    """

    def __init__(self, folder: Path, world: World, call: Call) -> None:
        self.folder, self.secret, self.inputs, self.place = (
            folder, folder / "secret", folder / "inputs", folder / "place"
        )  # fmt: skip
        for made in (self.place, folder / "home", folder / "tmp", folder / "modules"):
            made.mkdir()
        write_base(self.secret / "base", shards=1)
        write_adapter(self.secret / "adapter")
        for name in ("config.json", "tokenizer.json", "evil.py", "token", "notes.txt"):
            (self.secret / name).write_text(PRIVATE)
        (folder / "modules" / "evil_module.py").write_text("open(__file__ + '.ran', 'w')")
        self.base = self._base(world)
        self.adapter = self._adapter()
        self.wrapped = self._wrapped(call)
        self.merged = self.inputs / "merged"
        assert call("-q", "merge", self.base, self.adapter, "-o", self.merged).code == 0

    def names(self) -> list[str]:
        """Ways to say where the secret is."""
        return [str(self.secret / "base"), "../../secret/base", "../secret/notes.txt", f"file://{self.secret}/token"]

    def _base(self, world: World) -> Path:
        base = Path(shutil.copytree(world.base, self.inputs / "base"))
        there, above, *_ = self.names()
        auto_map = {"AutoModel": f"{above}/evil.py--evil_module.Evil", "AutoConfig": "evil_module.Evil"}
        named = {"_name_or_path": there, "auto_map": auto_map, "revision": above, "adapter": above}
        write_json(
            base / "config.json", CONFIG | named | {"text_config": {"model_type": above, "_name_or_path": there}}
        )
        write_json(base / "generation_config.json", named)
        tokenizer = {"tokenizer_file": f"{self.secret}/token", "vocab_file": above, "tokenizer_class": "evil_module.X"}
        write_json(base / "tokenizer_config.json", named | tokenizer)
        (base / "README.md").write_text(f"---\nbase_model: {above}\nlicense_link: {there}\n---\n![x]({there})\n")
        (base / "chat_template.jinja").write_text(f"{{% include '{above}' %}}{{% import '{there}' as x %}}")
        write_json(base / "lora_inject.json", self.receipt("inject"))
        return base

    def receipt(self, operation: str) -> dict[str, Any]:
        """A receipt of ours that lists what is not."""
        said = {"schema": "lora-cli/receipt/1", "operation": operation, "files": self.names(), "base": {}}
        sizes = dict.fromkeys(self.names(), len(PRIVATE))
        labelled = [{"label": name, "digest": "0" * 64, "path": name} for name in self.names()]
        return said | {"bytes": sizes, "adapters": labelled, "earlier": {"files": self.names()}}

    def _adapter(self) -> Path:
        there, above, *_ = self.names()
        files = {"cache_file": f"{self.secret}/token", "covariance_file": above, "path": there}
        adapter = write_adapter(
            self.inputs / "adapter",
            base_model_name_or_path=there,
            revision=above,
            auto_mapping={"parent_library": "evil_module", "base_model_class": "Evil"},
            megatron_core="evil_module",
            megatron_config=files,
            corda_config=files,
            eva_config=files,
            lora_ga_config=files,
            loftq_config=files,
            layers_pattern=there,
            target_modules=[there, above],
            exclude_modules=above,
        )
        write_json(adapter / "tokenizer_config.json", {"tokenizer_file": there, "auto_map": ["evil_module.X", above]})
        return adapter

    def _wrapped(self, call: Call) -> Path:
        wrapped = self.inputs / "wrapped"
        assert call("-q", "inject", self.base, "-o", wrapped, "--rank", 2, "--layout", "wrapped").code == 0
        said = json.loads((wrapped / "lora_wrap.json").read_text())
        renamed = {name: f"{self.secret}/{name}" for name in said["rename"]}
        write_json(wrapped / "lora_wrap.json", said | {"rename": renamed, "modules": self.names()})
        return wrapped

    def copy(self, name: str, of: Path) -> Path:
        """A copy of an input among the inputs."""
        return Path(shutil.copytree(of, self.inputs / name))

    def run(self, *lines: list[object]) -> tuple[list[int], list[list[str | None]]]:
        """Run command lines in a process that is listened to: their exit codes, and what happened."""
        log = self.folder / "log"
        home = {name: str(self.folder / "home") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
        env = home | {"TMPDIR": str(self.folder / "tmp"), "PYTHONPATH": f"{ROOT}:{self.folder / 'modules'}"}
        asked = json.dumps([[str(part) for part in line] for line in lines])
        given = (str(log), json.dumps([*PLACES, *NEVER]), asked)
        ran = process(program=("-c", RECORDER, *given), env=env, cwd=self.folder / "home")
        assert ran.code == 0, ran.err
        return json.loads(ran.out.splitlines()[-1]), [json.loads(line) for line in log.read_text().splitlines()]

    def allowed(self, path: str) -> bool:
        """Whether something may be opened: an input, the output's folder, Python, its libraries, and the machine's."""
        if not path.startswith("/"):
            # Below a folder that is open already: one name, as every call of `files` has it.
            return "/" not in path and path != ".."
        roots = {
            *filter(None, sys.path),
            *sysconfig.get_paths().values(),
            sys.prefix,
            sys.base_prefix,
            str(ROOT),
            "/proc",
            "/sys",
            "/dev/null",
        }
        own = [self.inputs, self.place, *(self.folder / name for name in ("tmp", "home", "modules"))]
        system = ("/usr/lib", "/usr/share", "/lib", "/etc", *roots)
        return any(path == root or path.startswith(f"{root}/") for root in [*map(str, own), *map(str, system)])


@pytest.fixture(name="trap")
def trap_fixture(tmp_path: Path, world: World, call: Call) -> Trap:
    return Trap(tmp_path, world, call)


def forged(undo: Path, old: str, new: str) -> None:
    """Exchange words in the manifest of an undo file, with every digest made to fit."""
    with safe_open(undo, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(undo)
    packed = tensors["manifest"].tobytes()
    text = decompress(packed[8:], int.from_bytes(packed[:8], "little")).decode()
    assert old in text
    text = text.replace(old, new)
    packed = len(text.encode()).to_bytes(8, "little") + compress(text.encode())
    tensors["manifest"] = np.frombuffer(packed, np.uint8)
    save_file(tensors, undo, metadata | {"manifest": bytes_digest(packed)})


def test_nothing_is_opened_that_a_file_names(trap: Trap) -> None:
    """All commands over hostile inputs; what they may touch is what was named, and what Python itself needs."""
    base, adapter, place = trap.base, trap.adapter, trap.place
    climbing = trap.copy("climbing", base)
    weight_map = json.loads((climbing / "model.safetensors.index.json").read_text())["weight_map"]
    write_json(
        climbing / "model.safetensors.index.json",
        {"weight_map": weight_map | {"x": "../../secret/base/model.safetensors"}},
    )
    odd = trap.copy("odd", trap.merged)
    forged(odd / "lora_merge.undo", '"config.json"', f'"{trap.secret}/config.json"')
    replaced = place / "replaced"
    replaced.mkdir()
    write_json(replaced / "lora_merge.json", trap.receipt("merge"))
    (replaced / "notes.txt").write_text("mine")
    lines: dict[tuple[object, ...], int] = {
        ("inspect", base): 0,
        ("inspect", trap.merged): 0,
        ("inspect", adapter, "--base", base, "--spectrum"): 0,
        ("merge", base, adapter, "-o", place / "m", "--tokenizer", "adapter", "--embed-adapter"): 0,
        ("merge", base, adapter, "-o", place / "m", "--force"): 0,
        ("merge", base, adapter, "-o", replaced, "--force"): 30,
        ("merge", trap.wrapped, "-o", place / "w"): 20,
        ("merge", climbing, adapter, "-o", place / "c"): 11,
        ("verify", place / "m", "--base", base, "--adapter", adapter, "--roundtrip"): 0,
        ("diff", base, place / "m", "--rank"): 1,
        ("diff", adapter, adapter): 0,
        ("unmerge", trap.merged, adapter, "-o", place / "u"): 0,
        ("unmerge", odd, adapter, "-o", place / "o"): 11,
        ("unmerge", trap.merged, adapter, "-o", place / "a", "--approximate"): 0,
        ("inject", base, "-o", place / "i", "--rank", 2): 0,
    }
    before = entries(trap.secret), entries(trap.inputs), entries(trap.folder / "modules")
    codes, events = trap.run(*([*line, "-q"] for line in lines))
    assert codes == list(lines.values())
    opened = {(event, str(path)) for event, path, *_ in events if event in PLACES}
    assert len(opened) > 500, "the recorder hears nothing"
    assert {str(base / "config.json"), str(adapter / "adapter_config.json")} <= {path for _, path in opened}
    assert not sorted(said for said in opened if said[1] != "None" and not trap.allowed(said[1]))
    assert not [event for event in events if event[0] in NEVER]
    assert not [event for event in events if event[0] == "import" and "evil" in str(event[1])]
    assert (entries(trap.secret), entries(trap.inputs), entries(trap.folder / "modules")) == before
    outputs = [path for path in place.rglob("*") if path.is_file()]
    assert len(outputs) > 20
    assert not [path for path in outputs if PRIVATE.encode() in path.read_bytes()]
    assert (replaced / "notes.txt").read_text() == "mine"


HOSTILE_NAMES = [
    "../config.json",
    "../../secret/config.json",
    "/etc/config.json",
    "a/../../config.json",
    "./config.json",
]
HOSTILE_NAMES += ["config.json/", "a//config.json", ".config.json", "..\\\\config.json", "a\\u0000.json", "a/b/c.json"]
HOSTILE_NAMES += ["config.exe", "pytorch_model.bin", "/dev/null", "NUL.json\\u0000", "\\u202enosj.json"]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_names_of_an_undo_file(name: str, call: Call, world: World, tmp_path: Path) -> None:
    """Files that come back from an undo file have plain names beside the tensors; with --force, too."""
    shutil.copytree(world.merged, tmp_path / "m")
    forged(tmp_path / "m" / "lora_merge.undo", '"config.json"', f'"{name}"')
    line = ["unmerge", tmp_path / "m", world.adapter, "-o", tmp_path / "out"]
    check_refused(call, line, 11, "names a file that cannot be in its output", folder=tmp_path)
    check_refused(call, [*line, "--force"], 11, "names a file that cannot be in its output", folder=tmp_path)


FIRST: Final = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.pkl", ".."])
def test_names_of_shards_of_an_undo_file(name: str, call: Call, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.merged, tmp_path / "m")
    forged(tmp_path / "m" / "lora_merge.undo", f'"{FIRST}"', f'"{name}"')
    line = ["unmerge", tmp_path / "m", world.adapter, "-o", tmp_path / "out"]
    check_refused(call, line, 11, "names a file that cannot be in its output", folder=tmp_path)


def test_a_base_that_is_named_is_shown_and_not_opened(trap: Trap, call: Call) -> None:
    """R132: also where it is an address; in JSON as it stands there."""
    for name in (*trap.names(), "https://example.com/x", "owner/name", "\x1b[2J\u202e", "C:\\base", "~/base"):
        adapter = write_adapter(trap.inputs / "other", base_model_name_or_path=name)
        ran = call("inspect", adapter, "-v")
        assert ran.code == 0
        assert "\x1b" not in ran.out + ran.err
        assert "\u202e" not in ran.out + ran.err
        assert call("inspect", adapter, "--json").code == 0


def test_force_follows_no_link_and_removes_nothing_elsewhere(trap: Trap, call: Call) -> None:
    """A forged receipt lists a folder that is a link, and files above: the link is no folder of ours."""
    out = trap.place / "out"
    shutil.copytree(trap.merged, out)
    said = json.loads((out / "lora_merge.json").read_text())
    listed = [*said["files"], "deep", "deep/token", "deep/notes.txt", *trap.names()]
    (out / "deep").symlink_to(trap.secret)
    sizes: dict[str, int]
    for sizes in (
        said["bytes"],
        {**said["bytes"], **dict.fromkeys(("deep/token", "deep/notes.txt"), len(PRIVATE))},
        {},
    ):
        write_json(out / "lora_merge.json", said | {"files": listed, "bytes": sizes})
        line = ["merge", trap.base, trap.adapter, "-o", out, "--force"]
        check_refused(call, line, 30, "exists already", folder=trap.folder)


def test_force_on_a_link_that_a_receipt_lists_leaves_what_it_points_to(trap: Trap, call: Call) -> None:
    """The link itself may go with the output it is part of; its target is none of it."""
    out = trap.place / "out"
    shutil.copytree(trap.merged, out)
    said = json.loads((out / "lora_merge.json").read_text())
    (out / "token").symlink_to(trap.secret / "token")
    write_json(
        out / "lora_merge.json",
        said | {"files": [*said["files"], "token"], "bytes": said["bytes"] | {"token": len(PRIVATE)}},
    )
    before = entries(trap.secret)
    call("merge", trap.base, trap.adapter, "-o", out, "--force")
    assert entries(trap.secret) == before
