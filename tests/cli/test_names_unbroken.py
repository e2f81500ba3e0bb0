"""Tables with more to say than there is room for: names go on after a dot, and no column is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora_cli.cli.draw import grid

NAMES = (
    "lm_head.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.10.mlp.shared_expert.gate_proj.weight",
)
WORDS = "the base, but changed since: 8,180 elements of 8,192 differ, by 140 % of its norm"
HEADS = ("tensor", "what", "elements", "max ULP", "strength", "looks like")


@pytest.mark.parametrize("width", [80, 84, 100, 120])
@pytest.mark.parametrize("ulp", ["15", "1,498,928"])
def test_names_are_broken_after_dots_alone(width: int, ulp: str) -> None:
    rows = [(name, "values", 8180, ulp, "0.577", WORDS) for name in NAMES]
    out = io.StringIO()
    Console(file=out, width=width).print(grid(HEADS, rows, right=(2, 3, 4)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    found = [line.split("  ")[0].strip() for line in lines[2:]]
    assert "".join(found) == "".join(NAMES)
    ends = [part for part in found if part and not part.endswith(".")]
    assert all(any(name.endswith(end) for name in NAMES) for end in ends)
    assert len(ends) == len(NAMES)
    for word in WORDS.split():
        assert sum(line.split().count(word) for line in lines) >= len(NAMES)
