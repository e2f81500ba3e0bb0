"""Factors whose rank is far above their sides, or far below: memory must not follow what a file of zeros says."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from cli_world import process
from tiny import write_adapter

DEEP, SIDE = 200_000, 96
MEASURED = """
import resource, sys
from lora_cli.cli.app import run
code = run(sys.argv[1:])
used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(max(used), file=sys.stderr)
raise SystemExit(code)
"""


def sparse(path: Path, **shapes: tuple[int, int]) -> Path:
    """A safetensors file of bfloat16 zeros that takes no space on most disks."""
    header: dict[str, object] = {}
    end = 0
    for side, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"base_model.model.x.lora_{side}.weight"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with path.open("r+b") as file:
        file.truncate(8 + len(raw) + end)
    return path


def peak(adapter: Path, side: int) -> int:
    """Most memory that looking at the spectrum of an adapter took."""
    line = ("inspect", adapter, "--scale", 1, "--spectrum", "--json")
    ran = process(*line, env={"OMP_NUM_THREADS": "1"}, program=("-c", MEASURED))
    assert ran.code == 0, ran.err
    (module,) = ran.document["spectrum"]["modules"]
    assert (module["norm"], module["shape"][0]) == (0.0, side)
    return 1024 * int(ran.err.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere peaks are those of the whole process")
@pytest.mark.parametrize(("side", "rank"), [(SIDE, DEEP), (DEEP, SIDE)], ids=["deep", "thin"])
def test_a_spectrum_takes_the_memory_of_the_file(side: int, rank: int, tmp_path: Path) -> None:
    """Both factors as they are stored, and bands: in float64 they alone would be four times as much."""
    sizes = {}
    for name, factor in (("small", (4, 4)), ("large", (rank, side))):
        write_adapter(tmp_path / name, {}, r=factor[0])
        file = sparse(tmp_path / name / "adapter_model.safetensors", A=factor, B=factor[::-1])
        sizes[name] = (peak(tmp_path / name, factor[1]), file.stat().st_size)
    assert sizes["large"][0] - sizes["small"][0] < 2 * sizes["large"][1] + (64 << 20)
