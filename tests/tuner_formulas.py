"""Adapters of PEFT's other tuners on a tiny model in float64, and what the project's formulas make of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
from models import quiet
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.adapters.adapter import Adapter, Parameter
from lora_cli.adapters.formats import open_adapter
from lora_cli.adapters.formula import Formula, Given, ProductMethod, SumMethod
from lora_cli.arithmetic.product import prepare
from lora_cli.checkpoint.checkpoint import StoredTensor

FILE = "adapter_model.safetensors"


class Net(nn.Module):
    """Linear layers, convolutions, and one that stores (in × out)."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2))
        self.turned = Conv1D(12, 8)
        self.beside = nn.Linear(8, 10)


@dataclass(frozen=True)
class Tuned:
    """An adapter on disk, and the live model.

    Attributes:
        folder: Where it is.
        model: What PEFT made.
    """

    folder: Path
    model: Any

    @property
    def adapter(self) -> Adapter:
        return open_adapter(self.folder)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / FILE)
        return tensors

    def layer(self, name: str) -> Any:
        return self.model.base_model.model.get_submodule(name)

    def formula(self, name: str) -> Formula:
        """What the file does to a layer's weight, settled on it."""
        formulas = {target.module: target.delta for target in self.adapter.targets if target.parameter == "weight"}
        shapes = {name: self.shape(name) for name in formulas}
        found = formulas[name]
        assert isinstance(found, Formula)
        if found.method.together:
            found = found.among([*shapes.values()])
        return found.on(Parameter(shapes[name], name == "turned", False, {}))

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.layer(name).get_base_layer().weight.shape)
        return shape[::-1] if name == "turned" else shape

    def given(self, name: str, scale: float = 1.0) -> Given:
        """The tensors of a layer, read."""
        tensors = self.tensors()

        def load(stored: StoredTensor) -> Tensor:
            return tensors[stored.key]

        return self.formula(name).given(load, scale)

    def delta(self, name: str) -> Tensor:
        """What the file adds to a layer's weight, in the shape in which the base stores it."""
        found = whole(self.formula(name), self.given(name))
        return found.T if name == "turned" else found.reshape(self.shape(name))


def whole(formula: Formula, given: Given) -> Tensor:
    """All of what a method adds, as a matrix."""
    height, width = given.matrix
    if isinstance(formula.method, ProductMethod):
        return prepare([formula.method.term(given)], slices=2).tile(slice(0, height), slice(0, width))
    assert isinstance(formula.method, SumMethod)
    return formula.method.values(given)(torch.arange(height), slice(0, width))


def tuned(folder: Path, config: Callable[[], Any]) -> Tuned:
    """Let PEFT adapt the model, move everything that can be trained, and save it."""
    from peft import get_peft_model

    with quiet(3):
        adapted = get_peft_model(Net().double().eval(), config()).double().eval()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # which AdaLoRA trains by mistake, and never saves
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter))
        adapted.save_pretrained(folder)
    return Tuned(folder, adapted)


class Tuners:
    """Adapters of all cases, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Tuned] = {}

    def __call__(self, name: str) -> Tuned:
        if name not in self._made:
            self._made[name] = tuned(self._root / name, ALL[name][0])
        return self._made[name]


# What they are of: how the config is made, and which layers it targets

LINEAR: Final = ["up", "down"]
KERNELS: Final = ["conv1", "conv2"]

Build = Callable[[], Any]


def of(kind: str, targets: list[str], **said: Any) -> tuple[Build, list[str]]:
    return lambda: getattr(peft, f"{kind}Config")(target_modules=targets, **said), targets


VB: Final = {"r": 2, "num_vectors": 9, "vector_length": 4, "topk": 3}
CASES: Final = {
    "lokr": of("LoKr", LINEAR, r=1, alpha=3),
    "lokr-both": of("LoKr", LINEAR, r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "lokr-full": of("LoKr", LINEAR, r=16, alpha=3),
    "lokr-kernels": of("LoKr", KERNELS, r=1, alpha=3, decompose_factor=1),
    "lokr-tucker": of("LoKr", KERNELS, r=1, alpha=3, decompose_factor=1, use_effective_conv2d=True),
    "lokr-kernels-full": of("LoKr", KERNELS, r=16, alpha=3),
    "adalora": of("AdaLora", [*LINEAR, "turned"], init_r=4, lora_alpha=7, total_step=9),
    "vera": of("Vera", [*LINEAR, "turned"], r=3),
    "vera-drawn": of("Vera", ["up", "beside"], r=3, save_projection=False, projection_prng_key=11),
    "pvera": of("Pvera", LINEAR, r=3),
    "pvera-drawn": of("Pvera", ["up", "beside"], r=3, save_projection=False),
    "randlora": of("RandLora", [*LINEAR, "turned"], r=3, randlora_alpha=7),
    "randlora-saved": of("RandLora", ["up", "beside"], r=3),
    "randlora-drawn": of("RandLora", LINEAR, r=3, randlora_alpha=7, save_projection=False),
    "randlora-sparse": of("RandLora", LINEAR, r=3, save_projection=False, sparse=True),
    "randlora-very-sparse": of("RandLora", LINEAR, r=3, save_projection=False, very_sparse=True),
    "vblora": of("VBLoRA", [*LINEAR, "turned"], **VB),
    "vblora-top": of("VBLoRA", LINEAR, **VB, save_only_topk_weights=True),
    "c3a": of("C3A", LINEAR, block_size=4),
    "shira": of("Shira", LINEAR, r=2, random_seed=1),
    "unilora": of("UniLora", [*LINEAR, "turned"], r=3, save_indices=True, theta_d_length=7),
    "tinylora": of("TinyLora", [*LINEAR, "turned"], r=2, u=5, weight_tying=1.0),
    "gralora": of("Gralora", [*LINEAR, "turned"], r=4, alpha=7, gralora_k=2),
    "gralora-hybrid": of("Gralora", LINEAR, r=4, alpha=7, gralora_k=4, hybrid_r=3),
}
MISS: Final = {
    "miss": of("Miss", LINEAR, r=4),
    "miss-remainder": of("Miss", LINEAR, r=5),
    "miss-mini": of("Miss", LINEAR, r=4, mini_r=2, init_weights="mini"),
    "miss-bat": of("Miss", LINEAR, r=4, init_weights="bat"),
}
ALL: Final = CASES | MISS
