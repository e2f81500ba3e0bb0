"""R173 to R176: little memory, few open files, many threads: it works, or says what would; the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_world import Call, Ran, World, call_fixture, environment, process, world_fixture  # noqa: F401 (fixtures)
from tiny import Array, factors, numbers, write_adapter, write_base, write_json

from lora_cli.surgery import workers

MIB = 1 << 20
LINUX = sys.platform == "linux"

# R173: the memory budget

BUDGETED = {
    "merge": "merge {base} {adapter} -o {out}",
    "merge without undo": "merge {base} {adapter} -o {out} --no-undo",
    "unmerge": "unmerge {merged} {adapter} -o {out}",
    "verify": "verify {merged} --base {base} --adapter {adapter} --roundtrip",
    "wrap": "inject {base} -o {out} --rank 1 --layout wrapped",
}


@pytest.mark.parametrize("line", BUDGETED.values(), ids=BUDGETED.keys())
def test_r173_the_smallest_budget_that_is_named_works(call: Call, world: World, tmp_path: Path, line: str) -> None:
    filled = world.fill(tuple(line.split()), tmp_path)
    ran = call(*filled, "--memory", "1kB")
    assert ran.code == 2
    assert "memory budget is too small" in ran.err
    assert list(tmp_path.iterdir()) == []
    (least,) = re.findall(r"--memory (\d+)MiB or more", ran.err)
    assert call(*filled, "--memory", f"{int(least) - 1}MiB").code == 2
    assert call(*filled, "--memory", f"{least}MiB", "--threads", "64").code == 0


REFUSED = ["0", "0MiB", "-1GB", "1,5GB", "lots", "10 Gigs", "nan", "", "1e400"]


@pytest.mark.parametrize("said", REFUSED)
def test_r173_what_is_no_budget_is_refused(call: Call, world: World, tmp_path: Path, said: str) -> None:
    ran = call("merge", world.base, world.adapter, "-o", tmp_path / "out", f"--memory={said}")
    assert ran.code == 2
    assert "--memory is no size" in ran.err
    assert "256MiB" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_r173_units_are_those_of_disks_and_of_memory_and_more_than_there_is_is_no_harm(
    call: Call, world: World, tmp_path: Path
) -> None:
    found = {}
    for said in ("8MB", "8MiB", "100TiB"):
        ran = call(
            "merge", world.base, world.adapter, "-o", tmp_path / "out", "--no-undo", "--memory", said, "--dry-run"
        )
        assert ran.code == 0, ran.err
        ran = call("merge", world.base, world.adapter, "-o", tmp_path / said, "--memory", said, "--no-undo")
        assert ran.code == 0
        found[said] = contents(tmp_path / said)
    assert found["8MB"] == found["8MiB"] == found["100TiB"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# R174: limits of the process

SIDE, KEYS = 2048, ("a", "b")
CONSTANT = 96 * MIB
"""What a run takes besides the import of torch and its budget."""


@pytest.fixture(scope="module", name="large")
def large_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 32 MiB in two shards, and an adapter."""
    folder = tmp_path_factory.mktemp("large")
    pattern = numbers(SIDE, 64)
    tensors: dict[str, Array] = {f"{key}.weight": np.tile(pattern * (n + 1), SIDE // 64) for n, key in enumerate(KEYS)}
    write_base(folder / "base", tensors, shards=2)
    write_adapter(folder / "adapter", factors(dict.fromkeys(KEYS, (SIDE, SIDE)), rank=2))
    return folder


def limited(data: int, line: Sequence[object], program: tuple[str, ...] = ("-m", "lora_cli")) -> Ran:
    """Run a process that gets no more memory of its own than so many bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))

    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return process(*line, env=env, program=program, preexec_fn=limit)


@pytest.fixture(scope="module", name="needed")
def needed_fixture() -> int:
    """Bytes of memory of its own with which a process has torch."""
    code = "import torch, re; print(re.search(r'VmData:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    return int(process(program=("-c", code), env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}).out) << 10


@pytest.mark.skipif(not LINUX, reason="RLIMIT_DATA bounds all memory of a process on Linux alone")
def test_r174_a_limit_a_little_above_the_budget_is_enough(large: Path, needed: int, tmp_path: Path) -> None:
    budget = 48 * MIB
    line = ["merge", large / "base", large / "adapter", "-o", tmp_path / "out", "--memory", budget, "--threads", "2"]
    ran = limited(needed + budget + CONSTANT, line)
    assert ran.code == 0, ran.err
    line = ["verify", tmp_path / "out", "--base", large / "base", "--adapter", large / "adapter", "--memory", budget]
    ran = limited(needed + budget + CONSTANT, [*line, "--threads", "1"])
    assert ran.code == 0, ran.err


@pytest.mark.skipif(not LINUX, reason="RLIMIT_DATA bounds all memory of a process on Linux alone")
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45, 0.8, 0.97, 1.03])
def test_r174_a_limit_that_is_far_too_low_is_said(large: Path, needed: int, tmp_path: Path, share: float) -> None:
    """Where Python has no room for what shows errors, where OpenBLAS would exit, where torch would abort, and later."""
    ran = limited(int(needed * share), ["merge", large / "base", large / "adapter", "-o", tmp_path / "out"])
    assert ran.code == 70 or (share > 1 and ran.code == 0)
    if ran.code:
        said = ran.err[ran.err.index("error: ") :]
        assert "memory" in said
        assert len(said.splitlines()) <= 4
        assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in ran.err
    assert "terminate" not in ran.err


# R175: few open files


def many_shards(folder: Path, shards: int) -> tuple[Path, Path]:
    tensors: dict[str, Array] = {f"layers.{n}.weight": numbers(6, 4, seed=n) for n in range(shards)}
    base = write_base(folder / "base", tensors, shards=shards)
    modules = {f"layers.{n}": (6, 4) for n in range(0, shards, 3)}
    return base, write_adapter(folder / "adapter", factors(modules, rank=2))


WITH_FEW_FILES = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from lora_cli.cli.app import run
from lora_cli.surgery import workers
workers.SHARE = 1
print(json.dumps({name: run(line) for name, line in json.load(open(sys.argv[1])).items()}))
"""


@pytest.mark.parametrize("shards", [90, pytest.param(2_000, marks=pytest.mark.slow)])
def test_r175_no_more_files_are_open_than_a_few(tmp_path: Path, shards: int) -> None:
    """Every command, on more shards than a process may have open."""
    base, adapter = many_shards(tmp_path, shards)
    merged, both = tmp_path / "merged", ["--base", base, "--adapter", adapter]
    fresh = ["inject", base, "--rank", "1", "-o"]
    lines: dict[str, list[object]] = {
        "inspect": ["inspect", base],
        "merge": ["merge", base, adapter, "-o", merged],
        "verify": ["verify", merged, *both, "--roundtrip"],
        "look": ["verify", base, *both],
        "diff": ["diff", base, merged, "--rank"],
        "unmerge": ["unmerge", merged, adapter, "-o", tmp_path / "back"],
        "subtract": ["unmerge", merged, adapter, "--approximate", "-o", tmp_path / "near"],
        "wrap": [*fresh, tmp_path / "wrapped", "--layout", "wrapped"],
        "merge again": ["merge", tmp_path / "wrapped", "-o", tmp_path / "unwrapped"],
        "pissa": [*fresh, tmp_path / "pissa", "--init", "pissa", "--base-out", tmp_path / "residual"],
    }
    every = write_json(tmp_path / "lines.json", {name: [*map(str, line), "-q"] for name, line in lines.items()})
    ran = process(every, program=("-c", WITH_FEW_FILES), timeout=1200)
    assert ran.err == ""
    assert json.loads(ran.out) == dict.fromkeys(lines, 0) | {"look": 1, "diff": 1}
    assert {name: digest for name, digest in contents(tmp_path / "back").items() if name != "lora_unmerge.json"} == (
        contents(base)
    )


# R176: threads


ONE = ["--threads", "1", "--memory", "32MiB"]
HOW: dict[str, tuple[list[str], bool, bool]] = {
    "two processes": (["--threads", "2"], True, False),
    "as many processes as units": (["--threads", "64", "--memory", "4GiB"], True, False),
    "three threads": (["--threads", "3", "--memory", "64MiB"], False, False),
    "as many threads as units": (["--threads", "64", "--memory", "4GiB"], False, False),
    "units in another order": (["--threads", "2"], True, True),
}


@pytest.mark.parametrize("how", HOW)
def test_r176_no_byte_depends_on_how_the_work_is_shared(
    call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whole processes with other threads of torch, other budgets and locales: tests/cli/test_same_bytes.py."""
    made = written(call, world, tmp_path / "one", ONE)
    flags, forked, turned = HOW[how]
    monkeypatch.setattr(workers, "SHARE", 1)
    monkeypatch.setattr(workers, "can_fork", lambda: forked)
    run_units = workers.run_units
    shared: list[int] = []

    def sharing(units, work, make_tools, threads, *, nbytes):  # type: ignore[no-untyped-def]
        listed = list(units)
        shared.append(min(threads, len(listed)))
        return run_units(listed[::-1] if turned else listed, work, make_tools, threads, nbytes=nbytes)

    for module in list(sys.modules.values()):
        if getattr(module, "run_units", None) is run_units:
            monkeypatch.setattr(module, "run_units", sharing)
    assert written(call, world, tmp_path / "other", flags) == made
    assert max(shared) > 1


WRITING: dict[str, str] = {
    "merged": "merge {base} {adapter} -o {out}",
    "cast": "merge {base} {adapter} -o {out} --dtype bf16 --weight 0.5",
    "back": "unmerge {merged} {adapter} -o {out}",
    "roughly": "unmerge {single} {adapter} -o {out} --approximate",
    "wrapped": "inject {base} -o {out} --rank 2 --layout wrapped --seed 5",
    "pissa": "inject {base} -o {out} --rank 2 --init pissa --base-out {out}-base",
}


def written(call: Call, world: World, folder: Path, flags: Sequence[str]) -> dict[str, dict[str, str]]:
    """The digest of every file of every command that writes."""
    for name, line in WRITING.items():
        (folder / name).mkdir(parents=True)
        ran = call(*world.fill(tuple(line.split()), folder / name), *flags)
        assert ran.code == 0, ran.err
    outs = {name: sorted((folder / name).iterdir()) for name in WRITING}
    return {f"{name}/{out.name}": contents(out) for name, found in outs.items() for out in found}
