"""R130: factors whose rank is far above their sides: a file of zeros may say so, and memory must not follow."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from cli_world import process

DEEP, SIDE = 200_000, 96
MEASURED = """
import resource, sys
from lora_cli.cli.app import run
code = run(sys.argv[1:])
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)), file=sys.stderr)
raise SystemExit(code)
"""


def sparse(path: Path, **shapes: tuple[int, int]) -> Path:
    """A safetensors file of bfloat16 zeros that takes no space on most disks."""
    header, end = {}, 0
    for side, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"x.lora_{side}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with path.open("r+b") as file:
        file.truncate(8 + len(raw) + end)
    return path


def peak(file: Path) -> int:
    """Most memory that looking at the spectrum of a file took."""
    line = ("inspect", file, "--scale", 1, "--spectrum", "--json")
    ran = process(*line, env={"OMP_NUM_THREADS": "1"}, program=("-c", MEASURED))
    assert ran.code == 0, ran.err
    (module,) = ran.document["spectrum"]["modules"]
    assert (module["norm"], len(module["values"][0])) == (0.0, SIDE)
    return 1024 * int(ran.err)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere peaks are those of the whole process")
def test_a_spectrum_takes_the_memory_of_the_file(tmp_path: Path) -> None:
    """Both factors as they are stored, and bands: in float64 they alone would be four times as much."""
    thin = peak(sparse(tmp_path / "thin.safetensors", A=(SIDE, SIDE), B=(SIDE, SIDE)))
    deep = sparse(tmp_path / "deep.safetensors", A=(DEEP, SIDE), B=(SIDE, DEEP))
    assert peak(deep) - thin < 2 * deep.stat().st_size + (64 << 20)
