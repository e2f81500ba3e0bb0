"""R178: undo files that lora-cli 0.1.0 wrote, in formats 1 to 3, with arithmetic 1: these are read forever.

Never regenerate them: whoever has a merged checkpoint from then has such a file beside it, and nothing else. A new
format or arithmetic gets fixtures of its own, beside these. `make` shows how they came about; it refuses to write over
them, and what it would write today may differ, since the bytes that zstd makes depend on its version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from formula_world import experts, formulas
from safetensors.torch import save_file
from special_worlds import WORLDS
from undo_reader import restore
from undo_world import Raw, read_raw, read_undo

from lora_cli.arithmetic import ARITHMETIC
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

FIXTURES = Path(__file__).parents[1] / "fixtures"
FROZEN = {
    "undo-1/bare": "41afc2b89b3f77e821a3e12fa2fa2ef1bfcc3b2e4f824486058e1c11f8de080e",
    "undo-1/cast": "686e7945b8c9437c6f124977f86f539a24219b0e7296d4394e6b5e5b2617eb51",
    "undo-1/eight-bits": "27a3ce3b6e46d83841495f548fd5fcaecbecb7c3c5ef2714c324ddee9e87228d",
    "undo-1/kinds": "25a00d00e69f8acdd313b3d8dbf8d9e5eb2b0fb88523a8dc0fca0d161dda9923",
    "undo-1/replaced": "16114cdad04902a8472dad1b482c039b1b76a7aabd668bd19c9368ece67635ef",
    "undo-1/shards": "e2bc0db249b3226a4435fce32b420df427f3cf9656c4872f8791494721f07ca6",
    "undo-1/stack": "52d618d40859ccd68236c6ffda77d3d73a01e6997cd7dc67e3ed4ba64613acc7",
    "undo-1/wrapped": "163c867a9fe7ebc271d418e26a66c46ef477b5883adc557f51dad13a341a515c",
    "undo-2/dora": "608bc58bdc7b7763ce6ad1f1a1cbb0e04970d1ad5e3b3fc2a9d557874fd51f6d",
    "undo-2/fused": "2a331456cfdb7d2511b0b6ffece7d74fc6c85392ad3fd21f7536e83f1ea5fe48",
    "undo-2/repeated": "4e24d4226606def4e84fa86bca5a08a28921f6e02726260d3e16dbfe7299a8d4",
    "undo-2/rotary": "6da675e75acc47c1d0a8940d20be6b31354d99c7debb8ad0dc14f9bc29caa47e",
    "undo-2/rows": "1596408d7e993701dc9e5bbf6f61d3333f5a6d7ba87ea6e8dc0a01d742e4736a",
    "undo-3/drawn": "dad9f12105bdf1e5e2a650367d2f4ebcc36ef00873b75d71e259d64abd2b4bff",
    "undo-3/experts-apart": "bf19294e5bc646f81bfbfb8de4968bdb9dd9a44cd03faf9b315c64f6409d8f86",
    "undo-3/experts-fused": "99fbffff35b776399edfbccfe44a70ff4447ef52a6c1cef7f158bb7da3b81fe9",
    "undo-3/experts-in-turn": "254fc6087403ed5698c0f4557ab6837c04bd8de38116252d800347803f228614",
    "undo-3/gains": "1f0011c0b0acbac866a1a00d78b4b83aca9966c66ca9bdcac08b1616e278558f",
    "undo-3/products": "c37aa560bba1ff035b5f17f47d40b87a389c51222614f85482177299b1964e3c",
    "undo-3/sums": "723976d5c039f2bf4d9e47842361c34c2fe2f896bd55e6806b2318bd8cf91345",
}
"""SHA-256 of all that belongs to a case."""


def sums(place: Path) -> dict[str, str]:
    """Every file of a folder, or one file under the name of its kind, by SHA-256."""
    files = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


@pytest.fixture(params=FROZEN)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of them."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def merged_in(case: Path) -> Path:
    """Its merged checkpoint: a folder, or a bare file."""
    return case / "merged" if (case / "merged").is_dir() else case / "merged.safetensors"


def test_none_of_them_changed_or_went(case: Path) -> None:
    text = "".join(f"{digest} {name}\n" for name, digest in sums(case).items())
    assert hashlib.sha256(text.encode()).hexdigest() == FROZEN[f"{case.parent.name}/{case.name}"]
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 450_000
    assert {path.relative_to(FIXTURES).as_posix() for path in FIXTURES.glob("*/*")} == set(FROZEN)


def restored(case: Path, given: bool) -> Path:
    """Take out what was merged; returns the base."""
    merged = merged_in(case)
    back = case / ("back" if merged.is_dir() else "back.safetensors")
    said = json.loads((case / "said.json").read_text())
    adapters = [case / name for name in said["adapters"]] if given else []
    result = unmerge(merged, adapters, back, threads=1)
    assert (result.exact, result.warnings) == (True, ())
    found = sums(back) if back.is_dir() else {"base.safetensors": hashlib.sha256(back.read_bytes()).hexdigest()}
    found.pop("lora_unmerge.json", None)
    assert found == said["base"]
    return back


def test_the_base_comes_back(case: Path) -> None:
    restored(case, given=True)


def test_what_is_in_the_undo_file_need_not_be_given(case: Path) -> None:
    if json.loads((case / "said.json").read_text())["embedded"]:
        restored(case, given=False)


@pytest.mark.skipif(ARITHMETIC != 1, reason="another arithmetic merges to other bytes")
def test_merging_gives_the_same_bytes_still(case: Path) -> None:
    said, merged = json.loads((case / "said.json").read_text()), merged_in(case)
    again = case / ("again" if merged.is_dir() else "again.safetensors")
    merge(restored(case, given=True), [case / name for name in said["adapters"]], again, PlanOptions(**said["options"]))
    if merged.is_file():
        assert again.read_bytes() == merged.read_bytes()
        return
    for path in sorted(merged.glob("*.safetensors*")):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_another_reader_finds_the_same(case: Path) -> None:
    """One that was written from docs/undo-file.md alone."""
    merged = merged_in(case)
    manifest, parts = read_undo(next(case.rglob("*.undo")))
    files = sorted(merged.glob("*.safetensors")) if merged.is_dir() else [merged]
    there = {key: raw for file in files for key, raw in read_raw(file)[1].items()}
    base = restored(case, given=True)

    def find(number: int, name: str) -> Raw:
        held = manifest["adapters"][number].get("held", "apart")
        if held == "apart":
            given = json.loads((case / "said.json").read_text())["adapters"]
            adapter = case / given[number - len(manifest["adapters"])]  # a base's own factors come first
            return read_raw(adapter / "adapter_model.safetensors" if adapter.is_dir() else adapter)[1][name]
        return parts[f"stored/{name}" if held == "in the base" else f"factor/{number}/{name}"]

    done = 0
    for file in manifest["files"]:
        path = base / file["name"] if base.is_dir() else base
        for said, (key, (dtype, _, data)) in zip(file["tensors"], read_raw(path)[1].items(), strict=True):
            assert said["key"] == key
            assert not data or restore(said, parts, there, dtype, find) == data, key
            done += said["how"] in ("preimages", "residual")
    assert done


# How they were made

Tensors = dict[str, torch.Tensor]
F16, BF16, F8, F5 = torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
RANK = 2


def make() -> None:
    """Write the fixtures, once."""
    torch.manual_seed(20260101)
    _make("bare", {"": _kinds(BF16) | {"conv.weight": torch.randn(20, 24).to(BF16)}}, {"plain": _plain()})
    shards = {"1": _kinds(torch.float32), "2": {"other.weight": torch.randn(9, 7), "ids": torch.arange(5)}}
    _make("shards", shards, {"adapter": _factors("dense", "half", "zeros") | _factors("other", shape=(9, 7))})
    tensors = _kinds(F8) | {f"five.{key}": tensor for key, tensor in _kinds(F5).items()}
    tensors |= {f"half.{key}": tensor for key, tensor in _kinds(F16).items()}
    adapters = {"one": _factors("dense", "five.half", "half.zeros"), "two": _factors("dense", "half.dense")}
    _make("eight-bits", {"1": tensors}, adapters, options={"weights": (0.7, -1.3)}, embed=True)
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3e38, 1.0])
    shards = {"1": _kinds(torch.float32), "2": {"odd": odd, "f16": torch.randn(7).half(), "none": torch.ones(0, 3)}}
    _make("cast", shards, {"adapter": _factors("dense")}, options={"dtype": "bf16"}, embed=True)
    whole = {"head.weight": torch.randn(3, 20), "dense.lora_B.bias": torch.randn(24)}
    tensors = {"head.weight": torch.randn(3, 20).to(BF16), "dense.bias": torch.randn(24), "ids": torch.arange(3)}
    adapter = _factors("dense") | whole | {"score.weight": torch.randn(2, 20), "score.ids": torch.arange(2)}
    _make("replaced", {"1": _kinds(torch.float64) | tensors}, {"adapter": adapter}, embed=True)
    wrapped = {"dense.base.weight": torch.randn(24, 20).half(), "dense.base.bias": torch.randn(24)}
    _make("wrapped", {"1": wrapped, "2": _factors("dense")}, {})
    first, second, folder, file = _all_kinds()
    _make("kinds", {"1": first, "2": second}, {"adapter": folder, "plain": file})
    _make("stack", {"1": _kinds(BF16)}, {"first": _factors("dense", "half")}, embed=True)
    _make_stack(FIXTURES / "undo-1" / "stack")


def make_newer() -> None:
    """Write those of format 2, once: lengths, parts of tensors, and what comes with other names and sizes."""
    for name, dtype in {"dora": BF16, "fused": F16, "rotary": BF16, "rows": BF16, "repeated": torch.float32}.items():
        case = FIXTURES / "undo-2" / name
        case.mkdir(parents=True)  # an error if it is there
        world = WORLDS[name](case, dtype, 1)
        weights = list(world.options.weights)
        _merge(case, "", [adapter.name for adapter in world.adapters], {"weights": weights} if weights else {}, False)


def make_newest() -> None:
    """Write those of format 3, once: experts in each way to store them, and other tuners' formulas."""
    for stored, dtype in {"apart": BF16, "fused": F16, "in turn": BF16}.items():
        case = _case(f"experts-{stored.replace(' ', '-')}")
        _merge(case, "", [adapter.name for adapter in experts(case, dtype, 1, stored).adapters], {}, True)
    for name, kinds in FORMULAS.items():
        case = _case(name)
        _merge(case, "", [adapter.name for adapter in formulas(case, BF16, 1, kinds).adapters], {}, False)


