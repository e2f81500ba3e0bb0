"""R139 to R147: text that came from a file cannot steer the terminal, in whatever a command prints."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cli_world import Call, Ran, World, call_fixture, process, world_fixture  # noqa: F401 (fixtures)
from safetensors.numpy import save_file
from tiny import PREFIX, Array, numbers, write_adapter, write_json

import lora_cli
from lora_cli.cli.app import run
from lora_cli.cli.text import shown
from lora_cli.errors import UnsupportedError
from lora_cli.surgery import inspect as surgery

HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "C1": "\x9b31mred\x9d0;x\x9c",
    "bell": "safe\x07\x08\x08\x08\x08evil",
    "return": "shown\rhidden",
    "lines": "one\ntwo\x0b\x0cthree\u2028four\u2029five\x85six",
    "tab": "a\tb\x7f",
    "override": "\u202egnp.\u202cexe",
    "isolate": "\u2066a\u2069\u200f\u061c",
    "zero width": "a\u200bb\u200d\u2060\ufeffc",
    "unseen": "a\ufe0fb\u3164c\U000e0101d\u034f\U000e0041",
    "storm": "Z" + "\u0301\u0327\u20dd" * 30,
    "markup": "[red]x[/red]",
    "closing": "[/x]",
    "link markup": "[link=http://evil]x[/link]",
    "emoji": ":smile:",
    "formula": "=cmd()",
}
ALL = "|".join(HOSTILE.values())
SHORT = "\x1b]0;x\x07\u202e[red]\x9b2J\r"
"""A name of a file: all at once, in fewer bytes than a name may have."""

STEERING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
SGR = re.compile(r"\x1b\[[0-9;]*m")


def hostile_world(folder: Path) -> dict[str, Path]:
    """Inputs in which every text that can be chosen is hostile, and what the program makes of them."""
    base = folder / f"base{SHORT}"
    base.mkdir()
    tensors = {f"m.{name}.weight": numbers(3, 2, seed=at) for at, name in enumerate(HOSTILE.values())}
    tensors[f"untouched.{ALL}"] = numbers(4)
    save_file(tensors, base / "model.safetensors", metadata={ALL: ALL, "format": "pt"})
    save_file({"x": numbers(1)}, base / f"unused{SHORT}.safetensors")
    write_json(base / "config.json", {"architectures": [ALL], "model_type": ALL, "dtype": ALL, ALL: ALL})
    for name in (f"{SHORT}.txt", f"side{SHORT}.json"):
        (base / name).write_text("{}")
    factors: dict[str, Array] = {}
    for at, name in enumerate(HOSTILE.values()):
        factors[f"{PREFIX}m.{name}.lora_A.weight"] = numbers(2, 2, seed=at)
        factors[f"{PREFIX}m.{name}.lora_B.weight"] = numbers(3, 2, seed=-at % 1000)
    said: dict[str, Any] = {"base_model_name_or_path": ALL, "revision": ALL, "alpha_pattern": {SHORT: 3}}
    adapter = write_adapter(folder / f"adapter{SHORT}", factors, **said)
    (adapter / "tokenizer.json").write_text("{}")
    save_file(factors, folder / f"plain{SHORT}.safetensors", metadata={ALL: ALL})
    found = {"base": base, "adapter": adapter, "plain": folder / f"plain{SHORT}.safetensors"}
    made = {
        "merged": ["merge", base, adapter],
        "wrapped": ["inject", base, "--layout", "wrapped", "--rank", "1"],
        "injected": ["inject", base, "--rank", "1"],
    }
    for name, line in made.items():
        found[name] = folder / f"{name}{SHORT}"
        assert run(["-q", *map(str, line), "-o", str(found[name])]) == 0
    found["told"] = shutil.copytree(found["merged"], folder / f"told{SHORT}")
    receipt = found["told"] / "lora_merge.json"
    receipt.write_text(json.dumps(every_text(json.loads(receipt.read_text("utf-8")))))
    (folder / "targets.yaml").write_text(json.dumps({"targets": [SHORT, "m.*"]}))
    (folder / "config.yaml").write_text(json.dumps({ALL: ALL}))
    return found | {"targets": folder / "targets.yaml", "config": folder / "config.yaml"}


def every_text(document: Any) -> Any:
    """A receipt in which labels and everything else that is a text is hostile, but for what says what it is."""
    if isinstance(document, dict):
        return {key: said if key in ("schema", "operation") else every_text(said) for key, said in document.items()}
    if isinstance(document, list):
        return [every_text(item) for item in document]
    return ALL if isinstance(document, str) else document


@pytest.fixture(scope="module", name="hostile")
def hostile_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile_world(tmp_path_factory.mktemp("hostile"))


BOTH = "--base {base} --adapter {adapter}"
LINES: dict[str, tuple[int, str]] = {
    "inspect base": (0, "inspect {base}"),
    "inspect adapter": (0, "inspect {adapter} --base {base}"),
    "inspect plain": (0, "inspect {plain} --scale 1 --spectrum"),
    "inspect merged": (0, "inspect {merged}"),
    "inspect told": (0, "inspect {told}"),
    "inspect wrapped": (0, "inspect {wrapped}"),
    "inspect injected": (0, "inspect {injected} --base {base}"),
    "merge": (0, "merge {base} {adapter} -o {out}"),
    "merge dry": (0, "merge {base} {adapter} {plain} --scale 1 --again --dry-run"),
    "merge twice": (23, "merge {merged} {adapter} -o {out}"),
    "merge map": (0, "merge {base} {adapter} -o {out} --map {all}=x"),
    "merge unmapped": (0, "merge {base} {adapter} -o {out} --map m.[/x]=none --allow-unmapped --tokenizer adapter"),
    "merge into": (30, "merge {base} {adapter} -o {base}"),
    "merge wrapped": (0, "merge {wrapped} -o {out}"),
    "unmerge": (0, "unmerge {merged} {adapter} -o {out}"),
    "unmerge dry": (0, "unmerge {merged} {adapter} --dry-run"),
    "unmerge alone": (2, "unmerge {merged} -o {out}"),
    "unmerge wrong": (23, "unmerge {merged} {injected} -o {out}"),
    "unmerge roughly": (0, "unmerge {base} {adapter} --approximate -o {out}"),
    "verify": (0, f"verify {{merged}} {BOTH} --roundtrip --junit {{out}}.xml"),
    "verify bare": (1, f"verify {{base}} {BOTH} --junit {{out}}.xml"),
    "verify told": (0, f"verify {{told}} {BOTH} --roundtrip"),
    "diff": (1, "diff {base} {merged} --rank"),
    "diff adapters": (1, "diff {adapter} {injected}"),
    "diff only": (0, "diff {base} {merged} --only {all}"),
    "inject": (0, "inject {base} -o {out} --rank 1 --target m.*"),
    "inject dry": (0, "inject {base} -o {out} --rank 1 --init pissa --base-out {out}-base --dry-run"),
    "inject wrapped": (0, "inject {base} -o {out} --rank 1 --layout wrapped"),
    "inject targets": (20, "inject {base} -o {out} --rank 1 --target {targets}"),
    "inject config": (10, "inject {base} -o {out} --config {config}"),
    "inject init": (2, "inject {base} -o {out} --rank 1 --init {all}"),
    "inject target": (20, "inject {base} -o {out} --rank 1 --target {all}"),
    "option": (2, "inspect {base} --{all}"),
    "command": (2, "{all}"),
    "nowhere": (2, "inspect {out}/{all}"),
    "the Hub": (2, "inspect owner/{all}"),
}


def filled(line: str, hostile: dict[str, Path], folder: Path) -> list[str]:
    names = {name: str(path) for name, path in hostile.items()} | {"out": str(folder / f"out{SHORT}"), "all": ALL}
    return [part.format(**names) for part in line.split()]


def steering(text: str) -> set[str]:
    """What of a text would steer a terminal, or not be seen on it; lines may end."""
    return {c for c in text if c != "\n" and (unicodedata.category(c) in STEERING or UNSEEN.match(c))}


def combining(text: str) -> int:
    """Most combining characters in a row."""
    marks = "".join("x" if unicodedata.category(character) in ("Mn", "Me", "Mc") else " " for character in text)
    return max(map(len, marks.split()), default=0)


def assert_harmless(ran: Ran, code: int) -> None:
    assert ran.code == code, ran.err
    for text in (ran.out, ran.err):
        assert steering(text) == set()
        assert combining(text) <= 4
        assert "Traceback" not in text


every_line = pytest.mark.parametrize(("code", "line"), LINES.values(), ids=LINES.keys())
MODES: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {"COLUMNS": "2000"}),
    "verbose": (["-v"], {"COLUMNS": "80"}),
    "narrow": (["-v"], {"COLUMNS": "10"}),
    "no width": ([], {"COLUMNS": "0"}),
    "quiet": (["-q"], {}),
}


@every_line
def test_r139_r140_r141_no_name_steers_the_terminal(
    call: Call, hostile: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    """R145 too: in a narrow terminal, and in one that does not know its width."""
    for mode, (flags, env) in MODES.items():
        folder = tmp_path / mode
        folder.mkdir()
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert_harmless(call(*filled(line, hostile, folder), *flags), code)


@every_line
def test_r139_json_has_the_exact_strings(
    call: Call, hostile: dict[str, Path], tmp_path: Path, code: int, line: str
) -> None:
    ran = call(*filled(line, hostile, tmp_path), "--json")
    assert ran.code == code
    assert steering(ran.out + ran.err) == set()
    said = [text for text in texts(ran.document) if not text.startswith("No such")]  # which is Typer's, and escaped
    names = {name for name in HOSTILE.values() if shown(name) != name}
    assert not [text for text in said for name in names if shown(name) in text]
    assert any(SHORT in text or ALL in text for text in said) or code == 2


def texts(document: Any) -> Iterator[str]:
    """Every text in a JSON document, names of fields too."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            yield from texts(value)
    elif isinstance(document, list):
        for item in document:
            yield from texts(item)
    elif isinstance(document, str):
        yield document


