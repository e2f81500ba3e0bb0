"""What tests of the command line share: small inputs, the program run in this process, and what it printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.numpy import save_file
from tiny import adapter_tensors, write_adapter, write_base

from lora_cli.cli.app import run

ROOT: Final = Path(__file__).resolve().parents[1]
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class World:
    """Inputs that no test changes.

    Attributes:
        base: A folder of two shards.
        adapter: A PEFT folder for it.
        single: The same base in a folder of one file.
        file: That file.
        plain: The same factors in a bare file, without a scale.
        merged: base + adapter, as lora-cli writes it.
    """

    base: Path
    adapter: Path
    single: Path
    file: Path
    plain: Path
    merged: Path

    def fill(self, arguments: tuple[str, ...], folder: Path) -> list[str]:
        """Put paths in the places of {base}, {adapter}, …, and {out} in `folder`."""
        paths = {name: str(path) for name, path in asdict(self).items()} | {"out": str(folder / "out")}
        return [argument.format(**paths) for argument in arguments]


@dataclass(frozen=True)
class Ran:
    """What a run of the program came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout, which is ASCII and ends its line."""
        assert self.out.isascii()
        assert self.out.endswith("}\n")
        document = json.loads(self.out)  # two documents, or anything beside them, are no JSON
        assert isinstance(document, dict)
        return document


Call = Callable[..., Ran]


def make_world(folder: Path) -> World:
    base, adapter = write_base(folder / "base"), write_adapter(folder / "adapter")
    single = write_base(folder / "single", shards=1)
    save_file(adapter_tensors(prefix=""), folder / "plain.safetensors")
    merged = folder / "merged"
    assert run(["-q", "merge", str(base), str(adapter), "-o", str(merged)]) == 0
    return World(base, adapter, single, single / "model.safetensors", folder / "plain.safetensors", merged)


@pytest.fixture(scope="session", name="world")
def world_fixture(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The inputs, made once a session."""
    before = [signal.getsignal(number) for number in SIGNALS]
    world = make_world(tmp_path_factory.mktemp("world"))
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    return world


@pytest.fixture(name="call")
def call_fixture(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Call]:
    """Runs the program in this process, in an empty folder, as from a pipe of eighty columns."""
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "LORA_CLI_NO_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    yield call
    assert list(here.iterdir()) == [], "something was written where nothing should be"
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def environment(**extra: str) -> dict[str, str]:
    """The environment for a process of its own: this checkout, no network, nothing about terminals."""
    gone = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "LC_ALL", "LANG", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"} | extra


def process(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    program: tuple[str, ...] = ("-m", "lora_cli"),
    **options: Any,
) -> Ran:
    """Run the program as users do, in a process of its own."""
    line = [sys.executable, *program, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120} | options
    ended = subprocess.run(line, env=environment(**(env or {})), check=False, **options)
    return Ran(ended.returncode, os.fsdecode(ended.stdout or b""), os.fsdecode(ended.stderr or b""))
