"""Unmerge by subtraction: what it calls proved is the base's own, and what it does not is a step away at most."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from adapter_worlds import WORLDS
from float_reference import Array, to_float64
from models import CASES, DTYPE_NAMES, maker, read_tensors
from safetensors.torch import save_file

from lora_cli.checkpoint import digests, staging
from lora_cli.errors import LockedError, LoraCliError, OutputExistsError, UsageError, WrongInputError
from lora_cli.progress import Progress
from lora_cli.surgery import budget, products
from lora_cli.surgery.approximate import Undecided
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import UnmergeResult, unmerge

DTYPES = {name: getattr(torch, name) for name in reference.FORMATS}
NARROW = [name for name, form in reference.FORMATS.items() if form.width <= 16]


def write_base(folder: Path, values: torch.Tensor, **others: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"x.weight": values.reshape(-1, 1)} | others, folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, deltas: torch.Tensor, **others: torch.Tensor) -> Path:
    """An adapter that adds these numbers, exactly."""
    tiny.write_adapter(folder, {}, r=1, lora_alpha=1, modules_to_save=["head"])
    factors = {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": deltas.reshape(-1, 1)}
    save_file(factors | others, folder / "adapter_model.safetensors")
    return folder


def x(folder: Path) -> torch.Tensor:
    return read_tensors(folder)["x.weight"].reshape(-1)


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy().view(f"<u{tensor.itemsize}")


def spacing(values: Array, name: str) -> Array:
    form = reference.FORMATS[name]
    exponent = np.where(values == 0, form.least_normal, np.frexp(values)[1] - 1)
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, form.least_normal) - form.fraction_bits))


def all_values(name: str, delta: float) -> torch.Tensor:
    """Every finite value of a narrow type to which `delta` can be added, both zeros and subnormals among them."""
    form = reference.FORMATS[name]
    patterns = np.arange(1 << form.width, dtype=np.uint64).astype(f"<u{form.width // 8}")
    values = torch.frombuffer(bytearray(patterns), dtype=DTYPES[name])
    wide = values.to(torch.float64)
    fits = wide.isfinite() & ((wide + delta).abs() < float(reference.limit(name)))
    return values[fits]


def proof_of(result: UnmergeResult, elements: int) -> Undecided:
    proof = next(iter(result.undecided), Undecided("x.weight", elements, elements, 0, 0))
    assert proof.key == "x.weight"
    assert proof.exact + proof.undecided + proof.impossible == proof.elements == elements
    return proof


def check_steps(found: torch.Tensor, base: torch.Tensor, merged: torch.Tensor, name: str) -> int:
    """No weight is more than a step off, at its largest. Returns how many are not the base's, to the bit."""
    w, m, f = (to_float64(tensor) for tensor in (base, merged, found))
    assert (np.abs(f - w) <= spacing(np.maximum(np.maximum(np.abs(w), np.abs(m)), np.abs(f)), name)).all()
    return int((bits(found) != bits(base)).sum())


DELTAS = (0.0, 2.0**-9, -(2.0**-7), 0.3, -1.0, 17.0, -48.0, -80.0, -12288.0)


@pytest.mark.parametrize(("name", "delta"), [(n, d) for n in NARROW for d in DELTAS if abs(d) < reference.limit(n)])
def test_every_value_of_a_narrow_type(tmp_path: Path, name: str, delta: float) -> None:
    values = all_values(name, delta)
    base = write_base(tmp_path / "base", values)
    adapter = write_adapter(tmp_path / "adapter", torch.full(values.shape, delta))
    merge(base, [adapter], tmp_path / "merged")
    result = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", approximate=True)
    merged, found = x(tmp_path / "merged"), x(tmp_path / "out")
    proof = proof_of(result, len(values))
    # All base values are there, so each result is there as often as it has preimages.
    _, where, times = np.unique(bits(merged), return_inverse=True, return_counts=True)
    provable = (times[where] == 1) & (bits(found) == bits(values))
    assert 0.99 * provable.sum() - 1 <= proof.exact <= provable.sum()
    assert proof.impossible == 0
    assert check_steps(found, values, merged, name) <= proof.undecided
    assert result.exact == (proof.exact == len(values))
    assert delta or result.exact


