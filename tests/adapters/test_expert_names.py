"""Experts by every name, in bases that store them one by one, all of a layer together, gate and up apart, or turned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversion_world import Shaped, held

from lora_cli.adapters.conversions import transposed_experts
from lora_cli.adapters.operations import NoPlaceError, followed, stored
from lora_cli.adapters.region import Place, Region, runs_of
from lora_cli.adapters.resolve import Resolution, resolve
from lora_cli.errors import NamesError
from lora_cli.surgery.merge import merge
from lora_cli.surgery.unmerge import unmerge

E, WIDE, INSIDE = 3, 5, 2
"""Experts of a layer, and their two sizes; no matrix is square."""


def config(kind: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [kind], "model_type": model_type, **more}


QWEN = config("Qwen3MoeForCausalLM", "qwen3_moe")
MIXTRAL = config("MixtralForCausalLM", "mixtral")
GRANITE = config("GraniteMoeForCausalLM", "granitemoe")
OSS = config("GptOssForCausalLM", "gpt_oss")
LLAMA4 = config("Llama4ForCausalLM", "llama4_text")
SEEING = config("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe")
STEP = config("Step3p7Model", "step3p7")
ARIA = config("AriaForConditionalGeneration", "aria")
FILTER = config("OpenAIPrivacyFilterForTokenClassification", "openai_privacy_filter")

QWEN_AT = "model.layers.1.mlp.experts"
SEEING_AT = "model.language_model.layers.1.mlp.experts"
MIXTRAL_AT = "model.layers.1.block_sparse_moe.experts"


def apart(at: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"), experts: int = E) -> dict[str, Shaped]:
    """Experts one by one."""
    gate, up, down = names
    sides = {gate: (INSIDE, WIDE), up: (INSIDE, WIDE), down: (WIDE, INSIDE)}
    return {f"{at}.{e}.{name}.weight": Shaped(side) for e in range(experts) for name, side in sides.items()}


def fused(at: str, *, turned: bool = False) -> dict[str, Shaped]:
    """All experts of a layer in one tensor."""
    shapes = {"gate_up_proj": (E, 2 * INSIDE, WIDE), "down_proj": (E, WIDE, INSIDE)}
    return {f"{at}.{n}": Shaped((s[0], s[2], s[1]) if turned else s) for n, s in shapes.items()}


OLD = apart(MIXTRAL_AT, ("w1", "w3", "w2"))
EVERY: Mapping[str, tuple[Mapping[str, Any], str, Mapping[str, Shaped], bool]] = {
    "qwen3-moe": (QWEN, QWEN_AT, apart(QWEN_AT), False),
    "qwen3-moe fused": (QWEN, QWEN_AT, fused(QWEN_AT), False),
    "qwen3-moe compiled": (QWEN, QWEN_AT, {f"_orig_mod.{k}": shape for k, shape in apart(QWEN_AT).items()}, False),
    "mixtral": (MIXTRAL, "model.layers.1.mlp.experts", OLD, False),
    "mixtral fused": (MIXTRAL, "model.layers.1.mlp.experts", fused("model.layers.1.mlp.experts"), False),
    "granite": (
        GRANITE,
        MIXTRAL_AT,
        {
            "model.layers.1.block_sparse_moe.input_linear.weight": Shaped((E, 2 * INSIDE, WIDE)),
            "model.layers.1.block_sparse_moe.output_linear.weight": Shaped((E, WIDE, INSIDE)),
        },
        False,
    ),
    "gpt-oss": (OSS, QWEN_AT, fused(QWEN_AT, turned=True), True),
    "llama 4": (
        LLAMA4,
        "model.layers.1.feed_forward.experts",
        fused("model.layers.1.feed_forward.experts", turned=True),
        True,
    ),
    "qwen3-vl-moe": (SEEING, SEEING_AT, fused(SEEING_AT), False),
    "qwen3-vl-moe published": (SEEING, SEEING_AT, fused(SEEING_AT, turned=True), False),
    "step 3.7": (
        STEP,
        "language_model.layers.4.mlp.experts",
        {
            "model.layers.4.moe.gate_proj.weight": Shaped((E, INSIDE, WIDE)),
            "model.layers.4.moe.up_proj.weight": Shaped((E, INSIDE, WIDE)),
            "model.layers.4.moe.down_proj.weight": Shaped((E, WIDE, INSIDE)),
        },
        False,
    ),
}
"""Config, the module's name in the model, what is stored, and whether the model holds matrices (in × out)."""


