"""Factors of two tied tensors that were to be trained as one: while they are one, and where training made them two."""

from pathlib import Path

import numpy as np
from adapter_worlds import HEAD, TABLE, as_one
from safetensors.numpy import load_file, save_file
from tiny import PREFIX, read_tensors

from lora_cli.adapters.source import ReadOptions
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

SCALE = 0.5


def delta(a: str, b: str, factors: dict[str, np.ndarray]) -> np.ndarray:
    """scale · B·A, out × in."""
    return SCALE * factors[PREFIX + b].astype(np.float64) @ factors[PREFIX + a].astype(np.float64)


def test_what_was_trained_as_one_stays_one(tmp_path: Path) -> None:
    """R099: an embedding that is the head too, and stays it."""
    world = as_one(tmp_path)
    result = merge(world.base, [world.adapter], tmp_path / "out", PlanOptions(read=ReadOptions(scale=SCALE)))
    base, made = read_tensors(world.base), read_tensors(tmp_path / "out")
    factors = load_file(world.adapter / "adapter_model.safetensors")
    change = delta("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", factors).T
    assert made.keys() == base.keys()
    assert HEAD not in made
    assert np.allclose(made[TABLE], base[TABLE] + change, rtol=1e-6, atol=1e-7)
    assert sorted(entry.outcome for entry in result.entries) == ["applied", "applied", "ignored", "ignored"]
    assert not result.warnings


def test_factors_that_differ_are_each_for_a_tensor_of_its_own(tmp_path: Path) -> None:
    """PEFT trains them apart in models of 16 bits, and the live model has two tensors then."""
    world = as_one(tmp_path)
    place = world.adapter / "adapter_model.safetensors"
    factors = load_file(place)
    factors[f"{PREFIX}lm_head.lora_B.weight"][0, 0] += 1
    save_file(factors, place)
    result = merge(world.base, [world.adapter], tmp_path / "out", PlanOptions(read=ReadOptions(scale=SCALE)))
    base, made = read_tensors(world.base), read_tensors(tmp_path / "out")
    table = delta("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", factors).T
    head = delta("lm_head.lora_A.weight", "lm_head.lora_B.weight", factors)
    assert not np.allclose(table, head)
    assert np.allclose(made[TABLE], base[TABLE] + table, rtol=1e-6, atol=1e-7)
    assert np.allclose(made[HEAD], base[TABLE] + head, rtol=1e-6, atol=1e-7)
    assert {entry.outcome for entry in result.entries} == {"applied"}
    assert [text for text in result.warnings if "their factors differ" in text]
    assert unmerge(tmp_path / "out", [world.adapter], tmp_path / "back").exact
    assert (tmp_path / "back" / "config.json").read_bytes() == (world.base / "config.json").read_bytes()
