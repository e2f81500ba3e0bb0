"""What the program says to people before and after the work: that it adds up, and names what can be done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from safetensors.numpy import load_file, save_file

from lora_cli.cli.planned import survival_words
from lora_cli.surgery.survival import Survival


@pytest.mark.parametrize(
    ("flags", "besides", "more"), [((), "undo file and receipt", 2), (("--no-undo",), "a receipt", 1)]
)
def test_the_plan_counts_the_files_that_come_out(
    flags: tuple[str, ...], besides: str, more: int, call: Call, world: World, tmp_path: Path
) -> None:
    line = ("merge", world.base, world.adapter, "-o", tmp_path / "out", *flags)
    for said in (call(*line, "--dry-run").out, (ran := call(*line)).out + ran.err):
        found = re.search(rf"in (\d+) files? and (\d+) side files?, besides {besides}$", said, re.MULTILINE)
        assert found is not None, said
        planned = sum(map(int, found.groups())) + more
    assert planned == len(list((tmp_path / "out").iterdir()))


@pytest.mark.parametrize(
    ("survival", "words"),
    [
        ([(0.94, 1.0002), (0.97, 0.9951)], "all of the change survived; 94% to 97% of the weights changed"),
        ([(0.5, 1.1)], "all of the change survived; 50% of the weights changed"),
        ([(0.101, 0.994), (0.104, 0.998)], "strength 0.99 or more; 10% of the weights changed"),
        ([(0.1, 0.25), (0.2, 1.0)], "strength 0.25 or more (least: 0); 10% to 20% of the weights changed"),
        ([], ""),
    ],
)
def test_what_survived(survival: list[tuple[float, float]], words: str) -> None:
    assert (
        survival_words([Survival(str(key), share, strength) for key, (share, strength) in enumerate(survival)]) == words
    )


def test_leaving_out_is_no_advice_where_nothing_would_be_left(call: Call, world: World, tmp_path: Path) -> None:
    factors = load_file(world.plain)
    save_file({f"other.{key}": value for key, value in factors.items()}, tmp_path / "none.safetensors")
    some = {key if number % 4 < 2 else f"other.{key}": factors[key] for number, key in enumerate(sorted(factors))}
    save_file(some, tmp_path / "some.safetensors")
    for name, advised in (("none", False), ("some", True)):
        ran = call("merge", world.base, tmp_path / f"{name}.safetensors", "--scale", "1", "-o", tmp_path / "out")
        assert ran.code == 20
        assert ("--allow-unmapped" in ran.err) is advised
        assert "--map OLD=NEW" in ran.err
