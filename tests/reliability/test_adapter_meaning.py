"""R081 to R115: what an adapter may mean, and what is refused because it could mean something else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapter_world import Case, changed, config_text, merged, merging, plainly
from catalogue import check_refused
from cli_world import Call, World, call_fixture, world_fixture  # noqa: F401 (fixtures)
from tiny import (
    MODULES,
    PREFIX,
    Array,
    adapter_tensors,
    base_tensors,
    numbers,
    read_tensors,
    write_adapter,
    write_base,
    write_json,
)

Q, UP = MODULES[0], MODULES[1]
FACTORS, BASE = adapter_tensors(), base_tensors()
PLAIN = adapter_tensors(prefix="")
F32 = np.float32


def q(side: str, array: Array) -> dict[str, Array]:
    """A tensor of the first query projection, as PEFT calls it."""
    return {f"{PREFIX}{Q}.{side}": array}


def pair(rank: int, out: int = 12, inner: int = 8) -> dict[str, Array]:
    return q("lora_A.weight", numbers(rank, inner)) | q("lora_B.weight", numbers(out, rank))


def without(*ends: str) -> dict[str, Array]:
    return {key: tensor for key, tensor in FACTORS.items() if not key.endswith(ends)}


def renamed(old: str, new: str) -> dict[str, Array]:
    return {key.replace(old, new): tensor for key, tensor in FACTORS.items()}


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newer(folder: Path) -> None:
    undo = folder / "lora_merge.undo"
    undo.write_bytes(undo.read_bytes().replace(b"lora-cli/undo/1", b"lora-cli/undo/9"))


EMPTY = {f"{PREFIX}{Q}.lora_A.weight": np.zeros((0, 8), F32), f"{PREFIX}{Q}.lora_B.weight": np.zeros((12, 0), F32)}
TWICE = BASE | {key.replace("model.", "transformer."): tensor for key, tensor in BASE.items() if "layers" in key}
HALF = {key: tensor.astype(np.float16) if tensor.dtype == F32 else tensor for key, tensor in BASE.items()}
UNDO = "lora_merge.undo"
ALPHA = '"lora_alpha": 4'

REFUSED: dict[str, tuple[Case, int, str]] = {
    "R081 rank 0": (merging(factors=EMPTY, r=0), 21, f"{Q}: A is [0, 8], B is [12, 0]"),
    "R081 rank 0, plain": (plainly({key.removeprefix(PREFIX): t for key, t in EMPTY.items()}, "--scale", 1), 21,
                           f"share no rank|{Q}: A is [0, 8], B is [12, 0]"),
    "R081 rank 0 in the config": (merging(r=0), 21, "the factors have rank 2, r says 0"),
    "R081 negative rank": (merging(r=-2), 21, "the factors have rank 2, r says -2"),
    "R082 ranks of A and B": (merging(factors=changed(q("lora_A.weight", numbers(3, 8)))), 21,
                              f"{Q}: A is [3, 8], B is [12, 2]"),
    "R083 another shape": (merging(factors=changed(pair(2, inner=9))), 21, f"{Q}.weight: [12, 8]|delta is (12 × 9)"),
    "R083 transposed": (merging(factors=changed(pair(2, out=8, inner=12))), 21, "fits only against fan_in_fan_out"),
    "R084 orphans": (merging(factors=without(f"{Q}.lora_A.weight", f"{UP}.lora_B.weight")), 20,
                     f"2 factors have no partner|{Q}.lora_B.weight has no A|{UP}.lora_A.weight has no B"),
    "R085 no alpha": (plainly(PLAIN), 2, "Nothing says how strong this adapter is|--alpha A|--scale S"),
    "R085 null": (merging(lora_alpha=None), 10, "adapter_config.json: lora_alpha|found None · expected a number"),
    "R085 kohya": (plainly({"lora_unet_a.lora_down.weight": numbers(2, 8)}), 12, "kohya"),
    "R086 alpha 0": (merging(lora_alpha=0), 22, "alpha is 0|change nothing|--alpha A|--weight 0"),
    "R086 alpha -0.0": (config_text(ALPHA, '"lora_alpha": -0.0'), 22, "alpha is 0"),
    "R086 alpha 0 of a pattern": (merging(alpha_pattern={"q_proj": 0}), 22, "alpha_pattern['q_proj']: |alpha is 0"),
    "R086 alpha 0 in metadata": (plainly(PLAIN, lora_alpha="0"), 22, "header metadata: lora_alpha: |alpha is 0"),
    "R086 NaN": (config_text(ALPHA, '"lora_alpha": NaN'), 10, "adapter_config.json|NaN is no JSON number"),
    "R086 infinity": (config_text(ALPHA, '"lora_alpha": -Infinity'), 10, "-Infinity is no JSON number"),
    "R086 out of range": (config_text(ALPHA, '"lora_alpha": 1e400'), 10, "a number out of range"),
    "R086 1e30": (merging(lora_alpha=1e30), 10, "lora_alpha|found 1e+30 · expected a number below 1e+30"),
    "R086 400 digits": (merging(lora_alpha=10**400), 10, "lora_alpha|expected a number below 1e+30"),
    "R086 text": (merging(lora_alpha="4"), 10, "lora_alpha|found '4' · expected a number"),
    "R086 true": (merging(lora_alpha=True), 10, "lora_alpha|found True"),
    "R086 text in a pattern": (merging(alpha_pattern={"q_proj": "4"}), 10, "alpha_pattern|object of numbers"),
    "R086 NaN in metadata": (plainly(PLAIN, lora_alpha="nan"), 10, "header metadata: lora_alpha: A scale is not"),
    "R086 1e30 in metadata": (plainly(PLAIN, lora_alpha="1e30"), 10, "header metadata|below 1e+30"),
    "R087 alpha as tensor": (merging(factors=changed(q("alpha", np.asarray([3.0], F32)))), 20, f"{Q}.alpha"),
    "R087 alpha as tensor, plain": (plainly(PLAIN | {f"{Q}.alpha": np.asarray([3.0], F32)}, "--scale", 1), 20,
                                    f"{Q}.alpha"),
    "R087 config and metadata": (plainly(PLAIN, config={"lora_alpha": 4}, lora_alpha="9"), 10,
                                 "Two fields|lora_alpha = 4 of adapter_config.json and lora_alpha = 9 of header"),
    "R087 alpha and scale": (plainly(PLAIN, lora_alpha="4", scale="1"), 10, "Two fields|lora_alpha = 4|scale = 1"),
    "R088 rank of the config": (merging(factors=changed(pair(3))), 21, "the factors have rank 3, r says 2"),
    "R088 rank of a pattern": (merging(rank_pattern={"q_proj": 5}), 21, "rank_pattern['q_proj'] says 5"),
    "R088 rank of metadata": (plainly(PLAIN, lora_alpha="4", r="3"), 21, "header metadata: r: |expected 2|found 3"),
    "R090 DoRA without magnitudes": (merging(use_dora=True), 12, "says DoRA, and the file lacks magnitudes|q_proj"),
    "R090 magnitudes without DoRA": (merging(factors=changed(q("lora_magnitude_vector", np.ones(12, F32)))), 12,
                                     "does not say use_dora"),
    "R091 bias of a factor": (merging(factors=changed(q("lora_B.bias", np.ones(12, F32))), lora_bias=True), 20,
                              f"{Q}.bias|needs one in the base"),
    "R091 tokens without rows": (merging(trainable_token_indices=[1]), 10, "trainable_token_indices|no rows"),
    "R091 layers out of range": (merging(layer_replication=[[0, 9]]), 23, "other layers|layer_replication"),
    "R092 a field": (merging(new_trick=0.5), 12, "new_trick = 0.5: unknown field|--ignore-field"),
    "R092 all of them": (merging(new_trick={"a": 1}, older_trick=[1]), 12, "new_trick|older_trick"),
    "R093 another tuner": (merging(peft_type="P_TUNING"), 12, "peft_type|trains prompts"),
    "R093 no tuner": (merging(peft_type="FRODO"), 12, "peft_type: Adapters of this type are not supported|FRODO"),
    "R093 several in one file": (merging(factors=changed(q("lora_A.style.weight", numbers(2, 8)))), 12,
                                 "several adapters|style"),
    "R094 LyCORIS": (plainly({f"{Q}.hada_w1_a": numbers(12, 2)}, "--scale", 1), 12, "LyCORIS LoHa"),
    "R094 mid tensor": (merging(factors=changed(q("lora_mid.weight", numbers(2, 2)))), 20, f"{Q}.lora_mid.weight"),
    "R095 no target": (merging(factors=renamed("q_proj", "qq_proj")), 20,
                       "2 names|qq_proj.weight (nearest: |q_proj|--map OLD=NEW|--allow-unmapped"),
    "R096 two pairs": (merging(factors=FACTORS | renamed(PREFIX, PREFIX * 2)), 20, "Two names|one tensor of the base"),
    "R096 by a map": (merging("--map", f"{Q}={MODULES[2]}"), 20, f"are both {MODULES[2]}.weight"),
    "R096 one factor twice": (merging(factors=changed(q("lora_A.default.weight", numbers(2, 8)))), 20,
                              "Two tensors are the same factor|lora_A.default.weight"),
    "R097 two ways": (merging(base=TWICE, factors=renamed("model.model.", "model.")), 20,
                      "two ways|is transformer.layers|is model.layers|--map OLD=NEW"),
    "R100 merged already": (lambda w, f: ["merge", w.merged, w.adapter, "-o", f / "out"], 23,
                            "is merged into the base already|adapter in the receipt of merged|--again"),
    "R101 changed since": (merged(lambda m: flip(next(m.glob("*1-of-*")))), 23, "not what the merge wrote (1)|weight"),
    "R102 another adapter": (merged(lambda m: None, adapter={k: t + 1 for k, t in FACTORS.items()}), 23,
                             "not the one that was merged|is another tensor"),
    "R102 another base": (lambda w, f: ["unmerge", w.base, w.adapter, "--undo", w.merged / UNDO, "-o", f / "out"], 23,
                          "not what the merge wrote|q_proj.weight"),
    "R103 no undo file": (merged(lambda m: (m / UNDO).unlink()), 23, "no undo file|bit for bit|--approximate"),
    "R103 empty": (merged(lambda m: cut(m / UNDO, 0)), 10, f"{UNDO}|found 0 bytes"),
    "R103 cut off": (merged(lambda m: cut(m / UNDO, -9)), 10, f"{UNDO}|9 bytes are missing"),
    "R103 a bit": (merged(lambda m: flip(m / UNDO)), 10, f"{UNDO}: The undo file is damaged"),
    "R103 of the future": (merged(newer), 12, f"{UNDO}|newer lora-cli|update lora-cli"),
    "R104 bitsandbytes": (merging(base_config={"quantization_config": {"load_in_4bit": True}}), 12, "16-bit"),
    **{f"R104 {name}": (merging(base_config={"quantization_config": {"quant_method": name}}), 12, f"({name})|16-bit")
       for name in ("gptq", "awq", "fp8", "compressed-tensors", "unheard-of")},
    "R104 no settings": (merging(base_config={"quantization_config": "int4"}), 10, "quantization_config|found 'int4'"),
    "R104 packed": (merging(base=BASE | {f"{Q}.qweight": np.ones((1, 12), np.int32)}), 12, "qweight stands beside it"),
    "R104 scales": (merging(base=BASE | {f"{Q}.weight_scale_inv": np.ones(1, F32)}), 12, "weight_scale_inv stands"),
    "R105 int8": (merging(base=BASE | {f"{Q}.weight": np.ones((12, 8), np.int8)}), 12, "storage type I8"),
    "R108 NaN in B": (merging(factors=changed(q("lora_B.weight", np.full((12, 2), np.nan, F32)))), 22,
                      f"{Q}.lora_B.weight|24"),
    "R108 infinity in A": (merging(factors=changed(q("lora_A.weight", np.full((2, 8), -np.inf, F32)))), 22,
                           f"{Q}.lora_A.weight|16"),
    "R108 scale": (merging("--alpha", "1e308", "--weight", "1e10"), 22, "scale"),
    "R109 NaN in a target": (merging(base=BASE | {f"{Q}.weight": np.full((12, 8), np.nan, F32)}), 22, f"{Q}.weight"),
    "R110 overflow": (merging(base=HALF, factors=changed(q("lora_B.weight", np.full((12, 2), 1e30, F32)))), 22,
                      f"{Q}.weight|float16"),
    **{f"R114 weight {text!r}": (merging("--weight", text), 2, words) for text, words in (
        ("nan", "finite|nan"), ("-inf", "finite|-inf"), ("1e999", "finite"), ("1,5", "--weight"), ("", "--weight"),
        ("half", "--weight"), ("0x10", "--weight"))},
    "R115 twice": (lambda w, f: ["merge", w.base, w.adapter, w.adapter, "-o", f / "out"], 23, "given twice|--again"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, call: Call, world: World, tmp_path: Path) -> None:
    case, exit_code, words = REFUSED[name]
    line = case(world, tmp_path)
    check_refused(call, line, exit_code, words, folder=tmp_path, inputs=[world.base, world.adapter, world.merged])


def test_several_adapters_in_a_folder(call: Call, world: World, tmp_path: Path) -> None:
    """R093: one folder for each adapter, and nobody said which; a path can say it, so it is a matter of usage."""
    for name in ("facts", "style"):
        write_adapter(tmp_path / "a" / name)
    line = ["merge", world.base, tmp_path / "a", "-o", tmp_path / "out"]
    check_refused(call, line, 2, "several adapters|facts, style|name one of the folders", folder=tmp_path)


# Warned of, and done

WARNED: dict[str, tuple[Case, str]] = {
    "R081 rank larger than the matrix": (merging(factors=adapter_tensors(rank=9), r=9),
                                         f"a: the rank of 4 modules is larger than their matrices: {UP}.weight, "
                                         "rank 9 for 16 × 8"),
    "R086 negative alpha": (merging(lora_alpha=-4), "negative, so the change is taken away|-2 = lora_alpha / r"),
    "R086 negative in metadata": (plainly(PLAIN, scale="-1"), "negative|-1 = scale of header metadata"),
    "R086 huge": (merging(lora_alpha=1e9), "scale of 4 modules is very large|5e+08 by lora_alpha / r"),
    "R114 huge weight": (merging("--weight", "1e9"), "very large|2e+09 by lora_alpha / r and weight 1e+09"),
    "R095 left out on purpose": (merging("--allow-unmapped", factors=changed(q("x.lora_A.weight", numbers(2, 8))
                                 | q("x.lora_B.weight", numbers(12, 2)))), ""),
    "R100 on purpose": (lambda w, f: ["merge", w.merged, w.adapter, "--again", "-o", f / "out"], ""),
    "R115 on purpose": (lambda w, f: ["merge", w.base, w.adapter, w.adapter, "--again", "-o", f / "out"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_done_with_a_warning(name: str, call: Call, world: World, tmp_path: Path) -> None:
    case, words = WARNED[name]
    ran = call(*case(world, tmp_path), "--json")
    assert ran.code == 0, ran.err
    said = " ".join(ran.document["warnings"])
    assert all(word in said for word in words.split("|")), said
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "more", [["--weight", "-1"], ["--alpha", "-4"], ["--scale", "-2"], ["--weight", "0"], ["--scale", "999"]], ids=str
)
def test_what_a_person_says_needs_no_warning(more: list[str], call: Call, world: World, tmp_path: Path) -> None:
    """R086, R114: a change that is asked for with a minus is taken away, which is what the minus says."""
    ran = call(*merging(*more)(world, tmp_path), "--json")
    assert (ran.code, ran.document["warnings"]) == (0, [])


def test_what_is_taken_away_once_more_is_added(call: Call, world: World, tmp_path: Path) -> None:
    """R086: two minuses, and the second one is a person's."""
    ran = call(*merging("--weight", "-1", lora_alpha=-4)(world, tmp_path), "--json")
    assert (ran.code, ran.document["warnings"]) == (0, [])