@every_line
def test_r145_forced_colours_are_all_that_is_sent(
    call: Call, hostile: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    ran = call(*filled(line, hostile, tmp_path), "-v")
    assert "\x1b" in ran.out + ran.err
    assert_harmless(Ran(ran.code, SGR.sub("", ran.out), SGR.sub("", ran.err)), code)


@pytest.mark.parametrize("line", ["verify {merged}", "verify {base}", "verify no/{all}"])
def test_r139_a_report_is_xml_without_control_characters(
    call: Call, hostile: dict[str, Path], tmp_path: Path, line: str
) -> None:
    """XML has no way to write most of them."""
    report = tmp_path / f"report{SHORT}.xml"
    assert call(*filled(f"{line} {BOTH}", hostile, tmp_path), "--junit", report).code in (0, 1, 2)
    text = report.read_text("utf-8")
    assert steering(text) == set()
    found = [element.get("name") or "" for element in ElementTree.fromstring(text).iter("testcase")]  # noqa: S314
    wanted = {shown(f"m.{name}.weight", 1000) for name in HOSTILE.values()} if line != "verify no/{all}" else set()
    assert wanted <= set(found)


RAISED: dict[str, Exception] = {
    "ours": UnsupportedError(ALL, file=ALL, tensor=ALL, expected=ALL, found=ALL, hint=ALL, details=[ALL] * 20),
    "a library's": RuntimeError(ALL),
    "the system's": OSError(5, ALL, ALL),
    "a key": KeyError(ALL),
    "two": ExceptionGroup(ALL, [ValueError(ALL)]),
}


@pytest.mark.parametrize("flags", [[], ["--debug"], ["--json", "--debug"]], ids=["plain", "debug", "json"])
@pytest.mark.parametrize("raised", RAISED.values(), ids=RAISED.keys())
def test_r139_the_text_of_an_exception_is_shown_escaped(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, flags: list[str]
) -> None:
    """Its traceback too, which --debug asks for."""

    def raising(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(surgery, "inspect", raising)
    ran = call("inspect", tmp_path, *flags)
    assert ran.code in (12, 70)
    assert steering(ran.out + ran.err) == set()
    assert ("Traceback" in ran.err) == ("--debug" in flags)
    assert shown(HOSTILE["clear"]) in ran.err or "--json" in flags


def test_r142_names_that_are_no_text(call: Call, hostile: dict[str, Path], tmp_path: Path) -> None:
    """Bytes that are no UTF-8 become halves of surrogate pairs, which no encoding can print."""
    odd = tmp_path / os.fsdecode(b"\xff[/x]\x80").replace("/", "")
    shutil.copytree(hostile["adapter"], odd)
    out, report = tmp_path / os.fsdecode(b"out\xfe"), tmp_path / os.fsdecode(b"\xfd.xml")
    for flags in ([], ["--json"]):
        lines = [
            ["merge", hostile["base"], odd, "-o", out],
            ["verify", out, "--base", hostile["base"], "--adapter", odd, "--roundtrip", "--junit", report],
            ["diff", out, hostile["base"]],
            ["inspect", out],
            ["unmerge", out, odd, "-o", tmp_path / os.fsdecode(b"back\xfc")],
            ["inject", hostile["base"], "--rank", "1", "-o", tmp_path / os.fsdecode(b"fresh\xfb")],
            ["merge", hostile["base"], odd, "-o", tmp_path / os.fsdecode(b"no\xfa") / "out"],
            ["verify", out, "--adapter", tmp_path / os.fsdecode(b"no\xfa"), "--junit", report],
        ]
        for line, code in zip(lines, (0, 0, 1, 0, 0, 0, 2, 2), strict=True):
            ran = call(*line, *flags)
            assert ran.code == code, (line, ran.err)
            assert steering(ran.out + ran.err) == set()
        assert ElementTree.parse(report).getroot().tag == "testsuites"  # noqa: S314
        for place in tmp_path.glob("[obf]*"):
            shutil.rmtree(place)


ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "shift_jis", "utf-16"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_r143_names_in_every_encoding_of_the_terminal(hostile: dict[str, Path], tmp_path: Path, encoding: str) -> None:
    """What a terminal cannot show is escaped there; R142 for a name that no terminal can show."""
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "200"}
    for line, code in (("inspect {adapter} -v", 0), ("inspect no/{all}", 2)):
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            ran = process(*filled(line, hostile, tmp_path), env=env, stdout=out, stderr=err)
        assert ran.code == code
        for name in ("out", "err"):
            text = (tmp_path / name).read_bytes().decode(encoding)
            assert steering(text.replace("\ufeff", "")) == set()
            assert "Traceback" not in text


PUBLISHED = {
    "merge": "merge {base} {adapter} -o {out}",
    "unmerge": "unmerge {merged} {adapter} -o {out}",
    "inject": "inject {base} --rank 1 -o {out}",
    "verify": "verify {merged} --base {base} --adapter {adapter} --junit {out}",
}


@pytest.mark.parametrize("line", [*PUBLISHED.values(), f"{PUBLISHED['merge']} --json"], ids=[*PUBLISHED, "json"])
def test_r144_a_result_that_cannot_be_shown_does_not_harm_what_was_written(
    call: Call, world: World, tmp_path: Path, line: str
) -> None:
    """Standard output is full. A reader that goes away: tests/cli/test_terminal.py."""
    with Path("/dev/full").open("wb") as full:
        ran = process(*world.fill(tuple(line.split()), tmp_path), stdout=full)
    assert ran.code == 32
    said = ran.err[ran.err.index("error: ") :]
    assert "No space left" in said
    assert len(said.splitlines()) <= 4
    (tmp_path / "again").mkdir()
    assert call(*world.fill(tuple(line.split()), tmp_path / "again")).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}


