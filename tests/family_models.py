"""Tiny models with inputs: of transformers, from a config, and of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Model = Any  # of transformers or PEFT, which are not typed
Inputs = dict[str, torch.Tensor]

WORDS: Final = 48
"""Entries of every vocabulary; the last three are images, their start and their end where a model sees."""
IMAGE, START, END = WORDS - 3, WORDS - 2, WORDS - 1
LABELS: Final = 3


# Inputs


def text(seed: int = 0) -> torch.Tensor:
    """Two lines in which every word is once, so that each row of a table is looked up."""
    return torch.randperm(WORDS - 3, generator=torch.Generator().manual_seed(seed))[: WORDS - 4].view(2, -1)


def noise(*shape: int) -> torch.Tensor:
    """An image, or a sound."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words() -> Inputs:
    return {"input_ids": text()}


def both_sides() -> Inputs:
    return {"input_ids": text(), "decoder_input_ids": text(1)}


def sound() -> Inputs:
    return {"input_features": noise(2, 8, 16), "decoder_input_ids": text(1)}


def pixels() -> Inputs:
    return {"pixel_values": noise(2, 3, 16, 16)}


def words_and_image(patches: int, **more: torch.Tensor) -> Inputs:
    """One line: an image between its marks, and every word."""
    seen = torch.tensor([START, *[IMAGE] * patches, END])
    line = torch.cat([seen, text().view(-1)])[None]
    return {"input_ids": line, "pixel_values": noise(1, 3, 16, 16), **more}


def seen() -> Inputs:
    return words_and_image(4)


def gemma_inputs() -> Inputs:
    given = seen()
    return given | {"token_type_ids": (given["input_ids"] == IMAGE).long()}


def qwen_inputs() -> Inputs:
    given = seen()
    kinds = (given["input_ids"] == IMAGE).int()
    patches = {"pixel_values": noise(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return given | patches | {"mm_token_type_ids": kinds}


# Models


def model(family: str, head: str = "ForCausalLM", **options: Any) -> Callable[[], Model]:
    """A model of transformers from its config; `head` is the suffix of its class."""

    def build() -> Model:
        import transformers

        config = getattr(transformers, f"{family}Config")(**options)
        return getattr(transformers, f"{family.removesuffix('Text')}{head}")(config)

    return build


DECODER: Final[dict[str, Any]] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: Final[dict[str, Any]] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EYE: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LLAMA: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_TABLES: Final[dict[str, Any]] = {"table": "embed_tokens", "head": "lm_head"}
FEW: Final[dict[str, Any]] = {"num_labels": LABELS}


def llava() -> Model:
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**EYE),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Model:
    import transformers

    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**DECODER, sliding_window=16),
        vision_config=transformers.SiglipVisionConfig(**EYE, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Model:
    import transformers

    options = {key: value for key, value in DECODER.items() if key != "head_dim"}
    config = transformers.Qwen2VLConfig(
        text_config=options
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


PLAIN: Final = {*DECODER, "tie_word_embeddings", "rms_norm_eps", "sliding_window", "layer_types"}
"""Settings that a language model has by itself as inside a multimodal one."""


def language_of(model: str) -> Callable[[Model], Model]:
    """The language model inside a multimodal one, by itself, as people train it."""

    def take(opened: Model) -> Model:
        import transformers

        options = opened.config.text_config.to_dict()
        kind = "Gemma3TextConfig" if model == "Gemma3" else f"{model}Config"
        config = getattr(transformers, kind)(**{key: value for key, value in options.items() if key in PLAIN})
        alone = getattr(transformers, f"{model}ForCausalLM")(config)
        alone.model.load_state_dict(opened.model.language_model.state_dict())
        alone.lm_head.load_state_dict(opened.lm_head.state_dict())
        alone.name_or_path = opened.name_or_path
        return alone.eval()

    return take


class Small(nn.Module):
    """A model of plain torch, whose folder has no config: tables, kernels of one to three dimensions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, 16)
        self.one = nn.Conv1d(16, 12, 3, padding=1)
        self.two = nn.Conv2d(1, 6, (3, 2))
        self.three = nn.Conv3d(2, 4, (1, 3, 2))
        self.resampler = nn.MultiheadAttention(12, 3, batch_first=True)
        self.wide = nn.Linear(12, 20)
        self.query = nn.Parameter(torch.randn(5, 12))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        seen = self.one(self.emb(input_ids).transpose(1, 2)).transpose(1, 2)
        held, _ = self.resampler(self.query.expand(len(seen), -1, -1), seen, seen, need_weights=False)
        flat: torch.Tensor = self.two(held[:, None])
        deep: torch.Tensor = self.three(flat.unflatten(1, (2, 3)))
        return torch.cat([self.wide(held).flatten(1), flat.flatten(1), deep.flatten(1)], 1)

    def save_pretrained(self, folder: Path, max_shard_size: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Small:
        made = cls()
        made.load_state_dict(load_file(folder / "model.safetensors"))
        return made.eval()