FORMULAS = {
    "products": ("adalora", "beft", "delora", "gralora", "randlora", "unilora", "vblora", "vera"),
    "sums": ("c3a", "loha", "lokr", "miss", "shira", "supertuning"),
    "gains": ("hira", "ia3"),
    "drawn": ("fourierft", "pvera-drawn", "vera-drawn", "waveft", "waveft-plain"),
}


def _case(name: str) -> Path:
    case = FIXTURES / "undo-3" / name
    case.mkdir(parents=True)  # an error if it is there
    return case


def _kinds(dtype: torch.dtype) -> Tensors:
    """Dense and pruned weights, zeros of both signs, numbers that are hardly there."""
    dense, zeros = torch.randn(24, 20), torch.where(torch.rand(24, 20) < 0.7, 0.0, -0.0)
    tensors = {"dense": dense, "half": torch.where(torch.rand(24, 20) < 0.5, dense, zeros), "zeros": zeros}
    tensors["dense"][3] *= 1e-6
    return {f"{key}.weight": tensor.to(dtype) for key, tensor in tensors.items()}


def _factors(*modules: str, shape: tuple[int, int] = (24, 20)) -> Tensors:
    tensors: Tensors = {}
    for module in modules:
        b = torch.randn(shape[0], RANK) * 0.2
        b[::5] = 0
        tensors |= {f"{module}.lora_A.weight": torch.randn(RANK, shape[1]), f"{module}.lora_B.weight": b}
    return tensors


