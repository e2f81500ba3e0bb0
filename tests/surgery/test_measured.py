"""What a run says of its own memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import write_base


def test_the_memory_of_the_program_that_started_it_is_not_its_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    large = f"""
import subprocess, sys
held = bytearray(400 << 20)
held[::4096] = bytes(len(held[::4096]))
subprocess.run([sys.executable, "-m", "lora_cli", "diff", {str(base)!r}, {str(base)!r}, "--json"], check=True)
"""
    done = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout)["peak_rss_bytes"]
    assert 10 << 20 < peak < 200 << 20
