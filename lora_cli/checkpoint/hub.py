"""From what somebody typed to a path on this machine; over the Hugging Face Hub when it is not one already.

Only what is needed is fetched, side files first and weights last: a snapshot that has its weights has the rest too,
which is what an offline run relies on. The client (`huggingface_hub`) is loaded only for a Hub id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import unquote

from lora_cli.checkpoint.checkpoint import ADAPTER_FILE, CONVERT_HINT, PICKLES
from lora_cli.checkpoint.files import make_folders
from lora_cli.checkpoint.hub_client import client_calls, is_model_id
from lora_cli.checkpoint.index import INDEX_LIMIT, parse_index
from lora_cli.checkpoint.sidefiles import SIDE_FILE_LIMIT, belongs
from lora_cli.checkpoint.source import as_text, listing, read_whole
from lora_cli.checkpoint.staged import write_beside
from lora_cli.errors import (
    DiskFullError,
    HubError,
    MalformedFileError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from lora_cli.progress import SILENT, Progress
from lora_cli.version import __version__

Role = Literal["checkpoint", "adapter"]

_INDEX, _SINGLE, _INDEX_SUFFIX = "model.safetensors.index.json", "model.safetensors", ".safetensors.index.json"
_OWN_FILES = ("adapter_config.json", "lora_merge.json", "lora_merge.undo", "lora_wrap.json")
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_NESTED_LIMIT = 1 << 20  # subfolders have configs (sentence encoders), but also one more copy of the tokenizer

_FILE_OR_PATH = re.compile(r"[./~].*|.*\.(safetensors|json|bin|pth?|ckpt|gguf|undo)", re.IGNORECASE)
_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]+(?:/(?!\.)[^/\\\x00-\x1f\x7f]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A revision becomes part of a path in the cache, so nothing in it may climb.
_REVISION = re.compile(r"(?![-./])(?!.*\.\.)(?!.*/$)[\w./+@#=,%-]+")
# Tokens of the Hub; in an address, users with passwords before a host, and what stands behind a question mark.
_TOKEN = re.compile(r"\bhf_\w{16,}", re.ASCII)
_SECRET = re.compile(r"(?<=://)[^/@]*(?=@)|(?<=\?).+", re.DOTALL)
# hf://[models/]owner/name[@revision][/path]; of the revisions only refs/pr/N and refs/convert/NAME hold a slash there.
_REPO = r"(?!(?:models|datasets|spaces|kernels|buckets)/)[^/@]+/[^/@]+"
_ID = re.compile(
    rf"hf://(?:models/)?(?P<repo>{_REPO})(?:@(?P<ref>refs/(?:pr/\d+|convert/[\w.-]+)|[^/]+))?(?P<path>/.+)?/?"
    rf"|(?P<short>{_REPO})(?:@(?P<rest>.+))?"
)


@dataclass(frozen=True)
class Location:
    """Where something is on this machine, and what to call it.

    Attributes:
        path: The file or folder.
        label: Its name in messages and receipts: `owner/name@commit`, or the last part of a local path.
        hub: Whether it came from the Hub.
    """

    path: Path
    label: str
    hub: bool


@dataclass(frozen=True)
class _Wanted:
    repo: str
    revision: str
    role: Role

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def locate(reference: str, *, role: Role, progress: Progress = SILENT) -> Location:
    """Return where `reference` is, after fetching it if it is a Hub id and no local path.

    Args:
        reference: A path, `owner/name[@revision]` or `hf://[models/]owner/name[@revision]`.
        role: What it will serve as, which decides the files that are fetched.
        progress: Hears in one line what is fetched; the client shows its bars only if somebody listens here.

    Raises:
        UsageError: Neither a path nor an id, or an id of something else than what `role` says.
        HubError: The Hub does not have it, does not give it or cannot be reached.
        UnsafeInputError: Its weights are pickled, or its index names something outside.
        UnsupportedError: Several files could be meant.
        MalformedFileError: Its index is broken.
        DiskFullError: The cache has no space for it.
        WriteError: The cache cannot be written.
    """
    path = local_path(reference)
    if path is not None:
        name = path.name if path.name not in ("", "..") else path.resolve().name
        return Location(path, as_text(name) or "/", hub=False)
    if not reference.startswith("hf://") and Path(reference).parent.is_dir() and "/" in reference:
        hint = f"check the spelling; for a repository on the Hub write hf://{_without_secrets(reference)}"
        raise UsageError("Path not found, though its folder is there", file=_without_secrets(reference), hint=hint)
    try:
        return _fetch(_parse(reference, role), progress)
    except HubError as error:
        if not reference.startswith("hf://"):
            error.found = error.found or "no file or folder of that name here, so the Hub was asked"
        raise


def _without_secrets(reference: str) -> str:
    """What somebody typed, without what looks like a password or token: people paste whole addresses."""
    return _TOKEN.sub("…", _SECRET.sub("…", reference) if "://" in reference else reference)


def local_path(reference: str) -> Path | None:
    """Return the path if something is there; None for what only the Hub can have.

    Raises:
        UsageError: It cannot be looked at, which must not become a question to the Hub; or a link leads nowhere.
    """
    if reference.startswith("hf://"):
        return None
    path = Path(reference)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UsageError("The symbolic link leads nowhere", file=_without_secrets(reference)) from None
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"The path cannot be opened: {reason}", file=_without_secrets(reference)) from None
    return path if reference else None


def _parse(reference: str, role: Role) -> _Wanted:
    match = _ID.fullmatch(reference)
    repo = (match["repo"] or match["short"]) if match else ""
    if match is None or _FILE_OR_PATH.fullmatch(match["short"] or "") or not is_model_id(repo):
        what = "Not the id of a model on the Hub" if reference.startswith("hf://") else "Path not found"
        hint = "ids on the Hub look like owner/name or owner/name@revision"
        here = "" if reference.startswith("hf://") else "check the spelling, nothing of that name is here; "
        raise UsageError(what, file=_without_secrets(reference), hint=here + hint)
    if match["path"]:
        raise UsageError(
            "A path inside a Hub repository is not supported",
            file=_without_secrets(reference),
            hint=f"write hf://{repo}",
        )
    revision = unquote(match["ref"]) if match["ref"] else (match["rest"] or "main")
    if not _REVISION.fullmatch(revision):
        raise UsageError("Not the name of a branch, tag or commit", file=repo, found=_without_secrets(ascii(revision)))
    return _Wanted(repo, revision, role)


def _fetch(wanted: _Wanted, progress: Progress) -> Location:
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    api, repo = HfApi(library_name="lora-cli", library_version=__version__), wanted.repo
    listening = type(progress) is not Progress
    calls = partial(client_calls, str(wanted), repo, warnings=listening)
    with calls():
        try:
            patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = api.model_info(repo, revision=wanted.revision, files_metadata=True, timeout=patience)
        except OfflineModeIsEnabled:
            return _from_cache(wanted)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if _NAME.fullmatch(file.rfilename)}
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise HubError("The Hub named no commit", file=wanted, hint="check that HF_ENDPOINT is a Hub")
    chosen = _choose(sizes, wanted) or _refuse(sizes, wanted)

    def get(name: str) -> Path:
        return Path(api.hf_hub_download(repo, name, revision=commit))

    beside = [name for name, size in sizes.items() if _travels(name, size, wanted.role)]
    large = [name for name in beside if name.endswith(".undo")]
    # Without bars: one for each config would bury the one that counts.
    with calls(), ThreadPoolExecutor(8) as pool:
        list(pool.map(get, [name for name in beside if name not in large]))
        shards = _shards(get(chosen)) if chosen.endswith(_INDEX_SUFFIX) else [chosen]
        large += shards
        missing = [name for name in large if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)]
    if absent := [name for name in shards if name not in sizes]:
        raise MalformedFileError("The index names shards that are not there", file=wanted, details=absent)
    volume = max(1e5, sum(sizes[name] for name in missing)) / 1e6
    progress.note(f"{repo}@{commit}: {f'fetching {volume:,.1f} MB' if missing else 'the weights are in the cache'}")
    # One after the other: the client splits a large file by itself, and an interrupt stops at once.
    with calls(bars=listening):
        snapshot = {get(name).parent for name in large}.pop()
    _remember(snapshot, wanted.revision)
    return _location(snapshot, wanted)


def _from_cache(wanted: _Wanted) -> Location:
    """Offline: the snapshot in the cache, if all its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    absent: list[str] = []
    with suppress(LocalEntryNotFoundError):
        # With no pattern allowed, this only looks up which snapshot the revision is.
        found = snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True, allow_patterns=[])
        held = {path.name: path for path in listing(Path(found)) if path.is_file()}
        if chosen := _choose(held, wanted):
            shards = _shards(held[chosen]) if chosen.endswith(_INDEX_SUFFIX) else [chosen]
            absent = [name for name in shards if name not in held]
            if not absent:
                return _location(Path(found), wanted)
    state = "only in part" if absent else "not"
    raise HubError(
        f"{wanted} is {state} in the Hub's cache, and HF_HUB_OFFLINE is set",
        details=absent,
        hint=f"with a network, run `HF_HUB_OFFLINE=0 hf download {wanted.repo} --revision {wanted.revision}`",
    ) from None


