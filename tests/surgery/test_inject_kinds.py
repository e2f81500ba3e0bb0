"""Fresh adapters on embeddings and convolutions: PEFT takes them, they change nothing, and both layouts agree."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import quiet, read_tensors
from safetensors.torch import load_file, save_file

from lora_cli.adapters.inits import draw
from lora_cli.errors import UnsupportedError
from lora_cli.progress import Progress
from lora_cli.surgery.inject import inject
from lora_cli.surgery.merge import merge

PREFIX = "base_model.model."


class Pictures(torch.nn.Module):
    """Convolutions of all dimensions, on their own: PEFT takes any module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.conv2 = torch.nn.Conv2d(3, 8, (2, 3), bias=False)
        self.conv3 = torch.nn.Conv3d(2, 5, 2)
        self.point = torch.nn.Conv2d(4, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of them on the same numbers."""
        shapes = {self.conv1: (1, 4, -1), self.conv2: (1, 3, 4, -1), self.conv3: (1, 2, 2, 3, -1)}
        parts = [layer(x.view(shape)).flatten() for layer, shape in shapes.items()]
        return torch.cat([*parts, self.point(x.view(1, 4, 6, -1)).flatten()])


class Words(torch.nn.Module):
    """An embedding and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(40, 16)
        self.wpe = torch.nn.Embedding(16, 16)  # square, so that its name has to say what it is
        self.up_proj = torch.nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look up and multiply."""
        result: torch.Tensor = self.up_proj(self.wte(x) + self.wpe(torch.arange(len(x))))
        return result


CASES = [
    pytest.param(
        Pictures,
        torch.linspace(-1, 1, 96),
        {
            "conv1": ((3, 4, 3), (6, 3, 1)),
            "conv2": ((3, 3, 2, 3), (8, 3, 1, 1)),
            "conv3": ((3, 2, 2, 2, 2), (5, 3, 1, 1, 1)),
            "point": ((3, 4, 1, 1), (7, 3, 1, 1)),
        },
        id="convolutions",
    ),
    pytest.param(
        Words,
        torch.tensor([3, 7, 39, 0]),
        {"wte": ((3, 40), (16, 3)), "wpe": ((3, 16), (16, 3)), "up_proj": ((3, 16), (24, 3))},
        id="embeddings",
    ),
]
Make = Callable[[], Any]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def write_base(make: Make, folder: Path) -> Any:
    with quiet(3):
        model = make().eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def trained(file: Path) -> None:
    """Put something into each B, the same for the same module in any layout."""
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if "lora_B" in key or "lora_embedding_B" in key:
            tensors[key] = torch.linspace(-1, 1, tensor.numel()).sin().view(tensor.shape)
    save_file(tensors, file, metadata={"format": "pt"})


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize(("make", "inputs", "shapes"), CASES)
def test_peft_takes_them_and_they_change_nothing(
    make: Make, inputs: torch.Tensor, shapes: Shapes, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = write_base(make, tmp_path / "base")
    inject(tmp_path / "base", tmp_path / "fresh", rank=3, alpha=6, targets=list(shapes))
    with quiet(3), torch.no_grad():
        expected = model(inputs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            live = PeftModel.from_pretrained(model, tmp_path / "fresh").eval()
        assert not [str(w.message) for w in said if "missing" in str(w.message)]
        state, stored = live.state_dict(), load_file(tmp_path / "fresh" / "adapter_model.safetensors")
        assert len(stored) == sum(".lora_" in key for key in state)
        for key, tensor in stored.items():
            plain = "embedding" in key
            assert torch.equal(state[f"{key}.default" if plain else key.replace(".weight", ".default.weight")], tensor)
        assert torch.equal(live(inputs), expected)
    for module, (a, b) in shapes.items():
        found = {tuple(tensor.shape) for key, tensor in stored.items() if f".{module}." in key}
        assert found == {a, b}


@pytest.mark.parametrize(("make", "inputs", "shapes"), CASES)
def test_merged_as_they_are_they_give_the_base(
    make: Make, inputs: torch.Tensor, shapes: Shapes, tmp_path: Path
) -> None:
    write_base(make, tmp_path / "base")
    inject(tmp_path / "base", tmp_path / "fresh", rank=3, targets=list(shapes), init="gaussian", std=2.0)
    inject(tmp_path / "base", tmp_path / "wrapped", rank=3, targets=list(shapes), layout="wrapped")
    merge(tmp_path / "base", [tmp_path / "fresh"], tmp_path / "one")
    merge(tmp_path / "wrapped", (), tmp_path / "other")
    for merged in ("one", "other"):
        assert file_of(tmp_path / merged).read_bytes() == file_of(tmp_path / "base").read_bytes()


@pytest.mark.parametrize(("make", "inputs", "shapes"), CASES)
def test_trained_they_merge_to_what_peft_computes(
    make: Make, inputs: torch.Tensor, shapes: Shapes, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = write_base(make, tmp_path / "base")
    for layout in ("adapter", "wrapped"):
        place = tmp_path / layout
        inject(tmp_path / "base", place, rank=3, alpha=6, targets=list(shapes), layout=layout)
        trained(file_of(place))
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "one")
    merge(tmp_path / "wrapped", (), tmp_path / "other")
    merged, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "other")
    assert merged.keys() == other.keys()
    assert all(torch.equal(other[key], tensor) for key, tensor in merged.items())
    with quiet(3), torch.no_grad():
        theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    before = read_tensors(tmp_path / "base")
    for key, tensor in merged.items():
        assert torch.allclose(theirs[key], tensor, atol=1e-5), key
        assert torch.equal(tensor, before[key]) is key.endswith("bias"), key


def test_the_numbers_are_those_of_the_module_s_name(tmp_path: Path) -> None:
    """Under one key for every kind of module and every layout; a kernel's bound is that of all it multiplies."""
    shapes = {"a.wte.weight": (20, 8), "b.conv.weight": (6, 4, 3), "c.up.weight": (6, 4)}
    (tmp_path / "base").mkdir()
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "base" / "model.safetensors")
    for layout in ("adapter", "wrapped"):
        place = tmp_path / layout
        inject(tmp_path / "base", place, rank=2, targets=["**"], seed=4, layout=layout)
    adapter, wrapped = load_file(file_of(tmp_path / "adapter")), load_file(file_of(tmp_path / "wrapped"))
    assert set(adapter) == {
        f"{PREFIX}{key}"
        for key in (
            *("a.wte.lora_embedding_A", "a.wte.lora_embedding_B"),
            *("b.conv.lora_A.weight", "b.conv.lora_B.weight", "c.up.lora_A.weight", "c.up.lora_B.weight"),
        )
    }
    for module, shape in (("a.wte", (2, 20)), ("b.conv", (2, 4, 3)), ("c.up", (2, 4))):
        table = module == "a.wte"  # a lookup takes one entry, so its bound is that of the layer behind it
        expected = draw("kaiming", f"{module}.lora_A.weight", shape, seed=4, table=table).astype(np.float32)
        assert np.abs(expected).max() <= 1 / np.sqrt(2 if table else np.prod(shape[1:]))
        key = f"{module}.lora_embedding_A" if module == "a.wte" else f"{module}.lora_A.weight"
        assert np.array_equal(adapter[f"{PREFIX}{key}"].numpy(), expected)
        assert np.array_equal(wrapped[f"{module}.lora_A.weight"].numpy(), expected)
    assert wrapped["b.conv.lora_B.weight"].shape == (6, 2, 1)
    assert wrapped["a.wte.lora_B.weight"].shape == (8, 2)
    orthogonal = draw("orthogonal", "b.conv.lora_A.weight", (2, 4, 3)).reshape(2, -1)
    assert np.allclose(orthogonal @ orthogonal.T, np.eye(2))


class Heard(Progress):
    """Remembers what is told on the way."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_of_two_tied_tensors_one_gets_an_adapter(tmp_path: Path) -> None:
    """As it does in PEFT's live model; but nothing may be taken off what the other use still needs."""
    (tmp_path / "base").mkdir()
    tensors = {"model.embed_tokens.weight": torch.ones(20, 8), "model.layers.0.up_proj.weight": torch.ones(8, 8)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    seen = Heard()
    made = inject(tmp_path / "base", tmp_path / "out", rank=2, targets=["**"], progress=seen)
    assert len(made.modules) == 2
    words = "model.embed_tokens is one tensor with lm_head.weight"
    assert [note for note in seen.notes if words in note]
    with pytest.raises(UnsupportedError, match="uses twice") as caught:
        inject(tmp_path / "base", tmp_path / "o", rank=2, targets=["**"], init="pissa", base_out=tmp_path / "left")
    assert caught.value.details == (words,)
