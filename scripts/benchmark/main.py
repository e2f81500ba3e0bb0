"""Measure lora-cli against `cp`, and against other tools that merge adapters.

Makes checkpoints with the shapes of Llama 3.2 1B and adapters for them, runs each job several times in turns, each in
a process of its own, compares what they write byte for byte, and prints medians. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jobs
import machine
import picture
import report
from disk import needed_for
from measure import Bench, Case, say
from shapes import llama, one_tensor

SCALE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ROUNDS, SCALE_ROUNDS = 5, 2
FORMAT = 1


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=form)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sizes", type=float, nargs="+", default=[2.5], metavar="GB", help="checkpoints (default: 2.5)")
    what.add_argument("--scale", action="store_true", help="sizes from 0.25 to 16 GB, two rounds each, one by one")
    what.add_argument("--one-tensor", type=float, metavar="GB", help="a checkpoint of a single matrix instead")
    what.add_argument("--from", dest="saved", type=Path, metavar="JSON", help="measure nothing; show a saved result")
    parser.add_argument("--rank", "--ranks", type=int, nargs="+", default=[16], metavar="R", help="(default: 16)")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"runs of each job (default: {ROUNDS})")
    parser.add_argument("--jobs", nargs="+", choices=jobs.LABELS, metavar="JOB", help=", ".join(jobs.LABELS))
    parser.add_argument("--peers", action="store_true", help="also run PEFT and mergekit, where they are installed")
    parser.add_argument("--peer-rounds", type=int, default=1, metavar="N", help="runs of these (default: 1)")
    parser.add_argument("--mergekit", metavar="PATH", help="mergekit-yaml, or a Python that has mergekit")
    parser.add_argument("--threads", type=int, metavar="N", help="passed to lora-cli; the peers' OMP_NUM_THREADS")
    parser.add_argument("--memory", metavar="SIZE", help="passed to lora-cli")
    parser.add_argument("--vocab", type=int, metavar="N", help="rows of the embedding (default: by size)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all numbers (default: 0)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep and reuse inputs there (default: removed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the case with the most jobs")
    arguments = parser.parse_args(words)
    for path in (arguments.json, arguments.svg):
        if path and not path.parent.is_dir():  # said now, not after an hour
            parser.error(f"there is no folder {path.parent}")
    if arguments.mergekit:
        found = shutil.which(arguments.mergekit)
        if found is None:
            parser.error(f"--mergekit: there is no program {arguments.mergekit}")
        # Jobs run in folders of their own. Not resolved: a link tells Python which environment it is from.
        arguments.mergekit = str(Path(found).absolute())
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; return the exit code."""
    arguments = arguments_of(words)
    if arguments.saved:
        result = json.loads(arguments.saved.read_text("utf-8"))
    else:
        result = measured(arguments, sys.argv[1:] if words is None else words)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if arguments.svg:
        arguments.svg.write_text(picture.draw(result), "utf-8")
    report.print_report(result)
    for wrong in result["wrong"]:
        print(f"wrong: {wrong}")
    return 1 if result["wrong"] else 0


def measured(arguments: argparse.Namespace, words: Sequence[str]) -> report.Result:
    """Measure all cases and return what is saved."""
    notes: list[str] = []
    wanted = chosen_jobs(arguments, notes)
    bench = Bench(wanted, arguments.threads)
    names = [job.name for job in wanted]
    result: dict[str, Any] = {
        "format": FORMAT,
        "command": machine.command_line(words),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine.machine(),
        "versions": machine.versions(names, arguments.mergekit),
    }
    keep = arguments.work is not None
    if keep:
        arguments.work.mkdir(parents=True, exist_ok=True)
    # An absolute path, because jobs run in folders below it.
    with nullcontext(arguments.work) if keep else tempfile.TemporaryDirectory(prefix="lora-bench-") as work:
        batches = batches_of(arguments, Path(work).resolve())
        check_room(batches, Path(work), keep=keep, caches="mergekit" in names)
        rounds = arguments.rounds or (SCALE_ROUNDS if arguments.scale else ROUNDS)
        for batch in batches:
            run_batch(bench, batch, arguments, rounds, keep=keep)
    cases = [case.as_json() for batch in batches for case in batch]
    return {**result, "cases": cases, "notes": notes, "wrong": bench.wrong}


def run_batch(bench: Bench, batch: Sequence[Case], arguments: argparse.Namespace, rounds: int, *, keep: bool) -> None:
    """Make the files of some cases, measure, and remove what is not kept."""
    for case in batch:
        bench.prepare(case, arguments.seed)
    bench.run(batch, rounds, arguments.peer_rounds)
    for case in batch:
        bench.clear(case)
        if not keep:
            shutil.rmtree(case.place, ignore_errors=True)


def chosen_jobs(arguments: argparse.Namespace, notes: list[str]) -> list[jobs.Job]:
    """The jobs to run, and a note for each peer that cannot."""
    options = [
        word
        for name in ("threads", "memory")
        if (value := getattr(arguments, name))
        for word in (f"--{name}", str(value))
    ]
    chosen = []
    for job in jobs.all_jobs(options, arguments.mergekit):
        if not (job.name in arguments.jobs if arguments.jobs else arguments.peers or not job.peer):
            continue
        why = jobs.missing(job.name, arguments.mergekit) if job.peer else None
        if job.peer and arguments.one_tensor:
            why = "no model class has a single tensor"
        if why:
            notes.append(f"{job.label} is left out: {why}")
            say(notes[-1])
        else:
            chosen.append(job)
    return chosen


def batches_of(arguments: argparse.Namespace, work: Path) -> list[list[Case]]:
    """The cases, in groups that take turns. Those of `--scale` come one by one: together they would fill the disk."""
    ranks = sorted(set(arguments.rank))
    if arguments.one_tensor:
        size = arguments.one_tensor
        return [[Case(size, rank, one_tensor(size), work / f"one-tensor-{size:g}GB") for rank in ranks]]
    sizes = SCALE if arguments.scale else sorted(set(arguments.sizes))
    by_size = [
        [Case(size, rank, llama(size, arguments.vocab), work / f"llama-{size:g}GB") for rank in ranks] for size in sizes
    ]
    return by_size if arguments.scale else [[case for cases in by_size for case in cases]]


def check_room(batches: Sequence[Sequence[Case]], work: Path, *, keep: bool, caches: bool) -> None:
    """Say how much disk is needed; stop if it is not there."""
    needed, free = needed_for(batches, keep=keep, caches=caches), shutil.disk_usage(work).free
    say(f"needs up to {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")
    if needed > free:
        raise SystemExit("not enough disk: take fewer or smaller sizes, or another folder with --work")


if __name__ == "__main__":
    sys.exit(main())
