"""A small model with a little of everything, and how tests of injection look at it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lora_cli.nn import GroupedLinear, Injection

WIDTH, VOCABULARY, LAYERS = 8, 13, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, 12, bias=False)
        self.down_proj = nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.q_proj(x), x, x)[0]
        normed: Tensor = self.norm(x + self.down_proj(self.up_proj(x).tanh()))
        return normed


class Net(nn.Module):
    """A little of everything; `head` is tied to `embed_tokens` on request."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.experts = GroupedLinear(2, WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed_tokens(ids).mT).mT
        for layer in self.layers:
            x = layer(x)
        rows = x.flatten(0, 1)
        x = self.experts(rows, torch.tensor([3, len(rows) - 3])).view_as(x)
        logits: Tensor = self.lm_head(x)
        return logits


EVERYTHING = ("all-linear", "embed_tokens", "conv", "layers.*.attn", "experts")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def ids() -> Tensor:
    return torch.arange(10).view(2, 5) % VOCABULARY


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Without gradients, for which attention takes other kernels."""
    logits: Tensor = model(ids())
    return logits


def same(left: Tensor, right: Tensor) -> bool:
    """Equal but for last bits: torch's kernels for frozen weights are not those for weights that ask for gradients."""
    return torch.allclose(left, right, rtol=0, atol=1e-6)


def stirred(injection: Injection) -> Injection:
    """Factors as after a training: none is zero."""
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return injection


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(_bytes(left[key]), _bytes(right[key])) for key in left
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.up(x))
        return found
