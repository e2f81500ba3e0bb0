"""What is measured: each job is a command that runs in the folder of its case, on files named there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BASE, ADAPTER, MERGED, OUT, CACHE, RECIPE = "../base", "adapter", "merged", "out", "cache", "recipe.yml"
PEERS = ("peft", "mergekit")
LABELS = {
    "import-torch": "import torch",
    "cp": "cp and sync",
    "merge-no-undo": "lora-cli merge --no-undo",
    "merge": "lora-cli merge",
    "unmerge": "lora-cli unmerge",
    "verify": "lora-cli verify",
    "diff": "lora-cli diff",
    "peft": "PEFT",
    "mergekit": "mergekit",
}
"""Name of a job → as shown, in the order of tables and pictures."""
COPY = ("cp", "--reflink=never", "-r") if sys.platform == "linux" else ("cp", "-r")
THEN_SYNC = '"$@" && sync out/*'
"""Ours end when the disk has the files; so that all do the same work, the others are followed by a sync of theirs."""


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        name: As given to `--jobs`.
        command: Words of the command line; what it writes is `out`.
        reads: Folders that are read into the page cache before.
        expected: The exit code that is right.
        same_as: Folder whose weight files must be those of `out`, byte for byte.
        warm_up: A command that loads the same programs, run once before anything is measured.
        peer: Whether it is somebody else's tool, which is run less often.
    """

    name: str
    command: tuple[str, ...]
    reads: tuple[str, ...] = (BASE, ADAPTER)
    expected: int = 0
    same_as: str | None = None
    warm_up: tuple[str, ...] = ()
    peer: bool = False

    @property
    def label(self) -> str:
        """As shown."""
        return LABELS[self.name]


def lora_cli(*words: str) -> tuple[str, ...]:
    """The command line of lora-cli as it is installed for this Python."""
    return (sys.executable, "-m", "lora_cli", *words, "-q")


def synced(*words: str) -> tuple[str, ...]:
    """A command, and a sync of the files that it wrote."""
    return ("sh", "-c", THEN_SYNC, "sh", *words)


def all_jobs(options: Sequence[str] = (), mergekit: str | None = None) -> list[Job]:
    """List every job.

    Args:
        options: Further options for lora-cli.
        mergekit: `mergekit-yaml`, or the Python of an environment that has it; None for this Python.
    """
    all_three = (BASE, ADAPTER, MERGED)
    merge = ("merge", BASE, ADAPTER, "-o", OUT, *options)
    unmerge = ("unmerge", MERGED, ADAPTER, "-o", OUT, *options)
    verify = ("verify", MERGED, "--base", BASE, "--adapter", ADAPTER, *options)
    diff = lora_cli("diff", BASE, MERGED, *options)
    peft = synced(sys.executable, str(HERE / "peft_merge.py"), BASE, ADAPTER, OUT)
    peft_imports = (sys.executable, "-c", "import peft, transformers.models.llama.modeling_llama")
    kit = mergekit_command(mergekit)
    kit_options = (
        *("--lora-merge-cache", CACHE, "--lora-merge-dtype", "bfloat16", "--quiet"),
        *("--no-copy-tokenizer", "--no-write-model-card"),  # there is no tokenizer; the card asks the Hub
    )
    return [
        Job("import-torch", (sys.executable, "-c", "import torch"), reads=()),
        Job("cp", synced(*COPY, BASE, OUT), (BASE,), same_as=BASE),
        Job("merge-no-undo", lora_cli(*merge, "--no-undo"), same_as=MERGED),
        Job("merge", lora_cli(*merge), same_as=MERGED),
        Job("unmerge", lora_cli(*unmerge), (MERGED, ADAPTER), same_as=BASE),
        Job("verify", lora_cli(*verify), all_three),
        Job("diff", diff, (BASE, MERGED), expected=1),
        Job("peft", peft, warm_up=peft_imports, peer=True),
        Job("mergekit", synced(*kit, RECIPE, OUT, *kit_options), warm_up=(*kit, "--help"), peer=True),
    ]


def mergekit_command(given: str | None) -> tuple[str, ...]:
    """The words that start `mergekit-yaml`."""
    if given and not Path(given).name.startswith("python"):
        return (given,)
    return (given or sys.executable, "-m", "mergekit.scripts.run_yaml")


def missing(name: str, mergekit: str | None) -> str | None:
    """Say why a peer cannot run here; None if it can, as far as can be seen."""
    if name == "peft":
        absent = [module for module in ("peft", "transformers") if find_spec(module) is None]
    else:
        absent = [] if mergekit or find_spec("mergekit") else ["mergekit"]
    return f"{', '.join(absent)} cannot be imported" if absent else None


def write_recipe(folder: Path) -> None:
    """Write what mergekit is to do: the base with the adapter in it, and nothing else."""
    recipe = f"models:\n  - model: {BASE}+{ADAPTER}\nmerge_method: passthrough\ndtype: bfloat16\n"
    (folder / RECIPE).write_text(recipe, "utf-8")
