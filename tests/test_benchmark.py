"""The benchmark makes what it says, computes what it says, and notices wrong results."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SCRIPTS = Path(__file__).parents[1] / "scripts" / "benchmark"
sys.path.append(str(SCRIPTS))

import checkpoints  # noqa: E402
import disk  # noqa: E402
import files  # noqa: E402
import jobs  # noqa: E402
import machine  # noqa: E402
import main  # noqa: E402
import picture  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from measure import Case  # noqa: E402

TINY = 0.004
GIGABYTE = 10**9


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("gigabytes", [0.02, 0.25, 1, 2.5, 7.5, 16])
def test_checkpoints_are_as_large_as_asked(gigabytes: float) -> None:
    model = shapes.llama(gigabytes)
    assert model.bytes == pytest.approx(gigabytes * 1e9, rel=0.25 if gigabytes < 2 else 0.03)


def test_two_and_a_half_gigabytes_are_llama_3_2_1b() -> None:
    model = shapes.llama(2.5)
    assert model.bytes == 2 * 1_235_814_400
    assert model.config
    assert (model.config["num_hidden_layers"], model.config["vocab_size"]) == (16, 128256)
    assert model.tensors["model.layers.15.mlp.down_proj.weight"] == (2048, 8192)
    assert model.tensors["model.layers.0.self_attn.k_proj.weight"] == (512, 2048)


def test_a_checkpoint_is_what_transformers_expects(tmp_path: Path) -> None:
    model = shapes.llama(TINY)
    checkpoints.write_base(tmp_path / "base", model, shard=2_000_000)
    found = tensors_in(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == model.tensors
    assert {name: tensor.shape for name, tensor in expected.items() if name != "lm_head.weight"} == {
        name: tensor.shape for name, tensor in found.items()
    }
    assert config.tie_word_embeddings
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert found["model.norm.weight"].eq(1).all()
    weights = found["model.layers.0.mlp.up_proj.weight"].float()
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean().item()) < 1e-3


def test_shards_have_an_index(tmp_path: Path) -> None:
    model = shapes.llama(TINY)
    checkpoints.write_base(tmp_path / "base", model, shard=2_000_000)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == model.bytes
    assert set(index["weight_map"]) == set(model.tensors)
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert [file.name for file in shards] == sorted(set(index["weight_map"].values()))
    assert len(shards) >= 2
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for file in shards:
        assert file.stat().st_size < 2_010_000
        with safe_open(file, "pt") as opened:
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
    checkpoints.write_base(tmp_path / "whole", model)
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {"config.json", "model.safetensors"}
    whole = tensors_in(tmp_path / "whole")
    assert all(whole[name].equal(tensor) for name, tensor in tensors_in(tmp_path / "base").items())


def test_an_adapter_changes_weights_as_much_as_training_does(tmp_path: Path) -> None:
    model = shapes.llama(TINY)
    checkpoints.write_adapter(tmp_path / "adapter", model, 8)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    assert len(config["target_modules"]) == 7
    found = tensors_in(tmp_path / "adapter")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == model.factors(8)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        key = f"base_model.model.model.layers.0.{name}"
        delta = 2 * found[f"{key}.lora_B.weight"] @ found[f"{key}.lora_A.weight"]
        assert delta.std().item() == pytest.approx(0.015 * 0.02, rel=0.15)


def test_files_are_the_same_each_time_and_another_seed_makes_others(tmp_path: Path) -> None:
    model = shapes.llama(TINY)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        checkpoints.write_base(tmp_path / name / "base", model, seed)
        checkpoints.write_adapter(tmp_path / name / "adapter", model, 4, seed)
    for part in ("base", "adapter"):
        assert files.same_weights(tmp_path / "a" / part, tmp_path / "b" / part)
        assert not files.same_weights(tmp_path / "a" / part, tmp_path / "c" / part)


def test_what_is_there_is_used_again_unless_its_parameters_are_others(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        folder.mkdir()

    for wanted in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        checkpoints.make_once(tmp_path / "base", wanted, make)
    assert made == ["base.making"] * 2
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["base", "base.stamp.json"]


def test_numbers_do_not_repeat_within_a_large_tensor() -> None:
    noise = checkpoints.Noise(0)
    pieces = list(noise.ring(noise.half, 3, 2 * checkpoints.BLOCK + 5))
    assert sum(len(piece) for piece in pieces) == 2 * checkpoints.BLOCK + 5
    turns = [pieces[0][:64].tobytes(), pieces[2][:64].tobytes(), next(noise.ring(noise.half, 4, 64)).tobytes()]
    assert len(set(turns)) == 3


def known_case(size: int, seconds: dict[str, float], rank: int = 16) -> dict[str, Any]:
    """A case in which every job used as many megabytes as it took seconds, and half of them of CPU."""
    samples = {
        name: [{"wall": t + off, "cpu": t / 2, "peak": t * 1e6} for off in (0.0, 5.0, -1.0)]
        for name, t in seconds.items()
    }
    sizes = {"gigabytes": size, "bytes": size * GIGABYTE, "tensors": 9, "adapter_bytes": 1, "undo_bytes": 1}
    return {**sizes, "rank": rank, "samples": samples}


def known_result(*cases: dict[str, Any]) -> dict[str, Any]:
    machine = {"cores": 2, "cpu": "A <fast> & good one", "memory": 8 * GIGABYTE}
    return {"machine": machine, "versions": {"python": "3"}, "cases": list(cases), "notes": [], "wrong": []}


def test_slopes_of_known_numbers() -> None:
    cases = [known_case(2, {"cp": 3, "merge": 7}), known_case(6, {"cp": 5, "merge": 12}), known_case(6, {"verify": 1})]
    found = report.slopes(cases)
    assert set(found) == {"cp", "merge"}
    assert found["cp"]["wall"] * GIGABYTE == pytest.approx(0.5)
    assert found["merge"]["wall"] * GIGABYTE == pytest.approx(1.25)
    assert found["merge"]["cpu"] * GIGABYTE == pytest.approx(0.625)
    assert found["merge"]["peak"] * GIGABYTE == pytest.approx(1.25e6)
    assert report.slope([(0, 1), (1, 2), (2, 6)]) == pytest.approx(2.5)
    assert report.slopes(cases[:1]) == {}


def test_the_tables_have_ratios_and_slopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "result.json"
    saved.write_text(
        json.dumps(known_result(known_case(2, {"cp": 3, "merge": 7}), known_case(6, {"cp": 5, "merge": 12})))
    )
    assert main.main(["--from", str(saved)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| lora-cli merge ")]
    assert [row[4:9:2] for row in rows[:3]] == [
        ["7.00", "2.33", "3.50"],
        ["12.00", "2.40", "6.00"],
        ["1.25", "2.50", "0.62"],
    ]
    assert rows[3][4:] == ["2.33", "·", "7", "MB", "|", "2.40", "·", "12", "MB", "|"]


def test_the_picture_has_every_job() -> None:
    seconds = {name: number + 1.0 for number, name in enumerate(jobs.LABELS)}
    drawn = picture.draw(
        known_result(known_case(9, {"cp": 1}), known_case(2, seconds), known_case(2, seconds, rank=64))
    )
    root = ET.fromstring(drawn)  # noqa: S314
    text = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    widths = [float(bar.attrib["width"]) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
    for name, label in jobs.LABELS.items():
        assert (label in text) == (name != "import-torch")
    assert "cp and sync: 2.00 s · 2 MB" in drawn
    assert "prefers-color-scheme: dark" in drawn
    assert "rank 16" in text[0]
    assert widths == sorted(widths)
    assert widths[-1] == pytest.approx(4.5 * widths[0], rel=0.01)


def test_every_job_has_a_label() -> None:
    assert [job.name for job in jobs.all_jobs()] == list(jobs.LABELS)


def test_room_counts_inputs_that_are_there_together(tmp_path: Path) -> None:
    one, two = (Case(size, 16, shapes.llama(size), tmp_path / f"{size}") for size in (1.0, 2.0))
    both = disk.needed_for([[one, two]], keep=False, caches=False)
    assert both == pytest.approx((3 + 3 * disk.MORE + 2 * disk.MORE) * 1e9, rel=0.1)
    assert disk.needed_for([[one], [two]], keep=False, caches=False) == pytest.approx(6.28e9, rel=0.1)
    assert disk.needed_for([[one], [two]], keep=False, caches=True) > 8e9
    (two.place / "base").mkdir(parents=True)
    assert both - disk.needed_for([[one, two]], keep=False, caches=False) == two.model.bytes


def test_no_folder_is_in_the_saved_command_line() -> None:
    words = ["--sizes", "2.5", "--work", "/home/me/bench", "--json=/home/me/out.json", "--svg", "a/b.svg"]
    expected = "scripts/bench --sizes 2.5 --work bench --json=out.json --svg b.svg"
    assert machine.command_line(words) == expected


def test_a_run_measures_and_checks(tmp_path: Path) -> None:
    saved, drawn, work = tmp_path / "result.json", tmp_path / "result.svg", tmp_path / "work"
    line: list[str | Path] = [
        sys.executable,
        SCRIPTS / "main.py",
        "--sizes",
        str(TINY),
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    line += ["--jobs", "cp", "merge", "unmerge", "--work", work, "--json", saved, "--svg", drawn]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    text = saved.read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text
    assert result["wrong"] == []
    assert result["versions"]["torch"]
    (case,) = result["cases"]
    assert case["undo_bytes"] > 0
    assert set(case["samples"]) == {"cp", "merge", "unmerge"}
    for (sample,) in case["samples"].values():
        assert sample["cpu"] > 0
        assert 0 < sample["wall"] < 60
    assert case["samples"]["cp"][0]["peak"] < 50e6 < case["samples"]["merge"][0]["peak"]
    ET.parse(drawn)  # noqa: S314
    kept = {str(path.relative_to(work / f"llama-{TINY:g}GB")) for path in work.rglob("*") if path.is_file()}
    assert kept == {
        *("base.stamp.json", "base/config.json", "base/model.safetensors", "rank-16/adapter.stamp.json"),
        *("rank-16/adapter/adapter_config.json", "rank-16/adapter/adapter_model.safetensors"),
    }


def test_a_wrong_result_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs.all_jobs

    def wrong(*given: Any) -> list[jobs.Job]:
        copy = jobs.synced("cp", "-r", jobs.MERGED, jobs.OUT)
        fails = (sys.executable, "-c", "raise SystemExit(3)")
        instead = {"unmerge": copy, "verify": fails}
        return [dataclasses.replace(job, command=instead.get(job.name, job.command)) for job in real(*given)]

    monkeypatch.setattr(jobs, "all_jobs", wrong)
    saved = tmp_path / "result.json"
    line = ["--sizes", str(TINY), "--rounds", "1", "--jobs", "cp", "unmerge", "verify", "--json", str(saved)]
    assert main.main([*line, "--work", str(tmp_path / "work")]) == 1
    result = json.loads(saved.read_text())
    assert result["wrong"] == [
        f"lora-cli unmerge did not write the bytes of base on {TINY:g} GB, rank 16",
        f"lora-cli verify failed on {TINY:g} GB, rank 16",
    ]
    assert set(result["cases"][0]["samples"]) == {"cp", "unmerge"}
