"""Undo files with a right digest that say impossible things of formulas, and of matrices of stacks."""

from __future__ import annotations

import copy
import random
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, Final, cast

import pytest
import tiny
import torch
from formula_world import experts, formulas
from special_worlds import World as Special
from test_undo_manifests import WRONG, paths, replaced
from test_undo_manifests_kinds import outcome
from undo_world import UNDO, World, read_undo, record, text_of

from lora_cli.adapters.region import Region
from lora_cli.adapters.tuners import METHODS
from lora_cli.surgery.bands import bands_of
from lora_cli.surgery.edit import Contribution

KINDS: Final = (
    "adalora", "c3a", "fourierft", "ia3", "loha", "lokr", "shira", "supertuning", "vblora", "vera-drawn", "waveft"
)  # fmt: skip
FUSED, PACKED = (f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (7, 0))


def made(folder: Path, special: Special) -> World:
    """A merge with all factors in its undo file."""
    world = World(folder)
    world.base = special.base
    return world.merge(*special.adapters, options=special.options, embed_adapter=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("formulas")
    return made(folder, formulas(folder / "made", torch.bfloat16, 1, KINDS))


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("stacks")
    return made(folder, experts(folder / "made", torch.bfloat16, 1, "fused"))


def test_nothing_wrong(world: World, stacks: World) -> None:
    for each in (world, stacks):
        each.restored(given=False, undo=each.spoilt(lambda manifest, parts: None))


def refused(world: World, key: str, said: dict[str, Any]) -> str:
    """What is said of a manifest with other fields in the first term of a tensor: at once, and in little memory."""
    place = world.spoilt(lambda manifest, _: record(manifest, key)["terms"][0].update(said))
    tracemalloc.start()
    try:
        with tiny.within(10), world.refused(10) as caught:
            world.unmerge(given=False, undo=place)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    return text_of(caught.value)


HUGE: Final = {"shape": [1 << 40, 8], "outputs": [0, 12, 12], "rows": [[0, 12, 1]]}
FAR: Final = {"shape": [1 << 20, 8], "outputs": [0, 12, 12], "rows": [[0, 11, 1], [(1 << 20) - 1, 1 << 20, 1]]}
DRAWN: Final = {"seed": 11, "rank": 3, "inputs": 8, "outputs": 12}
NOT_THE_BASE: Final = "what comes out is not the base"
CASES: Final[dict[str, tuple[str, dict[str, Any], str]]] = {
    **{f"a vast {kind}": (kind, HUGE, f"factors of {kind}") for kind in KINDS},
    **{f"a {kind} whose rows lie far apart": (kind, FAR, f"factors of {kind}") for kind in KINDS},
    **{
        f"a method that is not computed again, {kind}": ("loha", {"kind": kind}, f"factors of {kind}")
        for kind, method in METHODS.items()
        if not method.preimages
    },
    "another method": ("loha", {"kind": "lokr"}, "factors of lokr"),
    "a formula as a product": ("loha", {"kind": "lora"}, "factors of lora"),
    "no shape": ("loha", {"shape": []}, "factors of loha"),
    "a shape of nothing": ("loha", {"shape": [0, 8]}, "factors of loha"),
    "a shape below zero": ("loha", {"shape": [-12, -8]}, "factors of loha"),
    "a shape beyond all": ("loha", {"shape": [1 << 70, 8]}, "factors of loha"),
    "another shape": ("loha", {"shape": [8, 12]}, "factors of loha"),
    "another way round": ("loha", {"transposed": True}, "what its shape"),
    "a part twice": ("loha", {"parts": ["hada_w1_a"] * 4}, "factors of loha"),
    "a part too few": ("loha", {"parts": ["hada_w1_a", "hada_w1_b", "hada_w2_a"]}, "factors of loha"),
    "no parts": ("loha", {"parts": []}, "factors of loha"),
    "no parts and no tensors": ("loha", {"parts": [], "tensors": []}, "factors of loha"),
    "an unknown part": ("loha", {"parts": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "x"]}, "factors of loha"),
    "a part of another form": ("loha", {"parts": ["hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_b"]}, "factors of"),
    "parts in another order": ("loha", {"parts": ["hada_w1_b", "hada_w1_a", "hada_w2_a", "hada_w2_b"]}, "factors of"),
    "the other side's parts": ("loha", {"parts": ["hada_w2_a", "hada_w2_b", "hada_w1_a", "x"]}, "factors of loha"),
    "places as numbers": ("shira", {"parts": ["shira_indices", "shira_weight"]}, "factors of shira"),
    "a scale beyond all": ("adalora", {"scale": 1e308}, ""),
    "no scale": ("adalora", {"scale": 0.0}, NOT_THE_BASE),
    "no seed": ("fourierft", {"settings": {}}, "factors of fourierft"),
    "a seed that is a word": ("fourierft", {"settings": {"seed": "7"}}, "factors of fourierft"),
    "a seed that is a list": ("fourierft", {"settings": {"seed": [7]}}, "factors of fourierft"),
    "a seed that is true": ("fourierft", {"settings": {"seed": True}}, "factors of fourierft"),
    "a seed beyond all": ("fourierft", {"settings": {"seed": 1 << 64}}, ""),
    "a seed below all": ("fourierft", {"settings": {"seed": -(1 << 63) - 1}}, ""),
    "another seed": ("fourierft", {"settings": {"seed": 8}}, NOT_THE_BASE),
    "the largest seed": ("fourierft", {"settings": {"seed": (1 << 64) - 1}}, NOT_THE_BASE),
    "the least seed": ("waveft", {"settings": {"seed": -(1 << 63), "wavelet": "db2"}}, NOT_THE_BASE),
    "no wavelet": ("waveft", {"settings": {"seed": 7}}, "factors of waveft"),
    "an unknown wavelet": ("waveft", {"settings": {"seed": 7, "wavelet": "db11"}}, "factors of waveft"),
    "a wavelet that is a list": ("waveft", {"settings": {"seed": 7, "wavelet": [1]}}, "factors of waveft"),
    "another wavelet": ("waveft", {"settings": {"seed": 7, "wavelet": "coif4"}}, NOT_THE_BASE),
    "shared matrices of vast inputs": ("vera-drawn", {"settings": DRAWN | {"inputs": 1 << 40}}, "factors of vera"),
    "as many as any": ("vera-drawn", {"settings": DRAWN | {"inputs": (1 << 24) - 1}}, "factors of vera"),
    "shared matrices of vast outputs": ("vera-drawn", {"settings": DRAWN | {"outputs": (1 << 24) - 1}}, "factors of"),
    "fewer inputs than there are": ("vera-drawn", {"settings": DRAWN | {"inputs": 7}}, "factors of vera-drawn"),
    "inputs below zero": ("vera-drawn", {"settings": DRAWN | {"inputs": -8}}, "factors of vera-drawn"),
    "inputs that are a word": ("vera-drawn", {"settings": DRAWN | {"inputs": "8"}}, "factors of vera-drawn"),
    "no settings": ("vera-drawn", {"settings": {}}, "factors of vera-drawn"),
    "another rank": ("vera-drawn", {"settings": DRAWN | {"rank": 4}}, "factors of vera-drawn"),
    "inputs of another merge": ("vera-drawn", {"settings": DRAWN | {"inputs": 9}}, NOT_THE_BASE),
    "an alpha beyond all": ("supertuning", {"settings": {"alpha": 1e300}}, "factors of supertuning"),
    "an alpha that is true": ("supertuning", {"settings": {"alpha": True}}, "factors of supertuning"),
    "as many vectors as none": ("vblora", {"settings": {"topk": 0}}, "factors of vblora"),
    "more vectors than there are": ("vblora", {"settings": {"topk": 10}}, "factors of vblora"),
    "fewer vectors": ("vblora", {"settings": {"topk": 2}}, NOT_THE_BASE),
    "inputs for outputs": ("ia3", {"settings": {"inputs": True}}, "factors of ia3"),
    "a setting without a value": ("ia3", {"settings": {"inputs": None}}, "manifest"),
    "a setting of settings": ("ia3", {"settings": {"inputs": {"x": 1}}}, "manifest"),
    "settings that are none": ("ia3", {"settings": [1]}, "manifest"),
    "a matrix of what is none": ("loha", {"matrix": 0}, "a matrix of a stack"),
    "a matrix in what is no stack": ("loha", {"at": 0, "count": 1}, "what its shape"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "said", "words"), CASES.values(), ids=CASES)
