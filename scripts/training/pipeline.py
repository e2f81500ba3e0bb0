"""From nothing to a merge that is verified and undone: a base, an adapter for another style, and the files of both.

Usage: python scripts/training/pipeline.py [OUT] [--resume], see --help.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Text
from decoder import WEIGHTS, Decoder, Shape
from loop import Plan, Whole, evaluate, fit
from safetensors.torch import load_file

from lora_cli.nn import Injection, LoRAConfig, inject

SETTINGS, STATE = "training.json", "training.pt"
MADE = ("base", "adapter", "merged", "unmerged")
PROMPT = "\n\nThe "


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
        return Plan(self.base_steps, 4e-3, self.batch, self.length, seed=self.seed)

    @property
    def for_adapter(self) -> Plan:
        """How the adapter is trained."""
        return Plan(self.steps, 1e-2, self.batch, self.length, self.every, self.seed + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("out", nargs="?", type=Path, default=Path("train-out"), metavar="OUT")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run that stopped in OUT")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"[{value}]")
    said = vars(parser.parse_args(arguments))
    out, resume = said.pop("out"), said.pop("resume")
    # A model this small gains nothing from more threads, and sums do not depend on how many there are.
    torch.set_num_threads(1)
    try:
        run(out, Settings(**((settings_of(out) if resume else {}) | said)), resume=resume)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To go on: scripts/train {out} --resume")


def run(out: Path, settings: Settings, *, resume: bool, after_step: Callable[[int], None] = lambda step: None) -> None:
    """Do it all. What fails ends the program with a word on it."""
    prepare(out, settings, resume=resume)
    say("1. A base: a small Llama-shaped model reads prose. Every parameter is trained.")
    make_base(out / "base", settings)
    say("2. An adapter: LoRA layers in the same model learn verse. The base is frozen.")
    before, after, injection = train_adapter(out, settings, after_step)
    say("3. The files: merge, verify and undo, without the model.")
    check_files(out)
    say("4. The merged checkpoint in the plain model, which knows nothing of adapters.")
    check_merged(out, settings, injection, after)
    say(f"Verse, held out: loss {before:.4f} with the base, {after:.4f} with the adapter. All of it is in {out}")


def prepare(out: Path, settings: Settings, *, resume: bool) -> None:
    """Make room in the folder, or see that the run in it can go on."""
    mine = out / SETTINGS
    if resume:
        if settings_of(out) != asdict(settings):
            sys.exit(f"The run in {out} has other settings: {settings_of(out)}")
    elif mine.is_file():
        (out / STATE).unlink(missing_ok=True)
        remove(out, MADE)
    elif out.is_dir() and any(out.iterdir()):
        sys.exit(f"{out} holds something that this script did not make; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    mine.write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")


def settings_of(out: Path) -> dict[str, Any]:
    """What the run in a folder was started with."""
    mine = out / SETTINGS
    if not mine.is_file():
        sys.exit(f"{out} holds no run that could go on")
    stored: dict[str, Any] = json.loads(mine.read_text("utf-8"))
    return stored


def make_base(folder: Path, settings: Settings) -> None:
    """Train the base, unless it is there, and write it."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    torch.manual_seed(settings.seed)
    model, prose = Decoder(Shape(max_position_embeddings=settings.length)), Text.read("prose")
    fit(model, Whole(model), prose, settings.for_base, label="prose")
    print(f"prose, held out: loss {evaluate(model, prose, settings.length):.4f}")
    making = folder.with_name("base.making")
    shutil.rmtree(making, ignore_errors=True)
    model.save(making)
    making.rename(folder)


def train_adapter(out: Path, settings: Settings, after_step: Callable[[int], None]) -> tuple[float, float, Injection]:
    """Train and write the adapter. Return the loss on verse before and after, and the model with it."""
    model, verse = Decoder.load(out / "base"), Text.read("verse")
    before = evaluate(model, verse, settings.length)
    config = LoRAConfig(rank=settings.rank, alpha=settings.alpha, dropout=0.1, seed=settings.seed)
    injection = inject(model, config)
    print(injection.summary())
    fit(model, injection, verse, settings.for_adapter, label="verse", state=out / STATE, after_step=after_step)
    after = evaluate(model, verse, settings.length)
    print(f"verse, held out: loss {before:.4f} before, {after:.4f} after")
    if not after < before:
        sys.exit("The adapter has learned nothing")
    remove(out, MADE[1:])
    injection.save(out / "adapter", base_model="base")
    return before, after, injection


def check_files(out: Path) -> None:
    """Merge, verify and unmerge by the command line; compare what came back with the base, byte for byte."""
    base, adapter, merged, unmerged = (str(out / name) for name in MADE)
    command("merge", base, adapter, "-o", merged)
    command("verify", merged, "--base", base, "--adapter", adapter, "--roundtrip")
    command("unmerge", merged, adapter, "-o", unmerged)
    for file in sorted((out / "base").iterdir()):
        first, second = sha256(file), sha256(out / "unmerged" / file.name)
        print(f"{file.name}\n  sha256 of the base    {first}\n  after merge, unmerge  {second}")
        if first != second:
            sys.exit("The base did not come back")


def check_merged(out: Path, settings: Settings, injection: Injection, adapted: float) -> None:
    """Compare the merged file with the model that was trained: its loss, and its weights once merged in memory."""
    plain, verse = Decoder.load(out / "merged"), Text.read("verse")
    loss = evaluate(plain, verse, settings.length)
    print(f"verse, held out: loss {loss:.6f} merged, {adapted:.6f} with the adapter beside the base")
    if abs(loss - adapted) > 1e-4:
        sys.exit("The merged checkpoint computes something else")
    injection.merge()
    state, stored = injection.base_state(), load_file(out / "merged" / WEIGHTS)
    if not all(torch.equal(state[key], tensor) for key, tensor in stored.items()):
        sys.exit("Merged in memory and merged on files differ")
    print("merged in memory: the same bytes")
    injection.unmerge()
    for name, model in (("base", Decoder.load(out / "base")), ("merged", plain)):
        print(f"\033[36m{name} writes\033[0m{sample(model, settings)}")


@torch.no_grad()
def sample(model: Decoder, settings: Settings, count: int = 240) -> str:
    """Return a prompt and what the model writes after it."""
    numbers = torch.Generator().manual_seed(settings.seed)
    tokens = torch.tensor([list(PROMPT.encode())])
    for _ in range(count):
        odds = torch.softmax(model(tokens[:, -settings.length :])[0, -1] / 0.7, 0)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=numbers).view(1, 1)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def command(*words: str) -> None:
    """Run lora-cli as a person would."""
    print(f"\033[36m$ lora-cli {' '.join(words)}\033[0m", flush=True)
    done = subprocess.run([sys.executable, "-m", "lora_cli", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def say(text: str) -> None:
    """A headline."""
    print(f"\n\033[1m{text}\033[0m", flush=True)


def remove(out: Path, names: Sequence[str]) -> None:
    """Remove folders that an earlier run made."""
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def sha256(file: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
