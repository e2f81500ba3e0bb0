"""A small decoder in plain torch, with the keys and the arithmetic of Llama.

What it saves is a checkpoint folder that transformers opens as `LlamaForCausalLM`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (everyone's name for it)

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes, by their names in a config of transformers."""

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Numbers for each head."""
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    """Causal attention with rotary positions (Su et al. 2021), halves of each head turned against each other."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Return what each position takes from those up to it: (batch, length, width) as x is."""
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(turned(q, turns), turned(k, turns), v, is_causal=True)
        out: Tensor = self.o_proj(seen.transpose(1, 2).reshape(batch, length, width))
        return out


class Gated(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated product, in the shape of x."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention and the gated layers, each with a norm before it and a way around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Gated(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Return x with both parts added."""
        x = x + self.self_attn(self.input_layernorm(x), turns)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """All below the head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, tokens: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Return one vector a token, (batch, length, width)."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, turns)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """The model: tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return for each position the logits of the token that follows it."""
        logits: Tensor = self.lm_head(self.model(tokens, self._turns(tokens.shape[1])))
        return logits

    def _turns(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position's angles, (length, head_dim)."""
        steps = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.shape.rope_theta**-steps)
        both = torch.cat([angles, angles], dim=1)
        return both.cos(), both.sin()

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder."""
        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "hidden_act": "silu",
            "num_key_value_heads": self.shape.num_attention_heads,
            "tie_word_embeddings": False,
            **asdict(self.shape),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Make the model of a checkpoint folder, strictly."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = cls(Shape(**{name: config[name] for name in asdict(Shape())}))
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        return model.eval()


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return the halves of each head turned by their position's angles."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
