"""Factors taken from the base's weights, and the base that is left: together they are the base, for us and for PEFT."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models import CASES, Case, load, quiet, read_tensors
from safetensors.torch import load_file, save_file

from lora_cli.checkpoint.hub import Location
from lora_cli.checkpoint.staging import Staging
from lora_cli.errors import (
    DiskFullError,
    Interrupted,
    LoraCliError,
    NumericError,
    OutputExistsError,
    ShapeError,
    UsageError,
    WriteError,
)
from lora_cli.progress import Progress
from lora_cli.surgery import results
from lora_cli.surgery.inject import InjectResult, inject
from lora_cli.surgery.inject_options import settle_options
from lora_cli.surgery.merge import merge
from lora_cli.surgery.receipt import find_receipt

INITS = ("pissa", "pissa_niter_4", "olora")
BY_NAME = {case.name: case for case in CASES}
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Significant bits of a storage type."""

KINDS: Mapping[str, tuple[int, ...]] = {
    "word_embeddings.weight": (20, 8),
    "conv1.weight": (9, 4, 3),
    "patch.projection.weight": (8, 3, 2, 2),
    "encoder.layer.0.attention.self.query.weight": (8, 8),
    "encoder.layer.0.norm.weight": (8,),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny.write_base(tmp_path / "base")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def taken(base: Path, tmp_path: Path, init: str, rank: int = 3, **options: Any) -> InjectResult:
    out, left = tmp_path / "out", tmp_path / "left"
    return inject(base, out, rank=rank, base_out=left, init=init, **options)


def unit(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """One unit in the last place of each number."""
    return torch.ldexp(torch.ones_like(tensor), torch.frexp(tensor).exponent - bits)


def product(module: str, folder: Path, scale: float) -> torch.Tensor:
    """scale·B·A in float64, (out, in) or as the kernel, from the files."""
    stored = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}.lora_"
    if f"{prefix}embedding_A" in stored:
        a, b = (stored[f"{prefix}embedding_{side}"].double() for side in "AB")
        return torch.matmul(scale * b, a).T
    a, b = (stored[f"{prefix}{side}.weight"].double() for side in "AB")
    return torch.matmul(scale * b.flatten(1), a.flatten(1)).view(b.shape[0], *a.shape[1:])


# What is left, and the base


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("factors", ["fp32", "bf16"])
def test_adapter_and_residual_are_the_base(init: str, dtype: torch.dtype, factors: str, tmp_path: Path) -> None:
    """One rounding of base - scale·B·A; merged again, each weight is within one unit of the larger of the two."""
    tensors = {key: numbers(*shape, seed=seed).to(dtype) for seed, (key, shape) in enumerate(KINDS.items())}
    base = write(tmp_path / "base", tensors)
    targets = ["word_embeddings", "conv1", "projection", "query"]
    result = taken(base, tmp_path, init, rank=4, alpha=6, rslora=True, dtype=factors, targets=targets)
    merge(tmp_path / "left", [tmp_path / "out"], tmp_path / "merged", undo=False)
    left, merged = read_tensors(tmp_path / "left"), read_tensors(tmp_path / "merged")
    assert len(result.modules) == 4
    for module in result.modules:
        key, bits = module.key, BITS[dtype]
        before, rest, after = (found[key].double() for found in (tensors, left, merged))
        exact = before - product(key.removesuffix(".weight"), tmp_path / "out", 6 / 4**0.5)
        assert ((rest - exact).abs() <= 0.5 * unit(rest, bits) + 1e-6).all(), key
        assert left[key].dtype == dtype
        assert ((after - before).abs() <= unit(torch.maximum(before.abs(), rest.abs()), bits)).all(), key
        # It is not for nothing: much of the weight is in the factors.
        assert rest.norm() < 0.95 * before.norm() or init == "olora"
        assert not torch.equal(rest, before)
    assert torch.equal(left["encoder.layer.0.norm.weight"], tensors["encoder.layer.0.norm.weight"])


@pytest.mark.parametrize("init", INITS)
def test_all_else_of_the_base_stays(init: str, base: Path, tmp_path: Path) -> None:
    result = taken(base, tmp_path, init)
    assert result.residual is not None
    left = tmp_path / "left"
    assert sorted(path.name for path in left.iterdir()) == sorted(result.residual.files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result.files)
    assert set(result.residual.files) == {path.name for path in base.iterdir()} | {"lora_inject.json"}
    assert result.residual.bytes_written == sum(path.stat().st_size for path in left.iterdir())
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (left / name).read_bytes() == (base / name).read_bytes()
    changed = {module.key for module in result.modules}
    before, after = read_tensors(base), read_tensors(left)
    assert changed == {f"{module}.weight" for module in tiny.MODULES}
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed
    for shard in base.glob("*.safetensors"):
        data, other = shard.read_bytes(), (left / shard.name).read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        assert other[:length] == data[:length]


def test_pissa_takes_the_largest_directions(base: Path, tmp_path: Path) -> None:
    taken(base, tmp_path, "pissa", rank=3)
    before, left = read_tensors(base), read_tensors(tmp_path / "left")
    for module in tiny.MODULES:
        values = torch.linalg.svdvals(before[f"{module}.weight"].double())
        rest = torch.linalg.svdvals(left[f"{module}.weight"].double())
        assert torch.allclose(rest[: len(values) - 3], values[3:], atol=1e-5)


def test_a_matrix_that_is_stored_the_other_way_round(tmp_path: Path) -> None:
    weight, bias = numbers(6, 15), numbers(15)
    tensors = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": bias}
    taken(write(tmp_path / "base", tensors, model_type="gpt2"), tmp_path, "pissa", rank=2, alpha=4)
    found = product("h.0.attn.c_attn", tmp_path / "out", 2.0)
    assert found.shape == (15, 6)
    left = read_tensors(tmp_path / "left")["h.0.attn.c_attn.weight"]
    assert torch.allclose(left.double(), weight.double() - found.T, atol=1e-6)
    values = torch.linalg.svdvals(weight.double())
    assert torch.allclose(torch.linalg.svdvals(found)[:2], values[:2], atol=1e-5)


# PEFT


def peft_factors(case: Case, folder: Path, init: str, targets: list[str], rank: int) -> dict[str, torch.Tensor]:
    """scale·B·A as PEFT itself begins, by module."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    options = LoraConfig(
        r=rank, lora_alpha=rank * 2, target_modules=targets, init_lora_weights=init, fan_in_fan_out=case.name == "gpt2"
    )
    with quiet(case.seed):
        model = get_peft_model(load(case, folder), options)
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(
    ("name", "init", "targets"),
    [
        ("llama-untied", "pissa", ["q_proj", "down_proj"]),
        ("llama-untied", "olora", ["q_proj", "down_proj"]),
        ("llama-untied", "pissa_niter_16", ["q_proj", "down_proj"]),
        ("gpt2", "pissa", ["c_attn"]),
    ],
)
def test_the_product_is_peft_s(name: str, init: str, targets: list[str], tmp_path: Path) -> None:
    case, rank = BY_NAME[name], 3
    with quiet(case.seed), torch.no_grad():
        model = case.base().float()
        for parameter in model.parameters():
            if parameter.ndim == 2:  # directions of clearly different strength, as trained weights have them
                parameter.mul_(0.6 ** torch.arange(parameter.shape[1]))
        model.save_pretrained(tmp_path / "base")
    result = taken(tmp_path / "base", tmp_path, init, rank=rank, alpha=rank * 2, targets=targets)
    theirs = peft_factors(case, tmp_path / "base", init, targets, rank)
    assert len(theirs) == len(result.modules) > 0
    for module, expected in theirs.items():
        ours = product(module, tmp_path / "out", 2.0).float()
        assert expected.abs().max() > 1e-3
        assert torch.allclose(ours, expected, atol=1e-5), module  # theirs is computed in float32


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_on_the_residual_is_the_base(name: str, init: str, tmp_path: Path) -> None:
    from peft import PeftModel

    case = BY_NAME[name]
    with quiet(case.seed), torch.no_grad():
        case.base().float().save_pretrained(tmp_path / "base", max_shard_size=case.max_shard_size)
    # A gate that gives one number has one direction.
    small = ["shared_expert_gate"] if name == "qwen2-moe" else []
    taken(tmp_path / "base", tmp_path, init, rank=4, exclude=small)
    with quiet(case.seed), torch.no_grad():
        expected = load(case, tmp_path / "base")(**case.inputs())[0]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(load(case, tmp_path / "left"), tmp_path / "out").eval()
        assert not [str(w.message) for w in said if "missing" in str(w.message)]
        assert torch.allclose(model(**case.inputs())[0], expected, atol=1e-4)
        # Without the factors it is another model, and on the base itself they are too much.
        with model.disable_adapter():
            assert not torch.allclose(model(**case.inputs())[0], expected, atol=1e-2)


# The same bytes, receipts, plans


@pytest.mark.parametrize("init", INITS)
def test_threads_and_memory_change_nothing(init: str, tmp_path: Path) -> None:
    shapes = {f"layers.{at}.up_proj.weight": (128, 256) for at in range(144)}  # more than one worker's share
    base = write(tmp_path / "base", {key: numbers(*shape, seed=at) for at, (key, shape) in enumerate(shapes.items())})
    found = []
    for threads, memory in ((1, None), (3, 400 << 20)):
        place = tmp_path / str(threads)
        place.mkdir()
        taken(base, place, init, rank=2, threads=threads, memory=memory)
        found.append([path.read_bytes() for path in sorted(place.rglob("*.safetensors"))])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_seed_decides_only_what_is_drawn(base: Path, tmp_path: Path) -> None:
    """The width of a tiny weight is all there is, so both decompositions are exact; the receipt has the seed."""
    for init in ("pissa_niter_1", "pissa"):
        for seed in (0, 1):
            place = tmp_path / f"{init}-{seed}"
            place.mkdir()
            taken(base, place, init, seed=seed)
    read = {path.name: load_file(path / "out" / "adapter_model.safetensors") for path in tmp_path.glob("pissa*")}
    for key, tensor in read["pissa-0"].items():
        assert torch.equal(read["pissa-1"][key], tensor)
        assert torch.allclose(read["pissa_niter_1-1"][key], tensor, atol=1e-5)


def test_the_seed_decides_a_randomised_decomposition(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a.up_proj.weight": numbers(64, 48)})
    found = []
    for number, seed in enumerate((0, 1, 1)):
        place = tmp_path / str(number)
        place.mkdir()
        taken(base, place, "pissa_niter_0", rank=2, seed=seed)
        found.append((place / "out" / "adapter_model.safetensors").read_bytes())
    assert found[0] != found[1] == found[2]


def test_no_base_of_the_hub_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the one to load beside these factors."""
    found = Location(base, "owner/name@" + "0123456789" * 4, hub=True)
    monkeypatch.setattr(results, "locate", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    for init, name in (("olora", None), ("kaiming", "owner/name")):
        inject("owner/name", init, rank=2, init=init, base_out="left" if init == "olora" else "")
        said = json.loads((tmp_path / init / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == name
    assert json.loads((tmp_path / "left" / "lora_inject.json").read_text())["base"]["label"].startswith("owner/name@")


def test_receipts_and_config(base: Path, tmp_path: Path) -> None:
    taken(base, tmp_path, "pissa_niter_2")
    adapter, left = find_receipt(tmp_path / "out"), find_receipt(tmp_path / "left")
    assert adapter is not None
    assert left is not None
    assert adapter["residual"]["label"] == "left"
    assert left["adapter"]["label"] == "out"
    assert len(left["adapter"]["digest"]) == 64
    assert adapter["options"] == left["options"]
    assert adapter["options"]["init"] == "pissa_niter_2"
    assert left["operation"] == "inject"
    assert left["bytes"]["config.json"] == (base / "config.json").stat().st_size
    # On the residual the factors are an ordinary LoRA: PEFT would take them off once more for any other word.
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True
    taken(base, tmp_path, "olora", force=True)
    assert json.loads((tmp_path / "left" / "lora_inject.json").read_text())["options"]["init"] == "olora"


def test_one_file_in_and_out(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path / "base", shards=1)
    bare = (folder / "model.safetensors").rename(tmp_path / "bare.safetensors")
    result = inject(bare, tmp_path / "out", rank=2, init="olora", base_out=tmp_path / "left.safetensors")
    assert result.residual is not None
    assert result.residual.files == ("left.safetensors", "left.lora_inject.json")
    merge(tmp_path / "left.safetensors", [tmp_path / "out"], tmp_path / "merged.safetensors", undo=False)
    before, after = load_file(bare), load_file(tmp_path / "merged.safetensors")
    assert all(torch.allclose(after[key], tensor, atol=1e-6) for key, tensor in before.items())


def test_the_example_config(base: Path, tmp_path: Path) -> None:
    options = settle_options(Path(__file__).parents[2] / "configs" / "inject-pissa.yaml", {"rank": 2})
    assert (options.init, options.iterations, options.alpha) == ("pissa_niter_16", 16, 16)
    result = inject(base, tmp_path / "out", base_out=tmp_path / "left", **options.arguments())
    assert len(result.modules) == 4


# Refusals, and outputs that are complete or absent


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"init": "pissa"}, UsageError),
        ({"init": "kaiming", "base_out": "left"}, UsageError),
        ({"init": "olora", "base_out": "left", "layout": "wrapped"}, UsageError),
        ({"init": "pissa", "base_out": "left", "rank": 9}, ShapeError),
        ({"init": "pissa", "base_out": "out"}, OutputExistsError),
        ({"init": "pissa", "base_out": "out/left"}, LoraCliError),
        ({"init": "pissa", "base_out": "base/left"}, OutputExistsError),
        ({"init": "pissa", "base_out": "left.safetensors"}, UsageError),
        ({"init": "pissa", "base_out": "left", "memory": 1000}, UsageError),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    base: Path, tmp_path: Path, options: dict[str, Any], error: type[LoraCliError]
) -> None:
    if "base_out" in options:
        options = options | {"base_out": tmp_path / options["base_out"]}
    with pytest.raises(error):
        inject(base, tmp_path / "out", **{"rank": 2, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_all_weights_that_are_too_small_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="4 weights are too small") as caught:
        taken(base, tmp_path, "pissa_niter_2", rank=9)
    assert caught.value.details[0] == "model.layers.0.mlp.up_proj is (16 × 8)"
    assert len(caught.value.details) == 4


def test_weights_that_cannot_be_taken_from(tmp_path: Path) -> None:
    weight = numbers(6, 6)
    weight[2, 3] = torch.nan
    base = write(tmp_path / "base", {"a.weight": weight, "b.weight": 1e13 * numbers(6, 6).abs()})
    for target, dtype, words in (("a", "fp32", "NaN"), ("b", "fp16", "does not fit in fp16")):
        with pytest.raises(NumericError, match=words) as caught:
            taken(base, tmp_path, "pissa", targets=[target], dtype=dtype)
        assert caught.value.tensor == f"{target}.weight"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("which", ["left", "out"])
def test_both_outputs_are_published_or_none(
    which: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Staging.publish

    def broken(staging: Staging, *arguments: Any) -> None:
        if staging.target.name == which:
            raise WriteError("as if the disk was gone")
        publish(staging, *arguments)

    monkeypatch.setattr(Staging, "publish", broken)
    with pytest.raises(WriteError):
        taken(base, tmp_path, "olora")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_complete_is_not_taken_back(base: Path, tmp_path: Path) -> None:
    class Stopped(Progress):
        def published(self, out: str) -> None:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        taken(base, tmp_path, "olora", progress=Stopped())
    merge(tmp_path / "left", [tmp_path / "out"], tmp_path / "merged", undo=False)


def test_one_file_is_taken_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, publish = tiny.write_base(tmp_path / "base", shards=1), Staging.publish

    def broken(staging: Staging, *arguments: Any) -> None:
        if staging.target.name == "out":
            assert (tmp_path / "left.safetensors").exists()
            raise WriteError("as if the disk was gone")
        publish(staging, *arguments)

    monkeypatch.setattr(Staging, "publish", broken)
    with pytest.raises(WriteError):
        inject(folder, tmp_path / "out", rank=2, init="olora", base_out=tmp_path / "left.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_space_for_both_is_looked_for_before_any_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in base.iterdir())
    monkeypatch.setattr("lora_cli.checkpoint.targets.free_bytes", lambda _: size)
    with pytest.raises(DiskFullError):
        taken(base, tmp_path, "pissa")