def test_one_thing_wrong(world: World, key: str, said: dict[str, Any], words: str) -> None:
    assert words in refused(world, f"{key}.weight", said)


STACKS: Final[dict[str, tuple[str, dict[str, Any], str]]] = {
    "beyond the last": (FUSED, {"at": 3}, "a matrix of a stack"),
    "below the first": (FUSED, {"at": -1}, "a matrix of a stack"),
    "of more": (FUSED, {"count": 4}, "what its shape"),
    "of vastly more": (FUSED, {"count": 1 << 62}, "what its shape"),
    "of none": (FUSED, {"count": 0}, "a matrix of a stack"),
    "of fewer than none": (FUSED, {"count": -3}, "a matrix of a stack"),
    "another": (FUSED, {"at": 1}, NOT_THE_BASE),
    "no place": (FUSED, {"at": None}, "a matrix of a stack"),
    "neither": (FUSED, {"at": None, "count": 0}, "what its shape"),
    "a place that is half": (FUSED, {"at": 0.5}, "manifest"),
    "a matrix of a whole stack": (PACKED, {"matrix": 0}, "what its shape"),
    "a matrix beyond all": (PACKED, {"matrix": 1 << 62}, "a matrix of a stack"),
    "a matrix in one place": (PACKED, {"matrix": 0, "at": 2, "count": 3}, NOT_THE_BASE),
    "all in one place": (PACKED, {"at": 2, "count": 3}, "a matrix of a stack"),
    "a count alone": (PACKED, {"count": 3}, "a matrix of a stack"),
    "no layout": (PACKED, {"layout": ""}, "factors of lora-stack"),
    "an unknown layout": (PACKED, {"layout": "heaped"}, "factors of lora-stack"),
    "another layout": (PACKED, {"layout": "packed-by-expert"}, NOT_THE_BASE),
    "a layout of three dimensions": (PACKED, {"layout": "stacked"}, "factors of lora-stack"),
    "another side": (PACKED, {"swapped": True}, "factors of lora-stack"),
    "more experts": (PACKED, {"shape": [6, 12, 8]}, "what its shape"),
    "as many experts as no file has": (PACKED, {"shape": [1 << 50, 12, 8]}, "factors of lora-stack"),
    "no experts": (PACKED, {"shape": [0, 12, 8]}, "factors of lora-stack"),
    "two dimensions": (PACKED, {"shape": [12, 8]}, "factors of lora-stack"),
    "other rows": (PACKED, {"shape": [3, 11, 8]}, "factors of lora-stack"),
    "turned": (PACKED, {"transposed": True}, "what its shape"),
    "outputs in turn": (PACKED, {"outputs": [0, 12, 12, 2], "rows": [[0, 6, 1]]}, NOT_THE_BASE),
    "outputs in turns of vast steps": (PACKED, {"outputs": [0, 12, 12, 1 << 60], "rows": [[0, 1, 1]]}, "a part of"),
    "a step beyond all": (PACKED, {"outputs": [0, 12, 12, 1 << 70], "rows": [[0, 1, 1]]}, "a part of"),
    "the longest step": (PACKED, {"outputs": [0, 12, 12, 12], "rows": [[0, 1, 1]]}, NOT_THE_BASE),
}


