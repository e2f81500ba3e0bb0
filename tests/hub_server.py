"""A small Hub on this machine: the file routes of huggingface.co over repositories that a test makes up.

The fixture `hub_server` starts one and points the client in this process, and in processes started from it, there. It
has another name than the test's argument, so a test module imports it with

    from hub_server import HubServer, hub_server_fixture  # noqa: F401
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".h5", ".undo", ".msgpack")
"""Files that are served as the Hub serves large ones: from another host, by a signed address."""
SIGNATURE = "X-Amz-Signature=5ec4e7"
Content = bytes | Path


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    query: str
    token: str | None
    byte_range: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """An answer that stands in for the real one, `times` times, for paths that match `path`."""

    path: str
    status: int
    headers: Mapping[str, str]
    times: int
    body: bytes


@dataclass
class Repository:
    """Commits by their id, and the branches and tags that name them."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit_of(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


class HubServer:
    """Repositories, the requests for them, and the faults that a test asks for.

    Attributes:
        requests: Every request so far, oldest first.
        faults: Answers to give instead of the real ones.
        cut: Paths whose next body ends after half of it, as when a connection breaks.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.cut: set[str] = set()
        self._server: _Server | None = None

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.connections = []
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
        self._server = None

    def publish(self, repo: str, content: Path | Mapping[str, Content], *, branch: str = "main") -> str:
        """Make the files of a folder, or of a mapping, the newest commit of a branch; return the commit."""
        if isinstance(content, Path):
            root = content
            content = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        files = dict(content)
        repository = self.repositories.setdefault(repo, Repository())
        digest = hashlib.sha1(f"{repo}\0{branch}\0{len(repository.commits)}".encode(), usedforsecurity=False)
        for name, data in sorted(files.items()):
            digest.update(name.encode() + b"\0" + _sha256(data).encode())
        commit = digest.hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def publish_all(self, folder: Path) -> None:
        """Publish every `OWNER/NAME` below a folder."""
        for path in sorted(folder.glob("*/*")):
            self.publish(path.relative_to(folder).as_posix(), path)

    def fail(
        self,
        path: str,
        status: int,
        headers: Mapping[str, str] | None = None,
        *,
        times: int = 1_000_000,
        body: bytes = b"",
    ) -> None:
        """Answer requests in whose path the regular expression `path` is found with `status`."""
        self.faults.append(Fault(path, status, headers or {}, times, body))

    def fetched(self) -> list[str]:
        """Return the names of the files whose bytes were asked for, sorted."""
        return sorted(
            unquote(request.path.split("/", 5)[-1])
            for request in self.requests
            if request.method == "GET" and re.match(r"/[^/]+/[^/]+/resolve/|/cdn/", request.path)
        )


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _sha256(content: Content) -> str:
    return hashlib.sha256(_bytes(content)).hexdigest()


def _git_id(content: Content) -> str:
    data = _bytes(content)
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    connections: list[socket.socket]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """End the connections that clients keep open, as a server does that goes down."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that goes away, or tries TLS, is part of some tests; anything else is a fault of this server.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for a delayed acknowledgement

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, url.path, url.query, token, self.headers.get("Range")))
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.path, url.path):
                fault.times -= 1
                self._send(fault.status, fault.body, fault.headers)
                return
        for pattern, route in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._model_info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", self._cdn),
        ):
            if match := re.fullmatch(pattern, url.path):
                route(*(unquote(part) if part else part for part in match.groups()))
                return
        self._refuse(404, "PageNotFound")

    def _refuse(self, status: int, code: str) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": "said by the \x1b[31mserver"}
        self._send(status, json.dumps({"error": code}).encode(), said)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _find(self, repo: str, revision: str | None) -> tuple[Repository, str] | None:
        """The repository and commit, or None after the refusal was sent."""
        repository = self.hub.repositories.get(repo)
        allowed = self.headers.get("Authorization") is not None
        if repository is None or (repository.private and not allowed):
            self._refuse(404 if allowed else 401, "RepoNotFound")
            return None
        commit = repository.commit_of(revision or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return None
        return repository, commit

    def _model_info(self, repo: str, revision: str | None) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        repository, commit = found
        sized = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [self._sibling(name, data, sized=sized) for name, data in repository.commits[commit].items()]
        gated = "manual" if repository.gated else False
        self._send_json(
            {
                "_id": "0" * 24,
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit,
                "lastModified": "2025-01-01T00:00:00.000Z",
                "createdAt": "2025-01-01T00:00:00.000Z",
                "private": repository.private,
                "gated": gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    @staticmethod
    def _sibling(name: str, data: Content, *, sized: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name}
        if sized:
            entry |= {"blobId": _git_id(data), "size": _size(data)}
        return entry

    def _tree(self, repo: str, revision: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        repository, commit = found
        files = repository.commits[commit].items()
        self._send_json([{"type": "file", "path": n, "size": _size(d), "oid": _git_id(d)} for n, d in files])

    def _refs(self, repo: str) -> None:
        if (found := self._find(repo, None)) is None:
            return
        repository, _ = found

        def named(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]

        branches, tags = named("heads", repository.branches), named("tags", repository.tags)
        self._send_json({"branches": branches, "tags": tags, "converts": []})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        repository, commit = found
        if repository.gated:
            self._refuse(403, "GatedRepo")
        elif name not in repository.commits[commit]:
            self._refuse(404, "EntryNotFound")
        elif name.endswith(LARGE):
            self._redirect(repo, commit, name, repository.commits[commit][name])
        else:
            data = repository.commits[commit][name]
            self._send_file(data, {"X-Repo-Commit": commit, "ETag": f'"{_git_id(data)}"'})

    def _redirect(self, repo: str, commit: str, name: str, data: Content) -> None:
        # "localhost" is another host than the endpoint's 127.0.0.1, as the Hub's file store is.
        store = self.hub.endpoint.replace("127.0.0.1", "localhost")
        headers = {
            "Location": f"{store}/cdn/{repo}/{commit}/{name}?{SIGNATURE}",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(_size(data)),
            "X-Linked-Etag": f'"{_sha256(data)}"',
        }
        self._send(302, b"", headers)

    def _cdn(self, repo: str, commit: str, name: str) -> None:
        data = self.hub.repositories[repo].commits[commit][name]
        self._send_file(data, {"ETag": '"of-the-store"'})

    def _send_file(self, content: Content, headers: Mapping[str, str]) -> None:
        data = _bytes(content)
        cut = urlsplit(self.path).path in self.hub.cut
        self.hub.cut.discard(urlsplit(self.path).path)
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        status, extra = 200, {"Accept-Ranges": "bytes"}
        if ranged:
            start = int(ranged[1])
            status, extra = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        self._send(status, data, {**headers, **extra, "Content-Length": str(len(data))}, cut=cut)


@pytest.fixture(name="hub_server")
def hub_server_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yield a running server without repositories; the client uses it, with an empty cache and no token."""
    server = HubServer()
    server.start()
    try:
        use_hub(server.endpoint, tmp_path / "hf-home", monkeypatch)
        yield server
    finally:
        _close_client()
        server.stop()


def use_hub(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the Hub's client at `endpoint` and `home`, in this process and in those that it starts."""
    from huggingface_hub import constants

    for name in ("TOKEN", "HUB_CACHE", "HUB_OFFLINE", "XET_CACHE", "TOKEN_PATH", "HUB_DISABLE_PROGRESS_BARS", "DEBUG"):
        monkeypatch.delenv(f"HF_{name}", raising=False)
    for name in ("TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    # The client read its environment when it was imported, perhaps for another test.
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    _close_client()


def _close_client() -> None:
    """Make the client forget its connections and proxies; the name of the call depends on its release."""
    import huggingface_hub
    from huggingface_hub import utils

    close = getattr(huggingface_hub, "close_session", None) or getattr(utils, "reset_sessions", None)
    if close is not None:
        close()
