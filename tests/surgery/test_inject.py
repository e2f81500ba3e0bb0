"""Fresh adapters: PEFT takes them, they change nothing, and they are the same bytes however they are made."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from models import CASES, Case, Model, load, quiet, read_tensors
from safetensors.torch import load_file, save_file

from lora_cli.adapters.inits import draw
from lora_cli.checkpoint.hub import Location
from lora_cli.errors import (
    LoraCliError,
    MalformedFileError,
    NamesError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from lora_cli.progress import Progress
from lora_cli.surgery import results
from lora_cli.surgery.inject import inject, prepare
from lora_cli.surgery.inject_options import InjectOptions, Layout, settle_options
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge
from lora_cli.surgery.plan import Plan
from lora_cli.surgery.receipt import find_receipt

MakeBase = Callable[[str], Path]

BY_NAME = {case.name: case for case in CASES}
OWN_CLASS = {"gpt2-bare": "AutoModel", "bert-classifier": "AutoModel"}
"""Bare backbones are loaded as what they are: their names are those of the file."""
LIVE = ["llama-tied", "llama-untied", "gpt2", "gpt2-bare", "bert-classifier", "bert-mlm", "t5", "qwen2-moe"]
CONFIGS = Path(__file__).parents[2] / "configs"


def own(case: Case) -> Case:
    return replace(case, auto=OWN_CLASS.get(case.name, case.auto), load_options=None)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Bases as `save_pretrained` writes them, with negative zeros among the numbers."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            case = BY_NAME[name]
            folder = tmp_path_factory.mktemp(name)
            with quiet(case.seed), torch.no_grad():
                model = case.base().to(torch.bfloat16 if name == "bert-mlm" else torch.float32)
                for parameter in model.parameters():
                    parameter.view(-1)[::7] = -0.0
                model.save_pretrained(folder, max_shard_size=case.max_shard_size)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that tell of the merge: receipt, undo file and card."""
    told = ("lora_", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(told)}


def assert_same_checkpoint(found: Path, expected: Path, *, index_by_content: bool = False) -> None:
    found_files, expected_files = contents(found), contents(expected)
    assert found_files.keys() == expected_files.keys()
    for name, data in expected_files.items():
        if index_by_content and name.endswith(".index.json"):
            assert json.loads(found_files[name]) == json.loads(data)
        else:
            assert found_files[name] == data, name


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def lora_modules(model: Model) -> set[str]:
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# PEFT


@pytest.mark.parametrize("name", LIVE)
def test_peft_takes_exactly_what_was_injected(name: str, make_base: MakeBase, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    case, out = own(BY_NAME[name]), tmp_path / "fresh"
    result = inject(make_base(name), out, rank=3, alpha=12, rslora=name == "t5")
    injected = {module.key.removesuffix(".weight") for module in result.modules}
    with quiet(case.seed), torch.no_grad():
        plain = load(case, make_base(name))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(plain, out).eval()
        assert not [str(w.message) for w in said if "fan_in" in str(w.message) or "missing" in str(w.message)]
        assert lora_modules(model) == injected
        state, stored = model.state_dict(), load_file(out / "adapter_model.safetensors")
        for key, tensor in stored.items():
            assert torch.equal(state[key.replace(".weight", ".default.weight")], tensor)
        assert len(stored) == 2 * len(injected) == sum(".lora_" in key for key in state)
        layer = model.get_submodule(f"base_model.model.{result.modules[0].key.removesuffix('.weight')}")
        assert layer.scaling["default"] == (12 / math.sqrt(3) if name == "t5" else 4)
        # B is zero: not a bit of the output changes.
        outputs = model(**case.inputs())
        with model.disable_adapter():
            expected = model(**case.inputs())
        assert torch.equal(outputs[0], expected[0])
        # The preset means what PEFT means by it.
        theirs = get_peft_model(load(case, make_base(name)), LoraConfig(target_modules="all-linear"))
        assert lora_modules(theirs) == injected


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("llama-tied", ["mlp"], 6),
        ("llama-tied", ["layers.1.**", "layers.0.**.q_proj"], 8),
        ("gpt2-bare", ["mlp.c_proj", "h.0.attn.c_proj"], 3),
        ("bert-classifier", ["attention.output.dense", "pooler.dense"], 3),
        ("bert-classifier", [r"re:encoder\.layer\.1\..*"], 6),
        ("llama-untied", ["lm_head", "o_proj"], 2),
    ],
)
def test_peft_selects_parts_of_a_model(
    name: str, targets: Sequence[str], count: int, make_base: MakeBase, tmp_path: Path
) -> None:
    from peft import PeftModel

    case = own(BY_NAME[name])
    result = inject(make_base(name), tmp_path / "fresh", rank=2, targets=targets, init="orthogonal")
    with quiet(case.seed):
        model = PeftModel.from_pretrained(load(case, make_base(name)), tmp_path / "fresh")
    assert lora_modules(model) == {module.key.removesuffix(".weight") for module in result.modules}
    assert len(result.modules) == count