@pytest.mark.parametrize(("key", "said", "words"), STACKS.values(), ids=STACKS)
def test_one_thing_wrong_with_stacks(stacks: World, key: str, said: dict[str, Any], words: str) -> None:
    assert words in refused(stacks, key, said)


def test_what_means_the_same_is_accepted(world: World) -> None:
    def change(manifest: Any, _: Any) -> None:
        term = record(manifest, "loha.weight")["terms"][0]
        order = [2, 3, 0, 1]
        term.update({name: [term[name][at] for at in order] for name in ("parts", "tensors")})
        term.update(settings={"a setting of nobody": 1}, shape=[12, 8, 1, 1])
        record(manifest, "shira.weight")["terms"].reverse()

    world.restored(given=False, undo=world.spoilt(change))


VALUES = [*WRONG, *range(-3, 14), 1 << 62, -(1 << 62), 1 << 40, 1e300, -0.0, "packed", "loha", "lora", False]
VALUES += [[0], [12, 8], [3, 12, 8], [[0, 1 << 60, 1]], [0, 12, 12, 5], [1 << 30, 1 << 30], {"seed": 1}]


def spoilt(document: Any, dice: random.Random) -> Any:
    """A manifest of which one to three values in terms are others."""
    for _ in range(dice.randint(1, 3)):
        terms = [path for path in paths(document) if "terms" in path]
        document = replaced(document, dice.choice(terms), copy.deepcopy(dice.choice(VALUES)))
    return document


