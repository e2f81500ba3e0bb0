"""Checkpoints and adapters for property tests: odd names, all types that take a change, shards, ranks and patterns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import torch
from hypothesis import strategies as st
from torch import Tensor

Tensors = Mapping[str, Tensor]

TAKE_A_CHANGE: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OTHERS: Final = (*TAKE_A_CHANGE, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
PREFIX: Final = "base_model.model."
INDEX: Final = "model.safetensors.index.json"

parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=4)
odd_names = st.sampled_from(["", " ", "é", "\u202e", "\x1b[2J", "a/b", "..", "x" * 300, "\U0001f600", "__metadata"])
plain_modules = st.builds("model.layers.{}.{}".format, st.integers(0, 11), st.sampled_from(["q", "mlp.up", "é.w", "o"]))


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Numbers around zero of any type, a tenth of them zeros of either sign, as they are in pruned weights."""
    dice = torch.Generator().manual_seed(seed)
    values = scale * torch.randn([*shape], generator=dice, dtype=torch.float64)
    values[torch.rand([*shape], generator=dice) < 0.05] = -0.0
    return values.to(dtype)


@dataclass(frozen=True)
class Model:
    """A checkpoint and what an adapter for it may change.

    Attributes:
        tensors: All tensors, in the order in which they are written.
        modules: Linear layers with their (out, in).
        cuts: Where the tensors are cut into shards.
    """

    tensors: Tensors
    modules: Mapping[str, tuple[int, int]]
    cuts: tuple[int, ...]

    def write(self, folder: Path, names: Iterable[str] | None = None, cuts: Sequence[int] | None = None) -> Path:
        """Write it, in another order of names or other shards if told."""
        names, cuts = list(names or self.tensors), list(self.cuts if cuts is None else cuts)
        ends = sorted({0, *cuts, len(names)})
        shards = [names[begin:end] for begin, end in pairwise(ends)]
        folder.mkdir(parents=True)
        where: dict[str, str] = {}
        for number, share in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            where |= dict.fromkeys(share, file)
            write_tensors(folder / file, {name: self.tensors[name] for name in share})
        if len(shards) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text('{"model_type": "none"}')
        return folder


@dataclass(frozen=True)
class Factors:
    """A LoRA adapter as PEFT writes it."""

    tensors: Tensors
    config: Mapping[str, Any]

    def write(self, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Write it, its tensors in another order if told."""
        folder.mkdir(parents=True)
        write_tensors(
            folder / "adapter_model.safetensors", {name: self.tensors[name] for name in names or self.tensors}
        )
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file with its tensors in this order, which the library would sort."""
    contents = [bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in tensors.values()]
    ends = [0, *accumulate(map(len, contents))]
    header = {
        name: {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [*span]}
        for (name, tensor), span in zip(tensors.items(), pairwise(ends), strict=True)
    }
    raw = json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(contents))


_NAMES: Final = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Linear layers of all types, with tensors of any name and type among them, in one file or several."""
    names = draw(st.lists(plain_modules, min_size=1, max_size=4, unique=True))
    modules = {name: (draw(st.integers(1, 9)), draw(st.integers(1, 9))) for name in names}
    seed = draw(st.integers(0, 1 << 20))
    tensors = {
        f"{name}.weight": numbers(shape, draw(st.sampled_from(TAKE_A_CHANGE)), seed + at)
        for at, (name, shape) in enumerate(modules.items())
    }
    others = draw(st.lists(odd_names | parts, max_size=3, unique=True))
    for at, name in enumerate(others):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensors[name] = numbers(shape, draw(st.sampled_from(OTHERS)), seed - at)
    order = draw(st.permutations(list(tensors)))
    cuts = draw(st.lists(st.integers(1, len(order)), max_size=2))
    return Model({name: tensors[name] for name in order}, modules, tuple(cuts))


@st.composite
def adapters(draw: st.DrawFn, model: Model) -> Factors:
    """Factors for some of its layers: ranks and alphas of their own by patterns, weak or strong."""
    modules = draw(st.lists(st.sampled_from(sorted(model.modules)), min_size=1, unique=True))
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 0.5, -2.0, 3e-3]))
    ranks = {name: draw(st.integers(1, 4)) for name in modules if draw(st.booleans())}
    alphas = {name: draw(st.sampled_from([2, 1.5, -0.25])) for name in modules if draw(st.booleans())}
    seed, strength = draw(st.integers(0, 1 << 20)), draw(st.sampled_from([1e-3, 0.1, 1.0]))
    tensors = {}
    for at, name in enumerate(modules):
        (out, inner), own = model.modules[name], ranks.get(name, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = numbers((own, inner), torch.float32, seed + at, strength)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = numbers((out, own), torch.float32, seed - at, strength)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": draw(st.booleans())}
    escaped = {name.replace(".", r"\."): number for name, number in ranks.items()}
    return Factors(tensors, config | {"rank_pattern": escaped, "alpha_pattern": alphas})


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Model, Factors]:
    """A checkpoint and an adapter for it."""
    model = draw(models())
    return model, draw(adapters(model))