@pytest.mark.parametrize("ratio", [1e-4, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_samples_of_a_wide_type(tmp_path: Path, name: str, ratio: float) -> None:
    dtype, generator = DTYPES[name], torch.Generator().manual_seed(3)
    values = torch.randn(30_000, generator=generator, dtype=torch.float64).to(dtype)
    values[:3000] *= torch.logspace(-300 if name == "float64" else -44, 0, 3000, dtype=torch.float64).to(dtype)
    values[3000:3100], values[3100:3200] = 0.0, -0.0
    deltas = (torch.randn(30_000, generator=generator, dtype=torch.float64) * ratio).to(dtype)
    deltas[::7] = 0
    base, adapter = write_base(tmp_path / "base", values), write_adapter(tmp_path / "adapter", deltas)
    merge(base, [adapter], tmp_path / "merged")
    result = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", approximate=True)
    merged, found = x(tmp_path / "merged"), x(tmp_path / "out")

    def again(w: Array) -> Array:
        return np.asarray(w.astype(np.float64) + deltas.numpy().astype(np.float64)).astype(w.dtype)

    w = values.numpy()
    assert np.array_equal(again(w), merged.numpy())
    alone = (again(np.nextafter(w, np.inf)) != merged.numpy()) & (again(np.nextafter(w, -np.inf)) != merged.numpy())
    alone = np.where(deltas == 0, True, alone & (w != 0))  # one zero is as good as the other, unless it is kept
    proof, provable = proof_of(result, len(values)), alone & (bits(found) == bits(values))
    assert 0.99 * provable.sum() <= proof.exact <= provable.sum()
    assert proof.impossible == 0
    assert check_steps(found, values, merged, name) <= proof.undecided


@pytest.mark.parametrize("name", NARROW)
def test_another_adapter_is_found_out(tmp_path: Path, name: str) -> None:
    values, told = all_values(name, 1.0), list[str]()
    listener = type("Listener", (Progress,), {"warn": lambda _, text: told.append(text)})()
    base = write_base(tmp_path / "base", values)
    right, wrong = (write_adapter(tmp_path / str(d), torch.full(values.shape, d)) for d in (1.0, 0.6))
    for adapter in (right, wrong):
        merge(base, [adapter], tmp_path / f"by {adapter.name}")
    result = unmerge(tmp_path / "by 1.0", [wrong], tmp_path / "out", approximate=True, progress=listener)
    proof = proof_of(result, len(values))
    strange = np.isin(bits(x(tmp_path / "by 1.0")), bits(x(tmp_path / "by 0.6")), invert=True)
    assert 0 < proof.impossible <= strange.sum()
    assert f"{proof.impossible} weights cannot come from" in " ".join(told)
    assert not result.exact


def test_what_loses_nothing_comes_back_to_the_byte(tmp_path: Path) -> None:
    values = torch.linspace(1, 1.5, 65).to(torch.bfloat16)
    base, adapter = (
        write_base(tmp_path / "base", values),
        write_adapter(tmp_path / "adapter", torch.full((65,), 2.0**-7)),
    )
    merge(base, [adapter], tmp_path / "merged")
    result = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", approximate=True)
    assert (result.exact, result.undecided, result.kept) == (True, (), ())
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_proofs_do_not_depend_on_how_the_work_is_cut(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = maker(tmp_path_factory)(next(case for case in CASES if case.name == "gpt2-bare"), dtype)
    both, options, found = [made.adapter_dir] * 2, PlanOptions(weights=(0.7, 0.4)), []
    merge(made.base_dir, both, tmp_path / "merged", options, again=True)
    for number, threads in enumerate((1, 2, 3)):
        out = tmp_path / f"out{threads}"
        found.append(unmerge(tmp_path / "merged", both, out, options, approximate=True, threads=threads).undecided)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "out1/model.safetensors").read_bytes()
        monkeypatch.setattr(budget, "STRIP_BYTES", 999 + number)
        monkeypatch.setattr(products, "TILE_COLUMNS", 31 + number)
        monkeypatch.setattr(digests, "CUT_ELEMENTS", 2500 + number)
    assert found[0] == found[1] == found[2]
    base, merged, back = (read_tensors(folder) for folder in (made.base_dir, tmp_path / "merged", tmp_path / "out1"))
    assert {proof.key for proof in found[0]} <= {target.key for target in made.targets}
    for proof in found[0]:
        assert proof.elements == base[proof.key].numel()
        assert proof.impossible == 0
        off = check_steps(back[proof.key], base[proof.key], merged[proof.key], str(dtype).removeprefix("torch."))
        assert off <= proof.undecided
    assert sum(proof.exact for proof in found[0]) > sum(proof.elements for proof in found[0]) // 2


def test_refused_unless_asked_for(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", torch.ones(3)), write_adapter(tmp_path / "adapter", torch.ones(3))
    before = tiny.listing(tmp_path)
    with pytest.raises(WrongInputError) as caught:
        unmerge(base, [adapter], tmp_path / "out")
    assert caught.value.exit_code == 23
    assert "--approximate" in str(caught.value.hint)
    with pytest.raises(UsageError, match="Name the adapter"):
        unmerge(base, [], tmp_path / "out", approximate=True)
    with pytest.raises(OutputExistsError):
        unmerge(base, [adapter], base, approximate=True)
    assert tiny.listing(tmp_path) == before


def test_a_tensor_that_was_replaced_stays_and_is_named(tmp_path: Path) -> None:
    head = {"head.weight": torch.arange(4.0)}
    base = write_base(tmp_path / "base", torch.ones(3), **{"head.weight": torch.zeros(4)})
    right = write_adapter(tmp_path / "right", torch.ones(3), **head)
    wrong = write_adapter(tmp_path / "wrong", torch.ones(3), **{"head.weight": torch.full((4,), 9.0)})
    merge(base, [right], tmp_path / "merged")
    for adapter in (right, wrong):
        result = unmerge(tmp_path / "merged", [adapter], tmp_path / f"of {adapter.name}", approximate=True)
        assert (result.exact, result.kept) == (False, ("head.weight",))
        assert torch.equal(read_tensors(Path(result.out))["head.weight"], head["head.weight"])


def test_nothing_is_added_to_what_is_taken_apart(tmp_path: Path) -> None:
    merged = write_base(tmp_path / "merged", torch.ones(3))
    adapter = write_adapter(tmp_path / "adapter", torch.ones(3), **{"head.weight": torch.ones(4)})
    with suppress(LoraCliError):  # a refusal will do: the checkpoint lacks what the adapter would have added
        unmerge(merged, [adapter], tmp_path / "out", approximate=True)
        assert set(read_tensors(tmp_path / "out")) == {"x.weight"}


@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_a_merge_that_changed_the_type_proves_no_base(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    values = torch.linspace(1, 1.5, 500).to(stored)
    base, adapter = write_base(tmp_path / "base", values), write_adapter(tmp_path / "adapter", torch.full((500,), 0.25))
    merge(base, [adapter], tmp_path / "merged", PlanOptions(dtype=dtype))
    with suppress(LoraCliError):  # a refusal will do: the receipt says that the base was stored otherwise
        result = unmerge(tmp_path / "merged", [adapter], tmp_path / "out", approximate=True)
        assert proof_of(result, 500).exact <= int((x(tmp_path / "out").double() == values.double()).sum())
        assert not result.exact


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_that_is_replaced_is_what_its_last_receipt_says(tmp_path: Path, name: str) -> None:
    base, adapter = write_base(tmp_path / "base", torch.ones(3)), write_adapter(tmp_path / "adapter", torch.ones(3))
    merge(base, [adapter], tmp_path / name)
    assert inspect(tmp_path / name).kind == "merged"
    unmerge(base, [adapter], tmp_path / name, approximate=True, force=True)
    assert inspect(tmp_path / name).kind == "checkpoint"


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_r170_of_two_runs_one_wins_and_the_other_leaves_no_trace(
    tmp_path: Path, name: str, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks tell the second run at once; without any, whoever publishes first has won."""
    base, adapter = write_base(tmp_path / "base", torch.ones(3)), write_adapter(tmp_path / "adapter", torch.ones(3))
    out = tmp_path / name
    refused: list[LockedError] = []
    monkeypatch.setattr(staging, "PATIENCE", 0.0)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)

    class Rival(Progress):
        def file_done(self, name: str, file_bytes: int) -> None:
            try:
                unmerge(base, [adapter], out, approximate=True)
            except LockedError as error:
                refused.append(error)

    if locks:
        unmerge(base, [adapter], out, approximate=True, progress=Rival())
    else:
        with pytest.raises(OutputExistsError):
            unmerge(base, [adapter], out, approximate=True, progress=Rival())
    assert len(refused) == locks
    assert {path.name for path in tmp_path.iterdir()} - {"base", "adapter", "out.lora_unmerge.json"} == {name}
    (weights,) = tiny.read_tensors(out).values()
    assert not weights.any()


def without_locks(descriptor: int, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("name", ["untied", "resized", "repeated"])
def test_what_a_merge_did_besides_adding_is_kept_and_never_called_the_base(name: str, tmp_path: Path) -> None:
    """Nothing is added at all, so every weight is proved; and yet the output is another model than the base."""
    world, empty = WORLDS[name](tmp_path), tmp_path / "empty"
    merge(world.base, [world.adapter], tmp_path / "merged")
    tiny.write_adapter(empty, {k: v * 0 if "_B" in k else v for k, v in tiny.read_tensors(world.adapter).items()})
    if name == "repeated":
        weights = {key: tensor for key, tensor in tiny.read_tensors(empty).items() if "layers.3" in key}
        tiny.write_adapter(empty, weights)
    result = unmerge(tmp_path / "merged", [empty], tmp_path / "out", approximate=True)
    assert not result.exact
    told = " ".join(result.warnings)
    words = {
        "untied": ("lm_head.weight has a tensor of its own", "config.json says tie_word_embeddings false"),
        "resized": ("model.embed_tokens.weight has 23 rows instead of 20", "config.json says vocab_size 23"),
        "repeated": ("the layers are 0, 1, 0, 1 of the base", "config.json says num_hidden_layers 4"),
    }
    assert all(word in told for word in words[name])
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tmp_path / "merged").keys()
    plain = WORLDS["plain"](tmp_path / "plain")
    merge(plain.base, [plain.adapter], tmp_path / "summed")
    assert unmerge(tmp_path / "summed", [plain.adapter], tmp_path / "back", approximate=True).warnings == ()