def numbers(base: Mapping[str, Shaped]) -> dict[str, torch.Tensor]:
    """Another number for each element."""
    made, count = {}, 0
    for key, tensor in base.items():
        size = torch.Size(tensor.shape).numel()
        made[key] = torch.arange(count, count + size, dtype=torch.int64).reshape(tensor.shape)
        count += size
    return made


def live(name: str) -> dict[str, torch.Tensor]:
    """Gate, up and down of all experts (out × in), put together by hand from what is there."""
    said, _, base, _ = EVERY[name]
    there = {key.rpartition("experts.")[2].removesuffix(".weight"): tensor for key, tensor in numbers(base).items()}
    there = {re.sub(r"^model\.layers\.\d+\.(moe|block_sparse_moe)\.", "", key): t for key, t in there.items()}
    if "0.w1" in there or "0.gate_proj" in there:
        names = ("w1", "w3", "w2") if "0.w1" in there else ("gate_proj", "up_proj", "down_proj")
        stacks = [torch.stack([there[f"{e}.{name}"] for e in range(E)]) for name in names]
        return dict(zip(("gate", "up", "down"), stacks, strict=True))
    if "gate_proj" in there:
        return {"gate": there["gate_proj"], "up": there["up_proj"], "down": there["down_proj"]}
    both = there.get("gate_up_proj", there.get("input_linear"))
    down = there.get("down_proj", there.get("output_linear"))
    assert both is not None
    assert down is not None
    if both.shape[1] == WIDE:
        both, down = both.mT, down.mT
    gate, up = (both[:, ::2], both[:, 1::2]) if said is OSS else both.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down}


def found(name: str, names: Sequence[str]) -> Resolution:
    said, _, base, _ = EVERY[name]
    made = resolve(names, base, config=said)
    assert made.unmapped == ()
    return made


@pytest.mark.parametrize("name", EVERY)
def test_what_the_model_holds(name: str) -> None:
    _, at, base, inputs_first = EVERY[name]
    parts, names = live(name), [f"{at}.gate_up_proj", f"{at}.down_proj"]
    both = torch.cat([parts["gate"], parts["up"]], dim=1)
    if EVERY[name][0] is OSS:
        both = torch.stack([parts["gate"], parts["up"]], dim=2).flatten(1, 2)
    for parameter, part in zip(names, (both, parts["down"]), strict=True):
        wanted = part.mT if inputs_first else part
        assert torch.equal(held(found(name, names).places[parameter], numbers(base), tuple(wanted.shape)), wanted)


@pytest.mark.parametrize("spelled", ["gate_proj up_proj down_proj", "w1 w3 w2"])
@pytest.mark.parametrize("name", EVERY)
def test_single_experts(name: str, spelled: str) -> None:
    _, at, base, _ = EVERY[name]
    wanted = {
        f"{at}.{e}.{one}.weight": matrix
        for one, part in zip(spelled.split(), live(name).values(), strict=True)
        for e, matrix in enumerate(part)
    }
    made = found(name, list(wanted))
    for key, matrix in wanted.items():
        assert torch.equal(held(made.places[key], numbers(base), tuple(matrix.shape)), matrix)
        assert len(made.places[key]) == 1


