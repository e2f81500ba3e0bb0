"""The order of calls to the system: what a power cut must not turn around (R167).

A disk may lose whatever was not synced, and do the rest in any order. So a file is synced after its last byte and
before it gets its name, a folder after its last entry, and the folder around it once the name is there.
"""

from __future__ import annotations

from pathlib import PurePath

import pytest
from fault_jobs import NAMES, Job, Jobs, jobs_fixture  # noqa: F401 (fixture)
from faults import PUBLISHING, Operation

WRITING = {"create", "pwrite", "copy_file_range", "posix_fallocate", "ftruncate", "chmod"}

every_job = pytest.mark.parametrize("name", NAMES)


class Log:
    """The calls of one run, by what was done to which path.

    Attributes:
        made: Paths of output files, in the order in which they were created.
        published: Where in the log each entry of the place of the outputs got its name, and from where.
    """

    def __init__(self, job: Job) -> None:
        self.calls, self.place = job.log(), str(job.place)
        self.made = [one.path for one in self.calls if one.name == "create" and "/output/" in one.path]
        self.published = {
            at: one.path
            for at, one in enumerate(self.calls)
            if one.name in PUBLISHING and str(PurePath(one.to).parent) == self.place
        }

    def last(self, names: set[str], path: str) -> int:
        """Where one of these calls was made last with a path, or -1."""
        return max((at for at, one in enumerate(self.calls) if one.name in names and one.path == path), default=-1)

    def named(self, path: str) -> int:
        """Where in the log a file got its name: by itself, or with the folder that it is in."""
        return next(at for at, moved in self.published.items() if path == moved or path.startswith(f"{moved}/"))


@every_job
def test_a_file_is_synced_once_after_its_last_byte_and_before_it_gets_its_name(jobs: Jobs, name: str) -> None:
    log = Log(jobs[name])
    assert log.made
    for path in log.made:
        synced = [at for at, one in enumerate(log.calls) if one == Operation("fsync", path)]
        assert len(synced) == 1, path
        assert log.last(WRITING, path) < synced[0] < log.named(path), path


@every_job
def test_folders_are_synced_after_their_last_entry_and_the_place_after_the_name(jobs: Jobs, name: str) -> None:
    log = Log(jobs[name])
    for folder in {str(PurePath(path).parent) for path in log.made}:
        inner = [path for path in log.made if str(PurePath(path).parent) == folder]
        synced = log.last({"fsync"}, folder)
        assert max(log.last({"create"}, path) for path in inner) < synced < min(map(log.named, inner)), folder
    assert log.published
    assert log.last({"fsync"}, log.place) > max(log.published)


@every_job
def test_the_index_and_then_the_receipt_come_last(jobs: Jobs, name: str) -> None:
    """A folder without its index does not load, and an output without its receipt is not ours."""
    log = Log(jobs[name])
    places = {path.partition("/output/")[0] for path in log.made}
    for place in places:
        names = [PurePath(path).name for path in log.made if path.startswith(place)]
        assert names[-1].startswith(("lora_", "out.lora_"))
        assert names[-1].endswith(".json")
        if "model.safetensors.index.json" in names:
            after = names[names.index("model.safetensors.index.json") + 1 :]
            assert {PurePath(one).suffix for one in after} == {".json"}, names
    order = [PurePath(log.calls[at].to).name for at in log.published]
    if jobs[name].single:
        assert order[-1].endswith(".json")
        assert order[-2].endswith(".safetensors")


def test_what_is_left_of_a_base_has_its_name_before_the_adapter_that_needs_it(jobs: Jobs) -> None:
    log = Log(jobs["inject from weights"])
    assert [PurePath(log.calls[at].to).name for at in log.published] == ["left", "out"]
