"""What to do where the adapters that are given are not those of the merge, in the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.checkpoint.manifest import AdapterRecord
from lora_cli.surgery.weighting import BEFORE_TRAINING


def with_all(merged: Sequence[AdapterRecord], *, verify: bool) -> str:
    """How to name every adapter of a merge whose factors are not in the undo file; the caller's command comes first."""
    labels = [said.label for said in merged if said.held == "apart" and said.factors]
    names = [label.removesuffix(f" ({BEFORE_TRAINING})") for label in labels]
    flags = ["adapter" if name == label else "initial" for name, label in zip(names, labels, strict=True)]
    given = " ".join(f"--{flag} {name}" for flag, name in zip(flags, names, strict=True))
    ways = [f"verify MERGED {given} --roundtrip", f"unmerge MERGED {' '.join(names)} -o OUT"]
    return f"{' or '.join(ways if verify else ways[::-1])}; merge --embed-adapter makes it needless"


def only_last(merged: Sequence[AdapterRecord]) -> str:
    """Which adapters a merge was of, since no others come off with it."""
    labels = ", ".join(said.label for said in merged)
    last = f"{labels} was merged last" if len(merged) == 1 else f"{len(merged)} adapters were merged last, {labels}"
    return f"{last}; name them as they were then, and earlier ones when these are off"
