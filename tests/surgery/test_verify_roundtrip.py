"""verify --roundtrip: with the base, and with the undo file's digests alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lora_cli.adapters.source import AdapterSource, look_at_adapter
from lora_cli.errors import UsageError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import VerifyResult, verify

KEY = "model.layers.0.self_attn.q_proj.weight"
Array = NDArray[Any]
HEAD = "base_model.model.score.weight"


class Job:
    """A base, an adapter that also adds a head, and base + adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny.write_base(folder / "base")
        head = {HEAD: tiny.numbers(3, 8, seed=901)}
        self.adapter = tiny.write_adapter(folder / "a", tiny.adapter_tensors() | head, modules_to_save=["score"])
        self.merged = folder / "merged"
        merge(self.base, [self.adapter], self.merged)

    def change(self, key: str, change: Callable[[Array], Array]) -> None:
        """Change a tensor of the merged checkpoint, and nothing else."""
        for shard in self.merged.glob("*.safetensors"):
            data = shard.read_bytes()
            tensors = load_file(shard)
            if key in tensors:
                before = tensors[key].tobytes()
                at = data.index(before, 8 + int.from_bytes(data[:8], "little"))
                shard.write_bytes(data[:at] + change(tensors[key]).tobytes() + data[at + len(before) :])

    def alone(self) -> VerifyResult:
        return verify(self.merged, None, [self.adapter], roundtrip=True)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def plus_one(tensor: Array) -> Array:
    return np.add(tensor, 1, dtype=tensor.dtype)


def test_what_was_merged_goes_back_and_forth(job: Job) -> None:
    whole, alone = verify(job.merged, job.base, [job.adapter], roundtrip=True), job.alone()
    for result, against in ((whole, "base"), (alone, "digests")):
        assert result.verified
        assert result.roundtrip is not None
        assert (result.roundtrip.exact, result.roundtrip.against) == (True, against)
        assert result.roundtrip.files.keys() == {path.name for path in job.base.iterdir()}
    assert (alone.base, alone.adapters[0].label) == ("base", "a")
    assert alone.tensors["checked"] == len(tiny.base_tensors())


@pytest.mark.parametrize("key", [KEY, "model.embed_tokens.weight", "score.weight"], ids=["edited", "kept", "added"])
def test_any_change_is_found_without_the_base(job: Job, key: str) -> None:
    job.change(key, plus_one)
    result = job.alone()
    assert not result.verified
    assert [difference.key for difference in result.different] == [key]
    assert result.different[0].looks_like == "not what the merge wrote"


def test_side_files_count(job: Job) -> None:
    (job.merged / "config.json").write_text("{}")
    assert [difference.key for difference in job.alone().different] == ["config.json"]


def test_another_base_is_told(job: Job) -> None:
    tensors = tiny.base_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    other = tiny.write_base(job.folder / "other", tensors)
    result = verify(job.merged, other, [job.adapter], roundtrip=True)
    assert not result.verified
    assert "model.embed_tokens.weight" in {difference.key for difference in result.different}


def test_an_adapter_is_all_of_its_tensors(job: Job) -> None:
    head = {HEAD: tiny.numbers(3, 8, seed=902)}
    job.adapter = tiny.write_adapter(job.folder / "b", tiny.adapter_tensors() | head, modules_to_save=["score"])
    with pytest.raises(WrongInputError, match="not the one that was merged"):
        job.alone()
    assert unmerge(job.merged, [job.adapter], job.folder / "out").exact  # its factors are all that is needed


def test_another_scale_in_its_config_is_said(job: Job) -> None:
    class Heard(Progress):
        said: list[str] = []  # noqa: RUF012 (one test, one list)

        def warn(self, text: str) -> None:
            self.said.append(text)

    config = job.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 999}))
    assert verify(job.merged, None, [job.adapter], roundtrip=True, progress=Heard()).verified
    assert "the merge used scale" in " ".join(Heard.said)


def test_the_undo_file_may_lie_elsewhere(job: Job) -> None:
    (job.merged / "lora_merge.undo").rename(job.folder / "u")
    with pytest.raises(WrongInputError, match="no undo file"):
        job.alone()
    assert verify(job.merged, None, [job.adapter], roundtrip=True, undo=job.folder / "u").verified


def test_what_makes_no_sense_is_refused(job: Job) -> None:
    with pytest.raises(UsageError, match="base"):
        verify(job.merged, None, [job.adapter])
    with pytest.raises(UsageError, match="undo file says"):
        verify(job.merged, None, [job.adapter], PlanOptions(weights=(0.5,)), roundtrip=True)


def test_an_adapter_given_twice_is_refused(job: Job) -> None:
    with pytest.raises(WrongInputError, match="given twice"):
        merge(job.base, [job.adapter, job.adapter], job.folder / "out")
    merge(job.base, [job.adapter, job.adapter], job.folder / "zero", PlanOptions(weights=(1, 0)))


def test_a_file_of_a_merged_folder_is_known_as_merged(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", shards=1)
    adapter = tiny.write_adapter(tmp_path / "a")
    merge(base, [adapter], tmp_path / "merged")
    with pytest.raises(WrongInputError, match="already"):
        merge(tmp_path / "merged" / "model.safetensors", [adapter], tmp_path / "out.safetensors")


def test_subtracting_one_adapter_leaves_the_others_known(tmp_path: Path) -> None:
    base, place = tiny.write_base(tmp_path / "base"), tmp_path
    one = tiny.write_adapter(place / "one")
    two = tiny.write_adapter(place / "two")
    save_file({key: value * 2 for key, value in tiny.adapter_tensors().items()}, two / "adapter_model.safetensors")
    merge(base, [one], place / "m1")
    merge(place / "m1", [two], place / "m2")
    unmerge(place / "m2", [two], place / "back", approximate=True)
    with pytest.raises(WrongInputError, match="already"):
        merge(place / "back", [one], place / "out")
    merge(place / "back", [two], place / "out")


def test_inspect_says_what_undoing_needs(job: Job) -> None:
    undo = inspect(job.merged).undo
    assert undo is not None
    assert (undo.base, undo.needs, undo.problem) == ("base", ("a",), None)
    merge(job.base, [job.adapter], job.folder / "whole", embed_adapter=True)
    undo = inspect(job.folder / "whole").undo
    assert undo is not None
    assert undo.needs == ()
    (job.merged / "lora_merge.undo").write_bytes(b"x" * 64)
    undo = inspect(job.merged).undo
    assert undo is not None
    assert undo.problem


def test_an_adapters_names_are_listed_once(job: Job) -> None:
    """They were listed anew for each tensor, which took hours for many."""
    source: AdapterSource = look_at_adapter(job.adapter)
    assert source.tensors is source.tensors
