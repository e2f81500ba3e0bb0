"""What verify says of tensors that are not what a merge would have written: in words, and in strengths."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float_reference import SABOTAGES, one_element_off, transposed
from models import CASES, Make, maker
from test_merge_bits import gaussian, write_adapter, write_base
from test_merge_oracles import check, in_memory, is_matrix, overwrite

from lora_cli.arithmetic.ordered import neighbours
from lora_cli.checkpoint import digests
from lora_cli.progress import Progress
from lora_cli.surgery import budget, compare, engine
from lora_cli.surgery.looks.evidence import asked_of, gather
from lora_cli.surgery.looks.strengths import strengths_of
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.planning import plan
from lora_cli.surgery.results import open_adapters, open_base
from lora_cli.surgery.verify import Difference, VerifyResult, verify

Tensors = dict[str, torch.Tensor]
Patch = pytest.MonkeyPatch

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
EPS |= {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}
SHAPES = {"h.0.mlp.lin.weight": (64, 96), "h.0.attn.c_attn.weight": (96, 64), "h.0.mlp.lin.bias": (64,)}
"""A linear layer with its bias, and a layer that is stored (in × out)."""

KEYS = tuple(sorted(SHAPES))
MATRICES = ("h.0.attn.c_attn.weight", "h.0.mlp.lin.weight")
LARGE, SMALL = 6.0, 0.3
"""Sizes of a change in half spacings of a weight of 1: nearly all of it survives rounding, and about half of it."""

every_type = pytest.mark.parametrize("dtype", EPS, ids=str)
every_size = pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])


def factors(seed: int, change: float, rank: int = 4) -> Tensors:
    """Deltas of about this size for all of the shapes."""
    made: Tensors = {}
    for at, module in enumerate(("h.0.mlp.lin", "h.0.attn.c_attn")):
        out, inner = 64, 96
        made[f"{module}.lora_A.weight"] = gaussian(seed + at, rank, inner)
        made[f"{module}.lora_B.weight"] = gaussian(seed + at + 10, out, rank, std=change / math.sqrt(rank))
    return made | {"h.0.mlp.lin.lora_B.bias": gaussian(seed + 20, 64, std=change)}


@dataclass(frozen=True)
class World:
    """A base and adapters for it, in one type.

    Attributes:
        folder: Where everything is.
        base: The checkpoint.
        one: An adapter.
        two: Another, of another rank.
    """

    folder: Path
    base: Path
    one: Path
    two: Path

    def merged(self, name: str, *adapters: Path, base: Path | None = None, weights: tuple[float, ...] = ()) -> Path:
        """A merge, without the receipt that would forbid another one on top."""
        out = self.folder / name
        merge(base or self.base, adapters, out, PlanOptions(weights))
        for path in out.glob("lora_*"):
            path.unlink()
        return out

    def wrong(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
        """The right merge of the first adapter, with some tensors that are something else."""
        if not (self.folder / "right").exists():
            self.merged("right", self.one)
        out = self.folder / name
        shutil.copytree(self.folder / "right", out)
        for key, tensor in tensors.items():
            overwrite(out, key, tensor)
        return out


def make_world(folder: Path, dtype: torch.dtype, size: float) -> World:
    change = size * EPS[dtype]
    tensors = {key: gaussian(n, *shape, dtype=dtype) for n, (key, shape) in enumerate(SHAPES.items())}
    tensors["h.0.ln.weight"] = gaussian(9, 64, dtype=dtype)
    tensors["h.0.attn.position_ids"] = torch.arange(40)
    base = write_base(folder / "base", tensors)
    # Scales that are not 1, to show that they are part of the change.
    one = write_adapter(folder / "one", factors(100, change / 2), r=4, lora_alpha=8, lora_bias=True)
    two = write_adapter(folder / "two", factors(200, change / 3, 7), r=7, lora_alpha=21, lora_bias=True)
    return World(folder, base, one, two)


@pytest.fixture
def world(tmp_path: Path, dtype: torch.dtype, size: float) -> World:
    return make_world(tmp_path, dtype, size)


@pytest.fixture
def bf16(tmp_path: Path) -> World:
    return make_world(tmp_path, torch.bfloat16, LARGE)


def looks(result: VerifyResult) -> dict[str, str | None]:
    return {difference.key: difference.looks_like for difference in result.different}


def delta(factors_: Mapping[str, torch.Tensor], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """B·A of an adapter on one of the keys, dense, as the base stores it."""
    named = {name.removeprefix("base_model.model."): value.to(torch.float64) for name, value in factors_.items()}
    module, parameter = key.rsplit(".", 1)
    if parameter == "bias":
        return np.asarray(named[f"{module}.lora_B.bias"].numpy())
    product = named[f"{module}.lora_B.weight"] @ named[f"{module}.lora_A.weight"]
    return np.asarray((product.T if "attn" in key else product).numpy())


# Strengths


@every_type
@every_size
def test_the_strength_is_the_projection_on_the_change(world: World, size: float) -> None:
    base, two = in_memory(world.base), in_memory(world.two)
    other = world.merged("other", world.one, world.two, weights=(0.6, 1.0))
    result = verify(other, world.base, [world.one])
    survival = {survived.key: survived for survived in result.survival}
    assert survival.keys() == set(KEYS)
    for difference in result.different:
        key = difference.key
        was, found = base[key].double().numpy(), in_memory(other)[key].double().numpy()
        meant = 2 * delta(in_memory(world.one), key)
        expected = float(((found - was) * meant).sum() / (meant**2).sum())
        assert difference.strength == pytest.approx(expected, rel=1e-5)
        assert survival[key].strength == pytest.approx(expected, rel=1e-5)
        assert survival[key].changed_fraction == float((found != was).mean())
    assert two  # the second adapter is in it, and its own direction is another


@pytest.mark.parametrize("ranks", [(1, 1), (2, 16), (64, 3), (1, 2, 64)])
@every_type
def test_strengths_along_each_delta_are_those_of_dense_least_squares(
    tmp_path: Path, dtype: torch.dtype, ranks: tuple[int, ...], monkeypatch: Patch
) -> None:
    made = make_world(tmp_path, dtype, LARGE)
    several = []
    for number, rank in enumerate(ranks):
        tensors = factors(300 * (number + 1), EPS[dtype], rank)
        several.append(write_adapter(tmp_path / f"a{number}", tensors, r=rank, lora_alpha=rank, lora_bias=True))
    weights = tuple(0.5 + number for number in range(len(ranks)))
    other = made.merged("other", *several, weights=weights)
    for module in (budget, engine):  # pieces that end within rows
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 150)
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 700)
    opened = plan(open_base(made.base), open_adapters(several, PlanOptions().read), PlanOptions())
    edits = [edit for edit in opened.edits if edit.terms]
    evidence = gather(edits, open_base(other).tensors, budget.Budget(2, 64 << 10, 1 << 20), lambda _: None)
    base, there = in_memory(made.base), in_memory(other)
    for edit in edits:
        found = strengths_of(evidence[edit.key], asked_of(edit))
        deltas = np.stack([delta(in_memory(path), edit.key).ravel() for path in several])
        change = (there[edit.key].double() - base[edit.key].double()).numpy().ravel()
        expected, *_ = np.linalg.lstsq(deltas.T, change, rcond=None)
        assert found is not None
        assert found.found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        left = float(((change - expected @ deltas) ** 2).sum())
        assert found.share == pytest.approx(1 - left / float((change**2).sum()), rel=1e-5)


# Whole checkpoints


def again(world: World) -> Path:
    return world.merged("again", world.one, base=world.merged("first", world.one))


MISTAKES: dict[str, tuple[Callable[[World], Path], str]] = {
    "nothing": (lambda w: w.base, "the bare base: the adapter was not applied"),
    "again": (again, "the adapter applied twice"),
    "twice": (lambda w: w.merged("x", w.one, weights=(2.0,)), "the adapter applied twice"),
    "minus": (lambda w: w.merged("x", w.one, weights=(-1.0,)), "the adapter with the opposite sign"),
    "half": (lambda w: w.merged("x", w.one, weights=(0.5,)), "the adapter at 0.5 times its scale"),
}


@every_type
@every_size
@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_mistake_in_all_tensors(world: World, mistake: str) -> None:
    make, words = MISTAKES[mistake]
    result = verify(make(world), world.base, [world.one])
    assert looks(result) == dict.fromkeys(KEYS, words)
    assert result.looks_like == f"all 3 tensors that differ look like {words}"


@every_type
@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7, 0.9, 1.04, 1.1, 1.5, 3.0, 12.5, -0.5, -4.0])
@pytest.mark.parametrize("size", [LARGE, 1.0], ids=["large", "middling"])
def test_any_scale_of_a_large_change(world: World, dtype: torch.dtype, size: float, weight: float) -> None:
    """By as many digits as rounding leaves sure; a vector of 64 weights is too short for that."""
    if size < LARGE and not 0.5 < weight < 4:
        pytest.skip("rounding takes more than a little of so small a change")
    tensors = {name: tensor for name, tensor in factors(100, size * EPS[dtype]).items() if "bias" not in name}
    adapter = write_adapter(world.folder / "matrices", tensors, r=4, lora_alpha=4)
    result = verify(world.merged("x", adapter, weights=(weight,)), world.base, [adapter])
    sentences = [*looks(result).values(), result.looks_like]
    assert len(sentences) == 3
    for sentence in sentences:
        found = re.fullmatch(r"(?:all 2 tensors .* look like )?the adapter at (\S+) times its scale", str(sentence))
        assert found, sentence
        digits = len(found[1].partition(".")[2])
        assert float(found[1]) == pytest.approx(weight, rel=0.01, abs=0.6 * 10**-digits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [200.0])
@pytest.mark.parametrize("weight", [0.996, 1.004, 1.0])
def test_a_scale_that_is_hardly_off(world: World, weight: float) -> None:
    """It is never called 1 times the scale."""
    result = verify(world.merged("x", world.one, weights=(weight,)), world.base, [world.one])
    if weight == 1:
        assert result.verified
    else:
        assert {looks(result)[key] for key in MATRICES} == {f"the adapter at {weight:g} times its scale"}


@every_type
@pytest.mark.parametrize(("weight", "word"), [(0.8, "less"), (1.3, "more"), (5.0, "more")])
@pytest.mark.parametrize("size", [SMALL])
def test_another_scale_of_a_small_change(world: World, weight: float, word: str) -> None:
    """What rounding leaves of a small change does not grow with the scale, so no number can be told."""
    result = verify(world.merged("x", world.one, weights=(weight,)), world.base, [world.one])
    for key in MATRICES:
        assert looks(result)[key] == f"the adapter at {word} than its scale"


@every_type
@pytest.mark.parametrize("size", [SMALL])
def test_the_opposite_of_a_small_change_is_that_at_any_scale(world: World) -> None:
    result = verify(world.merged("x", world.one, weights=(-3.0,)), world.base, [world.one])
    assert {looks(result)[key] for key in MATRICES} == {"the adapter with the opposite sign"}


@every_type
@every_size
def test_another_adapter(world: World) -> None:
    result = verify(world.merged("x", world.two), world.base, [world.one])
    for key in MATRICES:
        assert looks(result)[key] in {
            f"another adapter, or another change (the adapter explains {share} of it)"
            for share in ("less than 0.1 %", *(f"0.{n} %" for n in range(10)))
        }
    assert result.looks_like in (None, "all 3 tensors that differ look like another adapter, or another change")


@every_type
@pytest.mark.parametrize("size", [LARGE])
def test_another_adapter_on_top(world: World) -> None:
    result = verify(world.merged("x", world.one, world.two), world.base, [world.one])
    assert {looks(result)[key] for key in MATRICES} == {"this merge with another change on top"}


@every_type
@every_size
def test_small_changes_of_two_adapters_are_not_those_of_one(world: World, size: float) -> None:
    """A change below the noise says little by its size; that weights move against the adapter says all."""
    result = verify(world.merged("x", world.one, world.two), world.base, [world.one])
    for key in MATRICES:
        words = looks(result)[key]
        assert words is not None
        assert words.startswith("another adapter, or" if size == SMALL else "this merge with another change")


@every_type
@pytest.mark.parametrize("size", [SMALL])
def test_a_small_change_of_another_adapter_on_top_of_the_merge(world: World) -> None:
    """The strength is the right one, and what is left is less than the noise of rounding: it is no rounding yet."""
    on_top = world.merged("x", world.two, base=world.merged("first", world.one))
    result = verify(on_top, world.base, [world.one])
    for key in MATRICES:
        assert str(looks(result)[key]).startswith(("this merge with another change", "another adapter, or another"))


@every_type
@pytest.mark.parametrize("size", [0.01])
def test_a_change_that_rounding_takes_nearly_all_of(world: World, dtype: torch.dtype) -> None:
    """Most weights are the base's in any merge: that most are as they should be says nothing."""
    result = verify(world.merged("x", world.two), world.base, [world.one])
    for difference in result.different:
        if difference.key in MATRICES:
            assert difference.elements is not None
            assert difference.elements < 0.05 * 64 * 96
            assert str(difference.looks_like).startswith("another adapter, or another change")


