"""R001 to R053: what is no safetensors file, given to the program wherever it takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogue import check_refused
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from header_cases import REFUSED, Refused

PLACES = {
    "inspect": "inspect {file}",
    "base": "merge {file} {adapter} -o {out}",
    "adapter": "merge {base} {file} --scale 1 -o {out}",
}


@pytest.mark.parametrize("line", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(call: Call, world: World, tmp_path: Path, case: Refused, line: str) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(case.content)
    arguments = [part.format(file=file, base=world.base, adapter=world.adapter, out=tmp_path / "out") for part in line.split()]
    check_refused(call, arguments, case.error.exit_code, f"m.safetensors|{case.fragment}", folder=tmp_path)
