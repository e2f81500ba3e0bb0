"""R067 to R075: links, pipes and devices, what nobody may read, odd names and long ones, for inputs of every kind."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from catalogue import check_refused
from cli_world import Call, Ran, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from folder_cases import not_waiting

from lora_cli.checkpoint import files

MERGE, INSPECT = "merge {base} {adapter} -o {out}", "inspect {base}"


@dataclass(frozen=True)
class Input:
    """A file that some command line opens.

    Attributes:
        path: Where it is in a folder of inputs.
        line: The command line, with {x} for the file itself.
        named: Whether the user names the file itself; a link is then the user's own.
    """

    path: str
    line: str
    named: bool = False


INPUTS = {
    "shard": Input("base/model-00001-of-00002.safetensors", MERGE),
    "index": Input("base/model.safetensors.index.json", INSPECT),
    "only file": Input("single/model.safetensors", "diff {single} {base}"),
    "config of a base": Input("base/config.json", MERGE),
    "factors": Input("adapter/adapter_model.safetensors", MERGE),
    "factors inspected": Input("adapter/adapter_model.safetensors", "inspect {adapter} --base {base}"),
    "only factors": Input("bare/factors.safetensors", "merge {base} {bare} --scale 1 -o {out}"),
    "only factors inspected": Input("bare/factors.safetensors", "inspect {bare}"),
    "config of an adapter": Input("adapter/adapter_config.json", "verify {merged} --base {base} --adapter {adapter}"),
    "undo file": Input("merged/lora_merge.undo", "unmerge {merged} {adapter} -o {out}"),
    "wrap file": Input("wrapped/lora_wrap.json", "merge {wrapped} -o {out}"),
    "base named": Input("base.safetensors", "merge {x} {adapter} -o {out}", named=True),
    "adapter named": Input("plain.safetensors", "merge {base} {x} --scale 1 -o {out}", named=True),
    "adapter before training": Input("plain.safetensors", "merge {base} {adapter} --initial {x} -o {out}", named=True),
    "undo file named": Input("merge.undo", "unmerge {merged} {adapter} --undo {x} -o {out}", named=True),
    "targets named": Input("targets.yaml", "inject {base} --rank 2 --target {x} -o {out}", named=True),
    "settings named": Input("settings.yaml", "inject {base} --config {x} -o {out}", named=True),
}
BESIDE = {name: one for name, one in INPUTS.items() if not one.named}
each_input = pytest.mark.parametrize("one", INPUTS.values(), ids=INPUTS.keys())
each_beside = pytest.mark.parametrize("one", BESIDE.values(), ids=BESIDE.keys())


@pytest.fixture(name="place")
def place_fixture(call: Call, world: World, tmp_path: Path) -> Path:
    """A folder with inputs of every kind, all of them good."""
    place = tmp_path / "in"
    for name in ("base", "single", "adapter", "merged"):
        shutil.copytree(getattr(world, name), place / name)
    shutil.copy(world.file, place / "base.safetensors")
    shutil.copy(world.plain, place / "plain.safetensors")
    (place / "bare").mkdir()
    shutil.copy(world.plain, place / "bare" / "factors.safetensors")
    shutil.copy(world.merged / "lora_merge.undo", place / "merge.undo")
    (place / "targets.yaml").write_text("targets: [all-linear]\n")
    (place / "settings.yaml").write_text("rank: 2\n")
    assert call("inject", world.base, "-o", place / "wrapped", "--rank", "2", "--layout", "wrapped").code == 0
    return place


def line(one: Input, place: Path) -> list[str]:
    words = {entry.name: str(entry) for entry in place.iterdir() if entry.is_dir()}
    return one.line.format(**words, x=place / one.path, out=place.parent / "out").split()


def refused(call: Call, one: Input, place: Path, code: int, words: str) -> None:
    with not_waiting():
        check_refused(call, line(one, place), code, words, folder=place.parent)


@each_input
def test_every_input_is_good_to_begin_with(call: Call, place: Path, one: Input) -> None:
    """So that what is refused below is refused for what was done to it."""
    expected = {"--initial": 2, "diff": 0}
    words = line(one, place)
    ran = call(*words)
    assert ran.code == next((code for word, code in expected.items() if word in words), 0), ran.err


# ---------------------------------------------------------------------------------------------- links


@each_beside
def test_r068_a_link_out_of_the_folder(call: Call, place: Path, one: Input) -> None:
    path = place / one.path
    path.rename(place / "elsewhere")
    path.symlink_to("../elsewhere")
    refused(call, one, place, 11, f"{path.name}|leads out of its folder|name the folder that really holds")


@each_beside
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/proc/self/mem"])
def test_r068_a_link_to_what_is_the_systems(call: Call, place: Path, one: Input, target: str) -> None:
    (place / one.path).unlink()
    (place / one.path).symlink_to(target)
    refused(call, one, place, 11, f"{Path(one.path).name}|leads out")


@each_beside
def test_r067_a_link_within_the_folder(call: Call, place: Path, one: Input) -> None:
    path = place / one.path
    (path.parent / "blobs").mkdir()
    path.rename(path.parent / "blobs" / "0")
    path.symlink_to("blobs/0")
    assert call(*line(one, place)).code == 0


@each_beside
@pytest.mark.parametrize("shared", [False, True], ids=["own store", "shared store"])
def test_r067_a_link_inside_a_hub_cache(call: Call, place: Path, one: Input, shared: bool) -> None:
    """CACHE/models--owner--name/snapshots/COMMIT, of links to the repository's blobs or to those that all share."""
    cache = place / "cache"
    folder, words = (place / one.path).parent, line(one, place)
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    store = cache / "blobs" / "ab" if shared else cache / "models--owner--name" / "blobs"
    store.mkdir(parents=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(store / f"{number:064x}")
        path.symlink_to(os.path.relpath(store / f"{number:064x}", snapshot))
    assert call(*[word.replace(str(folder), str(snapshot)) for word in words]).code == 0


@pytest.mark.parametrize("around", ["x/snapshots", "models--owner--name/revisions", "models--owner--name/snapshots"])
def test_r068_a_folder_that_looks_like_a_cache_leads_nowhere_else(call: Call, place: Path, around: str) -> None:
    """What lies beside the folder that somebody sent is not in a store, whatever the folder's name."""
    snapshot = place / around / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(place / "base", snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (place / "secret").write_text("secret")
    (place / "elsewhere").write_bytes((snapshot / "model-00001-of-00002.safetensors").read_bytes())
    (snapshot / "NOTICE").symlink_to("../../../secret")
    out = place.parent / "out"
    assert call("merge", snapshot, place / "adapter", "-o", out).code == 0
    assert not (out / "NOTICE").exists()
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    (snapshot / "model-00001-of-00002.safetensors").symlink_to("../../../elsewhere")
    check_refused(call, ["inspect", snapshot], 11, "leads out of its folder", folder=place.parent)


@pytest.mark.parametrize("around", ["x/snapshots", "models--owner--name/revisions"])
@pytest.mark.parametrize("store", ["../../blobs", "../../../blobs"])
def test_r068_stores_belong_to_snapshots_of_repositories(call: Call, place: Path, around: str, store: str) -> None:
    folder = place / around / ("0" * 40)
    folder.parent.mkdir(parents=True)
    (place / "base").rename(folder)
    kept = folder / store
    kept.mkdir()
    (folder / "config.json").rename(kept / "0")
    (folder / "config.json").symlink_to(f"{store}/0")
    check_refused(call, ["inspect", folder], 11, "config.json|leads out of its folder", folder=place.parent)


def test_r068_a_store_that_is_a_link_itself(call: Call, place: Path) -> None:
    repository = place / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(place / "base", snapshot)
    (repository / "blobs").symlink_to("..")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/base/config.json")
    check_refused(call, ["inspect", snapshot], 11, "config.json|leads out of its folder", folder=place.parent)


@each_beside
@pytest.mark.parametrize("target", ["nowhere", ".", "itself"])
def test_r069_a_link_that_leads_nowhere(call: Call, place: Path, one: Input, target: str) -> None:
    """R071 too: to a folder, here the one that the link is in."""
    path = place / one.path
    path.unlink()
    path.symlink_to(path.name if target == "itself" else target)
    words = {"nowhere": "leads nowhere", "itself": "leads nowhere", ".": ""}[target]
    refused(call, one, place, 11 if target == "." else 10, f"{path.name}|{words}")


@each_input
def test_r069_a_name_that_the_user_gave_may_be_a_link_and_must_lead_somewhere(
    call: Call, place: Path, one: Input
) -> None:
    if not one.named:
        one = Input(one.path.partition("/")[0], one.line)
    path = place / one.path
    words, before = line(one, place), call(*line(one, place)).code
    shutil.rmtree(place.parent / "out", ignore_errors=True)
    path.rename(place / "elsewhere")
    path.symlink_to("elsewhere")
    assert call(*words).code == before
    shutil.rmtree(place.parent / "out", ignore_errors=True)
    path.unlink()
    path.symlink_to(path.name)
    with not_waiting():
        ran = call(*words)
    assert ran.code in (2, 10), ran.err
    assert "Internal error" not in ran.err


# ---------------------------------------------------------------------------------------------- pipes, sockets, devices


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    """A socket; its address is short, so that it is made from within its folder."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


@each_input
@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        pytest.param(pipe, 11, "Not a regular file", id="R070 pipe"),
        pytest.param(bound, 11, "Not a regular file", id="R070 socket"),
        pytest.param(Path.mkdir, 10, "A folder stands where a file is expected", id="R071 folder"),
    ],
)
def test_r070_what_is_no_regular_file(
    call: Call, place: Path, one: Input, make: Callable[[Path], object], code: int, words: str
) -> None:
    path = place / one.path
    path.unlink()
    make(path)
    if make is Path.mkdir and one.named and one.path != "merge.undo" and not one.path.endswith(".yaml"):
        code, words = 2, "folder holds no"
    refused(call, one, place, code, words)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "/dev/null", "/dev/urandom"])
@pytest.mark.parametrize("name", [name for name, one in INPUTS.items() if one.named and name != "targets named"])
def test_r070_a_device_is_never_read(call: Call, place: Path, name: str, path: str) -> None:
    """A target that does not end in .yaml is no file."""
    words = [path if word == str(place / INPUTS[name].path) else word for word in line(INPUTS[name], place)]
    with not_waiting():
        check_refused(call, words, 11, "Not a regular file", folder=place.parent)


@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/self/status", "/sys/kernel/uevent_seqnum"])
def test_r070_files_that_the_kernel_makes_up_have_no_length_and_are_no_safetensors(
    call: Call, place: Path, path: str
) -> None:
    """Exit 10 and not 11: they are regular files, and shorter than they say."""
    if not Path(path).exists():
        pytest.skip("no such file here")
    for words in (["inspect", path], ["merge", path, place / "adapter", "-o", place.parent / "out"]):
        with not_waiting():
            ran = check_refused(call, words, 10, Path(path).name, folder=place.parent)
        assert "too short" in ran.err or "ended while it was read" in ran.err


# ---------------------------------------------------------------------------------------------- nobody may read it


@contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """As if nobody may read a file or list a folder: also root, for whom the system makes an exception."""
    open_to_read, listed = files.open_to_read, files.listed

    def refuse(asked: Path) -> None:
        if asked == path:
            raise PermissionError(13, "Permission denied", str(asked))

    def opening(asked: Path) -> int:
        refuse(asked)
        return open_to_read(asked)

    def listing(asked: Path) -> list[Path]:
        refuse(asked)
        return listed(asked)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_to_read", opening)
        patch.setattr(files, "listed", listing)
        yield


@each_input
def test_r072_a_file_that_nobody_may_read(call: Call, place: Path, one: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real rights, as somebody else than root: tests/checkpoint/test_open.py."""
    with forbidden(monkeypatch, place / one.path):
        refused(call, one, place, 10, f"{Path(one.path).name}|Permission denied")


@pytest.mark.parametrize("name", ["base", "single", "bare", "merged"])
def test_r072_a_folder_that_nobody_may_list(
    call: Call, place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"bare": ["inspect", place / "bare"], "merged": ["verify", place / "merged", "--base", place / "base"]}
    words = lines.get(name, ["merge", place / name, place / "adapter", "-o", place.parent / "out"])
    words += ["--adapter", place / "adapter"] if name == "merged" else []
    with forbidden(monkeypatch, place / name):
        check_refused(call, words, 10, f"{name}|cannot be listed: Permission denied", folder=place.parent)


def test_r072_a_folder_within_a_base_that_nobody_may_list(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in it could not be copied, and could not be told either."""
    (place / "base" / "1_Pooling").mkdir()
    words = ["merge", place / "base", place / "adapter", "-o", place.parent / "out"]
    with forbidden(monkeypatch, place / "base" / "1_Pooling"):
        check_refused(call, words, 10, "1_Pooling|cannot be listed", folder=place.parent)


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may do everything; as another user for a moment."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o644, 0o111, 0o000], ids=["not entered", "not listed", "neither"])
@pytest.mark.parametrize("name", ["base", "adapter", "sub-folder"])
def test_r072_folders_without_rights(call: Call, world: World, name: str, mode: int) -> None:
    """With real rights, which bind only who is not root."""

    def other(*arguments: object) -> Ran:
        with as_somebody_else():
            return call(*arguments)

    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o755)
        shutil.copytree(world.base, place / "base")
        shutil.copytree(world.adapter, place / "adapter")
        (place / "base" / "1_Pooling").mkdir()
        (place / "base" / "1_Pooling" / "config.json").write_text("{}")
        arguments = ["merge", place / "base", place / "adapter", "-o", place / "out"]
        assert call(*arguments, "--dry-run").code == 0
        locked = place / name if name != "sub-folder" else place / "base" / "1_Pooling"
        locked.chmod(mode)
        try:
            check_refused(other, arguments, 10, "Permission denied|check who may read", folder=place / "nothing")
        finally:
            locked.chmod(0o755)
        assert not (place / "out").exists()


@pytest.mark.parametrize("target", ["nowhere", "lora_merge.json", "../elsewhere"])
def test_r069_a_receipt_that_cannot_be_read_is_not_passed_over(call: Call, place: Path, target: str) -> None:
    """It would say that the adapter is merged already."""
    receipt = place / "merged" / "lora_merge.json"
    receipt.rename(place / "elsewhere")
    receipt.symlink_to(target)
    words = ["merge", place / "merged", place / "adapter", "-o", place.parent / "out"]
    check_refused(call, words, 11 if "elsewhere" in target else 10, "lora_merge.json|leads", folder=place.parent)
