"""The scripts of the checkout: what they say when they are called in a way that they do not know."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bash(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("script", ["demo", "fuzz", "lint"])
@pytest.mark.parametrize(("said", "code"), [("--help", 0), ("-h", 0), ("something", 2)])
def test_usage(script: str, said: str, code: int) -> None:
    ran = bash(f"scripts/{script} {said}")
    assert ran.returncode == code
    assert ran.stdout.startswith(f"Usage: scripts/{script}")
    assert ran.stderr == ""


def test_the_environment_knows_its_extras() -> None:
    """Without an argument of its own it sees the first one of the script that sources it."""
    ran = bash("set -- --resume; . scripts/environment; echo still here: $?")
    assert ran.stdout == "still here: 2\n"
    assert ran.stderr == "scripts/environment: there is no extra called --resume; give fuzz, test, or none\n"


@pytest.mark.parametrize("script", ["bench", "demo", "fuzz", "lint", "test", "train"])
def test_scripts_say_which_extra_they_want(script: str) -> None:
    """Their own arguments are not extras."""
    lines = (ROOT / "scripts" / script).read_text("utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(". "))
    assert line in {f'. "$(dirname "$0")/environment" {extra}' for extra in ('""', "fuzz", "test")}