def test_peft_finds_a_bare_backbone_under_a_head(make_base: MakeBase, tmp_path: Path) -> None:
    """A classifier on bare BERT: its own `dense` layers get nothing, those of the backbone get their factors."""
    from peft import PeftModel

    case = replace(BY_NAME["bert-classifier"], auto="AutoModelForSequenceClassification")
    result = inject(make_base(case.name), tmp_path / "fresh", rank=2)
    with quiet(case.seed):
        model = PeftModel.from_pretrained(load(case, make_base(case.name)), tmp_path / "fresh")
    assert lora_modules(model) == {f"bert.{module.key.removesuffix('.weight')}" for module in result.modules}


# Merging what is fresh gives back the base


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_merging_a_fresh_adapter_gives_the_base(name: str, make_base: MakeBase, tmp_path: Path) -> None:
    inject(make_base(name), tmp_path / "fresh", rank=2, init="gaussian", std=3.0)
    merge(make_base(name), [tmp_path / "fresh"], tmp_path / "merged")
    assert_same_checkpoint(tmp_path / "merged", make_base(name))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_merging_a_fresh_wrapped_checkpoint_gives_the_base(name: str, make_base: MakeBase, tmp_path: Path) -> None:
    result = inject(make_base(name), tmp_path / "wrapped", rank=2, layout="wrapped", rslora=True)
    merge(tmp_path / "wrapped", (), tmp_path / "merged")
    # The merge writes a new index, whose order is its own.
    assert_same_checkpoint(tmp_path / "merged", make_base(name), index_by_content=True)
    wrapped, base = read_tensors(tmp_path / "wrapped"), read_tensors(make_base(name))
    assert len(wrapped) == len(base) + 2 * len(result.modules)
    assert {key for key in wrapped if ".base." in key} == {
        f"{module}.base.{parameter}"
        for module in (m.key.removesuffix(".weight") for m in result.modules)
        for parameter in ("weight", "bias")
        if f"{module}.{parameter}" in base
    }


