"""Signals in the middle of the work: the right exit code, one line, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cli_world import ROOT, Call, World, call_fixture, environment, process, world_fixture  # noqa: F401 (fixtures)
from tiny import listing

from lora_cli.cli.output import Output
from lora_cli.surgery import inspect as surgery
from lora_cli.surgery import proof

# Files are finished only once GO is there, so that a signal always meets work in progress.
SLOW = """
import os, time
from lora_cli.checkpoint import staged
from lora_cli.cli.app import main
was = staged.StagedFile.finish
def finish(self, **named):
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.01)
    was(self, **named)
staged.StagedFile.finish = finish
main()
"""


def merge_with_a_signal(
    world: World, folder: Path, number: int, *flags: str, ignored: bool = False
) -> tuple[int, str, str]:
    """Start a merge, send the signal when it has begun to write, and let it come to its end."""
    work, go = folder / "work", folder / "go"
    work.mkdir()
    line = [sys.executable, "-c", SLOW, "merge", str(world.base), str(world.adapter), "-o", str(work / "out"), *flags]

    def ignoring() -> None:
        signal.signal(number, signal.SIG_IGN)

    started = subprocess.Popen(
        line,
        env=environment(GO=str(go)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignoring if ignored else None,  # noqa: PLW1509 (no threads yet)
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(work.glob(".out*/*/*.safetensors"))) < 2:
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.send_signal(number)
        time.sleep(0.2)
        go.touch()
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()
        started.wait()
    return started.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_a_merge_and_leaves_nothing(world: World, tmp_path: Path, number: int, code: int) -> None:
    returned, out, err = merge_with_a_signal(world, tmp_path, number, "-q")
    assert (returned, out) == (code, "")
    assert err.splitlines()[0] == "error: Interrupted; nothing was written"
    assert len(err.splitlines()) <= 2
    assert list((tmp_path / "work").iterdir()) == []


def test_a_signal_has_its_document(world: World, tmp_path: Path) -> None:
    returned, out, err = merge_with_a_signal(world, tmp_path, signal.SIGTERM, "--json")
    document: dict[str, Any] = json.loads(out)
    assert (returned, err, document["schema"]) == (143, "", "lora-cli/error/1")
    assert (document["code"], document["exit"]) == ("interrupted", 143)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_signal_that_was_ignored_stays_ignored(world: World, tmp_path: Path) -> None:
    """What `nohup lora-cli merge …` asks for: the end of the terminal is not the end of the merge."""
    returned, _, err = merge_with_a_signal(world, tmp_path, signal.SIGHUP, "-q", ignored=True)
    assert (returned, err) == (0, "")
    assert (tmp_path / "work" / "out" / "lora_merge.json").exists()


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1)  # Python runs handlers between its own instructions


def test_a_library_may_swallow_the_interrupt(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that is interrupted can fail with any error; the signal is still the reason."""

    def importing(*arguments: object, **options: object) -> None:
        try:
            send()
        except KeyboardInterrupt as error:
            raise ImportError("half of a library") from error

    monkeypatch.setattr(surgery, "inspect", importing)
    ran = call("inspect", world.base, "--json")
    assert (ran.code, ran.document["code"]) == (143, "interrupted")


def test_what_was_written_is_not_denied(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unmerge proves its result after it is complete; stopped there, it must not say that nothing was written."""

    def proving(*arguments: object, **options: object) -> Any:
        send()

    monkeypatch.setattr(proof, "prove", proving)
    ran = call("unmerge", world.merged, world.adapter, "-o", tmp_path / "out", "--approximate")
    assert ran.code == 143
    assert ("nothing was written" in ran.err) == (list(tmp_path.iterdir()) == [])


def test_a_signal_while_the_result_is_shown(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "result", lambda *arguments: send())
    ran = call("merge", world.base, world.adapter, "-o", tmp_path / "out")
    assert ran.code == 143
    assert "lora_merge.json" in {path.rpartition("/")[2] for path in listing(tmp_path)}
    assert "nothing was written" not in ran.err


def test_a_run_in_a_process_gives_its_handlers_back(call: Call, world: World) -> None:
    """`run` can be called by a program that has handlers of its own."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert call("inspect", world.adapter).code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


WHILE_STARTING = """
import os, runpy, signal, sys
class Stopping:
    def find_spec(self, name, path=None, target=None):
        if name == "lora_cli.cli.app":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stopping())
sys.argv = ["lora-cli", "--version"]
runpy.run_module("lora_cli", run_name="__main__")
"""


def test_an_interrupt_while_the_program_starts() -> None:
    """Most of the first second goes into imports, and a traceback from there helps nobody."""
    ran = process(program=("-c", WHILE_STARTING))
    assert (ran.code, ran.out, ran.err) == (130, "", "")
    assert process(program=("-c", WHILE_STARTING.replace("SIGINT", "SIGWINCH"))).out.startswith("lora-cli ")


def test_the_console_script_starts_so_too() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"lora-cli": "lora_cli.__main__:main"}
