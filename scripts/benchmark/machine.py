"""What a measurement was made on and with, without names of people, hosts or folders."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from files import memory

PACKAGES = ("lora-cli", "torch", "numpy", "safetensors")
PEER_PACKAGES = {"peft": ("peft", "transformers"), "mergekit": ("mergekit",)}


def machine() -> dict[str, Any]:
    """What the jobs run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "cpu": cpu(),
        "memory": memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "unknown"
    return name.replace("(R)", "").replace("(TM)", "")


def versions(wanted: Sequence[str], mergekit: str | None) -> dict[str, str]:
    """Package → version, of what takes part."""
    found = {"python": platform.python_version()}
    names = [*PACKAGES, *(name for job in wanted for name in PEER_PACKAGES.get(job, ()))]
    for name in names:
        if name == "mergekit" and mergekit:
            found[name] = elsewhere(name, mergekit)
        else:
            found[name] = metadata.version(name)
    return found


def elsewhere(package: str, program: str) -> str:
    """Version of a package in the environment that a program is from."""
    python = program if Path(program).name.startswith("python") else str(Path(program).with_name("python"))
    line = [python, "-c", "import sys; from importlib import metadata; print(metadata.version(sys.argv[1]))", package]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(arguments: Sequence[str]) -> str:
    """The command, with only the last part of every path."""
    return " ".join(["scripts/bench", *(bare(word) for word in arguments)])


def bare(word: str) -> str:
    """A word of a command line without the folders in it."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if os.sep in value else value)
