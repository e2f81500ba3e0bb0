"""Help, versions and completion come at once, without the heavy libraries; and help is worth reading."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_world import Call, World, call_fixture, environment, process, world_fixture  # noqa: F401 (fixtures)

from lora_cli.cli.app import app
from lora_cli.version import __version__

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)
HEAVY = ("torch", "transformers", "huggingface_hub", "peft", "safetensors.torch")

LOADED = f"""
import sys
from lora_cli.cli.app import main
try:
    main()
finally:
    print("loaded", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
"""
LIGHT = {
    "help": "--help",
    "no arguments": "",
    "version": "--version",
    "help of a command": "merge --help",
    "usage error": "merge --bogus",
    "adapter": "inspect {adapter}",
    "adapter with base": "inspect {adapter} --base {base} --json",
    "plain file": "inspect {plain} --scale 1",
    "checkpoint": "inspect {base}",
    "merged": "inspect {merged} --json",
    "no spectrum": "inspect {base} --spectrum",
    "difference": "diff {base} {merged}",
    "refusal": "merge {base} {plain} -o {out}",
}


def loaded(*arguments: str, **env: str) -> tuple[list[str], str]:
    """The heavy libraries that a run imported, and its stdout."""
    line = [sys.executable, "-c", LOADED, *arguments]
    ran = subprocess.run(line, env=environment(**env), capture_output=True, text=True, check=False, timeout=60)
    last = ran.stderr.splitlines()[-1].split()
    assert last[0] == "loaded", ran.stderr
    return last[1:], ran.stdout


@pytest.mark.parametrize("line", LIGHT.values(), ids=LIGHT.keys())
def test_what_needs_no_tensors_loads_no_library_for_them(world: World, tmp_path: Path, line: str) -> None:
    assert loaded(*world.fill(tuple(line.split()), tmp_path))[0] == []


def test_a_plan_loads_no_torch_where_no_undo_file_is_to_be_estimated(world: World, tmp_path: Path) -> None:
    line = world.fill(("merge", "{base}", "{adapter}", "-o", "{out}", "--dry-run", "--no-undo"), tmp_path)
    assert loaded(*line)[0] == ["huggingface_hub"]  # for the model card
    assert "torch" in loaded(*line[:-1])[0]


def test_completion_loads_no_library_and_completes() -> None:
    heavy, out = loaded(_LORA_CLI_COMPLETE="complete_bash", COMP_WORDS="lora-cli me", COMP_CWORD="1")
    assert (heavy, out.split()) == ([], ["merge"])
    heavy, out = loaded(_LORA_CLI_COMPLETE="complete_bash", COMP_WORDS="lora-cli merge --allow", COMP_CWORD="2")
    assert (heavy, out.split()) == ([], ["--allow-unmapped"])


PLAN_FIRST = """
import sys
from lora_cli.cli.output import Output
was = Output.show
def show(self, parts):
    was(self, parts)
    print("torch" in sys.modules)
Output.show = show
from lora_cli.cli.app import main
main()
"""


def test_the_plan_is_on_the_screen_before_torch_is_loaded(world: World, tmp_path: Path) -> None:
    """A plan takes milliseconds and torch takes seconds: nobody should wait in silence."""
    line = [sys.executable, "-c", PLAN_FIRST, "merge", str(world.base), str(world.adapter), "-o", str(tmp_path / "out")]
    ran = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[0] == "False"


def test_the_version() -> None:
    assert process("--version").out == f"lora-cli {__version__}\n"


# Help

NOT_LETTERS = re.compile(r"[\s\u2500-\u257f]+")
"""White space, and the lines of boxes, into which words are folded."""


def letters(text: str) -> str:
    return NOT_LETTERS.sub("", text)


def help_of(call: Call, *names: str) -> str:
    ran = call(*names, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert call(*names, "-h").out == ran.out
    return ran.out


def example_of(command: Any) -> str:
    """The line after `Example:` in a command's help."""
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip()]
    assert lines[0] == "Example:"
    assert len(lines) >= 2
    return lines[1]


every_command = pytest.mark.parametrize("name", COMMANDS)


def test_the_help_lists_every_command(call: Call) -> None:
    shown = help_of(call)
    assert call().out == shown
    for name, command in COMMANDS.items():
        assert re.search(rf"\b{name}\b", shown)
        assert letters(command.help.split(".")[0])[:40] in letters(shown)


@every_command
def test_every_command_is_explained_with_an_example(call: Call, name: str) -> None:
    command = COMMANDS[name]
    shown = help_of(call, name)
    assert example_of(command) in " ".join(shown.split())
    assert letters(command.help) in letters(shown)


@every_command
def test_every_option_is_explained(call: Call, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole sentence, and shown as it was written: square brackets are no markup."""
    monkeypatch.setenv("COLUMNS", "400")
    shown = letters(help_of(call, name))
    for parameter in COMMANDS[name].params:
        words = (parameter.help or "").replace("\\[", "[")
        assert re.search(r"[\w)][.?]( \[default: [^\]]+\])?$", words), f"{parameter.name}: {words!r}"
        assert letters(words) in shown, f"{parameter.name}: {words!r} is not what help shows"


@every_command
def test_every_command_knows_the_common_flags(name: str) -> None:
    options = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert {"--json", "-q", "--quiet", "-v", "--verbose", "--debug"} <= options
    assert {"--json", "-q", "-v", "--debug"} <= {flag for parameter in GROUP.params for flag in parameter.opts}


@every_command
def test_the_example_of_a_command_parses(name: str) -> None:
    program, command, *arguments = shlex.split(example_of(COMMANDS[name]))
    assert (program, command) == ("lora-cli", name)
    with COMMANDS[name].make_context(name, arguments) as context:
        assert context.params


def test_the_example_of_the_program_parses() -> None:
    program, command, *arguments = shlex.split(example_of(GROUP))
    assert program == "lora-cli"
    with COMMANDS[command].make_context(command, arguments) as context:
        assert context.params


@every_command
def test_an_example_that_is_wrong_does_not_parse(name: str) -> None:
    """So that the tests above prove something."""
    with pytest.raises(typer.TyperException), COMMANDS[name].make_context(name, ["--no-such-option"]):
        pass
