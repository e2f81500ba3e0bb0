"""The documents say what the code does: the reference and schemas are current, and the README's snippets run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from lora_cli import errors
from lora_cli.cli.app import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SCHEMAS = sorted((ROOT / "docs" / "schemas").glob("*.json"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `scripts/demo` leaves it before its first command."""
    folder = tmp_path_factory.mktemp("readme")
    subprocess.run([sys.executable, ROOT / "scripts" / "make_demo.py", folder / "demo"], check=True)
    return folder


def test_the_reference_and_the_schemas_are_current() -> None:
    script = ROOT / "scripts" / "make_docs.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", [0, 1])
def test_the_python_snippets_run(demo: Path, number: int) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    snippet, env = snippets[number], {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", snippet], cwd=demo, env=env, check=True)


def test_the_training_guide_runs(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "training.md").read_text("utf-8")
    snippets = "\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", snippets], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    (promised,) = re.findall(r"^# (Initial Parameters.*)$", guide, re.MULTILINE)
    assert done.stdout.strip() == promised


def test_the_console_example_is_what_the_program_prints(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setenv("COLUMNS", "100")
    (example,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for block in example.split("$ ")[1:]:
        command, *lines = block.strip().splitlines()
        assert run(shlex.split(command)[1:]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert [line.rstrip() for line in lines if line != "…"] == printed[: len([li for li in lines if li != "…"])]


def test_every_exit_code_is_in_the_readme() -> None:
    table = README.split("## Exit codes")[1].split("##")[0]
    for kind in errors.LoraCliError.__subclasses__():
        if kind is not errors.Interrupted:
            assert re.search(rf"\b{kind.exit_code}\b", table), kind


COMMANDS = {
    "inspect": "inspect demo/adapter --base demo/base",
    "inject": "inject demo/base -o fresh --rank 2 --target attention",
    "merge": "merge demo/base demo/adapter -o merged",
    "unmerge": "unmerge merged demo/adapter -o base --approximate",
    "verify": "verify merged --base demo/base --adapter demo/adapter",
    "diff": "diff demo/base merged --rank",
    "error": "merge demo/base demo/nothing -o x",
}


@pytest.mark.parametrize("name", [path.stem for path in SCHEMAS])
def test_results_keep_to_their_schemas(
    name: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "demo").symlink_to(demo / "demo")
    if name in ("unmerge", "verify", "diff"):
        assert run(["-q", *COMMANDS["merge"].split()]) == 0
    code = run(["--json", *COMMANDS[name].split()])
    assert code == {"diff": 1, "error": 2}.get(name, 0)
    document = json.loads(capsys.readouterr().out)
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**document, "schema": "another"})
