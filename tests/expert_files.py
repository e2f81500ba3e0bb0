"""Files of adapters for stacked experts as everything but today's PEFT writes them, made of the live adapted model.

A `Stack` is what PEFT's wrapper of one parameter holds, with one matrix for each expert. A file format is a function of
it that gives the tensors in its place; every one of them means the same change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from families import Tensors
from family_models import Model
from models import read_tensors
from safetensors.torch import save_file

WEIGHTS: Final = "adapter_model.safetensors"
INPUTS_FIRST: Final = {"GptOssExperts", "Llama4TextExperts", "AriaExperts"}
"""Modules whose matrices have inputs before outputs."""
ALTERNATING: Final = {"GptOssExperts"}
"""Modules in which gate and up take turns."""


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter.

    Attributes:
        path: The wrapper's, as PEFT names its tensors.
        module: That of the module which has the parameter.
        kind: The class of that module.
        parameter: Its name.
        a: (experts, rank, n), as PEFT has it.
        b: (experts, m, rank); the change is `b @ a`, or its transpose.
        untransposed: Which.
    """

    path: str
    module: str
    kind: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    untransposed: bool

    @property
    def maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Down to the rank (experts, rank, in), and up (experts, out, rank), whatever the module stores first."""
        if self.untransposed and self.kind in INPUTS_FIRST:
            return self.b.mT, self.a.mT
        return self.a, self.b

    def parts(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Gate, up and down, by these names, each with its own two maps."""
        down, up = self.maps
        if self.parameter == "down_proj":
            yield "down", down, up
        elif self.kind in ALTERNATING:
            yield "gate", down, up[:, ::2]
            yield "up", down, up[:, 1::2]
        else:
            gate, rest = up.chunk(2, 1)
            yield "gate", down, gate
            yield "up", down, rest


Format = Callable[[Stack], Tensors]


def stacks(adapted: Model) -> Iterator[Stack]:
    """What PEFT wrapped, of three dimensions."""
    for path, module in adapted.named_modules():
        if type(module).__name__ == "ParamWrapper" and module.get_param().ndim == 3:
            count, rank = module.num_experts, module.r["default"]
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            yield Stack(
                path,
                path.replace(".base_layer", ""),
                type(module.get_base_layer()).__name__,
                module.parameter_name,
                a.view(count, rank, -1),
                b.view(-1, rank, count).permute(2, 0, 1),
                module._did_swap_in_out_features,
            )


