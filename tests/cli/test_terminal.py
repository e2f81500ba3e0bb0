"""Where the output goes (R143 to R145): pipes that close, full disks, narrow and dumb terminals, those with ASCII."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_world import Call, Ran, World, call_fixture, environment, process, world_fixture  # noqa: F401 (fixtures)
from tiny import MODULES, read_tensors

from lora_cli.cli import output
from lora_cli.cli.output import Output

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")


# A reader that goes away, a disk without space


@contextmanager
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    try:
        yield write
    finally:
        os.close(write)


PRINTING = {
    "text": "inspect {base}",
    "json": "inspect {base} --json",
    "help": "--help",
    "version": "--version",
    "plan": "merge {base} {adapter} --dry-run",
}
every_print = pytest.mark.parametrize("line", PRINTING.values(), ids=PRINTING.keys())


@every_print
def test_a_closed_pipe_is_a_quiet_end(world: World, tmp_path: Path, line: str) -> None:
    with closed_pipe() as pipe:
        ran = process(*world.fill(tuple(line.split()), tmp_path), stdout=pipe)
    assert (ran.code, ran.err) == (141, "")


@pytest.mark.parametrize("line", ["inspect {base}", "inspect {base} --json", "--help"])
def test_a_full_disk_is_a_write_error(world: World, tmp_path: Path, line: str) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = process(*world.fill(tuple(line.split()), tmp_path), stdout=full)
    assert ran.code == 32
    assert ran.err.startswith("error: ")
    assert "No space left" in ran.err
    assert len(ran.err.splitlines()) <= 4


def test_head_takes_what_it_wants(world: World) -> None:
    line = f"set -o pipefail; '{sys.executable}' -m lora_cli inspect '{world.base}' -v | head -1"
    many = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, check=False, timeout=60)
    # All may have been written before head went away; that is no error either.
    assert many.returncode in (0, 141)
    assert many.stdout == b"checkpoint base\n"
    assert many.stderr == b""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_merge_is_done_though_nobody_reads_of_it(world: World, tmp_path: Path, flags: list[str]) -> None:
    with closed_pipe() as pipe:
        ran = process("merge", world.base, world.adapter, "-o", tmp_path / "out", *flags, stdout=pipe)
    assert ran.code == 141
    assert "Traceback" not in ran.err
    assert "error" not in ran.err
    mine, theirs = read_tensors(tmp_path / "out"), read_tensors(world.merged)
    assert {key: tensor.tobytes() for key, tensor in mine.items()} == {k: t.tobytes() for k, t in theirs.items()}


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(("path", "code"), [("{base}", 0), ("no/such/path", 2)])
def test_streams_that_are_closed_from_the_start(world: World, path: str, code: int, closing: str) -> None:
    """An error keeps its code whether it can be said or not; a result that cannot be shown is 0 or a write error."""
    where = path.format(base=world.base)
    line = f"'{sys.executable}' -m lora_cli inspect '{where}' {closing}"
    ran = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, check=False, timeout=60)
    assert b"Traceback" not in ran.stderr
    assert b"Internal error" not in ran.stderr
    assert ran.returncode in {code, 32 if code == 0 and "2>" not in closing[:2] else code}


# Terminals


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "no colour": {"NO_COLOR": "1"},
    "dumb": {"TERM": "dumb"},
    "no terminal type": {"TERM": ""},
    "20 columns": {"COLUMNS": "20"},
    "10 columns": {"COLUMNS": "10"},
    "0 columns": {"COLUMNS": "0"},
    "nonsense columns": {"COLUMNS": "-3x"},
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENCODINGS = {"LC_ALL=C": ASCII, "ascii": {"PYTHONIOENCODING": "ascii"}, "latin-1": {"PYTHONIOENCODING": "latin-1"}}


def assert_complete(shown: Ran, refused: Ran) -> str:
    """Names may be folded in a narrow terminal, but they are there; errors are never cut."""
    assert (shown.code, shown.err) == (0, "")
    assert "\x1b" not in shown.out
    letters = "".join(shown.out.split())
    assert "adapter_config.json" in letters
    assert "2=lora_alpha/r,4modules" in letters
    assert refused.code == 2
    assert refused.err.startswith("error: no/such/p")
    assert "Path not found" in refused.err
    assert len(refused.err.splitlines()) == 2
    return shown.out


@pytest.mark.parametrize("env", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_results_and_errors_are_complete_in_every_terminal(
    call: Call, world: World, monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    out = assert_complete(call("inspect", world.adapter), call("inspect", "no/such/päth"))
    width = int(env["COLUMNS"]) if env.get("COLUMNS", "").isdigit() else 80
    assert max(len(line) for line in out.splitlines()) <= max(width or 80, 20)  # 0 is a terminal that does not know
    assert width < 80 or all(module in out for module in MODULES)


@pytest.mark.parametrize("env", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_results_and_errors_are_complete_in_every_encoding(world: World, env: Mapping[str, str]) -> None:
    out = assert_complete(process("inspect", world.adapter, env=env), process("inspect", "no/such/päth", env=env))
    assert all(module in out for module in MODULES)
    assert out.isascii() or env is ENCODINGS["latin-1"]


@pytest.mark.parametrize("env", [{"COLUMNS": "20"}, ASCII], ids=["narrow", "ascii"])
def test_help_is_shown_everywhere(env: Mapping[str, str]) -> None:
    ran = process("merge", "--help", env=env)
    assert (ran.code, ran.err) == (0, "")
    assert "--weight" in "".join(ran.out.split())
    assert env is not ASCII or ran.out.isascii()


def on_a_terminal(*arguments: object, program: Sequence[str] = ("-m", "lora_cli"), **env: str) -> str:
    """What a terminal is sent."""
    here, there = pty.openpty()
    line = [sys.executable, *program, *map(str, arguments)]
    started = subprocess.Popen(line, stdout=there, stderr=there, env=environment(**env))
    os.close(there)
    parts = []
    try:
        while part := os.read(here, 65536):
            parts.append(part)
    except OSError:
        pass  # Linux says EIO when the last writer is gone
    finally:
        os.close(here)
    assert started.wait(60) == 0
    return b"".join(parts).decode()


FORKING = """
import sys
from lora_cli.cli import output
from lora_cli.cli.app import main
from lora_cli.surgery import ahead, forking, workers

