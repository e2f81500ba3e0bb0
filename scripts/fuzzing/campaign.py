"""Fuzz the parsers one after the other, and say in one table what came of it.

Usage: scripts/fuzz SECONDS [TARGET...]

Each target is run for SECONDS from its folder of tests/corpus; what the fuzzer finds on the way is kept in a folder of
its own and thrown away. An input that shows a fault is shortened and kept in a folder as TARGET-HASH; exit code 1 then.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "corpus"
LONGEST = 8192
"""Bytes of the longest input: all that parsers decide, they decide of less."""

_LIMITS = ("-timeout=30", "-rss_limit_mb=3000", f"-max_len={LONGEST}", "-print_final_stats=1", "-close_fd_mask=1")
_END = re.compile(r"^#(?P<runs>\d+)\s+DONE\s+cov: (?P<cov>\d+) ft: (?P<ft>\d+) corp: (?P<corpus>\S+)", re.MULTILINE)
_SPEED = re.compile(r"average_exec_per_sec:\s+(\d+)")
_WORDS = (
    *("dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", ".safetensors", "model.layers.0."),
    *(".lora_A.weight", ".lora_B.weight", "targets:", "exclude:", "re:", "all-linear", "- ", "&a", "*a", "!!", "<<:"),
    *("\\u0000", "\\ud800", "\\udc00", "NaN", "Infinity", "-0", "1e999", "../", "\\\\"),
)
"""What parsers look for, for those inputs that are varied byte by byte."""


@dataclass(frozen=True)
class Ended:
    """What a target's run came to, in the fuzzer's own numbers."""

    target: str
    runs: str
    cov: str
    corpus: str
    speed: str
    fault: str | None

    @property
    def row(self) -> str:
        """As a line of the table."""
        said = self.fault or "no fault"
        return f"| {self.target} | {self.runs} | {self.cov} | {self.corpus} | {self.speed} | {said} |"


def targets() -> list[str]:
    """Every folder of the corpus that is a target's."""
    return sorted(folder.name for folder in CORPUS.iterdir() if folder.is_dir() and folder.name != "undo-world")


def fuzz(target: str, seconds: int, faults: Path, words: Path) -> Ended:
    """Run one target, and read off its last lines what came of it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as found:
        line = [sys.executable, str(Path(__file__).with_name("run_one.py")), target, str(faults)]
        line += [f"-max_total_time={seconds}", f"-dict={words}", f"-artifact_prefix={found}/fault-", *_LIMITS]
        folders = [found + "/corpus", str(CORPUS / target)]
        Path(folders[0]).mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run([*line, *folders], capture_output=True, check=False, env=environment)
        for path in Path(found).glob("fault-*"):
            if not path.name.startswith("fault-crash-"):  # too slow, or too much memory; crashes were written shortened
                shutil.copy(path, faults / path.name.replace("fault", target, 1))
    said = ran.stderr.decode("utf-8", "replace")
    end, speed = _END.search(said), _SPEED.search(said)
    fault = re.search(r"^fault: .*$", said, re.MULTILINE)
    what = fault[0] if fault else (said.strip().splitlines() or ["nothing said"])[-1]
    return Ended(
        target,
        end["runs"] if end else "?",
        end["cov"] if end else "?",
        end["corpus"] if end else "?",
        speed[1] if speed else "?",
        None if ran.returncode == 0 else what,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz what the command line names."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Fuzz the parsers of files from strangers.")
    parser.add_argument("seconds", type=int, help="how long each target is run")
    parser.add_argument("target", nargs="*", choices=[[], *targets()], help="which; all of them unless named")
    parser.add_argument("--faults", type=Path, default=Path("fuzz-faults"), help="where inputs that show a fault go")
    said = parser.parse_args(arguments)
    said.faults.mkdir(exist_ok=True)
    ended = []
    with tempfile.NamedTemporaryFile("w", suffix=".dict", encoding="utf-8") as words:
        words.write("".join(f'"{escaped}"\n' for escaped in (word.replace("\\", "\\\\") for word in _WORDS)))
        words.flush()
        for target in said.target or targets():
            ended.append(fuzz(target, said.seconds, said.faults, Path(words.name)))
            print(ended[-1].row, flush=True)
    print("\n| target | runs | cov | corpus | runs a second | |\n|---|---|---|---|---|---|")
    print("\n".join(one.row for one in ended))
    return 1 if any(one.fault for one in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
