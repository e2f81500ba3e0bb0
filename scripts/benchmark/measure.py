"""Run the jobs of some cases in turns, and check what they write."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import jobs
from files import same_weights, warm, weights
from jobs import Job
from shapes import Model

UNDO = "lora_merge.undo"


@dataclass
class Case:
    """One checkpoint and one adapter, and what was measured on them.

    Attributes:
        gigabytes: The size that was asked for.
        rank: Rank of the adapter.
        model: What the checkpoint consists of.
        place: Folder of the checkpoint; the case has a folder in it.
        samples: Job name → what every run of it took.
        undo_bytes: Length of the undo file.
    """

    gigabytes: float
    rank: int
    model: Model
    place: Path
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    undo_bytes: int = 0

    @property
    def folder(self) -> Path:
        """Where the jobs run."""
        return self.place / f"rank-{self.rank}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.gigabytes:g} GB, rank {self.rank}"

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the factors."""
        return 4 * sum(math.prod(shape) for shape in self.model.factors(self.rank).values())

    def as_json(self) -> dict[str, Any]:
        """What is kept of it."""
        return {
            "gigabytes": self.gigabytes,
            "rank": self.rank,
            "bytes": self.model.bytes,
            "tensors": len(self.model.tensors),
            "adapter_bytes": self.adapter_bytes,
            "undo_bytes": self.undo_bytes,
            "samples": self.samples,
        }


class Bench:
    """Runs jobs on cases.

    Attributes:
        wrong: What did not come out as it must, in sentences.
    """

    def __init__(self, wanted: Sequence[Job], threads: int | None) -> None:
        self.wanted = wanted
        self.wrong: list[str] = []
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)

    def prepare(self, case: Case, seed: int) -> None:
        """Make the files of a case; what was made before with the same parameters is used again."""
        made = {"tensors": [[name, list(shape)] for name, shape in case.model.tensors.items()], "seed": seed}
        made["config"] = case.model.config
        base, adapter = case.place / "base", case.folder / jobs.ADAPTER
        case.folder.mkdir(parents=True, exist_ok=True)
        say(f"making {case.name}")
        checkpoints.make_once(base, made, lambda at: checkpoints.write_base(at, case.model, seed))
        made["rank"] = case.rank
        checkpoints.make_once(adapter, made, lambda at: checkpoints.write_adapter(at, case.model, case.rank, seed))
        jobs.write_recipe(case.folder)
        remove(case, jobs.MERGED, jobs.OUT, jobs.CACHE)
        if not any(jobs.MERGED in (*job.reads, job.same_as) for job in self.wanted):
            return
        command = jobs.lora_cli("merge", jobs.BASE, jobs.ADAPTER, "-o", jobs.MERGED)
        if self.clock(command, case)["code"]:
            raise SystemExit(f"the first merge failed: {complaint(case)}")
        case.undo_bytes = (case.folder / jobs.MERGED / UNDO).stat().st_size

    def run(self, cases: Sequence[Case], rounds: int, peer_rounds: int) -> None:
        """Run all jobs on all cases, and again, until every one has run as often as it should."""
        for job in self.wanted:
            if job.warm_up:
                self.clock(job.warm_up, cases[0])
        for number in range(1, max(rounds, peer_rounds) + 1):
            for case in cases:
                for job in self.wanted:
                    if number <= (peer_rounds if job.peer else rounds):
                        self.one(job, case, f"round {number}  {case.name}  {job.name:<14}")

    def one(self, job: Job, case: Case, title: str) -> None:
        """Run a job once, from a warm page cache and a quiet disk; the first time, check what it wrote."""
        warm(case.folder / name for name in job.reads)
        os.sync()
        sample = self.clock(job.command, case)
        say(f"{title} {sample['wall']:8.2f} s  {sample['peak'] / 1e6:7.0f} MB")
        # An exit code of 1 is also what Python has for a crash.
        if sample.pop("code") != job.expected or "Traceback" in complaint(case):
            self.complain(f"{job.label} failed on {case.name}", complaint(case))
        else:
            samples = case.samples.setdefault(job.name, [])
            samples.append(sample)
            if len(samples) == 1:
                self.check(job, case)
        remove(case, jobs.OUT, jobs.CACHE)

    def check(self, job: Job, case: Case) -> None:
        """Compare what a job wrote with what it must be. Others may round differently, but not leave anything out."""
        out = case.folder / jobs.OUT
        if job.same_as and not same_weights(out, case.folder / job.same_as):
            self.complain(f"{job.label} did not write the bytes of {Path(job.same_as).name} on {case.name}")
        if job.peer and sum(file.stat().st_size for file in weights(out).values()) < case.model.bytes:
            self.complain(f"{job.label} did not write the whole checkpoint on {case.name}")

    def clock(self, command: Sequence[str], case: Case) -> dict[str, float]:
        """Run a command in the folder of a case and say what it took."""
        watch = [sys.executable, "-I", "-S", str(jobs.HERE / "stopwatch.py"), "stderr", *command]
        done = subprocess.run(watch, cwd=case.folder, env=self.environment, stdout=subprocess.PIPE, check=True)
        sample: dict[str, float] = json.loads(done.stdout)
        return sample

    def clear(self, case: Case) -> None:
        """Remove everything but the checkpoint and the adapter."""
        remove(case, jobs.MERGED, jobs.OUT, jobs.CACHE)
        for name in (jobs.RECIPE, "stderr"):
            (case.folder / name).unlink(missing_ok=True)

    def complain(self, words: str, detail: str = "") -> None:
        """Note that something is wrong."""
        self.wrong.append(words)
        say(f"wrong: {words}" + (f"\n{detail}" if detail else ""))


def remove(case: Case, *names: str) -> None:
    """Remove what jobs wrote."""
    for name in names:
        if (case.folder / name).exists():
            shutil.rmtree(case.folder / name)


def complaint(case: Case) -> str:
    """The end of what the last command wrote to stderr."""
    return (case.folder / "stderr").read_text("utf-8", "replace")[-2000:].strip()


def say(words: str) -> None:
    """Tell a waiting person what is going on."""
    print(words, file=sys.stderr, flush=True)
