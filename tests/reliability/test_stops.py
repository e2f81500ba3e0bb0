"""R168, R169: workers that fail or are killed, and signals before the work begins: a code, a cause, and no trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import queues
from pathlib import Path
from typing import Any

import pytest
from catalogue import entries
from cli_world import Call, World, call_fixture, environment, world_fixture  # noqa: F401 (fixtures)

from lora_cli.checkpoint import files
from lora_cli.cli.output import Output
from lora_cli.surgery import workers

LINES = {
    "merge": "merge {base} {adapter} -o {out}",
    "unmerge": "unmerge {merged} {adapter} -o {out}",
    "verify": "verify {merged} --base {base} --adapter {adapter} --roundtrip",
    "diff": "diff {base} {merged} --rank",
    "wrap": "inject {base} -o {out} --rank 1 --layout wrapped",
}


def broken() -> None:
    raise ZeroDivisionError("broken\x1b[2J")


def starved() -> None:
    raise MemoryError


def killed() -> None:
    """As the system does when memory is short: nothing is said, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    "exception": (broken, "Internal error; nothing was written|ZeroDivisionError: broken\\x1b[2J"),
    "no memory": (starved, "no more memory; nothing was written|--memory"),
    "killed": (killed, "A worker process was killed|--threads 1|--memory"),
    "exit": (left, "A worker process was killed"),
}
CASES = [
    *(("merge", way, fault) for way in ("processes", "threads") for fault in ("exception", "no memory")),
    *((command, "processes", fault) for command in LINES for fault in ("killed", "exit")),
]


@pytest.mark.skipif(sys.platform != "linux", reason="units run in processes on Linux alone")
@pytest.mark.parametrize(("command", "way", "fault"), CASES)
def test_r169_a_worker_that_fails_ends_the_run(
    call: Call,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    way: str,
    fault: str,
) -> None:
    """Each way of sharing work; what a worker's error looks like from the other side: tests/surgery/test_workers.py."""
    do, words = FAULTS[fault]
    parent, here = os.getpid(), threading.get_ident()

    def failing(name: str) -> Callable[..., Any]:
        was = getattr(files, name)

        def call(*arguments: Any) -> Any:
            if os.getpid() != parent or threading.get_ident() != here:
                do()
            return was(*arguments)

        return call

    monkeypatch.setattr(workers, "can_fork", lambda: way == "processes")
    monkeypatch.setattr(workers, "SHARE", 1)
    for name in ("read_at", "copy_range"):
        monkeypatch.setattr(files, name, failing(name))
    line = world.fill(tuple(LINES[command].split()), tmp_path)
    ran = call(*line, "--threads", "2")
    assert ran.code == 70
    assert "Traceback" not in ran.err
    assert [word for word in words.split("|") if word not in ran.err] == []
    assert list(tmp_path.iterdir()) == []
    document = call(*line, "--threads", "2", "--json").document
    assert (document["code"], document["exit"]) == ("internal", 70)


def test_r169_a_pool_without_the_thread_that_feeds_it_does_not_hang(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short the second thread of a pool of processes cannot start, and the first dies of that."""

    def refused(queue: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "can_fork", lambda: True)
    monkeypatch.setattr(workers, "SHARE", 1)
    monkeypatch.setattr(queues.Queue, "_start_thread", refused)
    hooked = threading.excepthook
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.1)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    ran = call("merge", world.base, world.adapter, "-o", tmp_path / "out", "--threads", "2")
    signal.alarm(0)
    assert ran.code == 70
    assert "error: The system has no room for the workers\n  found can't start new thread" in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []
    assert threading.excepthook is hooked


# Signals while the program starts and plans. While it writes: tests/cli/test_signals.py, test_kill_loop.py

STOPPED = """
import os, signal, sys
from lora_cli.__main__ import main
class Stopping:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("AT"):
            del os.environ["AT"]
            os.kill(os.getpid(), getattr(signal, os.environ["WITH"]))
sys.meta_path.insert(0, Stopping())
main()
"""
STARTING = ("typer", "lora_cli.cli.app", "lora_cli.cli.merge")
"""Modules that are loaded before the program has read its arguments."""
PLANNING = ("lora_cli.surgery.merge", "msgspec", "yaml", "numpy", "torch", "torch.autograd", "rich.console")
"""Modules that are loaded after that."""
EACH = ("typer", "torch")
"""At these every signal is tried."""
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize(
    ("module", "number"),
    [(module, name) for module in (*STARTING, *PLANNING) for name in CODES if name == "SIGINT" or module in EACH],
)
def test_r168_a_signal_before_the_work_begins(world: World, tmp_path: Path, module: str, number: str) -> None:
    """Wherever it meets the program: no traceback, one line at most, nothing written."""
    line = [sys.executable, "-c", STOPPED, "merge", str(world.base), str(world.adapter), "-o", str(tmp_path / "out")]
    env = environment(AT=module, WITH=number)
    ran = subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=60)
    # Before the program's own handlers are there, the others do what they do to every program.
    assert ran.returncode in (CODES[number], -getattr(signal, number) if module in STARTING else CODES[number])
    assert ran.stdout == ""
    said = ran.stderr[ran.stderr.index("error: ") :] if "error: " in ran.stderr else ""
    assert said.splitlines()[:1] == ([] if module in STARTING else ["error: Interrupted; nothing was written"])
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_r168_a_signal_while_an_error_is_shown(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = entries(tmp_path)

    def stopped(*arguments: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(Output, "error", stopped)
    ran = call("inspect", tmp_path)
    assert (ran.code, ran.out, ran.err) == (128 + number, "", "")
    assert entries(tmp_path) == before
