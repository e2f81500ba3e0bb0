"""What verify says of changes that are no sum of products: formulas, gains and maps, each looked for as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import read_tensors
from test_merge_oracles import overwrite
from tiny import write_base
from tuner_worlds import tensors_of, write_tuner

from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import VerifyResult, verify

Tensors = dict[str, torch.Tensor]
every_kind = pytest.mark.parametrize("kind", ["FOURIERFT", "IA3", "LOHA", "OFT"])


def merged(folder: Path, kind: str, change: Callable[[Tensors, Tensors], Tensors] | None = None) -> tuple[Path, ...]:
    """A base, an adapter of the kind and their merge, of which `change` makes another one from base and merge."""
    base, adapter, out = write_base(folder / "base"), write_tuner(folder / "adapter", kind), folder / "merged"
    merge(base, [adapter], out)
    if change:
        for key, tensor in change(read_tensors(base), read_tensors(out)).items():
            overwrite(out, key, tensor)
    return out, base, adapter


def along(strength: float) -> Callable[[Tensors, Tensors], Tensors]:
    def change(before: Tensors, after: Tensors) -> Tensors:
        pairs = {key: (before[key].double(), after[key].double()) for key in before}
        return {key: (b + strength * (a - b)).to(before[key].dtype) for key, (b, a) in pairs.items()}

    return change


def strengths(result: VerifyResult) -> list[float]:
    return [one.strength for one in result.different if one.strength is not None]


@every_kind
@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (0.0, "the bare base: the adapter was not applied"),
        (2.0, "the adapter applied twice"),
        (-1.0, "the adapter with the opposite sign"),
        (0.5, "the adapter at 0.5 times its scale"),
        (1.5, "the adapter at 1.5 times its scale"),
    ],
)
def test_the_whole_change_at_another_strength(tmp_path: Path, kind: str, strength: float, words: str) -> None:
    out, base, adapter = merged(tmp_path, kind, along(strength))
    result = verify(out, base, [adapter])
    assert result.looks_like == f"all {len(result.different)} tensors that differ look like {words}"
    assert strengths(result) == pytest.approx([strength] * len(result.different), abs=0.01)


@pytest.mark.parametrize("kind", ["IA3", "LOHA"])
def test_merged_once_more(tmp_path: Path, kind: str) -> None:
    out, base, adapter = merged(tmp_path, kind)
    merge(out, [adapter], tmp_path / "again", again=True)
    result = verify(tmp_path / "again", base, [adapter])
    assert {one.looks_like for one in result.different} == {"the adapter applied twice"}


@every_kind
def test_another_adapter_of_the_kind(tmp_path: Path, kind: str) -> None:
    """Other numbers, of the same size, that have nothing to do with the first ones."""
    out, base, _ = merged(tmp_path, kind)
    drawn = torch.Generator().manual_seed(1)
    tensors = {
        key: value[torch.randperm(len(value), generator=drawn).numpy()] for key, value in tensors_of(kind).items()
    }
    config = {"random_loc_seed": 8} if kind == "FOURIERFT" else {}
    other = write_tuner(
        tmp_path / "other", kind, {key: -value[::-1] + 1 * (kind == "IA3") for key, value in tensors.items()}, **config
    )
    result = verify(out, base, [other])
    assert {(one.looks_like or "").partition(" (")[0] for one in result.different} == {
        "another adapter, or another change"
    }
    assert len(strengths(result)) == len(result.different)


def test_two_formulas_on_a_tensor_are_one_change(tmp_path: Path) -> None:
    out, base, adapter = merged(tmp_path, "LOHA", lambda before, _: before)
    other = write_tuner(tmp_path / "other", "ADALORA")
    result = verify(out, base, [adapter, other])
    assert {one.looks_like for one in result.different} == {"the bare base: no adapter was applied"}
    merge(base, [adapter, other], tmp_path / "twice", PlanOptions(weights=(2.0, 2.0)))
    result = verify(tmp_path / "twice", base, [adapter, other])
    assert {one.looks_like for one in result.different} == {"the change of all adapters applied twice"}


# Another base


def other_base(folder: Path, base: Path) -> Path:
    """A base of the same shapes whose matrices are others, and whose norms are the same."""
    other = shutil.copytree(base, folder / "other")
    for at, (key, tensor) in enumerate(read_tensors(base).items()):
        if tensor.dim() > 1:
            drawn = torch.Generator().manual_seed(at)
            overwrite(other, key, torch.randn(tensor.shape, generator=drawn).to(tensor.dtype))
    return other


def test_another_base_is_said_once(tmp_path: Path) -> None:
    out, base, _ = merged(tmp_path, "OFT")
    adapter = tmp_path / "adapter"
    other = other_base(tmp_path, base)
    result = verify(out, other, [adapter])
    assert result.looks_like is not None
    assert result.looks_like.startswith("this looks like a merge into another base: ")
    assert result.looks_like.endswith(" are not those of other; its receipt names base")
    sizes = [one.looks_like for one in result.different if (one.looks_like or "").startswith("the base, but changed")]
    assert sizes
    assert not any("e+" in (words or "") for words in sizes)


def test_a_base_of_the_same_name_with_other_digests(tmp_path: Path) -> None:
    """Digests are compared where both receipts have them: the base is a merge itself."""
    first, base, adapter = merged(tmp_path, "LOHA")
    top = write_tuner(tmp_path / "top", "ADALORA")
    merge(first, [top], tmp_path / "twice")
    other = other_base(tmp_path, base)
    shutil.move(first, tmp_path / "away")
    merge(other, [adapter], first)
    result = verify(tmp_path / "twice", first, [top])
    assert (result.looks_like or "").endswith("are not those of merged; its receipt names merged, with other digests")


def test_one_table_that_was_trained_is_no_other_base(tmp_path: Path) -> None:
    out, base, adapter = merged(tmp_path, "OFT")
    key = "model.embed_tokens.weight"
    overwrite(out, key, read_tensors(base)[key] + 1)
    assert (verify(out, base, [adapter]).looks_like or "").startswith(
        "the tensor that differs looks like the base, but"
    )
