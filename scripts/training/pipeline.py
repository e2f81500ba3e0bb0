"""From nothing to a merge that is verified and undone: a base, an adapter for another style, and the files of both.

Usage: python scripts/training/pipeline.py [OUT] [--resume | --force] [options], see --help.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from corpus import Text
from decoder import WEIGHTS, Decoder
from loop import Whole, evaluate, fit
from safetensors.torch import load_file
from settings import FILE, MEANINGS, Settings, option

from lora_cli.errors import LoraCliError, UsageError
from lora_cli.nn import Injection, inject

STATE, BASE_STATE = "training.pt", "base-training.pt"
MADE = ("base", "adapter", "merged", "unmerged")
PROMPT = "\n\nThe "
ABOUT = """A small model learns prose, an adapter learns verse, and lora-cli merges it into the checkpoint, verifies
that, and takes it out again. OUT gets base/, adapter/, merged/ and unmerged/."""

Start = Literal["new", "resume", "force"]
"""A run in a folder that has none; one that goes on; one in the place of whatever run is there."""
AfterStep = Callable[[str, int], None]
"""Called with the text that is learned and the number of steps that are done."""


def never_mind(_: str, __: int) -> None:
    """Do nothing after a step."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="scripts/train", description=ABOUT, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path("train-out"), metavar="OUT", help="a folder [train-out]"
    )
    how = parser.add_mutually_exclusive_group()
    for start, words in (
        ("resume", "go on with the run that stopped in OUT, to the same adapter"),
        ("force", "start anew in OUT, and remove what an earlier run made there"),
    ):
        how.add_argument(f"--{start}", dest="start", action="store_const", const=start, default="new", help=words)
    for name, value in asdict(Settings()).items():
        parser.add_argument(option(name), type=type(value), metavar="N", help=f"{MEANINGS[name]} [{value:g}]")
    said = vars(parser.parse_args(arguments))
    out, start = said.pop("out"), said.pop("start")
    # A model this small gains nothing from more threads, and sums do not depend on how many there are.
    torch.set_num_threads(1)
    try:
        started = asdict(Settings.read(out)) if start == "resume" else {}
        run(out, Settings(**(started | said)), start)
    except LoraCliError as error:
        parser.exit(error.exit_code, f"{error}\n")
    except KeyboardInterrupt:
        further = f" To go on: scripts/train {out} --resume" if (out / FILE).is_file() else ""
        parser.exit(130, f"\nStopped.{further}\n")


def run(out: Path, settings: Settings, start: Start = "new", after_step: AfterStep = never_mind) -> None:
    """Do it all. What fails ends the program with a word on it.

    Raises:
        UsageError: Settings that make no sense, or a folder in which this run cannot be; nothing was touched.
    """
    settings.check()
    prepare(out, settings, start)
    say("1. A base: a small Llama-shaped model reads prose. Every parameter is trained.")
    make_base(out, settings, after_step)
    say("2. An adapter: LoRA layers in the same model learn verse. The base is frozen.")
    before, after, injection = train_adapter(out, settings, after_step)
    say("3. The files: merge, verify and undo, without the model.")
    check_files(out)
    say("4. The merged checkpoint in the plain model, which knows nothing of adapters.")
    check_merged(out, settings, injection, after)
    say(f"Verse, held out: loss {before:.4f} with the base, {after:.4f} with the adapter. All of it is in {out}")


def prepare(out: Path, settings: Settings, start: Start) -> None:
    """Make room in the folder, or see that the run in it can go on."""
    if start == "resume":
        difference = Settings.read(out).differences(settings)
        if difference:
            raise UsageError("The run has other settings", file=out, found=difference, hint="leave these options out")
        return
    if out.exists() and not out.is_dir():
        raise UsageError("OUT is no folder", file=out, hint="name another")
    mine = (out / FILE).is_file()
    if mine and start == "new":
        raise UsageError("A run is there already", file=out, hint="--resume to go on with it, --force to start anew")
    if not mine and out.is_dir() and any(out.iterdir()):
        raise UsageError("OUT holds something that this script did not make", file=out, hint="name another folder")
    for state in (STATE, BASE_STATE):
        (out / state).unlink(missing_ok=True)
    remove(out, MADE)
    out.mkdir(parents=True, exist_ok=True)
    settings.write(out)


def make_base(out: Path, settings: Settings, after_step: AfterStep) -> None:
    """Train the base, unless it is there, and write it."""
    folder, state = out / "base", out / BASE_STATE
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    torch.manual_seed(settings.seed)
    model, prose = Decoder(settings.shape), Text.read("prose")
    after = partial(after_step, "prose")
    fit(model, Whole(model), prose, settings.for_base, label="prose", state=state, after_step=after)
    print(f"prose, held out: loss {evaluate(model, prose, settings.length):.4f}")
    making = folder.with_name("base.making")
    shutil.rmtree(making, ignore_errors=True)
    model.save(making)
    making.rename(folder)
    state.unlink(missing_ok=True)


def train_adapter(out: Path, settings: Settings, after_step: AfterStep) -> tuple[float, float, Injection]:
    """Train and write the adapter. Return the loss on verse before and after, and the model with it."""
    model, verse = Decoder.load(out / "base"), Text.read("verse")
    before = evaluate(model, verse, settings.length)
    injection = inject(model, settings.config)
    print(injection.summary())
    after_each = partial(after_step, "verse")
    fit(model, injection, verse, settings.for_adapter, label="verse", state=out / STATE, after_step=after_each)
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
