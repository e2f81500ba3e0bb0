"""The merged bytes, through files: those of exact rational arithmetic, and the same however the work is cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from huggingface_hub import save_torch_state_dict
from models import assert_same_bits, read_tensors
from safetensors.torch import save_file

from lora_cli.checkpoint import digests
from lora_cli.errors import UsageError
from lora_cli.surgery import budget, compare, engine, products
from lora_cli.surgery.merge import merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.verify import verify

Tensors = Mapping[str, torch.Tensor]
Patch = pytest.MonkeyPatch

DTYPES = {name: getattr(torch, name) for name in reference.FORMATS}
OUTPUTS = {"keep": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SPANS = {"float8_e4m3fn": 3, "float8_e5m2": 6, "float16": 6}
"""Powers of two on either side of 1 in which base values lie, where 12 would leave no room for a sum."""


def write_base(folder: Path, tensors: Tensors, shard_bytes: int = 1 << 30) -> Path:
    """A checkpoint of one file, or of several with an index."""
    folder.mkdir()
    save_torch_state_dict(dict(tensors), folder, max_shard_size=shard_bytes)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "float32"}))
    return folder


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A PEFT folder; its names are the base's."""
    folder.mkdir()
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 7} | config))
    return folder


def digest(folder: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """What the files of a folder hold; receipt, undo file and card say how they were made, and may differ."""
    files = sorted(path for path in folder.glob(pattern) if not path.name.startswith(("lora_", "README.md")))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def patterns(tensor: torch.Tensor) -> Any:
    """Bit patterns, row by row; a vector is one column."""
    flat = tensor.contiguous().view(torch.uint8).numpy().view(f"<u{tensor.itemsize}")
    return flat.reshape(len(tensor), -1).tolist()


def fractions(tensor: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in tensor.to(torch.float64).tolist()]


def awkward(seed: int, name: str, *shape: int) -> torch.Tensor:
    """Any finite numbers in some binades around 1, and among them zeros of both signs and subnormals."""
    form, span, rng = reference.FORMATS[name], SPANS.get(name, 12), np.random.default_rng(seed)
    kind, sign, fraction = rng.random(shape), rng.integers(0, 2, shape), rng.integers(0, 1 << form.fraction_bits, shape)
    exponent = np.where(kind < 0.2, 0, 1 - form.least_normal + rng.integers(-span, span + 1, shape))
    values = exponent << form.fraction_bits | np.where(kind < 0.15, 0, fraction) | sign << (form.width - 1)
    return torch.frombuffer(bytearray(values.astype(f"<u{form.width // 8}")), dtype=DTYPES[name]).reshape(shape)


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def lora(seed: int, module: str, out: int, inner: int, rank: int = 3, **options: Any) -> dict[str, torch.Tensor]:
    """Factors of one module, of sizes that differ. The first row of B is zero: the base's own bits must stay there."""
    a, b = gaussian(seed, rank, inner, std=0.02, **options), gaussian(seed + 1, out, rank, std=3.0, **options)
    b[0] = 0
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


SHAPES = {
    "h.0.mlp.lin.weight": (5, 7),
    "h.0.mlp.lin.bias": (5,),
    "h.0.mlp.gate.weight": (6, 6),
    "h.0.attn.c_attn.weight": (7, 9),  # stored (in × out), as is the square one
    "h.0.attn.c_attn.bias": (9,),
    "h.0.attn.c_proj.weight": (6, 6),
    "h.0.ln.weight": (4,),
}


def expected(key: str, base: torch.Tensor, out: str | None, uses: list[tuple[Tensors, Fraction]]) -> list[list[int]]:
    """Bit patterns of one merged tensor, by the reference."""
    name, (module, _, parameter) = str(base.dtype).removeprefix("torch."), key.rpartition(".")
    terms = []
    for factors, scale in uses:
        if f"{module}.lora_B.{parameter}" in factors:
            b, a = factors[f"{module}.lora_B.{parameter}"], factors[f"{module}.lora_A.weight"]
            a = a if parameter == "weight" else torch.ones(1, 1)
            terms.append(reference.Term(fractions(b.reshape(len(b), -1)), fractions(a), float(scale)))
    if not terms:
        return [[reference.cast_bits(pattern, name, out or name) for pattern in row] for row in patterns(base)]
    turned = ".attn." in key and parameter == "weight"
    merged = reference.merged_bits(patterns(base.T if turned else base), name, terms, out)
    return [list(column) for column in zip(*merged, strict=True)] if turned else merged


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_is_that_of_rational_arithmetic(tmp_path: Path, name: str, output: str) -> None:
    """R105, R106: every pair of types, float8 among them, rounded once."""
    base = {key: awkward(n, name, *shape) for n, (key, shape) in enumerate(SHAPES.items())}
    one = lora(10, "h.0.mlp.lin", 5, 7) | lora(20, "h.0.mlp.gate", 6, 6)
    one |= lora(30, "h.0.attn.c_attn", 9, 7) | lora(40, "h.0.attn.c_proj", 6, 6)
    one |= {"h.0.mlp.lin.lora_B.bias": gaussian(11, 5), "h.0.attn.c_attn.lora_B.bias": gaussian(31, 9, std=0.1)}
    two = lora(50, "h.0.mlp.lin", 5, 7, 4, dtype=torch.bfloat16)
    two |= lora(60, "h.0.attn.c_attn", 9, 7, 4, dtype=torch.float64)
    two |= lora(70, "h.0.attn.c_proj", 6, 6, 4, dtype=torch.float16)
    adapters = [write_adapter(tmp_path / "one", one, lora_bias=True)]
    adapters += [write_adapter(tmp_path / "two", two, r=4, lora_alpha=-3, use_rslora=True)]
    merge(write_base(tmp_path / "base", base), adapters, tmp_path / "out", PlanOptions((0.7, -1.3), output))
    merged = read_tensors(tmp_path / "out")
    # float8 has no wider twin that would mean the same to its reader: it is never cast.
    out = None if name.startswith("float8") else OUTPUTS[output]
    uses: list[tuple[Tensors, Fraction]] = [(one, Fraction(0.7) * 7 / 3), (two, Fraction(-1.3) * -3 / 2)]
    assert merged.keys() == base.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == DTYPES[out or name]
        assert patterns(tensor) == expected(key, base[key], out, uses), key
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == (OUTPUTS[output] or "float32")


def one_tile_each(patch: Patch) -> None:
    for module in (engine, products):
        patch.setattr(module, "TILE_ELEMENTS", 1 << 20)
    patch.setattr(products, "TILE_COLUMNS", 1 << 20)


class Work:
    """A base of awkward shapes, two adapters, and what the merge of them is when each tensor is one tile."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        shapes = {"x": (67, 45), "c_attn": (45, 67), "wide": (2, 4099), "tall": (301, 1), "ln": (999,), "step": ()}
        base = {f"{key}.weight": gaussian(n, *shape, dtype=dtype) for n, (key, shape) in enumerate(shapes.items())}
        one = lora(100, "x", 67, 45) | lora(110, "c_attn", 67, 45) | lora(120, "wide", 2, 4099)
        two = lora(130, "x", 67, 45, 16) | lora(140, "tall", 301, 1, 16)
        self.base = write_base(folder / "base", base, 9000)
        self.adapters = [write_adapter(folder / "one", one), write_adapter(folder / "two", two, r=16)]
        self.options = PlanOptions(weights=(0.3, 1.7))
        self.out = folder / "out"
        self.expected = self.merged(self.out, threads=1)

    def merged(self, out: Path, **how: Any) -> dict[str, str]:
        merge(self.base, self.adapters, out, self.options, undo=False, **how)
        return digest(out)


@pytest.fixture(scope="module", params=["bfloat16", "float32", "float64"])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    with Patch.context() as patch:
        one_tile_each(patch)
        return Work(tmp_path_factory.mktemp("work"), DTYPES[request.param])


CUTS = {
    "as it comes": {},
    "two threads": {"threads": 2},
    "three threads": {"threads": 3, "memory": 8 << 20},
    "much memory": {"threads": 2, "memory": 1 << 30},
    "hardly any memory": {"threads": 3, "memory": 3 << 20},
    "tiles of one column": {"TILE_COLUMNS": 1, "TILE_ELEMENTS": 13},
    "odd tiles": {"threads": 2, "TILE_COLUMNS": 17, "TILE_ELEMENTS": 131},
    "pieces shorter than a row": {"threads": 2, "STRIP_BYTES": 83},
    "pieces of some rows": {"STRIP_BYTES": 1001, "TILE_COLUMNS": 7, "TILE_ELEMENTS": 50},
    "units of one row": {"threads": 3, "CUT_ELEMENTS": 4},
    "units of some rows": {"threads": 2, "CUT_ELEMENTS": 500, "STRIP_BYTES": 777, "TILE_ELEMENTS": 4000},
}
"""How the work is cut: arguments of `merge`, and in capitals the sizes that are constants otherwise."""


@pytest.mark.parametrize("cut", CUTS)
def test_no_byte_depends_on_how_the_work_is_cut(work: Work, cut: str, tmp_path: Path, monkeypatch: Patch) -> None:
    how = {name: value for name, value in CUTS[cut].items() if name.islower()}
    for name in CUTS[cut].keys() - how.keys():
        for module in (budget, digests, engine, products, compare):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, CUTS[cut][name])
    before = torch.get_num_threads()
    assert work.merged(tmp_path / "out", **how) == work.expected
    assert verify(work.out, work.base, work.adapters, work.options, **how).verified  # type: ignore[arg-type]
    assert torch.get_num_threads() == before
    with pytest.raises(UsageError, match="too small"):
        work.merged(tmp_path / "less", memory=1 << 20)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(701, 515), (37, 10007)])
def test_many_tiles_with_an_odd_tail(tmp_path: Path, shape: tuple[int, int], name: str, monkeypatch: Patch) -> None:
    base = write_base(tmp_path / "base", {"x.weight": gaussian(0, *shape, dtype=DTYPES[name])})
    adapter = write_adapter(tmp_path / "adapter", lora(1, "x", *shape, 16), r=16)
    merge(base, [adapter], tmp_path / "tiles", threads=2)
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 100_000)
    merge(base, [adapter], tmp_path / "units", threads=2)
    one_tile_each(monkeypatch)
    merge(base, [adapter], tmp_path / "whole", threads=1)
    assert digest(tmp_path / "tiles") == digest(tmp_path / "units") == digest(tmp_path / "whole") != digest(base)


def test_shards_and_order_do_not_show(work: Work, tmp_path: Path) -> None:
    one = write_base(tmp_path / "base", read_tensors(work.base))
    merge(one, work.adapters, tmp_path / "one", work.options)
    split = read_tensors(work.out)
    for key, tensor in read_tensors(tmp_path / "one").items():
        assert_same_bits(tensor, split[key], key)
    merge(work.base, work.adapters[::-1], tmp_path / "turned", PlanOptions(weights=work.options.weights[::-1]))
    assert digest(tmp_path / "turned") == work.expected


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("weight", [0.375, 0.3, -2.0])
def test_a_weight_is_an_alpha(work: Work, tmp_path: Path, weight: float, rslora: bool) -> None:
    factors = lora(7, "x", 67, 45) | lora(8, "c_attn", 67, 45)
    config: dict[str, Any] = {"use_rslora": rslora, "alpha_pattern": {"c_attn": 2}}
    weighted = write_adapter(tmp_path / "weighted", factors, lora_alpha=16, **config)
    config["alpha_pattern"] = {"c_attn": 2 * weight}  # both products are exact
    direct = write_adapter(tmp_path / "direct", factors, lora_alpha=16 * weight, **config)
    merge(work.base, [weighted], tmp_path / "one", PlanOptions(weights=(weight,)))
    merge(work.base, [direct], tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(work.base)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 90])
def test_weight_zero_gives_the_base_byte_for_byte(tmp_path: Path, name: str, shard_bytes: int) -> None:
    tensors = {key: awkward(n, name, *shape) for n, (key, shape) in enumerate(SHAPES.items())}
    tensors["h.0.attn.c_proj.weight"] = torch.full((6, 6), -0.0).to(DTYPES[name])
    base = write_base(tmp_path / "base", tensors, shard_bytes)
    factors = lora(1, "h.0.mlp.lin", 5, 7) | lora(2, "h.0.attn.c_proj", 6, 6) | lora(3, "h.0.attn.c_attn", 9, 7)
    factors |= {"h.0.mlp.lin.lora_B.bias": torch.ones(5), "h.0.ln.weight": torch.ones(4), "score.weight": torch.ones(2)}
    adapter = write_adapter(tmp_path / "adapter", factors, lora_bias=True, modules_to_save=["ln", "score"])
    result = merge(base, [adapter], tmp_path / "out", PlanOptions(weights=(0.0,)))
    assert digest(tmp_path / "out", "*") == digest(base, "*")
    assert result.ledger == {"applied": 7, "replaced": 0, "added": 0, "ignored": 2}
    assert {entry.reason for entry in result.entries if entry.outcome == "ignored"} == {"weight 0"}
