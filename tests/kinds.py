"""Every kind of delta as other programs write it: files, and what they mean, written out once more in float64.

The layers are those that people write from scratch, cut down to their factors and the formula by which they merge;
nothing here knows `lora_cli`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

Tensors = dict[str, Tensor]

SCALE = 0.75


def gaussian(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


# Layers that hold A and B in the direction of the numbers: in, rank, out


@dataclass
class LinearFromScratch:
    """A (in, r) and B (r, out); the weight is (out, in)."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def delta(self, scale: float) -> Tensor:
        return (self.lora_A.double() @ self.lora_B.double()).T * scale


@dataclass
class EmbeddingFromScratch:
    """A (V, r) and B (r, dim); the weight is (V, dim)."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def delta(self, scale: float) -> Tensor:
        return self.lora_A.double() @ self.lora_B.double() * scale


@dataclass
class ConvFromScratch:
    """A (r, in, k, k) is a kernel, B (r, out) a matrix; the weight is (out, in, k, k)."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def delta(self, scale: float) -> Tensor:
        product = self.lora_B.double().T @ self.lora_A.double().flatten(1) * scale
        return product.reshape(self.lora_B.shape[1], *self.lora_A.shape[1:])


@dataclass
class GroupedLinear:
    """A stack of experts: x (E, n, in) goes through weights (E, in, out) and factors (E, in, r), (E, r, out)."""

    weight: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def forward(self, x: Tensor, scale: float) -> Tensor:
        whole, a, b = (tensor.double() for tensor in (self.weight, self.lora_A, self.lora_B))
        return torch.bmm(x, whole) + scale * torch.bmm(torch.bmm(x, a), b)


