"""Adapters that PEFT saved from tiny models in float64, and the models that they were saved from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import quiet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.adapter import Adapter, Target
from lora_cli.adapters.formats import open_adapter

PREFIX = "base_model.model."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    """One layer of each kind, none of them square but attention's output."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.emb = nn.Embedding(10, 6)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 2))
        self.conv3 = nn.Conv3d(2, 6, (2, 1, 2))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.norm = nn.LayerNorm(8)


def net() -> nn.Module:
    """The model in float64, the same every time."""
    torch.manual_seed(1)
    model = Net().double().eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def llama(*, tied: bool = False, layers: int = 1, head: str = "LlamaForCausalLM") -> Any:
    """A language model whose embedding and head may be one tensor."""
    import transformers

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return getattr(transformers, head)(config).double().eval()


@dataclass(frozen=True)
class Saved:
    """An adapter on disk.

    Attributes:
        folder: Where it is.
        model: The live model that it was saved from.
        before: The state of the model before PEFT had it.
    """

    folder: Path
    model: Any
    before: Mapping[str, Tensor]

    @property
    def adapter(self) -> Adapter:
        return open_adapter(self.folder)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / FILE)
        return tensors

    def module(self, name: str) -> Any:
        """A module of the live model, by its name in the adapter."""
        return self.model.base_model.model.get_submodule(name)

    def write(self, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> None:
        """Replace what the file holds, and fields of the config."""
        if tensors is not None:
            save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, self.folder / FILE)
        said = json.loads((self.folder / CONFIG).read_text())
        (self.folder / CONFIG).write_text(json.dumps(said | config))

    def delta(self, target: Target) -> Tensor:
        """What the reader says a target changes by, in float64 and in the module's own shape."""
        tensors = self.tensors()
        term = target.delta.term(lambda stored: tensors[stored.key].double(), 1.0)
        product = (term.b @ term.a) * term.scale
        stored = target.delta.stored
        return product.reshape(stored[False]) if False in stored else product.T.reshape(stored[True])


def saved(
    folder: Path,
    model: Any,
    *,
    trained: bool = True,
    change: Callable[[Any], object] = lambda model: None,
    save: Mapping[str, Any] | None = None,
    **config: Any,
) -> Saved:
    """Let PEFT adapt a model and save it.

    Args:
        folder: Where to.
        model: The model; where an init takes no float64, in float32, and in float64 from then on.
        trained: Whether everything that can be trained is moved.
        change: What is done to the adapted model besides.
        save: Options of `save_pretrained`.
        **config: Fields of the `LoraConfig`.
    """
    with quiet(3):
        from peft import LoraConfig, get_peft_model

        before = {name: tensor.double() for name, tensor in copy.deepcopy(model.state_dict()).items()}
        adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | config))).double().eval()
        change(adapted)
        if trained:
            train(adapted)
        adapted.save_pretrained(folder, **(save or {}))
    return Saved(folder, adapted, before)


def train(model: Any) -> None:
    """Move everything that can be trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