# What is said of what is assumed


def test_a_default_is_named(call: Call, world: World, tmp_path: Path) -> None:
    """R085: a PEFT config of an old version lacks what was PEFT's default; what is taken then is said in the plan."""
    file = write_adapter(tmp_path / "a") / "adapter_config.json"
    fields = json.loads(file.read_text())
    write_json(file, {name: value for name, value in fields.items() if name != "lora_alpha"})
    ran = call("merge", world.base, tmp_path / "a", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "scale 4 = PEFT's default lora_alpha / r" in ran.out + ran.err


def test_rslora_by_hand(call: Call, world: World, tmp_path: Path) -> None:
    """R089: alpha 6 and rank 9 are a scale of 6 / √9 = 2; computed here with numpy alone."""
    factors = adapter_tensors(rank=9)
    adapter = write_adapter(tmp_path / "a", factors, r=9, lora_alpha=6, use_rslora=True)
    assert call("merge", world.base, adapter, "-o", tmp_path / "out").code == 0
    found = read_tensors(tmp_path / "out")
    for module in MODULES:
        a, b = (factors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        wanted = BASE[f"{module}.weight"].astype(np.float64) + 6 / math.sqrt(9) * (b @ a)
        np.testing.assert_allclose(found[f"{module}.weight"], wanted, rtol=0, atol=1e-5)


def test_a_change_of_nothing(call: Call, world: World, tmp_path: Path) -> None:
    """R107: B is zero, as before training: every byte of the base is there again, and no weight counts as changed."""
    zero = {key: np.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in FACTORS.items()}
    ran = call("merge", world.base, write_adapter(tmp_path / "a", zero), "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    for path in world.base.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert {entry["changed_fraction"] for entry in ran.document["survival"]} == {0.0}


def test_odd_numbers_that_no_change_touches(call: Call, tmp_path: Path) -> None:
    """R109, R111, R112: NaN with its payload, infinities, subnormals and −0.0 keep their bits."""
    bits = np.asarray([0x7FC00001, 0xFFC0BEEF, 0x7F800001, 0xFF800000, 0x80000000, 1, 0x807FFFFF, 0x3F800000])
    odd = bits.astype(np.uint32).view(F32)
    base = write_base(tmp_path / "b", BASE | {"odd.weight": odd})
    assert call("merge", base, write_adapter(tmp_path / "a"), "-o", tmp_path / "out").code == 0
    assert read_tensors(tmp_path / "out")["odd.weight"].view(np.uint32).tolist() == odd.view(np.uint32).tolist()


def test_a_change_that_rounding_takes(call: Call, tmp_path: Path) -> None:
    """R113: a change far below the spacing of the weights is lost, and the program says how much is left."""
    small = {key: tensor * np.float32(1e-3) for key, tensor in FACTORS.items()}
    base = write_base(tmp_path / "b", HALF)
    ran = call("merge", base, write_adapter(tmp_path / "a", small), "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert any("rounding took much of the change" in words for words in ran.document["warnings"])
    assert max(entry["changed_fraction"] for entry in ran.document["survival"]) < 0.5


def test_force_does_not_lift_a_refusal(call: Call, world: World, tmp_path: Path) -> None:
    """R100: --force is about the output; only --again merges once more."""
    shutil.copytree(world.merged, tmp_path / "m")
    line = ["merge", tmp_path / "m", world.adapter, "-o", tmp_path / "out", "--force"]
    check_refused(call, line, 23, "merged into the base already|--again", folder=tmp_path)


SINGULAR = {
    "inspect --spectrum": lambda w, f: ["inspect", w.adapter, "--spectrum"],
    "diff --rank": lambda w, f: ["diff", w.base, w.merged, "--rank"],
    "inject pissa": lambda w, f: ["inject", w.base, "-o", f / "out", "--base-out", f / "b", "--rank", 2, "--init",
                                  "pissa"],
}  # fmt: skip


@pytest.mark.parametrize("name", SINGULAR)
def test_a_decomposition_that_does_not_converge(
    name: str, call: Call, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R118: LAPACK may give up on a finite matrix; the tensor is named."""
    import torch

    def gives_up(*_: object, **__: object) -> None:
        failure: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
        raise failure("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    monkeypatch.setattr(torch.linalg, "svdvals", gives_up)
    line = SINGULAR[name](world, tmp_path)
    check_refused(call, line, 22, "does not converge|_proj", folder=tmp_path)
