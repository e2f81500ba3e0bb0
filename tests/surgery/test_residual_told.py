"""An adapter whose first factors were taken off a base fits what is left of that alone, and its receipt tells."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from blake3 import blake3
from models import read_tensors
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from lora_cli.checkpoint import digests
from lora_cli.cli.app import app
from lora_cli.errors import WrongInputError
from lora_cli.nn import load_adapter
from lora_cli.surgery.inject import inject
from lora_cli.surgery.inspect import inspect
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge
from lora_cli.surgery.verify import verify


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with base, out (the adapter) and left."""
    tiny.write_base(tmp_path / "base")
    inject(tmp_path / "base", tmp_path / "out", rank=3, init="pissa", base_out=tmp_path / "left")
    return tmp_path


def receipt(world: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((world / "out" / "lora_inject.json").read_text())
    return said


def rewritten(world: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint of one file with these tensors."""
    save_file(dict(tensors), world / f"{name}.safetensors")
    return world / f"{name}.safetensors"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_receipt_has_the_digest_of_one_weight_of_the_residual(world: Path) -> None:
    said = receipt(world)["residual"]
    weight = read_tensors(world / "left")[said["tensor"]]
    assert not torch.equal(weight, read_tensors(world / "base")[said["tensor"]])
    assert said == {
        "label": "left",
        "tensor": f"{receipt(world)['modules'][0]}.weight",
        "dtype": "F32",
        "shape": list(weight.shape),
        "digest": blake3(raw(weight)).hexdigest(),
    }
    assert sorted(receipt(world)["files"]) == sorted(path.name for path in (world / "out").iterdir())


@pytest.mark.parametrize("adapter", ["out", "out/adapter_model.safetensors", "link"])
def test_the_base_itself_is_refused(world: Path, adapter: str) -> None:
    (world / "link").symlink_to(world / "out")
    base, named = world / "base", world / adapter
    merge(world / "left", [named], world / "merged", undo=False)
    uses: dict[str, Callable[[], object]] = {
        "merge": lambda: plan_merge(base, [named]),
        "verify": lambda: verify(world / "merged", base, [named]),
        "inspect": lambda: inspect(named, base=base),
        "among others": lambda: plan_merge(base, [world / "other", named], PlanOptions(weights=(1, 0.5))),
    }
    inject(base, world / "other", rank=1, targets=["q_proj"])
    for name, use in uses.items():
        with pytest.raises(WrongInputError, match="first factors were taken off") as caught:
            use()
        assert caught.value.exit_code == 23, name
        assert "left" in str(caught.value.hint)
        assert caught.value.tensor == receipt(world)["residual"]["tensor"]


def test_the_residual_is_taken_without_a_word(world: Path) -> None:
    assert not plan_merge(world / "left", [world / "out"]).warnings
    result = merge(world / "left", [world / "out"], world / "merged")
    assert not result.warnings
    assert verify(world / "merged", world / "left", [world / "out"]).verified
    resolved = inspect(world / "out", base=world / "left").modules
    assert all(module.key for module in resolved)


def test_other_names_of_the_residual(world: Path) -> None:
    """Told by the module's name in the adapter."""
    for name in ("base", "left"):
        tensors = {key.removeprefix("model."): tensor for key, tensor in read_tensors(world / name).items()}
        assert receipt(world)["residual"]["tensor"] not in tensors
        rewritten(world, name, tensors)
    assert not plan_merge(world / "left.safetensors", [world / "out"]).warnings
    with pytest.raises(WrongInputError):
        plan_merge(world / "base.safetensors", [world / "out"])


@pytest.mark.parametrize("name", ["base", "left"])
def test_a_base_that_was_cast_is_warned_of(world: Path, name: str) -> None:
    cast = rewritten(world, "cast", {key: tensor.bfloat16() for key, tensor in read_tensors(world / name).items()})
    (warning,) = plan_merge(cast, [world / "out"]).warnings
    assert "fits left alone" in warning
    assert "BF16" in warning


def test_a_weight_that_the_adapter_lost_is_warned_of(world: Path) -> None:
    """Nothing is left to compare."""
    file, module = world / "out" / "adapter_model.safetensors", receipt(world)["residual"]["tensor"][: -len(".weight")]
    kept = {key: tensor for key, tensor in load_file(file).items() if module not in key}
    save_file(kept, file, {"format": "pt"})
    residual, passed_over = plan_merge(world / "base", [world / "out"]).warnings
    assert "nothing tells if base is it" in residual
    assert module in passed_over


def test_what_needs_no_residual(world: Path) -> None:
    """At weight 0 an adapter changes nothing, and what it is taken out of is not what it fits."""
    plan_merge(world / "base", [world / "out"], PlanOptions(weights=(0,)))
    merge(world / "left", [world / "out"], world / "merged", undo=False)
    assert unmerge(world / "merged", [world / "out"], world / "again", approximate=True)


@pytest.mark.parametrize("residual", [None, "left", {"label": "left"}, {"label": 1, "tensor": "x", "shape": 3}])
def test_no_receipt_or_one_that_says_nothing_useful(world: Path, residual: object) -> None:
    """As of an adapter that another tool saved after training: nothing can tell."""
    said = receipt(world) | {"residual": residual}
    (world / "out" / "lora_inject.json").write_text(json.dumps(said))
    assert not plan_merge(world / "base", [world / "out"]).warnings
    shutil.copytree(world / "out", world / "saved", ignore=shutil.ignore_patterns("lora_*"))
    assert not plan_merge(world / "base", [world / "saved"]).warnings


def test_of_a_large_weight_the_first_cut_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CUT_ELEMENTS", 20)
    weight = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    save_file({"up.weight": weight}, tmp_path / "base.safetensors")
    left = tmp_path / "left.safetensors"
    inject(tmp_path / "base.safetensors", tmp_path / "out", rank=2, init="olora", base_out=left, targets=["up"])
    assert receipt(tmp_path)["residual"]["digest"] == blake3(raw(load_file(left)["up.weight"][:2])).hexdigest()
    plan_merge(left, [tmp_path / "out"])
    model = nn.ModuleDict({"up": nn.Linear(8, 9, bias=False)})
    model.load_state_dict(load_file(left))
    load_adapter(model, tmp_path / "out")
    with pytest.raises(WrongInputError):
        plan_merge(tmp_path / "base.safetensors", [tmp_path / "out"])


# Live models


def live(folder: Path) -> nn.Module:
    """A model with the modules of a checkpoint."""
    tensors = {
        key: tensor for key, tensor in read_tensors(folder).items() if key.removesuffix(".weight") in tiny.MODULES
    }
    model = nn.Module()
    for key, tensor in tensors.items():
        *path, last = key.removesuffix(".weight").split(".")
        place = model
        for name in path:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        out, inner = tensor.shape
        place.add_module(last, nn.Linear(inner, out, bias=False))
    model.load_state_dict(tensors)
    return model


def test_a_live_model_of_the_base_is_refused_and_left_alone(world: Path) -> None:
    model = live(world / "base")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WrongInputError, match="first factors were taken off"):
        load_adapter(model, world / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_live_model_of_the_residual_is_the_base(world: Path) -> None:
    model, base = live(world / "left"), live(world / "base")
    injection = load_adapter(model, world / "out")
    injection.merge()
    merged = injection.base_state()
    assert all(torch.allclose(merged[key], tensor, atol=1e-6) for key, tensor in base.state_dict().items())


def test_a_live_model_of_another_type_is_warned_of(world: Path) -> None:
    with pytest.warns(UserWarning, match="fits left alone.*BF16"):
        load_adapter(live(world / "left").bfloat16(), world / "out")
    load_adapter(live(world / "base").to("meta"), world / "out")


# Words


def shown(*arguments: object) -> str:
    ran = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.output
    words = [line.split(maxsplit=1) for line in ran.output.splitlines() if line.strip()]
    return next(said.strip() for name, said in (pair for pair in words if len(pair) == 2) if name == "receipt")


def test_inspect_says_what_an_injection_wrote(world: Path) -> None:
    inject(world / "base", world / "wrapped", rank=1, layout="wrapped")
    assert shown("inspect", world / "left") == "residual of base (pissa), for adapter out"
    assert shown("inspect", world / "out") == "inject (pissa) of base; fits left alone"
    assert shown("inspect", world / "wrapped") == "inject (wrapped) of base"
    merge(world / "left", [world / "out"], world / "merged", undo=False)
    assert shown("inspect", world / "merged") == "merge of left + out"