def _all_kinds() -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """A stack of experts and a parametrization in the base, an embedding and convolutions that adapters change."""

    def some(**shapes: tuple[int, ...]) -> Tensors:
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    one = some(**{"moe.base.weight": (3, 6, 5), "moe.lora_A.weight": (3, 6, RANK), "moe.lora_B.weight": (3, RANK, 5)})
    one["moe.base.weight"] = one["moe.base.weight"].to(BF16)
    kept = {"original": (4, 3, 2), "0.A": (RANK, 6), "0.B": (4, RANK)}
    one |= some(**{f"p.parametrizations.weight.{name}": shape for name, shape in kept.items()}) | some(
        **{"p.bias": (4,)}
    )
    two = some(**{"emb.weight": (20, 6), "conv.weight": (6, 3, 2, 2), "one.weight": (5, 4, 3)})
    two = {key: tensor.to(F16 if key == "emb.weight" else BF16) for key, tensor in two.items()}
    folder = some(**{"emb.lora_embedding_A": (RANK, 20), "emb.lora_embedding_B": (6, RANK)})
    folder |= some(**{"conv.lora_A.weight": (RANK, 3, 2, 2), "conv.lora_B.weight": (6, RANK, 1, 1)})
    return one, two, folder, some(**{"one.A": (RANK, 4, 3), "one.B": (RANK, 5)})