def _location(snapshot: Path, wanted: _Wanted) -> Location:
    return Location(snapshot, f"{wanted.repo}@{snapshot.name}", hub=True)


def _remember(snapshot: Path, revision: str) -> None:
    """Note in the cache which commit a branch or tag was, as the client does, so that an offline run finds it."""
    reference = snapshot.parents[1] / "refs" / revision
    with suppress(OSError, WriteError, DiskFullError):  # a read-only cache serves this run all the same
        if revision != snapshot.name:
            make_folders(reference.parent)
            write_beside(reference, snapshot.name.encode())


def _choose(names: Iterable[str], wanted: _Wanted) -> str | None:
    """Return the index or file that holds the weights; None if there are none in safetensors."""
    root = sorted(name for name in names if "/" not in name)
    preferred, suffixes = [_INDEX, _SINGLE], [_INDEX_SUFFIX, ".safetensors"]
    if wanted.role == "adapter":
        preferred, suffixes = [ADAPTER_FILE], [".safetensors"]
        model = _INDEX in root or {_SINGLE, "config.json"} <= set(root)
        if model and not {ADAPTER_FILE, "adapter_config.json"}.intersection(root):
            hint = "give the base checkpoint first, then the adapter"
            raise UsageError("The repository holds a checkpoint, not an adapter", file=wanted, hint=hint)
    for name in preferred:
        if name in root:
            return name
    for suffix in suffixes:
        candidates = [name for name in root if name.endswith(suffix)]
        if len(candidates) > 1:
            hint = f"run `hf download {wanted.repo} FILE`, then give the path that it prints"
            raise UnsupportedError("Several files could be meant", file=wanted, details=candidates, hint=hint)
        if candidates:
            return candidates[0]
    return None


def _refuse(names: Iterable[str], wanted: _Wanted) -> NoReturn:
    pickles = sorted(name for name in names if name.endswith(PICKLES) and not name.startswith(_TRAINING_STATE))
    if pickles:
        what = "The repository holds only pickled weights, which can run code when they are read"
        raise UnsafeInputError(what, file=wanted, found=", ".join(pickles[:8]), hint=CONVERT_HINT)
    hint = "name a repository or revision that has the weights as safetensors"
    raise HubError("The repository has no safetensors file at its root", file=wanted, hint=hint)


def _travels(name: str, size: int, role: Role) -> bool:
    """Whether a file comes with the weights: from subfolders only configs, and none of a run's own checkpoints."""
    if "/" in name:
        wanted = role == "checkpoint" and not name.startswith("checkpoint-")
        return wanted and size <= _NESTED_LIMIT and belongs(Path(name))
    return name.endswith(_OWN_FILES) or (size <= SIDE_FILE_LIMIT and belongs(Path(name)))


def _shards(index: Path) -> list[str]:
    return sorted(set(parse_index(read_whole(index, limit=INDEX_LIMIT), name=index.name).weight_map.values()))