@pytest.mark.parametrize("end", ["", ".weight"])
@pytest.mark.parametrize("spelled", ["gate_proj up_proj", "w1 w3 w2"])
@pytest.mark.parametrize("name", EVERY)
def test_one_part_of_all_experts(name: str, spelled: str, end: str) -> None:
    _, at, base, _ = EVERY[name]
    parts = zip(spelled.split(), live(name).values(), strict=False)
    wanted = {f"{at}.{one}{end}": part for one, part in parts}
    made = found(name, list(wanted))
    for key, part in wanted.items():
        assert torch.equal(held(made.places[key], numbers(base), tuple(part.shape)), part)
        assert {place.at for place in made.places[key]} == {None}


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", ""])
def test_older_prefixes_of_single_experts(prefix: str) -> None:
    """Names of transformers 4, wrapped, in a base that transformers 5 saved by the names of modules."""
    name = f"{prefix}{MIXTRAL_AT}.2.w3.weight"
    at = "model.layers.1.mlp.experts"
    made = resolve([name], fused(at), config=MIXTRAL)
    assert made.places[name] == (Place(f"{at}.gate_up_proj", Region((2, 4), 4, ((0, 2, 1),)), at=2),)


def test_an_expert_that_is_stored_by_itself_is_a_whole_tensor() -> None:
    names = {f"model.layers.1.mlp.experts.2.{new}.weight": old for new, old in (("gate_proj", "w1"), ("up_proj", "w3"))}
    made = found("mixtral", list(names))
    assert made.keys == {name: f"{MIXTRAL_AT}.2.{old}.weight" for name, old in names.items()}


def test_experts_are_in_the_order_of_their_numbers() -> None:
    base = dict(sorted(apart(QWEN_AT, experts=12).items()))
    places = resolve([f"{QWEN_AT}.down_proj"], base, config=QWEN).places[f"{QWEN_AT}.down_proj"]
    assert places == tuple(Place(f"{QWEN_AT}.{e}.down_proj.weight", matrix=e) for e in range(12))


def test_the_first_half_of_the_experts_reads_text_and_the_rest_images() -> None:
    """Of five the first three, as transformers cuts them."""
    said = config("Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe")
    base = apart("model.layers.1.mlp.experts", experts=5)
    at = "model.language_model.layers.1.mlp"
    names = [f"{at}.{part}_moe.experts.down_proj" for part in ("text", "vision")]
    made = resolve(names, base, config=said).places
    keys = [[(place.key.split(".")[-3], place.matrix) for place in made[name]] for name in names]
    assert keys == [[("0", 0), ("1", 1), ("2", 2)], [("3", 0), ("4", 1)]]


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("Concatenate", {"dim": 1}, (4, 3)),
        ("Chunk", {"dim": 1}, (4, 3)),
        ("Chunk", {"dim": 2}, (4, 3, 2)),
        ("Interleave", {"dim": 1}, (4, 4)),
        ("Transpose", {"dim0": 1, "dim1": 2}, (4, 3)),
        ("Transpose", {}, (4, 3, 2)),
        ("MergeModulelist", {"dim": 1}, (4, 3)),
        ("Unheard", {}, (4, 3)),
    ],
)
def test_columns_are_no_rows(name: str, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(NoPlaceError):
        followed([(name, arguments)], {"a": [stored("a", shape)]}, ["b"], {})


def test_gate_and_up_that_take_turns() -> None:
    name = f"{QWEN_AT}.1.up_proj.weight"
    (place,) = found("gpt-oss", [name]).places[name]
    assert place == Place(f"{QWEN_AT}.gate_up_proj", Region((1, 4), 4, ((0, 2, 1),), 2), turned=True, at=1)


# What is not there


def reason(said: Mapping[str, Any], base: Mapping[str, Shaped], name: str) -> str:
    (lost,) = resolve([name], base, config=said).unmapped
    return str(lost.reason)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["0.gate_proj"], "lacks a part of it: mlp.experts.0.gate_proj.weight"),
        (["1.up_proj", "2.up_proj"], "mlp.experts.1.up_proj.weight, mlp.experts.2.up_proj.weight"),
        # Gate and up have as many, and down has more.
        (["2.gate_proj", "2.up_proj"], "mlp.experts.2.gate_proj.weight, mlp.experts.2.up_proj.weight"),
        ([f"{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up")], "and 1 more"),
        (["0.up_proj", "1.up_proj", "2.up_proj"], "experts.0.up_proj.weight"),
    ],
)
def test_missing_experts_are_named(gone: Sequence[str], words: str) -> None:
    base = apart(QWEN_AT)
    for key in gone:
        del base[f"{QWEN_AT}.{key}.weight"]
    assert words in reason(QWEN, base, f"{QWEN_AT}.gate_up_proj")
    # What is there can be changed by itself.
    kept = next(key for key in base if "gate" in key or "down" in key)
    assert resolve([kept], base, config=QWEN).keys == {kept: kept}
    # And down lacks nothing.
    assert len(resolve([f"{QWEN_AT}.down_proj"], base, config=QWEN).places[f"{QWEN_AT}.down_proj"]) == E


