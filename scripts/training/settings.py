"""What decides a training run, and what is known of a run that lies in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from corpus import Text
from decoder import Decoder, Shape
from loop import Plan

from lora_cli.errors import UsageError
from lora_cli.nn import LoRAConfig, inject

FILE = "training.json"
LEAST = {"base_steps": 1, "steps": 1, "every": 0, "rank": 1, "batch": 1, "length": 1, "seed": 0}
MOST = {"rank": Shape().hidden_size, "seed": 2**63 - 2}

MEANINGS = {
    "base_steps": "updates of the base",
    "steps": "updates of the adapter",
    "every": "steps between two states on disk, from which --resume goes on; 0 for none",
    "rank": "rank of the adapter",
    "alpha": "the adapter counts alpha/rank times",
    "batch": "windows of text in an update",
    "length": "tokens of each, and positions of the model",
    "seed": "decides the first weights, which windows come when, and dropout",
}
"""Setting → what `--help` says of it."""


@dataclass(frozen=True)
class Settings:
    """What decides a run. One that goes on must have the same."""

    base_steps: int = 400
    steps: int = 200
    every: int = 50
    rank: int = 8
    alpha: float = 16.0
    batch: int = 16
    length: int = 64
    seed: int = 0

    @property
    def for_base(self) -> Plan:
        """How the base is trained."""
        return Plan(self.base_steps, 4e-3, self.batch, self.length, self.every, self.seed)

    @property
    def for_adapter(self) -> Plan:
        """How the adapter is trained."""
        return Plan(self.steps, 1e-2, self.batch, self.length, self.every, self.seed + 1)

    @property
    def config(self) -> LoRAConfig:
        """The adapter."""
        return LoRAConfig(rank=self.rank, alpha=self.alpha, dropout=0.1, seed=self.seed)

    @property
    def shape(self) -> Shape:
        """The model."""
        return Shape(max_position_embeddings=self.length)

    def check(self) -> None:
        """See that training can begin, before anything is written.

        Raises:
            UsageError: A value that makes no sense; names it.
        """
        most = {**MOST, "length": min(len(Text.read(name).held_out) for name in ("prose", "verse")) - 1}
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value < least or value > most.get(name, value):
                limits = f"{least} to {most[name]}" if name in most else f"{least} or more"
                raise UsageError(f"{option(name)} makes no sense", expected=limits, found=value, hint=HELP)
        inject(Decoder(self.shape), self.config)  # says what else is wrong

    def differences(self, other: Settings) -> str:
        """What another run has that this one has not, for people."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{option(name)} {theirs[name]}, not {mine[name]}" for name in mine if mine[name] != theirs[name]
        )

    def write(self, out: Path) -> None:
        """Say in a folder what its run is."""
        (out / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path) -> Settings:
        """What the run in a folder was started with.

        Raises:
            UsageError: There is none.
        """
        try:
            stored = json.loads((out / FILE).read_text("utf-8"))
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict) or set(stored) != {field.name for field in fields(cls)}:
            raise UsageError("There is no run that could go on", file=out, hint="start one without --resume")
        return cls(**stored)


HELP = "scripts/train --help"


def option(name: str) -> str:
    """How a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"
