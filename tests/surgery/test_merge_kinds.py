"""Embeddings, convolutions, stacks of experts, parametrizations and files from scratch: merged, verified, taken out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import CASES, SCALE, Case, gaussian, is_merged
from round_trips import contents, round_trip, weights
from safetensors.torch import load_file, save_file

from lora_cli.adapters.source import ReadOptions
from lora_cli.checkpoint import digests
from lora_cli.errors import NamesError, ShapeError, UnsupportedError, UsageError
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import verify

every_case = pytest.mark.parametrize("name", CASES)


def options(case: Case, **more: Any) -> PlanOptions:
    return PlanOptions(read=ReadOptions(scale=SCALE), orientation=case.orientation, **more)  # type: ignore[arg-type]


def sabotages(deltas: kinds.Tensors) -> dict[str, kinds.Tensors]:
    """What the deltas are not."""
    return {
        "halved": {key: delta / 2 for key, delta in deltas.items()},
        "none": {key: torch.zeros_like(delta) for key, delta in deltas.items()},
        "turned": {key: delta.reshape(-1).flip(0).reshape(delta.shape) for key, delta in deltas.items()},
        "transposed": {
            key: delta.mT if delta.shape[-1] == delta.shape[-2] else delta.flip(-1) for key, delta in deltas.items()
        },
    }


@every_case
def test_a_merge_is_what_the_formula_says(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    base, adapters = case.write(tmp_path)
    result = merge(base, adapters, tmp_path / "out", options(case))
    found = kinds.read(tmp_path / "out")
    assert is_merged(found, case)
    for what, wrong in sabotages(case.deltas).items():
        assert not is_merged(found, case, wrong), what
    factors = [
        key for key in case.adapter or case.base if not {"lora_A", "lora_B", "A", "B"}.isdisjoint(key.split("."))
    ]
    assert result.ledger == {"applied": len(factors), "replaced": len(case.whole), "added": 0, "ignored": 0}


@every_case
@pytest.mark.parametrize("how", ["apart", "embedded"])
def test_there_and_back(tmp_path: Path, name: str, how: str) -> None:
    case = CASES[name]()
    base, adapters = case.write(tmp_path, shards=2)
    embed = how == "embedded"
    round_trip(tmp_path, base, adapters, options(case), given=[] if embed else adapters, embed=embed)


@every_case
def test_verify_passes_what_was_merged_and_names_what_was_not(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    base, adapters = case.write(tmp_path)
    merge(base, adapters, tmp_path / "out", options(case))

    def check(place: Path, **how: Any) -> Any:
        return verify(place, adapters=adapters, base=base, options=options(case), **how)

    found = check(tmp_path / "out", roundtrip=True)
    assert (found.verified, found.different) == (True, ())
    assert found.roundtrip.exact
    shutil.copytree(tmp_path / "out", tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    for key, delta in case.deltas.items():
        before = case.before(key)
        tensors[key] = (before.double() + delta / 2).to(before.dtype)
    save_file(tensors, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    wrong = check(tmp_path / "half")
    assert not wrong.verified
    assert {difference.key for difference in wrong.different} == set(case.deltas)
    assert {difference.looks_like for difference in wrong.different} == {"the adapter at 0.5 times its scale"}


@every_case
def test_weight_zero_is_the_base(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    base, adapters = case.write(tmp_path)
    merge(base, adapters, tmp_path / "out", options(case, weights=(0.0,)), undo=False)
    found = kinds.read(tmp_path / "out")
    for key in {*case.deltas, *case.whole}:
        assert found[key].view(torch.uint8).equal(case.before(key).contiguous().view(torch.uint8)), key
    if adapters:
        assert weights(tmp_path / "out") == weights(base)


@every_case
def test_no_byte_depends_on_shards_memory_or_threads(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An expert is larger than a block, which then ends within a row; and each is a unit of its own.
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 1 << 18)
    case = kinds.stack(3, 600, 500) if name == "stack" else CASES[name]()
    made = []
    for at, (shards, how) in enumerate([(1, {}), (2, {"memory": 40 << 20}), (1, {"threads": 1}), (2, {"threads": 3})]):
        base, adapters = case.write(tmp_path / str(at), shards=shards)
        merge(base, adapters, tmp_path / str(at) / "out", options(case), undo=False, **how)  # type: ignore[arg-type]
        made.append(kinds.read(tmp_path / str(at) / "out"))
    assert is_merged(made[0], case)
    for tensors in made[1:]:
        assert tensors.keys() == made[0].keys()
        assert all(torch.equal(tensors[key], made[0][key]) for key in tensors)


def test_a_large_stack_comes_back_cut_by_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 1 << 18)
    case = kinds.stack(3, 600, 500, torch.bfloat16)
    base, adapters = case.write(tmp_path)
    round_trip(tmp_path, base, adapters, options(case))


# The plan


def test_a_plan_says_the_kind_of_each_delta(tmp_path: Path) -> None:
    seen: dict[str, tuple[str, bool]] = {}
    for name, make in CASES.items():
        case = make()
        base, adapters = case.write(tmp_path / name)
        plan = plan_merge(base, adapters, options(case))
        seen |= {edit.key: (term.delta.kind, term.transposed) for edit in plan.edits for term in edit.terms}
        # A wrapped file that has no description says nothing of a square matrix.
        assert [words.split(":")[0] for words in plan.as_dict()["warnings"]] == (
            ["lin.weight"] if name == "wrapped" else []
        )
    assert seen["moe.up.weight"] == ("lora-stack", True)
    assert seen["grouped.weight"] == ("lora-conv", False)
    assert seen["embed_tokens.weight"] == seen["wpe.weight"] == ("lora-embedding", True)
    assert seen["mix"] == ("lora", True)
    assert seen["attention.in_proj_weight"] == ("lora", False)


def test_a_stack_needs_memory_for_one_expert_at_a_time(tmp_path: Path) -> None:
    few, many = (kinds.stack(experts, 64, 64).write(tmp_path / str(experts))[0] for experts in (2, 400))
    said = PlanOptions(read=ReadOptions(scale=1.0))
    merge(few, [], tmp_path / "few", said, memory=4 << 20, threads=1, undo=False)
    merge(many, [], tmp_path / "many", said, memory=4 << 20, threads=1, undo=False)
    with pytest.raises(UsageError, match="too small"):
        merge(few, [], tmp_path / "none", said, memory=1 << 20, threads=1, undo=False)


# Two adapters on one tensor


def test_a_second_adapter_adds_to_the_factors_that_are_there(tmp_path: Path) -> None:
    case = kinds.wrapped()
    base, _ = case.write(tmp_path)
    a, b = gaussian(200, 3, 4, 3, 3), gaussian(201, 9, 3, std=0.1)
    more = {"conv.lora_A.weight": a, "conv.lora_B.weight": b.reshape(9, 3, 1, 1)}
    save_file(more, tmp_path / "more.safetensors")
    trip = round_trip(tmp_path, base, [tmp_path / "more.safetensors"], options(case))
    also = SCALE * (b.double() @ a.double().flatten(1)).reshape(9, 4, 3, 3)
    deltas = case.deltas | {"conv.weight": case.deltas["conv.weight"] + also}
    assert is_merged(kinds.read(trip.merged), case, deltas)
    assert not is_merged(kinds.read(trip.merged), case)


def test_a_stack_and_a_convolution_are_not_added(tmp_path: Path) -> None:
    base, _ = kinds.stack(5, 12, 7).write(tmp_path)
    # The stack (5, 12, 7) has the shape of a kernel as well.
    save_file({"moe.up.A": gaussian(1, 2, 12, 7), "moe.up.B": gaussian(2, 5, 2, 1)}, tmp_path / "conv.safetensors")
    with pytest.raises(ShapeError) as caught:
        plan_merge(base, [tmp_path / "conv.safetensors"], PlanOptions(read=ReadOptions(scale=1.0)))
    assert "stack" in caught.value.details[0]


def test_a_stack_that_is_replaced_whole_is_changed_and_comes_back(tmp_path: Path) -> None:
    case = kinds.stack(4, 30, 20)
    tensors = {"moe.up.weight": gaussian(300, 4, 30, 20), "n.A": gaussian(1, 2, 5), "n.B": gaussian(2, 4, 2)}
    with_n = Case(case.base | {"n.weight": gaussian(3, 4, 5)}, {}).write(tmp_path / "more")[0]
    save_file(tensors, tmp_path / "whole.safetensors")
    trip = round_trip(tmp_path, with_n, [tmp_path / "whole.safetensors"], options(case))
    found = kinds.read(trip.merged)["moe.up.weight"].double()
    assert torch.allclose(found, tensors["moe.up.weight"].double() + case.deltas["moe.up.weight"], rtol=1e-6, atol=1e-9)


# Refusals


@pytest.mark.parametrize("straight", [False, True])
def test_other_kernels_of_a_file_say_which_way_round_a_square_b_is(straight: bool, tmp_path: Path) -> None:
    """A (2, 4, 3) with B (2, 2): out is the rank. With B (8, 2) beside it, all are (out × rank)."""
    base = {"c.weight": gaussian(1, 2, 4, 3), "d.weight": gaussian(2, 8, 4, 3)}
    factors = {f"{module}.lora_A": gaussian(seed, 2, 4, 3) for seed, module in ((3, "c"), (4, "d"))}
    wide = gaussian(5, 8, 2)
    factors |= {"c.lora_B": gaussian(6, 2, 2), "d.lora_B": wide if straight else wide.T.contiguous()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "factors.safetensors")
    said = PlanOptions(read=ReadOptions(scale=1.0))
    merge(tmp_path / "base.safetensors", [tmp_path / "factors.safetensors"], tmp_path / "merged.safetensors", said)
    b = factors["c.lora_B"].double() if straight else factors["c.lora_B"].double().T
    expected = base["c.weight"].double() + (b @ factors["c.lora_A"].double().flatten(1)).view(2, 4, 3)
    found = load_file(tmp_path / "merged.safetensors")["c.weight"]
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


def test_what_matches_nothing_in_the_base_is_named(tmp_path: Path) -> None:
    case = kinds.from_scratch()
    assert case.adapter is not None
    case.adapter["lora_model.up.gate"] = gaussian(1, 3)
    base, adapters = case.write(tmp_path)
    with pytest.raises(NamesError) as caught:
        merge(base, adapters, tmp_path / "out", options(case))
    assert caught.value.exit_code == 20
    (line,) = caught.value.details
    assert line.startswith("lora_model.up.gate")
    result = merge(base, adapters, tmp_path / "out", options(case, allow_unmapped=True))
    assert result.ledger["ignored"] == 1


def test_an_embedding_bears_no_witness_for_a_square(tmp_path: Path) -> None:
    """How a table lies, whatever it is called, says nothing of the linear layers."""
    base = Case({"tok.weight": gaussian(1, 40, 12), "lin.weight": gaussian(2, 12, 12)}, {}).write(tmp_path)[0]
    factors = {"tok.lora_A": gaussian(3, 40, 2), "tok.lora_B": gaussian(4, 2, 12)}
    factors |= {"lin.lora_A": gaussian(5, 12, 2), "lin.lora_B": gaussian(6, 2, 12)}
    save_file(factors, tmp_path / "f.safetensors")
    with pytest.raises(ShapeError) as caught:
        plan_merge(base, [tmp_path / "f.safetensors"], PlanOptions(read=ReadOptions(scale=1.0)))
    assert [line.partition(":")[0] for line in caught.value.details] == ["lin.weight"]


def test_a_square_table_lies_as_embeddings_do_whatever_is_said_of_the_rest(tmp_path: Path) -> None:
    base = Case({"wte.weight": gaussian(1, 12, 12), "lin.weight": gaussian(2, 12, 12)}, {}).write(tmp_path)[0]
    factors = {f"{name}.lora_{side}": gaussian(at, *shape) for at, name in enumerate(("wte", "lin"))
               for side, shape in (("A", (12, 2)), ("B", (2, 12)))}  # fmt: skip
    save_file(factors, tmp_path / "f.safetensors")
    said = PlanOptions(read=ReadOptions(scale=1.0), orientation="ba")
    plan = plan_merge(base, [tmp_path / "f.safetensors"], said)
    assert {edit.key: edit.terms[0].transposed for edit in plan.edits} == {"wte.weight": True, "lin.weight": False}


WRONG: dict[str, kinds.Tensors] = {
    "another adapter's factors": {"lin.lora_A.second.weight": gaussian(1, 2, 8)},
    "a chain of factors": {"lin.lora_A.default.more.weight": gaussian(1, 2, 8)},
    "PEFT's embedding": {"embed_tokens.lora_embedding_A": gaussian(1, 2, 30)},
    "magnitudes of DoRA": {"lin.lora_magnitude.weight": gaussian(1, 8)},
}


@pytest.mark.parametrize("what", WRONG)
def test_factors_that_would_be_lost_are_refused(tmp_path: Path, what: str) -> None:
    case = kinds.wrapped()
    base, _ = Case(case.base | WRONG[what], {}).write(tmp_path)
    with pytest.raises(UnsupportedError, match="carries factors already") as caught:
        plan_merge(base, [], options(case))
    assert list(caught.value.details) == list(WRONG[what])


@pytest.mark.parametrize("rest", ["1.A", "1.original", "0.mask", "0.A.more"])
def test_more_parametrizations_than_factors_are_refused(tmp_path: Path, rest: str) -> None:
    case, key = kinds.parametrized(), f"lin.parametrizations.weight.{rest}"
    base, _ = Case(case.base | {key: gaussian(1, 3)}, {}).write(tmp_path)
    with pytest.raises(UnsupportedError, match="carries factors already") as caught:
        plan_merge(base, [], options(case))
    assert list(caught.value.details) == [key]


def test_other_parametrizations_stay_as_they_are(tmp_path: Path) -> None:
    case = kinds.parametrized()
    others = {
        "norm.parametrizations.weight.original0": gaussian(1, 5, 1),
        "norm.parametrizations.weight.original1": gaussian(2, 5),
    }
    base, _ = Case(case.base | others, {}).write(tmp_path)
    merge(base, [], tmp_path / "out", options(case))
    found = kinds.read(tmp_path / "out")
    assert set(found) == {*others, *(key for key in kinds.Parametrized().state_dict())}


@pytest.mark.parametrize(("change", "words"), [
    ({"lin.parametrizations.weight.0.A": gaussian(1, 2, 6)}, "Ranks do not agree"),
    ({"lin.parametrizations.weight.0.A": gaussian(1, 3, 7)}, "do not fit the parameter"),
    ({"lin.weight": gaussian(1, 10, 6)}, "two tensors one name"),
    ({"lin.parametrizations.weight.0.A": None}, "no partner"),
])  # fmt: skip
def test_factors_that_do_not_fit_their_parameter(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tensors = {key: tensor for key, tensor in (kinds.parametrized().base | change).items() if tensor is not None}
    base, _ = Case(tensors, {}).write(tmp_path)
    with pytest.raises((ShapeError, NamesError), match=words):
        plan_merge(base, [], PlanOptions(read=ReadOptions(scale=1.0)))


# Strength


def test_a_wrap_file_says_how_strong_parametrizations_are(tmp_path: Path) -> None:
    case = kinds.parametrized()
    base, _ = case.write(tmp_path)
    with pytest.raises(UsageError, match="how strong"):
        merge(base, [], tmp_path / "out")
    said = {"schema": "lora-cli/wrap/1", "alpha": SCALE * 3, "rank": 3, "scaling": "alpha/rank"}
    (base / "lora_wrap.json").write_text(json.dumps(said))
    merge(base, [], tmp_path / "out")
    assert is_merged(kinds.read(tmp_path / "out"), case)


def test_a_module_on_its_own_is_folded_too(tmp_path: Path) -> None:
    """A saved layer has names without a module."""
    a, b, weight = gaussian(1, 2, 6), gaussian(2, 4, 2), gaussian(3, 4, 6)
    tensors = {f"parametrizations.weight.{name}": t for name, t in {"original": weight, "0.A": a, "0.B": b}.items()}
    save_file(tensors | {"bias": gaussian(4, 4)}, tmp_path / "layer.safetensors")
    before = contents(tmp_path / "layer.safetensors")
    merge(tmp_path / "layer.safetensors", [], tmp_path / "out.safetensors", PlanOptions(read=ReadOptions(alpha=3.0)))
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {"weight", "bias"}
    assert torch.allclose(found["weight"].double(), weight.double() + 1.5 * b.double() @ a.double(), rtol=1e-6)
    assert contents(tmp_path / "layer.safetensors") == before