def can_fork():
    print("can fork:", forking.can_fork(), file=sys.stderr)
    return forking.can_fork()

output.BAR_AFTER_SECONDS = 0.0
ahead.can_fork = workers.can_fork = can_fork
ahead.SHARE = workers.SHARE = 1
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units run in processes on Linux alone")
def test_a_bar_does_not_keep_work_from_being_forked(world: World, tmp_path: Path) -> None:
    """A bar that redraws itself would do so in a thread, and then there could be no processes."""
    sent = on_a_terminal(
        "merge", world.base, world.adapter, "-o", tmp_path / "out", program=("-c", FORKING), TERM="xterm-256color"
    )
    assert sent.count("can fork: True") == 2
    assert "can fork: False" not in sent
    assert "━" in sent


def test_a_terminal_has_colours_unless_it_is_told_not_to(world: World) -> None:
    assert COLOUR.search(on_a_terminal("inspect", world.adapter, TERM="xterm-256color"))
    assert not COLOUR.search(on_a_terminal("inspect", world.adapter, TERM="xterm-256color", NO_COLOR="1"))
    assert "\x1b" not in on_a_terminal("inspect", world.adapter, TERM="dumb")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


BARS: list[tuple[Output, dict[str, str], bool]] = [
    (Output(), {"TERM": "xterm"}, True),
    (Output(), {"TERM": "dumb"}, False),
    (Output(quiet=True), {"TERM": "xterm"}, False),
    (Output(json=True), {"TERM": "xterm"}, False),
    (Output(verbose=True), {"TERM": "xterm"}, False),
]


@pytest.mark.parametrize(("shown", "env", "bar"), BARS)
def test_a_bar_only_on_a_terminal_that_can_take_it_away(
    monkeypatch: pytest.MonkeyPatch, shown: Output, env: dict[str, str], bar: bool
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(output, "BAR_AFTER_SECONDS", 0.0)
    for name, value in {"COLUMNS": "80", **env}.items():
        monkeypatch.setenv(name, value)
    progress = shown.progress()
    progress.begin("merge", 100)
    time.sleep(0.01)
    progress.advance(50)
    progress.file_done("model.safetensors", 50)
    progress.advance(50)
    assert ("\x1b" in stream.getvalue()) == bar
    assert ("merge" in stream.getvalue()) == bar
    assert ("model.safetensors: 50 B done" in stream.getvalue()) == shown.verbose


def test_no_bar_for_work_that_takes_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    progress = Output().progress()
    progress.begin("merge", 100)
    progress.advance(99)
    progress.advance(1)
    assert stream.getvalue() == ""