def contents(path: Path) -> dict[str, bytes]:
    """Every file; of a report only that it is one, since it tells how long it took."""
    if path.is_file():
        return {"report": path.read_bytes()[:40]}
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*")}


@pytest.mark.parametrize("line", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_r144_standard_error_is_full(world: World, tmp_path: Path, line: str) -> None:
    """Nothing can be said any more; the exit code is what is left, and nothing is left half done."""
    with Path("/dev/full").open("wb") as full:
        ran = process(*world.fill(tuple(line.split()), tmp_path), "-v", stderr=full)
    assert ran.code in (0, 32)
    left = list(tmp_path.iterdir())
    assert ran.code == 0 or left == [] or (line == PUBLISHED["verify"] and b"<error" in left[0].read_bytes())


# The source: what the tests above cannot reach does not print either


PACKAGE = Path(lora_cli.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
PRINTERS = {"print", "echo", "secho", "print_exception", "print_exc"}
ASKING = {"input", "confirm", "prompt", "getpass", "stdin", "launch", "getchar", "pause"}


@cache
def used(name: str) -> set[str]:
    """Every name that a source uses, alone or of a module."""
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(SOURCES[name].read_text("utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
    }


def loaded(name: str) -> set[str]:
    """Libraries that a source loads when it runs, wherever: not what only a type checker sees."""
    tree = ast.parse(SOURCES[name].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[0] for module in modules}


def test_only_the_output_layer_prints() -> None:
    """`cli/output.py` prints, `cli/draw.py` makes what is printed; both make every text harmless."""
    printing = {name for name in SOURCES if used(name) & PRINTERS}
    assert printing == {"cli/output.py", "cli/app.py"}  # which shows the version
    drawing = {name for name in SOURCES if "rich" in loaded(name)}
    assert drawing == {"cli/output.py", "cli/draw.py"}
    streams = {name for name in SOURCES if used(name) & {"stdout", "stderr"}}
    assert streams == {"cli/output.py", "cli/app.py"}  # which sets them up


def test_r146_nothing_is_ever_asked() -> None:
    """No command waits for an answer, so none is missing where standard input is no terminal."""
    assert {name: used(name) & ASKING for name in SOURCES if used(name) & ASKING} == {}
