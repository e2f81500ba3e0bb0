"""Undo files are as short as promised: the script that measures them says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "undo_sizes.py"
USUAL = (0.005, 0.015, 0.05, 0.15)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    line = [sys.executable, str(SCRIPT), "--side", "800", "--json", "--ratios", *map(str, USUAL)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_they_are_within_five_percent_of_the_least(rows: list[dict[str, Any]]) -> None:
    usual = [row for row in rows if row["weights"] == "dense"]
    assert len(usual) == len(USUAL)
    for row in usual:
        assert row["least"] > 1000
        assert row["bytes"] <= 1.05 * row["least"] + (64 << 10), row
        assert row["bytes"] <= 1.05 * row["least"] + 2500, row  # what they really have besides


def test_pruned_weights_cost_at_most_twice_as_much(rows: list[dict[str, Any]]) -> None:
    dense = {row["ratio"]: row["bytes"] for row in rows if row["weights"] == "dense"}
    pruned = [row for row in rows if row["weights"] != "dense"]
    assert len(pruned) == 2 * len(dense) > 0
    assert all(row["bytes"] <= 2 * dense[row["ratio"]] for row in pruned)
