"""The workflow in `configs/` does what it says: its shell steps run as they stand in the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / "configs" / "github-merge.yml").read_text("utf-8"))
(JOB,) = WORKFLOW["jobs"].values()
STEPS: list[dict[str, Any]] = [step for step in JOB["steps"] if "run" in step]
INSTALL, *WORK = STEPS


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository with `base` and `adapter`, as the workflow expects it."""
    subprocess.run([sys.executable, ROOT / "scripts" / "make_demo.py", tmp_path], check=True)
    return tmp_path


def run(place: Path, step: dict[str, Any]) -> int:
    """Run a step as GitHub does: bash, which stops at the first error."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **WORKFLOW["env"], "PATH": path, "PYTHONPATH": str(ROOT)}
    line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(line, cwd=place, env=env, check=False, timeout=120).returncode


def test_it_is_a_workflow_that_installs_and_then_proves() -> None:
    assert "pip install" in INSTALL["run"]
    assert all(step["run"].startswith("lora-cli ") for step in WORK)
    assert sum("--roundtrip" in step["run"] for step in WORK) == 2
    uploads = [step for step in JOB["steps"] if "upload-artifact" in step.get("uses", "")]
    assert [step["with"]["path"] for step in uploads] == ["verify.xml"]


def test_its_steps_pass(place: Path) -> None:
    assert [run(place, step) for step in WORK] == [0] * len(WORK)
    suite = ElementTree.parse(place / "verify.xml").getroot()  # noqa: S314 (our own file)
    assert suite.find(".//testcase") is not None
    assert suite.find(".//failure") is None


def test_it_fails_on_a_difference(place: Path) -> None:
    merge = next(number for number, step in enumerate(WORK) if " merge " in step["run"])
    for step in WORK[: merge + 1]:
        assert run(place, step) == 0
    shard = place / "merged" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert [run(place, step) for step in WORK[merge + 1 :]] == [1, 1]
    suite = ElementTree.parse(place / "verify.xml").getroot()  # noqa: S314 (our own file)
    assert suite.find(".//failure") is not None
