"""Fuzz one target with Atheris; started by `campaign.py`, once for each target.

Usage: python scripts/fuzzing/run_one.py TARGET FAULTS [libFuzzer's own arguments]
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import atheris

_SHORTENING = 10
"""Seconds that an input is shortened at most: less than the fuzzer gives a single input."""

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["lora_cli"]):
    import fuzz_targets

import mutate  # noqa: E402 (after what is instrumented)


def fault_of(target: str, data: bytes) -> str | None:
    """What is wrong with the program, as this input shows it: the kind of exception and the line; None if nothing."""
    try:
        fuzz_targets.outcome(target, data)
    except RecursionError:
        return "RecursionError"
    except Exception as error:  # noqa: BLE001 (whatever it is, it is a fault)
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return f"{type(error).__name__} line {trace.tb_lineno if trace else 0}"
    return None


def shortened(data: bytes, still_faulty: Callable[[bytes], bool]) -> bytes:
    """Take away runs of bytes, long ones first, as long as the fault stays; for a few seconds."""
    run, end = len(data) // 2, time.monotonic() + _SHORTENING
    while run and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            less = data[:at] + data[at + run :]
            if still_faulty(less):
                data = less
            else:
                at += run
        run //= 2
    return data


def main() -> None:
    """Let libFuzzer call the target until its time is over, or a fault shows."""
    target, faults, *arguments = sys.argv[1:]

    def one(data: bytes) -> None:
        fault = fault_of(target, data)
        if fault is None:
            return
        small = shortened(data, lambda less: fault_of(target, less) == fault)
        place = Path(faults) / f"{target}-{hashlib.sha256(small).hexdigest()[:16]}"
        place.write_bytes(small)
        print(f"fault: {fault}; input written to {place}", file=sys.stderr, flush=True)
        fuzz_targets.outcome(target, small)

    mutator = mutate.MUTATORS.get(target)
    atheris.Setup([sys.argv[0], *arguments], one, **({"custom_mutator": mutator} if mutator else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