@pytest.mark.parametrize("seed", range(4))
def test_any_values_in_terms(world: World, stacks: World, seed: int) -> None:
    """Nothing comes out that is not the base, and nothing but a refusal stops the program."""
    dice, codes = random.Random(seed), Counter[int]()
    for each in (world, stacks):
        manifest, parts = read_undo(each.merged / UNDO)
        for _ in range(25):
            codes[outcome(each, spoilt(manifest, dice), parts)] += 1
            shutil.rmtree(each.out, ignore_errors=True)
    assert codes[10] > 35
    assert set(codes) <= {0, 10, 12, 23}


def test_steps_that_never_meet(stacks: World) -> None:
    """Outputs that take turns in steps of 5, 7, 8, 9 and 11 would meet again after 27720."""

    def change(manifest: Any, _: Any) -> None:
        said = record(manifest, PACKED)
        (term,) = said["terms"]
        steps = {step: range(0, 12, step) for step in (5, 7, 8, 9, 11)}
        said["terms"] = [
            term | {"outputs": [0, 12, 12, step], "rows": [[0, len(found), 1]]} for step, found in steps.items()
        ]

    place = stacks.spoilt(change)
    with tiny.within(10), stacks.refused(10) as caught:
        stacks.unmerge(given=False, undo=place)
    assert NOT_THE_BASE in text_of(caught.value)


def test_bands_of_steps_that_never_meet() -> None:
    """Each output is in one band, of the terms that change it, and no band's step leads out of the tensor."""
    steps = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
    with tiny.within(10):
        terms = [every(step, 64) for step in steps]
        found = bands_of(terms)
    assert sorted(output for band in found for output in band.stored) == [*range(64)]
    for band in found:
        assert band.step <= 64
        for output in band.stored:
            assert [*band.terms] == [term for term in terms if output in range(*term.outputs, term.step)]
            assert all(term.rows(range(output, output + 1)) for term in band.terms)


def every(step: int, outputs: int) -> Contribution:
    """A term for every so many outputs of a tensor."""
    stored = range(step // 3, outputs, step)
    region = Region((stored[0], stored[-1] + 1), outputs, ((0, len(stored), 1),), step)
    return Contribution(0, "m", cast("Any", None), 1.0, False, region)
