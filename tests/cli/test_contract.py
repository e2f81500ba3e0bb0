"""What scripts rely on: streams, one JSON document, exit codes; for each command, each mode and each fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_faults import FAULTS, Fault
from cli_world import Call, Ran, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from tiny import listing, numbers, read_tensors, write_adapter

from lora_cli.errors import LoraCliError

ERROR_FIELDS = {"schema", "code", "exit", "message", "file", "tensor", "expected", "found", "hint", "details"}
MERGE_FIELDS = "out tensors ledger entries adapters bytes_written seconds peak_rss_bytes"
PLAN_FIELDS = "operation base tensors ledger adapters files bytes_to_read bytes_to_write free_disk_bytes fits"
DIFF_FIELDS = "same only_in_a only_in_b changed unchanged"
VERIFY_FIELDS = "verified max_ulp tensors different"
INPUTS = "--base {base} --adapter {adapter}"
TAKEN = "inject {base} -o {out} --rank 2 --base-out {out}-base"
UNMERGE = "unmerge {merged} {adapter} --approximate"
UNMERGE_FIELDS = "out exact files tensors undecided"


@dataclass(frozen=True)
class Command:
    """A command line that works.

    Attributes:
        line: Its arguments, with {base}, {out} and so on.
        schema: Of its JSON.
        fields: That the JSON has, at least.
        code: Exit code.
        shards: Whether it goes through the base's shards, so that -v has a line for each.
        plan: Whether the plan is on stderr first.
    """

    line: str
    schema: str
    fields: str
    code: int = 0
    shards: bool = False
    plan: bool = False


COMMANDS = {
    "inspect adapter": Command("inspect {adapter}", "inspect", "kind format parameters modules"),
    "inspect with base": Command("inspect {adapter} --base {base}", "inspect", "kind format parameters modules"),
    "inspect spectrum": Command("inspect {adapter} --spectrum", "inspect", "kind modules spectrum"),
    "inspect base": Command("inspect {base}", "inspect", "kind format parameters tensors"),
    "inspect file": Command("inspect {file}", "inspect", "kind format parameters tensors"),
    "inspect plain": Command("inspect {plain} --scale 2", "inspect", "kind format parameters modules"),
    "inspect merged": Command("inspect {merged}", "inspect", "kind format parameters tensors receipt"),
    "merge": Command("merge {base} {adapter} -o {out}", "merge", MERGE_FIELDS, shards=True, plan=True),
    "merge file": Command("merge {file} {plain} --scale 3 -o {out}.safetensors", "merge", MERGE_FIELDS, plan=True),
    "merge dry": Command("merge {base} {adapter} -o {out} --dry-run", "plan", PLAN_FIELDS),
    "verify": Command(f"verify {{merged}} {INPUTS}", "verify", VERIFY_FIELDS, shards=True),
    "verify other": Command(f"verify {{base}} {INPUTS}", "verify", VERIFY_FIELDS, code=1, shards=True),
    "diff": Command("diff {base} {merged}", "diff", DIFF_FIELDS, code=1),
    "diff same": Command("diff {base} {single}", "diff", DIFF_FIELDS),
    "diff adapters": Command("diff {adapter} {adapter}", "diff", DIFF_FIELDS),
    "inject": Command("inject {base} -o {out} --rank 2", "inject", "out"),
    "inject wrapped": Command("inject {base} --rank 2 -o {out} --layout wrapped", "inject", "out", shards=True),
    "inject olora": Command(f"{TAKEN} --init olora", "inject", "out residual", shards=True),
    "inject dry": Command(f"{TAKEN} --init pissa_niter_2 --dry-run", "plan", f"{PLAN_FIELDS} residual"),
    "unmerge": Command(f"{UNMERGE} -o {{out}}", "unmerge", UNMERGE_FIELDS, shards=True, plan=True),
    "unmerge dry": Command(f"{UNMERGE} --dry-run", "plan", PLAN_FIELDS),
}  # fmt: skip
"""Every command in every way that gives a result; a new one is a new line."""

every_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
before_or_after = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


def start(call: Call, world: World, folder: Path, command: Command, *flags: str, before: bool = False) -> Ran:
    line = world.fill(tuple(command.line.split()), folder)
    return call(*flags, *line) if before else call(*line, *flags)


def assert_plain(ran: Ran) -> None:
    """No escape sequences, no traceback, no leftovers of a bar."""
    for text in (ran.out, ran.err):
        assert "\x1b" not in text
        assert "\r" not in text
        assert "Traceback" not in text


@every_command
def test_text(call: Call, world: World, tmp_path: Path, command: Command) -> None:
    ran = start(call, world, tmp_path, command)
    assert ran.code == command.code, ran.err
    assert_plain(ran)
    assert ran.out.strip()
    assert not ran.out.startswith("{")
    assert "error" not in ran.err
    assert "warning" not in ran.err
    assert ran.err.startswith("plan: ") == command.plan
    assert ("plan: " in ran.out) == (command.schema == "plan")


@before_or_after
@every_command
def test_json(call: Call, world: World, tmp_path: Path, command: Command, before: bool) -> None:
    ran = start(call, world, tmp_path, command, "--json", before=before)
    assert (ran.code, ran.err) == (command.code, "")
    assert ran.document["schema"] == f"lora-cli/{command.schema}/1"
    assert set(command.fields.split()) <= ran.document.keys()


@before_or_after
@every_command
def test_quiet(call: Call, world: World, tmp_path: Path, command: Command, before: bool) -> None:
    ran = start(call, world, tmp_path, command, "-q", before=before)
    assert (ran.code, ran.out, ran.err) == (command.code, "", "")


@before_or_after
@every_command
def test_verbose(call: Call, world: World, tmp_path: Path, command: Command, before: bool) -> None:
    ran = start(call, world, tmp_path, command, "-v", before=before)
    assert ran.code == command.code
    assert_plain(ran)
    told = [line.split(":")[0] for line in ran.err.splitlines() if line.startswith("model-")]
    assert sorted(told) == (sorted(path.name for path in world.base.glob("*.safetensors")) if command.shards else [])


@every_command
def test_flags_mean_the_same_before_and_after(call: Call, world: World, tmp_path: Path, command: Command) -> None:
    found = []
    for before in (True, False):
        folder = tmp_path / str(before)
        folder.mkdir()
        document = start(call, world, folder, command, "-v", "--json", "--debug", "--quiet", before=before).document
        hidden = (
            "seconds",
            "peak_rss_bytes",
            "out",
            "free_disk_bytes",
            "residual",
            "files" if "{out}.safe" in command.line else "",
        )
        found.append({key: value for key, value in document.items() if key not in hidden})
    assert found[0] == found[1]


def test_every_exit_code_of_the_table_is_tested_and_every_error_class_has_its_own() -> None:
    tested = {fault.exit for fault in FAULTS.values()}
    classes = {kind.exit_code: kind for kind in LoraCliError.__subclasses__() if kind.code != "interrupted"}
    assert len(classes) == len([kind for kind in LoraCliError.__subclasses__() if kind.code != "interrupted"])
    # These need a machine that fails: see test_machine.
    assert set(classes) - tested == {31, 32, 33, 40}
    assert {fault.code for fault in FAULTS.values()} == {classes[code].code for code in tested}


every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


def lines_of(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if not re.match(r"plan: |  (tensors|adapter|names|ledger|writes) ", line)
    ]


@every_fault
def test_fault_in_text(call: Call, world: World, tmp_path: Path, fault: Fault) -> None:
    arguments = fault.arguments(world, tmp_path)
    before = listing(tmp_path)
    ran = call(*arguments)
    assert ran.code == fault.exit, ran.err
    assert ran.out == ""
    assert_plain(ran)
    lines = lines_of(ran.err)
    assert lines[0].startswith("error: ")
    assert [word for word in fault.words.split("|") if word not in ran.err] == []
    assert len([line for line in lines if not line.startswith(("  - ", "  … "))]) <= 4
    assert not lines[0].endswith(".")
    assert listing(tmp_path) == before, "something was left behind"
    assert call("-q", *arguments).err.splitlines() == lines, "-q keeps errors, and only them"


@every_fault
@before_or_after
def test_fault_in_json(call: Call, world: World, tmp_path: Path, fault: Fault, before: bool) -> None:
    arguments = fault.arguments(world, tmp_path)
    ran = call("--json", *arguments) if before else call(*arguments, "--json")
    assert (ran.code, ran.err) == (fault.exit, "")
    error = ran.document
    assert error.keys() >= ERROR_FIELDS
    assert (error["schema"], error["code"], error["exit"]) == ("lora-cli/error/1", fault.code, fault.exit)
    text = "\n".join(str(value) for value in [*error.values(), *error["details"]])
    words = [
        word for word in fault.words.split("|") if word.removeprefix("found ").removeprefix("expected ") not in text
    ]
    assert words == []


@every_fault
def test_fault_comes_with_an_action(call: Call, world: World, tmp_path: Path, fault: Fault) -> None:
    hint = call("--json", *fault.arguments(world, tmp_path)).document["hint"]
    assert hint
    assert not hint.endswith(".")


@pytest.mark.parametrize("flags", [["--json"], ["--json", "-q"], ["--json", "bogus"], ["merge", "--json"]])
def test_a_line_that_names_no_command_has_its_document(call: Call, flags: list[str]) -> None:
    ran = call(*flags)
    assert (ran.code, ran.err, ran.document["code"]) == (2, "", "usage")


def test_what_follows_two_dashes_is_no_flag(call: Call) -> None:
    ran = call("inspect", "--", "--json")
    assert (ran.code, ran.out) == (2, "")


def test_all_mismatches_at_once(call: Call, world: World, tmp_path: Path) -> None:
    """Eight for people, with the number of the rest; all of them in JSON."""
    tensors = {f"nowhere.{n}.lora_{side}.weight": numbers(2, 2) for n in range(12) for side in "AB"}
    line = ["merge", world.base, write_adapter(tmp_path / "a", tensors), "-o", tmp_path / "out"]
    text, document = call(*line), call(*line, "--json").document
    assert len(document["details"]) == 12
    assert all(any(f"nowhere.{n}." in words for words in document["details"]) for n in range(12))
    assert text.err.count("  - ") == 8
    assert "4 more (--json lists all)" in text.err


def test_one_run_leaves_nothing_to_the_next(call: Call, world: World) -> None:
    """Flags before the name are kept in one place; they must not outlive their run."""
    assert call("--json", "-q", "-v", "--debug", "inspect", world.adapter).out.startswith("{")
    assert call("inspect", world.adapter).out.startswith("adapter")
    assert call("--json", "inspect").out.startswith("{")
    ran = call("inspect")
    assert (ran.out, ran.err.startswith("error: ")) == ("", True)


def test_debug_adds_the_traceback_to_stderr(call: Call, world: World) -> None:
    ran = call("inspect", "no/such/path", "--debug", "--json")
    assert (ran.code, ran.document["exit"]) == (2, 2)
    assert "Traceback" in ran.err


def test_inputs_are_as_they_were(world: World) -> None:
    assert sorted(path.name for path in world.base.parent.iterdir()) == [
        "adapter",
        "base",
        "merged",
        "plain.safetensors",
        "single",
    ]
    assert read_tensors(world.base).keys() == read_tensors(world.merged).keys()