class LowRankParametrization(nn.Module):
    """W + scale·(B·A).view(W.shape), whatever W is."""

    def __init__(self, weight: Tensor, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        first = weight.shape[0]
        self.scale = scale
        self.A = nn.Parameter(gaussian(seed, rank, weight.numel() // first).to(weight))
        self.B = nn.Parameter(gaussian(seed + 1, first, rank, std=0.1).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A).view(weight.shape)


# Cases


@dataclass(frozen=True)
class Case:
    """A merge and what must come of it.

    Attributes:
        base: Tensors of the base file.
        adapter: Tensors of the adapter file; none where the base carries its factors.
        weights: Key of the output → what it was before.
        deltas: Key of the output → its change in float64.
        whole: Key of the output → what the adapter holds whole.
        config: config.json of the base.
        orientation: What the user must say.
    """

    base: Tensors
    deltas: Tensors
    adapter: Tensors | None = None
    weights: Tensors = field(default_factory=dict)
    whole: Tensors = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    orientation: str | None = None

    def before(self, key: str) -> Tensor:
        return self.weights.get(key, self.base.get(key, torch.empty(0)))

    def write(self, folder: Path, *, shards: int = 1) -> tuple[Path, list[Path]]:
        """The base folder, and the adapter's file if there is one."""
        base = folder / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(self.config))
        names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
        places = {key: names[at % shards] for at, key in enumerate(self.base)}
        for name in names:
            share = {key: self.base[key].contiguous() for key in self.base if places[key] == name}
            save_file(share, base / (name if shards > 1 else "model.safetensors"), {"format": "pt"})
        if shards > 1:
            total = sum(tensor.nbytes for tensor in self.base.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (base / "model.safetensors.index.json").write_text(json.dumps(index))
        if self.adapter is None:
            return base, []
        file = folder / "adapter.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in self.adapter.items()}, file)
        return base, [file]


def from_scratch(dtype: torch.dtype = torch.float32) -> Case:
    """A file of trainable parameters: every kind of layer, trained biases, a module that was left out of freezing."""
    base = {
        "tok.weight": gaussian(1, 40, 12, dtype=dtype),
        "square.weight": gaussian(2, 12, 12, dtype=dtype),
        "up.weight": gaussian(3, 20, 12, dtype=dtype),
        "up.bias": gaussian(4, 20, dtype=dtype),
        "conv.weight": gaussian(5, 9, 5, 3, 3, dtype=dtype),
        "conv.bias": gaussian(6, 9, dtype=dtype),
        "narrow.weight": gaussian(7, 4, 5, 2, 3, dtype=dtype),  # as many outputs as the rank
        "norm.weight": gaussian(8, 12, dtype=dtype),
        "head.weight": gaussian(9, 3, 20, dtype=dtype),
    }
    layers: dict[str, LinearFromScratch | EmbeddingFromScratch | ConvFromScratch] = {
        "tok": EmbeddingFromScratch(gaussian(11, 40, 4), gaussian(12, 4, 12, std=0.1)),
        "square": LinearFromScratch(gaussian(13, 12, 4), gaussian(14, 4, 12, std=0.1)),
        "up": LinearFromScratch(gaussian(15, 12, 4), gaussian(16, 4, 20, std=0.1)),
        "conv": ConvFromScratch(gaussian(17, 4, 5, 3, 3), gaussian(18, 4, 9, std=0.1)),
        "narrow": ConvFromScratch(gaussian(19, 4, 5, 2, 3), gaussian(20, 4, 4, std=0.1)),
    }
    whole = {
        "up.bias": gaussian(21, 20, dtype=dtype),
        "conv.bias": gaussian(22, 9, dtype=dtype),
        "head.weight": gaussian(23, 3, 20, dtype=dtype),
    }
    saved = {f"{name}.lora_{side}": getattr(layer, f"lora_{side}") for name, layer in layers.items() for side in "AB"}
    return Case(
        base,
        {f"{name}.weight": layer.delta(SCALE) for name, layer in layers.items()},
        {f"lora_model.{key}": tensor for key, tensor in (saved | whole).items()},
        whole=whole,
    )


def functional() -> Case:
    """Weights and factors in dictionaries, all of them (in, out); two are square, which only the user can know."""
    shapes = {"w1": (16, 24), "w2": (24, 16), "mix": (16, 16)}
    base = {name: gaussian(at, *shape) for at, (name, shape) in enumerate(shapes.items())}
    adapter: Tensors = {}
    deltas: Tensors = {}
    for at, (name, (inner, out)) in enumerate(shapes.items(), 30):
        a, b = gaussian(at, inner, 3), gaussian(at + 10, 3, out, std=0.1)
        adapter |= {f"{name}.A": a, f"{name}.B": b}
        deltas[name] = SCALE * a.double() @ b.double()
    return Case(base, deltas, adapter, orientation="ab")


def kernels(matrix_b: bool) -> Case:
    """Convolutions of one to three dimensions and with groups, where A and B are kernels, or B is a matrix."""
    shapes = {"one": (8, 6, 3), "two": (8, 6, 3, 2), "three": (8, 6, 2, 3, 2), "grouped": (8, 2, 3, 3)}
    base, adapter, deltas = {}, {}, {}
    for at, (name, shape) in enumerate(shapes.items()):
        a, b = gaussian(50 + at, 5, *shape[1:]), gaussian(60 + at, shape[0], 5, std=0.1)
        base[f"{name}.weight"] = gaussian(40 + at, *shape)
        adapter[f"{name}.lora_A.weight"] = a
        adapter[f"{name}.lora_B.weight"] = b.T if matrix_b else b.reshape(*b.shape, *(1 for _ in shape[2:]))
        deltas[f"{name}.weight"] = torch.einsum("or,r...->o...", b.double(), a.double()) * SCALE
    return Case(base, deltas, adapter)


def stack(experts: int = 5, inner: int = 12, out: int = 7, dtype: torch.dtype = torch.float32) -> Case:
    """A grouped linear layer in a wrapped checkpoint; what it does to unit vectors is what its weights are."""
    layer = GroupedLinear(
        gaussian(70, experts, inner, out, dtype=dtype),
        gaussian(71, experts, inner, 3, dtype=dtype),
        gaussian(72, experts, 3, out, std=0.1, dtype=dtype),
    )
    base = {"moe.up.base.weight": layer.weight, "moe.up.lora_A.weight": layer.lora_A}
    base |= {"moe.up.lora_B.weight": layer.lora_B, "moe.norm.weight": gaussian(73, inner)}
    units = torch.eye(inner, dtype=torch.float64).expand(experts, inner, inner)
    delta = layer.forward(units, SCALE) - layer.weight.double()
    return Case(base, {"moe.up.weight": delta}, weights={"moe.up.weight": layer.weight})


def wrapped() -> Case:
    """Embeddings, one of them square, and convolutions in a wrapped checkpoint."""
    weights = {
        "embed_tokens.weight": gaussian(80, 30, 8),
        "wpe.weight": gaussian(81, 8, 8),
        "lookup.weight": gaussian(82, 14, 8),  # a name that no table lists
        "lin.weight": gaussian(83, 8, 8),
        "conv.weight": gaussian(84, 9, 4, 3, 3),
        "thin.weight": gaussian(85, 9, 4, 3),
    }
    base: Tensors = {}
    deltas: Tensors = {}
    for at, (key, weight) in enumerate(weights.items(), 90):
        name = key.removesuffix(".weight")
        table = name in ("embed_tokens", "wpe", "lookup")
        first, rest = weight.shape[0], weight.shape[1:]
        a = gaussian(at, 2, first) if table else gaussian(at, 2, *rest)
        b = gaussian(at + 10, rest[0], 2, std=0.1) if table else gaussian(at + 10, first, 2, std=0.1)
        product = SCALE * (b.double() @ a.double().flatten(1))
        deltas[key] = product.T if table else product.reshape(weight.shape)
        stored_b = b.reshape(9, 2, 1, 1) if name == "conv" else b
        base |= {f"{name}.base.weight": weight, f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": stored_b}
    return Case(base, deltas, weights=weights)


class Parametrized(nn.Module):
    """Layers whose weights lie in every way: (out, in), (entries, dim), a kernel, and one of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 10)
        self.square = nn.Linear(6, 6)
        self.emb = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2)


PLACES = {"lin.weight": 1, "square.weight": 2, "emb.weight": 3, "conv.weight": 4, "attention.in_proj_weight": 5}
"""Parameters that are parametrized, with a seed."""


def parametrized() -> Case:
    """A checkpoint of a model whose weights are parametrized; what it computes with is the model's own word."""
    model = Parametrized().double()
    for number, tensor in enumerate(model.parameters()):
        tensor.data = gaussian(120 + number, *tensor.shape).double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    after = {}
    for key, seed in PLACES.items():
        module, parameter = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        low_rank = LowRankParametrization(getattr(module, parameter), 3, SCALE, 130 + 2 * seed)
        parametrize.register_parametrization(module, parameter, low_rank)
        after[key] = getattr(module, parameter).detach()
    deltas = {key: after[key] - before[key] for key in PLACES}
    base = {key: tensor.detach().float() for key, tensor in model.state_dict().items()}
    return Case(base, deltas, weights={key: before[key].float() for key in PLACES})


def attention() -> Case:
    """`torch.nn.MultiheadAttention` with factors on what it projects its inputs by, and on its last layer, or not."""
    base: Tensors = {}
    weights: Tensors = {}
    deltas: Tensors = {}
    for at, name in enumerate(("x", "y.attn"), 200):
        parts = {"in_proj_weight": (18, 6), "in_proj_bias": (18,), "out_proj.weight": (6, 6), "out_proj.bias": (6,)}
        whole = {key: gaussian(10 * at + number, *shape) for number, (key, shape) in enumerate(parts.items())}
        weights |= {f"{name}.{key}": tensor for key, tensor in whole.items()}
        a, b = gaussian(10 * at + 5, 2, 6), gaussian(10 * at + 6, 18, 2, std=0.1)
        base |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        deltas[f"{name}.in_proj_weight"] = SCALE * b.double() @ a.double()
        out = "out_proj.base" if name == "x" else "out_proj"
        base |= {f"{name}.base.{key.replace('out_proj', out)}": tensor for key, tensor in whole.items()}
    a, b = gaussian(2007, 2, 6), gaussian(2008, 6, 2, std=0.1)
    base |= {"x.base.out_proj.lora_A.weight": a, "x.base.out_proj.lora_B.weight": b}
    deltas["x.out_proj.weight"] = SCALE * b.double() @ a.double()
    return Case(base | {"norm.weight": gaussian(1, 6)}, deltas, weights=weights)


CASES: dict[str, Callable[[], Case]] = {
    "from scratch": from_scratch,
    "from scratch, bf16": lambda: from_scratch(torch.bfloat16),
    "functional": functional,
    "kernels": lambda: kernels(matrix_b=False),
    "kernels and matrices": lambda: kernels(matrix_b=True),
    "stack": stack,
    "stack, bf16": lambda: stack(dtype=torch.bfloat16),
    "wrapped": wrapped,
    "parametrized": parametrized,
    "attention": attention,
}


def is_merged(found: Tensors, case: Case, deltas: Tensors | None = None) -> bool:
    """Whether every tensor is the base's plus its delta, rounded once to its type, the adapter's, or the base's own."""
    deltas = case.deltas if deltas is None else deltas
    if not set(case.deltas) | set(case.whole) <= set(found) or any("lora_" in key for key in found):
        return False
    for key, tensor in found.items():
        before = case.whole.get(key, case.before(key))
        if (tensor.dtype, tensor.shape) != (before.dtype, before.shape):
            return False
        if key in deltas:
            exact = before.double() + deltas[key]
            # Half a unit in the last place; and 2⁻²⁰ of the change is more than the product may be off beside it.
            off = (tensor.double() - exact).abs()
            limit = (
                exact.abs() * torch.finfo(tensor.dtype).eps / 2 + _product_error(tensor.dtype) * deltas[key].abs().max()
            )
            if deltas[key].shape != before.shape or not bool((off <= limit).all()):
                return False
        elif not torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)):
            return False
    return True


def _product_error(dtype: torch.dtype) -> float:
    return 2.0**-40 if dtype.itemsize > 2 else 2.0**-20


def read(folder: Path) -> Tensors:
    """All tensors of a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