def trained(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors with something in B, the same for the same module in any layout."""
    return {
        key: torch.linspace(-1, 1, tensor.numel()).view(tensor.shape).sin() if "lora_B" in key else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "gpt2-bare", "bert-mlm"])
@pytest.mark.parametrize("rslora", [False, True])
def test_both_layouts_train_to_the_same_merge(name: str, rslora: bool, make_base: MakeBase, tmp_path: Path) -> None:
    """Same factors, same scale, same way round: also where the base stores (in × out)."""
    layouts: tuple[Layout, ...] = ("adapter", "wrapped")
    for layout in layouts:
        inject(make_base(name), tmp_path / layout, rank=3, alpha=5, rslora=rslora, layout=layout)
        for file in (tmp_path / layout).glob("*.safetensors"):
            save_file(trained(load_file(file)), file, metadata={"format": "pt"})
    merge(make_base(name), [tmp_path / "adapter"], tmp_path / "one")
    merge(tmp_path / "wrapped", (), tmp_path / "other")
    assert_same_checkpoint(tmp_path / "other", tmp_path / "one", index_by_content=True)
    assert contents(tmp_path / "one") != contents(make_base(name))


# The wrapped layout


def test_a_wrapped_checkpoint_keeps_shards_order_and_side_files(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "optimizer.bin").write_bytes(b"x")
    result = inject(base, tmp_path / "out", rank=2, layout="wrapped", targets=["q_proj"], dtype="bf16")
    assert result.left_out == ("optimizer.bin",)
    for shard in sorted(base.glob("*.safetensors")):
        expected = []
        for key in _keys(shard):
            module, _, parameter = key.rpartition(".")
            wrapped = module.endswith("q_proj")
            expected += [f"{module}.base.{parameter}" if wrapped else key]
            expected += [f"{module}.lora_{side}.weight" for side in "AB"] if wrapped else []
        assert _keys(tmp_path / "out" / shard.name) == expected
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {
        key: file.name for file in (tmp_path / "out").glob("*.safetensors") for key in _keys(file)
    }
    assert tensors["model.layers.0.self_attn.q_proj.lora_A.weight"].dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").exists()
    said = json.loads((tmp_path / "out" / "lora_wrap.json").read_text())
    q_proj = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert said == {
        "schema": "lora-cli/wrap/1",
        "rank": 2,
        "alpha": 2.0,
        "scaling": "alpha/rank",
        "fan_in_fan_out": False,
        "modules": q_proj,
        "rename": {f"{module}.weight": f"{module}.base.weight" for module in q_proj},
    }


def _keys(file: Path) -> list[str]:
    """Names in byte order."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda key: (header[key]["data_offsets"], key))


def test_a_sorted_index_stays_sorted(make_base: MakeBase, tmp_path: Path) -> None:
    inject(make_base("t5"), tmp_path / "out", rank=1, layout="wrapped")
    names = list(json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"])
    assert names == sorted(names)


def test_a_shard_without_targets_is_the_base_s_own(make_base: MakeBase, tmp_path: Path) -> None:
    inject(make_base("llama-tied"), tmp_path / "out", rank=1, layout="wrapped", targets=["layers.0.**.q_proj"])
    same = [
        shard.name
        for shard in make_base("llama-tied").glob("*.safetensors")
        if shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    ]
    assert len(same) == 3


def test_a_shard_without_targets_keeps_a_header_that_others_would_write_otherwise(base: Path, tmp_path: Path) -> None:
    """Its bytes are copied, not made again: spaces behind the header stay."""
    shard = base / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shard.write_bytes((length + 64).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 64 + data[8 + length :])
    inject(base, tmp_path / "out", rank=2, layout="wrapped", targets=["layers.1.mlp.up_proj"])
    assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_one_file_in_and_out(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path / "base", shards=1)
    bare = (folder / "model.safetensors").rename(tmp_path / "bare.safetensors")
    out = tmp_path / "wrapped.safetensors"
    result = inject(bare, out, rank=2, alpha=1, layout="wrapped")
    assert result.files == ("wrapped.safetensors", "wrapped.lora_wrap.json", "wrapped.lora_inject.json")
    assert result.bytes_written == sum((tmp_path / name).stat().st_size for name in result.files)
    merge(out, (), tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == bare.read_bytes()
    with pytest.raises(OutputExistsError):
        inject(bare, out, rank=2, layout="wrapped")
    inject(bare, out, rank=3, layout="wrapped", force=True)
    assert json.loads((tmp_path / "wrapped.lora_wrap.json").read_text())["rank"] == 3


def test_nothing_of_others_is_written_over_beside_one_file(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path / "base", shards=1)
    (tmp_path / "x.lora_wrap.json").write_text("mine")
    with pytest.raises(OutputExistsError):
        inject(folder, tmp_path / "x.safetensors", rank=2, layout="wrapped")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x.lora_wrap.json"]


def test_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    module = tiny.MODULES[0]
    taken = tiny.base_tensors() | {f"{module}.base.weight": tiny.numbers(2)}
    base = tiny.write_base(tmp_path / "base", taken)
    with pytest.raises(NamesError) as caught:
        inject(base, tmp_path / "out", rank=2, layout="wrapped")
    assert any(f"would both be {module}.base.weight" in detail for detail in caught.value.details)


def test_a_base_with_factors_is_refused(base: Path, tmp_path: Path) -> None:
    inject(base, tmp_path / "wrapped", rank=2, layout="wrapped")
    with pytest.raises(UnsupportedError, match="carries factors already"):
        inject(tmp_path / "wrapped", tmp_path / "out", rank=2)


# What is written


def test_the_result_says_what_was_written(base: Path, tmp_path: Path) -> None:
    plans: list[Plan] = []
    out = tmp_path / "out"
    result = inject(base, out, rank=2, alpha=3.5, exclude=["layers.1.**"], seed=4, on_plan=plans.append)
    assert result.files == ("adapter_model.safetensors", "adapter_config.json", "lora_inject.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(result.files)
    assert result.bytes_written == sum(path.stat().st_size for path in out.iterdir())
    assert [(module.key, module.rank, module.shape) for module in result.modules] == [
        ("model.layers.0.mlp.up_proj.weight", 2, (16, 8)),
        ("model.layers.0.self_attn.q_proj.weight", 2, (12, 8)),
    ]
    assert result.parameters == sum(t.numel() for t in load_file(out / "adapter_model.safetensors").values()) == 88
    whole = sum(tensor.size for tensor in tiny.base_tensors().values())
    assert result.trainable_fraction == 88 / (88 + whole)
    assert (result.layout, result.rank, result.alpha) == ("adapter", 2, 3.5)
    receipt = find_receipt(out)
    assert receipt is not None
    assert receipt["base"] == {"label": "base"}
    assert receipt["options"] == {
        "rank": 2,
        "alpha": 3.5,
        "targets": ["all-linear"],
        "exclude": ["layers.1.**"],
        "init": "kaiming",
        "std": None,
        "layout": "adapter",
        "rslora": False,
        "dtype": "fp32",
        "seed": 4,
    }
    assert str(tmp_path) not in (out / "lora_inject.json").read_text()
    said = plans[0].as_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["files"][0]["edits"][0]["source"]["made_by"] == "kaiming, seed 4"
    assert said["tensors"] == {"total": 4, "edited": 0, "copied": 0, "added": 4, "dropped": 0}
    assert said["bytes_to_read"] == 0
    assert not plans[0].files[0].untouched


def test_the_config_is_what_peft_writes(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    inject(base, tmp_path / "out", rank=2, init="gaussian")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    theirs = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM").to_dict()
    theirs |= {"inference_mode": True, "init_lora_weights": "gaussian"}
    theirs["target_modules"] = sorted(theirs["target_modules"])
    assert said == {name: theirs[name] for name in said}
    assert {"peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path"} <= set(said)


def test_factors_are_those_of_the_inits(base: Path, tmp_path: Path) -> None:
    for init in ("kaiming", "gaussian", "orthogonal"):
        inject(base, tmp_path / init, rank=3, init=init, seed=9)
        found = load_file(tmp_path / init / "adapter_model.safetensors")
        for module in tiny.MODULES:
            key = f"{module}.lora_A.weight"
            expected = draw(init, key, (3, tiny.WIDTH), seed=9).astype(np.float32)
            assert np.array_equal(found[f"base_model.model.{key}"].numpy(), expected)
            b = found[f"base_model.model.{module}.lora_B.weight"]
            assert b.shape == (tiny.out_of(module), 3)
            assert not b.any()


def test_the_deviation_and_the_patterns_of_a_file_are_those_given(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("targets: [mlp]\nexclude: [layers.0.**]\n")
    out = tmp_path / "out"
    inject(base, out, rank=3, init="gaussian", std=2.5, targets=[str(tmp_path / "mine.yaml")])
    key = "model.layers.1.mlp.up_proj.lora_A.weight"
    found = load_file(out / "adapter_model.safetensors")
    assert len(found) == 2
    expected = draw("gaussian", key, (3, tiny.WIDTH), std=2.5).astype(np.float32)
    assert np.array_equal(found[f"base_model.model.{key}"].numpy(), expected)
    receipt = find_receipt(out)
    assert receipt is not None
    said = receipt["options"]
    assert (said["targets"], said["exclude"], said["std"]) == (["mlp"], ["layers.0.**"], 2.5)


def test_inspect_reads_it(base: Path, tmp_path: Path) -> None:
    inject(base, tmp_path / "out", rank=2, alpha=6)
    found = inspect(tmp_path / "out", base=base)
    assert (found.kind, found.base, found.warnings) == ("adapter", None, ())
    assert {(module.module, module.key, module.scale) for module in found.modules} == {
        (module, f"{module}.weight", 3.0) for module in tiny.MODULES
    }


def test_a_base_from_the_hub_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    found = Location(base, f"owner/name@{commit}", hub=True)
    monkeypatch.setattr(results, "locate", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    for reference in ("owner/name", "hf://owner/name@main"):
        out = tmp_path / reference.partition(":")[0].replace("/", "-")
        inject(reference, out, rank=2)
        said = json.loads((out / "adapter_config.json").read_text())
        assert (said["base_model_name_or_path"], said["revision"]) == ("owner/name", commit)
    local = tmp_path / "owner" / "name"
    local.mkdir(parents=True)
    inject("owner/name", tmp_path / "local", rank=2)
    assert json.loads((tmp_path / "local" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


# The same bytes


@pytest.mark.parametrize("layout", ["adapter", "wrapped"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_threads_and_memory_change_nothing(layout: Any, init: str, make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama-untied")
    for name, threads, memory in (("a", 1, 256 << 20), ("b", 4, 256 << 20), ("c", 2, 10 << 20)):
        inject(base, tmp_path / name, rank=130, init=init, layout=layout, threads=threads, memory=memory)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_one_seed_one_adapter(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inject(base, tmp_path / name, rank=2, seed=seed)
    a, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ac")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for key, tensor in a.items():
        assert torch.equal(tensor, c[key]) is ("lora_B" in key)
    drawn = [tensor for key, tensor in a.items() if "lora_A" in key]
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == len(drawn)


def test_other_modules_layouts_and_shards_do_not_matter(base: Path, tmp_path: Path) -> None:
    one_file = tiny.write_base(tmp_path / "other", shards=1)
    inject(base, tmp_path / "all", rank=2)
    inject(base, tmp_path / "some", rank=2, targets=["layers.1.**", "mlp"], exclude=["layers.0.mlp.**"])
    inject(one_file, tmp_path / "wrapped", rank=2, layout="wrapped", targets=["mlp", "attention"])
    everything = load_file(tmp_path / "all" / "adapter_model.safetensors")
    some = load_file(tmp_path / "some" / "adapter_model.safetensors")
    wrapped = read_tensors(tmp_path / "wrapped")
    assert 0 < len(some) < len(everything)
    for key, tensor in everything.items():
        assert torch.equal(wrapped[key.removeprefix("base_model.model.")], tensor)
        assert key not in some or torch.equal(some[key], tensor)


# Options


def test_the_example_config(make_base: MakeBase, tmp_path: Path) -> None:
    options = settle_options(CONFIGS / "inject-llama.yaml", {"seed": 5, "rslora": None, "exclude": ()})
    assert (options.rank, options.alpha, options.seed) == (16, 32, 5)
    result = inject(make_base("llama-tied"), tmp_path / "out", **options.arguments())
    layer = "model.layers.1"
    assert {module.key.removesuffix(".weight") for module in result.modules} == {
        f"{layer}.mlp.down_proj",
        *(f"{layer}.self_attn.{name}_proj" for name in "qkvo"),
    }
    # Every field of the example is one that exists, and every field is explained there.
    assert set(options.arguments()) == {*_fields(CONFIGS / "inject-llama.yaml"), "std"}


def _fields(path: Path) -> set[str]:
    return {line.split(":")[0] for line in path.read_text().splitlines() if line[:1].isalpha()}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rank: 4\nalpha: 8\ntargets: [mlp]\nexclude: [up_proj]\nrslora: true\ninit: gaussian\nstd: 1\n")
    assert settle_options(file, {}) == InjectOptions(
        rank=4, alpha=8, targets=("mlp",), exclude=("up_proj",), rslora=True, init="gaussian", std=1
    )
    given = {"rank": 2, "alpha": None, "targets": ("attention",), "exclude": (), "rslora": False, "std": None}
    assert settle_options(file, given) == InjectOptions(
        rank=2, alpha=8, targets=("attention",), exclude=("up_proj",), rslora=False, init="gaussian", std=1
    )
    with pytest.raises(UsageError, match="No rank given"):
        settle_options(None, {"alpha": 3.0})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("rank: 4\nlora_alpha: 3", "lora_alpha"),
        ("rank: four", "rank"),
        ("rank: true", "rank"),
        ("rank: 4.0", "rank"),
        ("rslora: 1", "rslora"),
        ("alpha: yes", "alpha"),
        ("seed: [1]", "seed"),
        ("targets: mlp", "targets"),
        ("exclude: [mlp, mlp]", "exclude"),
        ("init: null", "init"),
    ],
)
def test_a_config_names_the_field_that_is_wrong(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(MalformedFileError) as caught:
        settle_options(tmp_path / "c.yaml", {"rank": 1})
    assert caught.value.tensor == field
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, UsageError),
        ({"rank": -3}, UsageError),
        ({"alpha": 0}, UsageError),
        ({"alpha": math.nan}, UsageError),
        ({"alpha": math.inf}, UsageError),
        ({"alpha": 1e40}, UsageError),
        ({"init": "svd"}, UsageError),
        ({"init": "pissa_niter_"}, UsageError),
        ({"std": 0.1}, UsageError),
        ({"init": "gaussian", "std": -0.1}, UsageError),
        ({"layout": "folded"}, UsageError),
        ({"dtype": "int8"}, UsageError),
        ({"targets": ()}, UsageError),
        ({"targets": ("nothing",)}, NamesError),
        ({"targets": ("input_layernorm",)}, UnsupportedError),
        ({"memory": 1000}, UsageError),
        ({"init": "orthogonal", "memory": 2 << 20, "rank": 8000}, UsageError),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    base: Path, tmp_path: Path, options: dict[str, Any], error: type[LoraCliError]
) -> None:
    with pytest.raises(error):
        inject(base, tmp_path / "out", **{"rank": 2, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_outputs_that_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        inject(base, tmp_path / "out.safetensors", rank=2)
    with pytest.raises(UsageError, match="2 shards"):
        inject(base, tmp_path / "out.safetensors", rank=2, layout="wrapped")
    with pytest.raises(UsageError, match="No output given"):
        inject(base, "", rank=2)
    for inside in (base, base / "out"):
        with pytest.raises(OutputExistsError):
            inject(base, inside, rank=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError):
        inject(base, tmp_path / "mine", rank=2, force=True)
    inject(base, tmp_path / "ours", rank=2)
    inject(base, tmp_path / "ours", rank=3, force=True)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 3


def test_what_is_said_on_the_way(base: Path, make_base: MakeBase, tmp_path: Path) -> None:
    heard = Heard()
    inject(base, tmp_path / "a", rank=13, progress=heard)
    assert heard.warnings == ["rank 13 is more than 4 of 4 modules can use: model.layers.0.mlp.up_proj is (16 × 8)"]
    assert heard.notes == ["left out: 1 of kind head (lm_head), which no preset takes; a pattern can name it"]
    heard = Heard()
    inject(base, tmp_path / "full", rank=8, progress=heard)
    assert heard.warnings == []
    moe = make_base("qwen2-moe")
    prepare(moe, InjectOptions(rank=4, targets=("experts.0.up_proj",)), progress=heard)
    assert heard.warnings == [
        "2 targets are single experts, which transformers 5 holds fused: PEFT may not find them there"
    ]
    inject(moe, tmp_path / "b", rank=4, targets=["experts.**"], layout="wrapped")
    merge(tmp_path / "b", (), tmp_path / "c")
    assert_same_checkpoint(tmp_path / "c", moe, index_by_content=True)