def test_a_hostile_number_takes_no_time() -> None:
    base = {**apart(QWEN_AT), f"{QWEN_AT}.{10**400}.gate_proj.weight": Shaped((INSIDE, WIDE))}
    with tiny.within(2):
        assert "experts.3.gate_proj.weight" in reason(QWEN, base, f"{QWEN_AT}.gate_up_proj")


def test_an_expert_that_is_there_twice() -> None:
    base = {**OLD, "model.layers.1.mlp.experts.0.w1.weight": Shaped((INSIDE, WIDE))}
    assert "several tensors for one expert" in reason(MIXTRAL, base, "model.layers.1.mlp.experts.gate_up_proj")


def test_experts_of_several_sizes() -> None:
    base = {**apart(QWEN_AT), f"{QWEN_AT}.1.up_proj.weight": Shaped((INSIDE + 1, WIDE))}
    assert "several sizes" in reason(QWEN, base, f"{QWEN_AT}.gate_up_proj")


def test_an_expert_beyond_the_last() -> None:
    assert reason(QWEN, fused(QWEN_AT), f"{QWEN_AT}.3.up_proj.weight") == f"the base has {E} experts in this layer"
    assert reason(QWEN, fused(QWEN_AT), f"{QWEN_AT}.3.w1.weight") == f"the base has {E} experts in this layer"


def test_without_the_class_nothing_says_how_experts_lie() -> None:
    assert "which model it is" in reason({}, fused(QWEN_AT), f"{QWEN_AT}.1.up_proj.weight")
    base = apart(QWEN_AT)
    assert resolve([*base], base, config={}).keys == {key: key for key in base}
    assert resolve([*fused(QWEN_AT)], fused(QWEN_AT), config={}).unmapped == ()


def test_a_square_that_no_shape_decides() -> None:
    """transformers takes a square as it is, though what belongs to it lies turned."""
    at = SEEING_AT
    square = {f"{at}.gate_up_proj": Shaped((E, 4, 4)), f"{at}.down_proj": Shaped((E, 2, 4))}
    for name in (f"{at}.gate_up_proj", f"{at}.1.up_proj.weight"):
        assert "which way round" in reason(SEEING, square, name)
    assert resolve([f"{at}.down_proj"], square, config=SEEING).places[f"{at}.down_proj"][0].turned
    usual = {f"{at}.gate_up_proj": Shaped((E, 4, 4)), f"{at}.down_proj": Shaped((E, 4, 2))}
    assert resolve([*usual], usual, config=SEEING).keys == {key: key for key in usual}
    compiled = {f"_orig_mod.{key}": shape for key, shape in square.items()}
    for name in (f"{at}.gate_up_proj", f"_orig_mod.{at}.gate_up_proj"):
        assert "which way round" in reason(SEEING, compiled, name)
    alone = {f"{at}.gate_up_proj": Shaped((E, 4, 5))}
    assert "which way round" in reason(SEEING, alone, f"{at}.gate_up_proj")


def test_the_same_expert_twice_and_different_ones() -> None:
    names = [f"{QWEN_AT}.{e}.{part}_proj.weight" for e in range(E) for part in ("gate", "up", "down")]
    assert len(found("qwen3-moe fused", names).places) == len(names)
    for both in (
        [f"{QWEN_AT}.1.up_proj.weight", f"{QWEN_AT}.1.w3.weight"],
        [f"{QWEN_AT}.1.down_proj.weight", f"{QWEN_AT}.down_proj"],
        [f"{QWEN_AT}.down_proj", f"{QWEN_AT}.1.down_proj.weight"],
        [f"{QWEN_AT}.gate_up_proj", f"{QWEN_AT}.1.up_proj.weight"],
    ):
        with pytest.raises(NamesError, match="mean one tensor"):
            resolve(both, fused(QWEN_AT), config=QWEN)