def _plain() -> Tensors:
    """As anybody may store them: the other way round, and for a base that stores its matrix the other way round."""
    tensors = {f"{key}.{side}": torch.randn(24, RANK) for key in ("dense", "conv") for side in "B"}
    tensors |= {f"{key}.A": torch.randn(RANK, 20) for key in ("dense", "conv")}
    return tensors | {"half.A": torch.randn(20, RANK).half(), "half.B": torch.randn(RANK, 24).to(BF16)}


def _make(
    name: str,
    shards: dict[str, Tensors],
    adapters: dict[str, Tensors],
    *,
    options: dict[str, Any] | None = None,
    embed: bool = False,
) -> None:
    case = FIXTURES / "undo-1" / name
    case.mkdir(parents=True)  # an error if it is there
    kind = ".safetensors" if "" in shards else ""
    base = case / f"base{kind}"
    if kind:
        save_file(shards[""], base, {"format": "pt"})
    else:
        _write_base(base, shards)
    names = [_write_adapter(case / name, tensors) for name, tensors in adapters.items()]
    _merge(case, kind, names, options or {}, embed)


def _merge(case: Path, kind: str, adapters: list[str], options: dict[str, Any], embed: bool) -> None:
    base = case / f"base{kind}"
    given = [case / name for name in adapters]
    merge(base, given, case / f"merged{kind}", PlanOptions(**options), embed_adapter=embed)
    found = {base.name: hashlib.sha256(base.read_bytes()).hexdigest()} if kind else sums(base)
    said = {"adapters": adapters, "options": options, "embedded": embed or not adapters, "base": found}
    (case / "said.json").write_text(json.dumps(said, indent=1) + "\n")
    if kind:
        base.unlink()
    else:
        shutil.rmtree(base)


def _write_base(base: Path, shards: dict[str, Tensors]) -> None:
    base.mkdir()
    places: dict[str, str] = {}
    for number, tensors in shards.items():
        name = f"model-{number}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(tensors, base / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if any(".lora_A." in key for key in places):
        wrap = {"schema": "lora-cli/wrap/1", "alpha": 3, "rank": RANK, "scaling": "alpha/rank"}
        (base / "lora_wrap.json").write_text(json.dumps(wrap))
    (base / "config.json").write_text(json.dumps({"model_type": "none", "dtype": "float32"}))
    (base / "README.md").write_text("# A base\n")


def _write_adapter(place: Path, tensors: Tensors) -> str:
    if any(key.endswith(".A") for key in tensors):
        save_file(tensors, place.with_suffix(".safetensors"), {"alpha": "3"})
        return f"{place.name}.safetensors"
    place.mkdir()
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "lora_bias": True, "modules_to_save": ["head", "score"]}
    (place / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, place / "adapter_model.safetensors")
    return place.name


def _make_stack(case: Path) -> None:
    (case / "merged").rename(case / "base")
    shutil.rmtree(case / "first")
    _merge(case, "", [_write_adapter(case / "adapter", _factors("dense", "zeros"))], {}, True)