# Several adapters


COMBINATIONS: dict[str, tuple[tuple[float, float], str]] = {
    "none": ((0, 0), "the bare base: no adapter was applied"),
    "first missing": ((0, 1), "this merge without one"),
    "second missing": ((1, 0), "this merge without two"),
    "first twice": ((2, 1), "this merge with one applied twice"),
    "second half": ((1, 0.5), "this merge with two at 0.5 times its scale"),
    "second minus": ((1, -1), "this merge with the opposite sign of two"),
    "both twice": ((2, 2), "all adapters applied twice"),
    "both half": ((0.5, 0.5), "all adapters at 0.5 times their scale"),
    "both minus": ((-1, -1), "all adapters with the opposite sign"),
}


@every_type
@every_size
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_of_two_adapters(world: World, combination: str) -> None:
    weights, words = COMBINATIONS[combination]
    result = verify(world.merged("x", world.one, world.two, weights=weights), world.base, [world.one, world.two])
    assert looks(result) == dict.fromkeys(KEYS, words)
    assert result.looks_like == f"all 3 tensors that differ look like {words}"


@pytest.mark.parametrize("rank", [1, 2, 16, 64])
@every_type
def test_the_missing_one_at_any_rank(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    made = make_world(tmp_path, dtype, LARGE)
    tensors = factors(500, EPS[dtype], rank)
    third = write_adapter(tmp_path / "third", tensors, r=rank, lora_alpha=rank, lora_bias=True)
    for present, missing in ((made.one, "third"), (third, "one")):
        result = verify(made.merged(f"no-{missing}", present), made.base, [made.one, third])
        assert looks(result) == dict.fromkeys(KEYS, f"this merge without {missing}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [LARGE])
def test_two_adapters_each_wrong_in_its_own_way(world: World) -> None:
    other = world.merged("x", world.one, world.two, weights=(3.0, -1.0))
    result = verify(other, world.base, [world.one, world.two])
    for key in MATRICES:
        found = re.fullmatch(
            "this merge with one at (.*) times its scale and with the opposite sign of two", looks(result)[key] or ""
        )
        assert found
        assert float(found[1]) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_size
def test_an_adapter_whose_weight_is_zero(world: World) -> None:
    both = world.merged("both", world.one, world.two)
    result = verify(both, world.base, [world.one, world.two], PlanOptions(weights=(1.0, 0.0)))
    assert looks(result) == dict.fromkeys(KEYS, "this merge with two applied, though its weight is 0")
    alone = verify(world.merged("x", world.one), world.base, [world.one], PlanOptions(weights=(0.0,)))
    assert looks(alone) == dict.fromkeys(KEYS, "the adapter applied, though its weight is 0")
    assert {difference.strength for difference in alone.different} == {None}


def test_adapters_that_cannot_be_told_apart(bf16: World) -> None:
    twin = bf16.folder / "twin" / "one"
    twin.parent.mkdir()
    shutil.copytree(bf16.one, twin)
    result = verify(bf16.merged("x", bf16.one, weights=(0.6,)), bf16.base, [bf16.one, twin])
    assert {looks(result)[key] for key in MATRICES} == {"the sum of all adapters at 0.3 times its scale"}
    # Where an exact merge with one of them missing agrees, it does not matter which.
    result = verify(bf16.merged("y", bf16.one), bf16.base, [bf16.one, twin])
    assert set(looks(result).values()) == {"all adapters at 0.5 times their scale"}


def test_two_adapters_of_one_name(bf16: World) -> None:
    twin = bf16.folder / "twin" / "one"
    twin.parent.mkdir()
    shutil.copytree(bf16.two, twin)
    result = verify(bf16.merged("x", bf16.one), bf16.base, [bf16.one, twin])
    assert set(looks(result).values()) == {"this merge without one (2)"}


def test_each_tensor_names_the_adapters_that_change_it(bf16: World) -> None:
    """And what all have in common is said of all."""
    tensors = {
        name: tensor for name, tensor in factors(600, 0.1).items() if "mlp.lin.lora_A" in name or "B.weight" in name
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "mlp.lin" in name}
    third = write_adapter(bf16.folder / "third", tensors, r=4)
    result = verify(bf16.base, bf16.base, [bf16.one, third])
    assert looks(result) == {
        "h.0.mlp.lin.weight": "the bare base: no adapter was applied",
        "h.0.mlp.lin.bias": "the bare base: one was not applied",
        "h.0.attn.c_attn.weight": "the bare base: one was not applied",
    }
    assert result.looks_like == "all 3 tensors that differ look like the bare base"


# Single tensors


@every_type
@every_size
def test_one_tensor_from_another_merge(world: World) -> None:
    half, twice = world.merged("h", world.one, weights=(0.5,)), world.merged("t", world.one, weights=(2.0,))
    lin, attn, bias = "h.0.mlp.lin.weight", "h.0.attn.c_attn.weight", "h.0.mlp.lin.bias"
    tensors = {lin: in_memory(half)[lin], attn: in_memory(world.base)[attn], bias: in_memory(twice)[bias]}
    result = verify(world.wrong("wrong", tensors), world.base, [world.one])
    assert looks(result) == {
        lin: "the adapter at 0.5 times its scale",
        attn: "the bare base: the adapter was not applied",
        bias: "the adapter applied twice",
    }
    assert result.looks_like is None


@every_type
@every_size
@pytest.mark.parametrize("key", KEYS)
def test_one_flipped_bit(world: World, dtype: torch.dtype, key: str) -> None:
    right = in_memory(world.merged("right", world.one))[key]
    for bit in (0, 1, 2, 8 * dtype.itemsize - 3, 8 * dtype.itemsize - 2, 8 * dtype.itemsize - 1):
        other = right.clone()
        other.view(-1).view(torch.uint8)[7 * dtype.itemsize + bit // 8] ^= 1 << bit % 8
        result = verify(world.wrong(f"bit{bit}", {key: other}), world.base, [world.one])
        (difference,) = result.different
        assert difference.elements == 1
        assert difference.max_ulp is not None
        if not other.to(torch.float64).isfinite().all():
            words = "this merge, but 1 element is NaN or infinity"
        elif difference.max_ulp <= 2:
            most = max(1, difference.max_ulp)
            words = (
                f"this merge, rounded in another way: 1 element, by at most {most} ULP (--max-ulp {most} allows that)"
            )
        else:
            words = "this merge with 1 changed element"
        assert difference.looks_like == words
        assert result.looks_like == f"the tensor that differs looks like {words}"


@every_type
@every_size
def test_a_row_that_was_forgotten(world: World) -> None:
    """As a loop over tiles forgets its odd tail: the rest is exactly right."""
    key = "h.0.mlp.lin.weight"
    right, base = in_memory(world.merged("right", world.one))[key], in_memory(world.base)[key]
    result = verify(world.wrong("wrong", {key: torch.cat([right[:-1], base[-1:]])}), world.base, [world.one])
    (difference,) = result.different
    assert difference.looks_like == f"this merge with {difference.elements} changed elements"


def rounded_down(right: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Towards zero, where the right one is rounded to the nearest."""
    lower, upper = neighbours(right)
    inner = torch.where(right.double() > 0, lower.double(), upper.double()).to(right.dtype)
    return torch.where(right.double().abs() > exact.abs(), inner.double(), right.double()).to(right.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_size
def test_another_way_of_rounding(world: World) -> None:
    base, right, one = (in_memory(path) for path in (world.base, world.merged("right", world.one), world.one))
    tensors = {
        key: rounded_down(right[key], base[key].double() + torch.from_numpy(2 * delta(one, key))) for key in MATRICES
    }
    result = verify(world.wrong("wrong", tensors), world.base, [world.one])
    for difference in result.different:
        count = f"{difference.elements:,} elements, by at most 1 ULP (--max-ulp 1 allows that)"
        assert difference.looks_like == f"this merge, rounded in another way: {count}"
    words = "this merge, rounded in another way (--max-ulp 1 allows that)"
    assert result.looks_like == f"all 2 tensors that differ look like {words}"
    assert verify(world.folder / "wrong", world.base, [world.one], max_ulp=1).verified


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [LARGE, 100.0], ids=["some weights differ", "many weights differ"])
def test_a_merge_with_narrower_factors(world: World, dtype: torch.dtype, size: float) -> None:
    """Each product is off by up to 2^-8 of it, which in a wide type is more than rounding."""
    base, one = in_memory(world.base), in_memory(world.one)
    narrow = {name: value.bfloat16() for name, value in one.items()}
    exact = {key: base[key].double() + torch.from_numpy(2 * delta(narrow, key)) for key in MATRICES}
    tensors = {key: values.to(dtype) for key, values in exact.items()}
    result = verify(world.wrong("wrong", tensors), world.base, [world.one])
    words = r"this merge, computed less exactly: off by (\S+) % of the change"
    for difference in result.different:
        assert difference.strength == pytest.approx(1, abs=5e-3)
        found = re.fullmatch(words, str(difference.looks_like))
        assert found or dtype == torch.float16
        if found:
            right = in_memory(world.folder / "right")[difference.key].double()
            change = (right - base[difference.key].double()).norm()
            off = (tensors[difference.key].double() - right).norm() / change
            assert float(found[1]) == pytest.approx(100 * float(off), rel=0.1)
    if dtype == torch.float32:
        assert result.looks_like == "all 2 tensors that differ look like this merge, computed less exactly"


def test_another_change_where_the_adapter_makes_none(bf16: World) -> None:
    """Nothing moves against the adapter, and its strength is the right one."""
    tensors = factors(100, LARGE * EPS[torch.bfloat16])
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:32] = 0
    half = write_adapter(bf16.folder / "half", tensors, r=4, lora_alpha=4, lora_bias=True)
    on_top = bf16.merged("x", bf16.two, base=bf16.merged("first", half))
    right, there = in_memory(bf16.folder / "first"), in_memory(on_top)
    key = "h.0.mlp.lin.weight"
    overwrite(bf16.folder / "first", key, torch.cat([there[key][:32], right[key][32:]]))
    result = verify(bf16.folder / "first", bf16.base, [half])
    assert looks(result) == {key: "this merge with another change on top"}


def test_half_of_a_short_vector(tmp_path: Path) -> None:
    """So few weights tell little: half of the strength may be noise, but it is not the right strength for that."""
    base = write_base(tmp_path / "base", {"x.weight": torch.ones(6, 1, dtype=torch.bfloat16)})
    tensors = {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.full((6, 1), 0.125)}
    adapter = write_adapter(tmp_path / "adapter", tensors, r=1, lora_alpha=1)
    merge(base, [adapter], tmp_path / "out")
    other = in_memory(tmp_path / "out")["x.weight"]
    other[:3] = 1
    overwrite(tmp_path / "out", "x.weight", other)
    result = verify(tmp_path / "out", base, [adapter])
    assert looks(result) == {"x.weight": "another adapter, or another change (the adapter explains 50 % of it)"}
    assert result.different[0].strength == pytest.approx(0.5)


@every_type
@every_size
def test_numbers_that_are_none(world: World, dtype: torch.dtype) -> None:
    right, base = in_memory(world.merged("right", world.one)), in_memory(world.base)
    lin, attn, bias, ln = "h.0.mlp.lin.weight", "h.0.attn.c_attn.weight", "h.0.mlp.lin.bias", "h.0.ln.weight"
    broken = {key: tensor.to(torch.float64) for key, tensor in right.items()}
    broken[lin][0, :3] = math.nan
    broken[attn] = base[attn].to(torch.float64)
    broken[attn][5, 5] = math.nan
    broken[bias][1] = math.nan if dtype == torch.float8_e4m3fn else math.inf
    broken[ln][1] = math.nan
    tensors = {key: broken[key].to(dtype) for key in (lin, attn, bias, ln)}
    result = verify(world.wrong("wrong", tensors), world.base, [world.one])
    assert looks(result) == {
        lin: "this merge, but 3 elements are NaN or infinity",
        attn: "the bare base: the adapter was not applied, but 1 element is NaN or infinity",
        bias: "this merge, but 1 element is NaN or infinity",
        ln: "the base with 1 changed element, and NaN or infinity",
    }
    strengths = {difference.key: difference.strength for difference in result.different}
    assert strengths[attn] == pytest.approx(0, abs=0.01)
    assert strengths[lin] == pytest.approx(1, abs=0.6)  # of a small change less than all is there anyway
    assert strengths[ln] is None


@every_type
@pytest.mark.parametrize("size", [LARGE])
def test_roundings_and_a_number_that_is_none(world: World, dtype: torch.dtype) -> None:
    """How far the others are off is not known then, and is not said."""
    key = "h.0.mlp.lin.weight"
    right = in_memory(world.merged("right", world.one))[key]
    other = torch.where(gaussian(70, 64, 96) > 1, neighbours(right)[1].double(), right.double())
    other[0, 0] = right[0, 0]
    count = int((other != right.double()).sum())
    other[0, 0] = math.nan
    (difference,) = verify(world.wrong("wrong", {key: other.to(dtype)}), world.base, [world.one]).different
    words = f"this merge, rounded in another way in {count:,} elements, but 1 element is NaN or infinity"
    assert difference.looks_like == words


def test_signs_of_zeros(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"x.weight": torch.zeros(6, 6, dtype=torch.bfloat16)})
    tensors = {"x.lora_A.weight": torch.ones(1, 6), "x.lora_B.weight": torch.tensor([[0.0], [1], [1], [1], [1], [1]])}
    adapter = write_adapter(tmp_path / "adapter", tensors, r=1)
    merge(base, [adapter], tmp_path / "out", PlanOptions(orientation="ba"))
    other = in_memory(tmp_path / "out")["x.weight"]
    other[0] = -0.0
    overwrite(tmp_path / "out", "x.weight", other)
    result = verify(tmp_path / "out", base, [adapter], PlanOptions(orientation="ba"))
    assert looks(result) == {"x.weight": "this merge, but for signs of zeros"}
    assert (result.different[0].elements, result.different[0].max_ulp) == (6, 0)


def test_a_change_of_nothing(bf16: World) -> None:
    """An adapter that was never trained has no direction, and the right merge is the base."""
    tensors = factors(1, 0.0)
    fresh = write_adapter(bf16.folder / "fresh", tensors, r=4, lora_bias=True)
    assert verify(bf16.base, bf16.base, [fresh]).verified
    result = verify(bf16.merged("x", bf16.one), bf16.base, [fresh])
    assert set(looks(result).values()) == {
        "another adapter, or another change (the adapter explains less than 0.1 % of it)"
    }
    assert {difference.strength for difference in result.different} == {None}


def test_a_merge_that_widens(bf16: World) -> None:
    """The base in another type is the bare base still."""
    wide = PlanOptions(dtype="fp32")
    merge(bf16.base, [bf16.one], bf16.folder / "wide", wide)
    right = in_memory(bf16.folder / "wide")
    base = {key: tensor.float() for key, tensor in in_memory(bf16.base).items() if tensor.is_floating_point()}
    shutil.copytree(bf16.folder / "wide", bf16.folder / "bare")
    for key in KEYS:
        overwrite(bf16.folder / "bare", key, base[key])
    result = verify(bf16.folder / "bare", bf16.base, [bf16.one], wide)
    assert looks(result) == dict.fromkeys(KEYS, "the bare base: the adapter was not applied")
    assert [survived.changed_fraction for survived in result.survival] == [0, 0, 0]
    half = {key: base[key] + (right[key] - base[key]) / 2 for key in MATRICES}
    for key, tensor in half.items():
        overwrite(bf16.folder / "wide", key, tensor)
    result = verify(bf16.folder / "wide", bf16.base, [bf16.one], wide)
    assert looks(result) == dict.fromkeys(MATRICES, "the adapter at 0.5 times its scale")


def test_a_merge_that_narrows(tmp_path: Path) -> None:
    """So is the base rounded to the output's type."""
    made = make_world(tmp_path, torch.float32, LARGE * EPS[torch.bfloat16] / EPS[torch.float32])
    narrow = PlanOptions(dtype="bf16")
    merge(made.base, [made.one], tmp_path / "bare", narrow)
    for key in KEYS:
        overwrite(tmp_path / "bare", key, in_memory(made.base)[key].bfloat16())
    result = verify(tmp_path / "bare", made.base, [made.one], narrow)
    assert looks(result) == dict.fromkeys(KEYS, "the bare base: the adapter was not applied")
    assert [survived.changed_fraction for survived in result.survival] == [0, 0, 0]
    merge(made.base, [made.one], tmp_path / "twice", PlanOptions((2.0,), "bf16"))
    result = verify(tmp_path / "twice", made.base, [made.one], narrow)
    assert looks(result) == dict.fromkeys(KEYS, "the adapter applied twice")


# Tensors without a delta


def test_tensors_that_no_adapter_changes(bf16: World) -> None:
    base = in_memory(bf16.base)
    ln, ids = base["h.0.ln.weight"].clone(), base["h.0.attn.position_ids"].clone()
    ln[3], ids[5] = 7, 99
    result = verify(bf16.wrong("few", {"h.0.ln.weight": ln, "h.0.attn.position_ids": ids}), bf16.base, [bf16.one])
    words = "the base with 1 changed element"
    assert looks(result) == {"h.0.ln.weight": words, "h.0.attn.position_ids": words}
    assert result.looks_like == "all 2 tensors that differ look like the base with a few changed elements"
    other = {"h.0.ln.weight": (base["h.0.ln.weight"].float() * 1.5).bfloat16(), "h.0.attn.position_ids": ids + 1}
    result = verify(bf16.wrong("all", other), bf16.base, [bf16.one])
    assert looks(result) == {
        "h.0.ln.weight": "the base, but changed since: 64 elements of 64 differ, by 50 % of its norm",
        "h.0.attn.position_ids": "the base, but changed since: 40 elements of 40 differ",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_that_are_replaced(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make_world(tmp_path, dtype, LARGE)
    key = "h.0.ln.weight"
    tensors = factors(100, EPS[dtype]) | {key: gaussian(50, 64, dtype=dtype), "score.weight": gaussian(51, 3, 64)}
    adapter = write_adapter(tmp_path / "saved", tensors, r=4, lora_bias=True, modules_to_save=["ln", "score"])
    merge(made.base, [adapter], tmp_path / "right")
    right = in_memory(tmp_path / "right")

    def looks_with(tensor: torch.Tensor, name: str = key) -> str | None:
        shutil.copytree(tmp_path / "right", tmp_path / "other")
        overwrite(tmp_path / "other", name, tensor)
        result = verify(tmp_path / "other", made.base, [adapter])
        shutil.rmtree(tmp_path / "other")
        assert {"h.0.ln.weight", "score.weight"} < set(result.edited)
        return looks(result)[name]

    one = right[key].clone()
    one[3] = 5
    assert looks_with(in_memory(made.base)[key]) == "the bare base: the adapter was not applied"
    assert looks_with(one) == "this merge with 1 changed element"
    words = "another tensor than the adapter's: 64 elements of 64 differ, by "
    assert str(looks_with(gaussian(52, 64, dtype=dtype))).startswith(words)
    assert looks_with(gaussian(51, 3, 64) * math.nan, "score.weight") is not None
    assert "NaN" in str(looks_with(gaussian(51, 3, 64) * math.nan, "score.weight"))
    # All of a bare base, with what was appended to it.
    shutil.copytree(tmp_path / "right", tmp_path / "bare")
    for name in (*KEYS, key):
        overwrite(tmp_path / "bare", name, in_memory(made.base)[name])
    result = verify(tmp_path / "bare", made.base, [adapter])
    assert result.looks_like == "all 4 tensors that differ look like the bare base: the adapter was not applied"


# Trained models


SAID = {
    "transposed": "another adapter, or another change",
    "half_scaled": "the adapter at 0.5 times its scale",
    "applied_twice": "the adapter applied twice",
    "rows_shifted": "another adapter, or another change",
    "not_merged": "the bare base: the adapter was not applied",
    "tail_left_out": "this merge with",
    "one_element_off": "this merge, rounded in another way: 1 element, by at most 2 ULP",
}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_faults_of_real_merges(make: Make, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, wrong = make(next(case for case in CASES if case.name == name), dtype), tmp_path / "wrong"
    merge(made.base_dir, [made.adapter_dir], wrong, threads=2)
    base, merged = made.base_tensors(), in_memory(wrong)
    targets = [(key, terms) for key, terms in made.terms().items() if is_matrix(base[key])][:3]
    for sabotage in SABOTAGES:
        for key, terms in targets:
            overwrite(wrong, key, sabotage(base[key], terms))
            (difference,) = check(made, wrong).different
            assert difference.looks_like is not None
            words = SAID[sabotage.__name__]
            if sabotage is one_element_off:
                # Two units of the result may be less than that of a larger addend.
                words = "this merge, rounded in another way: "
            if sabotage is not transposed or base[key].shape[0] != 1:
                assert difference.looks_like.startswith(words), (sabotage.__name__, key)
            overwrite(wrong, key, merged[key])


# What is said on the way


class Heard(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_size
def test_survival_is_the_merges_own_and_its_warning_is_for_what_is_right(world: World, size: float) -> None:
    merged = merge(world.base, [world.one], world.folder / "right")
    heard = Heard()
    result = verify(world.folder / "right", world.base, [world.one], progress=heard)
    assert result.survival == merged.survival
    lost = [
        survived.strength for survived in result.survival if survived.strength is not None and survived.strength < 0.9
    ]
    assert bool(lost) == (size == SMALL) == bool(heard.warnings)
    if lost:
        assert f"in {len(lost)} of 3 tensors" in heard.warnings[0]
    heard = Heard()
    result = verify(world.base, world.base, [world.one], progress=heard)
    assert [(survived.changed_fraction, survived.strength) for survived in result.survival] == [(0, 0)] * 3
    assert heard.warnings == []


def test_what_was_compared(bf16: World) -> None:
    result = verify(bf16.merged("x", bf16.one, bf16.two), bf16.base, [bf16.one, bf16.two], PlanOptions((1.0, 1.0)))
    assert (result.merged, result.base) == ("x", "base")
    assert [use.label for use in result.adapters] == ["one", "two"]
    assert sorted(result.edited) == list(KEYS)
    assert (result.looks_like, result.different) == (None, ())


def test_names_and_types_look_like_nothing(bf16: World) -> None:
    """Only values are looked at; and then there is no sentence for all."""
    merge(bf16.base, [bf16.one], bf16.folder / "wide", PlanOptions(dtype="fp32"))
    result = verify(bf16.folder / "wide", bf16.base, [bf16.one])
    assert {difference.what for difference in result.different} == {"dtype"}
    assert (result.looks_like, set(looks(result).values())) == (None, {None})


def test_the_units_that_would_allow_for_all(bf16: World) -> None:
    right = in_memory(bf16.merged("right", bf16.one))
    wrong = {}
    for steps, key in enumerate(MATRICES, start=1):
        wrong[key] = right[key].clone()
        for _ in range(steps):
            wrong[key][5] = neighbours(wrong[key])[1][5]
    result = verify(bf16.wrong("wrong", wrong), bf16.base, [bf16.one])
    assert [difference.max_ulp for difference in result.different] == [1, 2]
    words = "this merge, rounded in another way (--max-ulp 2 allows that)"
    assert result.looks_like == f"all 2 tensors that differ look like {words}"


def test_tensors_at_different_scales(bf16: World) -> None:
    scales = {"h.0.mlp.lin.weight": 0.7, "h.0.attn.c_attn.weight": 0.8}
    merges = {key: bf16.merged(key, bf16.one, weights=(scale,)) for key, scale in scales.items()}
    wrong = bf16.wrong("wrong", {key: in_memory(path)[key] for key, path in merges.items()})
    result = verify(wrong, bf16.base, [bf16.one])
    found = {key: float(str(words).split()[3]) for key, words in looks(result).items()}
    assert found == pytest.approx(scales, abs=0.01)
    assert result.looks_like is None


def test_one_tensor_too_many_spoils_the_sentence(bf16: World) -> None:
    base = write_base(bf16.folder / "more", in_memory(bf16.base) | {"more": torch.ones(3)})
    result = verify(base, bf16.base, [bf16.one])
    assert looks(result) == dict.fromkeys(KEYS, "the bare base: the adapter was not applied") | {"more": None}
    assert result.looks_like is None


@pytest.mark.parametrize("cut", ["little memory", "pieces within rows", "cuts of some rows"])
def test_no_word_depends_on_how_the_work_is_cut(bf16: World, cut: str, monkeypatch: Patch) -> None:
    tensors = {"h.0.mlp.lin.weight": in_memory(bf16.merged("h", bf16.two))["h.0.mlp.lin.weight"]}
    tensors["h.0.attn.c_attn.weight"] = in_memory(bf16.merged("m", bf16.one, weights=(0.7,)))["h.0.attn.c_attn.weight"]
    wrong = bf16.wrong("wrong", tensors)
    expected = verify(wrong, bf16.base, [bf16.one], threads=1).different
    if cut == "pieces within rows":
        for module in (budget, engine):
            monkeypatch.setattr(module, "BLOCK_ELEMENTS", 83)
    if cut == "cuts of some rows":
        monkeypatch.setattr(digests, "CUT_ELEMENTS", 500)
        monkeypatch.setattr(compare, "TILE_ELEMENTS", 77)
    found = verify(
        wrong, bf16.base, [bf16.one], threads=3, memory=8 << 20 if cut == "little memory" else None
    ).different
    assert [without_digits(one) for one in found] == [without_digits(one) for one in expected]


def without_digits(difference: Difference) -> tuple[Any, ...]:
    strength = None if difference.strength is None else round(difference.strength, 9)
    return (difference.key, difference.elements, difference.max_ulp, difference.looks_like, strength)