# Which way PEFT has them


@pytest.mark.parametrize(
    ("said", "module", "transposed"),
    [
        (OSS, "model.layers.11.mlp.experts", True),
        (OSS, "base_model.model.model.layers.0.mlp.experts", True),
        (OSS, "layers.0.mlp.experts", True),
        (OSS, "model.layers.0.mlp.router", False),
        (ARIA, "model.language_model.layers.2.mlp.experts", True),
        (FILTER, "model.layers.0.mlp.experts", True),
        (LLAMA4, "model.layers.1.feed_forward.experts", False),
        (QWEN, QWEN_AT, False),
        ({}, QWEN_AT, None),
        (config("Own", "own"), QWEN_AT, None),
        (config("LlavaForConditionalGeneration", "llava", text_config={"model_type": "own"}), "language_model.x", None),
        (config("LlavaForConditionalGeneration", "llava", text_config={"model_type": "own"}), "vision_tower.x", False),
    ],
)  # fmt: skip
def test_modules_that_are_transposed(said: Mapping[str, Any], module: str, transposed: bool | None) -> None:
    assert transposed_experts(said, module) is transposed


# Whole tensors


def test_whole_experts_take_the_place_of_those_that_are_stored_one_by_one(tmp_path: Path) -> None:
    held: dict[str, tiny.Array] = {key: tiny.numbers(*tensor.shape) for key, tensor in OLD.items()}
    base = tiny.write_base(tmp_path / "base", held, shards=3, config=MIXTRAL)
    at = f"{tiny.PREFIX}model.layers.1.mlp.experts"
    whole: dict[str, tiny.Array] = {
        f"{at}.gate_up_proj": tiny.numbers(E, 2 * INSIDE, WIDE),
        f"{at}.down_proj": tiny.numbers(E, WIDE, INSIDE),
    }
    adapter = tiny.write_adapter(tmp_path / "adapter", whole, modules_to_save=["experts"], target_modules=[])
    merge(base, [adapter], tmp_path / "merged")
    made = tiny.read_tensors(tmp_path / "merged")
    for e in range(E):
        gate_up, down = (whole[f"{at}.{name}"][e] for name in ("gate_up_proj", "down_proj"))
        expected = {"w1": gate_up[:INSIDE], "w3": gate_up[INSIDE:], "w2": down}
        for name, matrix in expected.items():
            assert (made[f"{MIXTRAL_AT}.{e}.{name}.weight"] == matrix).all()
    unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    assert all((tiny.read_tensors(tmp_path / "back")[key] == tensor).all() for key, tensor in held.items())


# Runs


@pytest.mark.parametrize(
    ("numbers", "runs"),
    [
        ([], ()),
        ([4], ((4, 5, 1),)),
        ([0, 1, 2], ((0, 3, 1),)),
        ([1, 3, 5, 6], ((1, 6, 2), (6, 7, 1))),
        ([0, 4, 1, 5], ((0, 5, 4), (1, 6, 4))),
        ([3, 2, 1], ((3, 4, 1), (2, 3, 1), (1, 2, 1))),
    ],
)
def test_runs_of_numbers(numbers: list[int], runs: tuple[tuple[int, int, int], ...]) -> None:
    assert runs_of(numbers) == runs
    assert [number for run in runs for number in range(*run)] == numbers


def test_a_part_of_a_region_is_where_its_rows_are() -> None:
    region = Region((2, 8), 9, ((0, 6, 2), (1, 6, 2)))
    assert region.cut(range(0, 6, 2)) == Region((2, 5), 9, ((0, 3, 1),))
    with pytest.raises(ValueError, match="equal distances"):
        region.cut(range(4))
    assert region.cut(range(6, 9)) is None