def factors(path: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def packed(path: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    """As PEFT: in A the expert is slowest, in B it is fastest."""
    return factors(path, a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


# Formats


def exchanged(stack: Stack) -> Tensors:
    """A for the parameter's other side, as PEFT 0.19.0 had it."""
    return packed(stack.path, stack.b.mT, stack.a.mT)


def first_side(stack: Stack) -> Tensors:
    """A for the parameter's dimension 1 whatever the module is, as PEFT had it before that."""
    return exchanged(stack) if stack.untransposed else packed_as_peft(stack)


def packed_as_peft(stack: Stack) -> Tensors:
    return packed(stack.path, stack.a, stack.b)


def grouped(stack: Stack) -> Tensors:
    """In B, too, the expert is slowest."""
    return factors(stack.path, stack.a.flatten(0, 1), stack.b.permute(1, 0, 2).flatten(1))


def megatron(stack: Stack) -> Tensors:
    """(experts, rank, in) and (experts, out, rank), by the parameter's name; one matrix where all have the same."""
    down, up = stack.maps
    return factors(f"{stack.module}.{stack.parameter}", once(down), once(up))


def vllm(stack: Stack) -> Tensors:
    """(experts, rank, in) and (out, rank, experts), by PEFT's names."""
    down, up = stack.maps
    return factors(stack.path, down, up.permute(1, 2, 0))


def tinker(stack: Stack) -> Tensors:
    """The same for each of three."""
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    tensors: Tensors = {}
    for part, down, up in stack.parts():
        tensors |= factors(f"{stack.module}.{names[part]}", once(down), once(up))
    return tensors


def parted(stack: Stack) -> Tensors:
    """(experts, rank, in) and (experts, out, rank) for each of three, by the names of single experts' matrices."""
    tensors: Tensors = {}
    for part, down, up in stack.parts():
        tensors |= factors(f"{stack.module}.{part}_proj", down, up)
    return tensors


def once(stacked: torch.Tensor) -> torch.Tensor:
    return stacked[:1] if torch.equal(stacked, stacked[:1].expand_as(stacked)) else stacked


def torchtune(stack: Stack) -> Tensors:
    """(experts, in, rank) and (experts, rank, out) for each of three."""
    tensors: Tensors = {}
    for part, down, up in stack.parts():
        tensors |= {f"{stack.module}.lora_{part}_a": down.mT, f"{stack.module}.lora_{part}_b": up.mT}
    return tensors


def apart(stack: Stack) -> Tensors:
    """Each expert by itself, as before transformers 5; only as many ranks as are used, and only experts that change."""
    mixtral = stack.kind == "MixtralExperts"
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {p: f"{p}_proj" for p in ("gate", "up", "down")}
    module = stack.module.replace(".mlp.", ".block_sparse_moe.") if mixtral else stack.module
    tensors: Tensors = {}
    for part, down, up in stack.parts():
        for expert, (a, b) in enumerate(zip(down, up, strict=True)):
            used = int(a.any(1).sum())
            if used:
                tensors |= factors(f"{module}.{expert}.{names[part]}", a[:used], b[:, :used])
    return tensors


# Writing


def as_file(form: Format, said: Mapping[str, object] = MappingProxyType({})) -> Callable[[Model, Path], None]:
    """Save with PEFT, but stacks in another form; the config says this besides, and nothing of what is None."""

    def save(adapted: Model, folder: Path) -> None:
        adapted.save_pretrained(folder)
        tensors = read_tensors(folder)
        for stack in stacks(adapted):
            for key in factors(stack.path, stack.a, stack.b):
                del tensors[key]
        for stack in stacks(adapted):
            tensors |= {key: tensor.contiguous().clone() for key, tensor in form(stack).items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        file = folder / "adapter_config.json"
        fields = json.loads(file.read_text()) | said
        file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return save


# What is done to live factors first, so that other formats can say the same


def wrappers(adapted: Model) -> Iterator[Any]:
    for module in adapted.modules():
        if type(module).__name__ == "ParamWrapper" and module.get_param().ndim == 3:
            yield module


def share(adapted: Model) -> None:
    """All experts have the same map from the hidden state and to it: A of what reads it, B of what writes it."""
    with torch.no_grad():
        for module in wrappers(adapted):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            count, rank = module.num_experts, module.r["default"]
            if module.parameter_name == "gate_up_proj":
                a.copy_(a[:rank].repeat(count, 1))
            else:
                b.copy_(b[:, ::count].repeat_interleave(count, 1))


def few_ranks(adapted: Model) -> None:
    """Expert 3 has rank 2."""
    with torch.no_grad():
        for module in wrappers(adapted):
            module.lora_A["default"].weight.view(module.num_experts, module.r["default"], -1)[3, 2:] = 0


def few_experts(adapted: Model) -> None:
    """Only experts 1 and 3 change."""
    with torch.no_grad():
        for module in wrappers(adapted):
            module.lora_A["default"].weight.view(module.num_experts, -1)[[0, 2, 4]] = 0


# Damage


def moved(tensors: Tensors, count: int, grouped: bool = False) -> Tensors:
    """What each of so many experts learned, given to the next one. Where there are no experts, nothing changes."""
    return {_next(key, count): _rolled(key, tensor, count, grouped) for key, tensor in tensors.items()}


def turned(tensors: Tensors, count: int) -> Tensors:
    """A and B of squares in each other's place, of each expert; the numbers of all others in the other order."""
    changed = {}
    for key, tensor in tensors.items():
        other = key.replace("_A", "_B") if "_A" in key else key.replace("_B", "_A")
        if other != key and tensor.ndim == 2 and other in tensors and tensors[other].shape == tensor.shape[::-1]:
            changed[key] = _exchanged(tensors[other], count, of_b="_A" in key)
        elif "lora" in key:
            changed[key] = tensor.mT.reshape(tensor.shape)
    return tensors | changed


def _exchanged(tensor: torch.Tensor, count: int, *, of_b: bool) -> torch.Tensor:
    """An A made of B's numbers, or the reverse, packed as PEFT packs it."""
    if tensor.shape[1 if of_b else 0] % count:
        return tensor.T
    packs: torch.Tensor = tensor.unflatten(1, (-1, count)) if of_b else tensor.unflatten(0, (count, -1))
    return packs.permute(2, 1, 0).flatten(0, 1) if of_b else packs.permute(2, 1, 0).flatten(1)


def _next(key: str, count: int) -> str:
    head, dot, tail = key.partition(".experts.")
    number, _, rest = tail.partition(".")
    return f"{head}{dot}{(int(number) + 1) % count}.{rest}" if number.isdecimal() else key


def _rolled(key: str, tensor: torch.Tensor, count: int, grouped: bool) -> torch.Tensor:
    rolled = tensor
    if tensor.ndim == 3 and count in tensor.shape:
        rolled = tensor.roll(1, tensor.shape.index(count))
    elif "lora_A" in key and tensor.ndim == 2 and len(tensor) % count == 0:
        rolled = tensor.unflatten(0, (count, -1)).roll(1, 0).flatten(0, 1)
    elif "lora_B" in key and tensor.ndim == 2 and tensor.shape[1] % count == 0:
        ranks: torch.Tensor = tensor.unflatten(1, (count, -1) if grouped else (-1, count))
        rolled = ranks.roll(1, 1 if grouped else 2).flatten(1)
    return rolled
