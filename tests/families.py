"""Model families: tiny models of everything that is trained with adapters, as transformers writes their folders.

A `Family` builds a model, gives it inputs that every token of its vocabulary is in, and says in which Auto class
adapters for it are trained. A new family is one entry of `FAMILIES`. Transformers is imported only when one is built.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from family_models import (
    DECODER,
    ENCODER,
    EYE,
    FEW,
    LABELS,
    LLAMA_TABLES,
    WORDS,
    Inputs,
    Model,
    Small,
    both_sides,
    gemma3,
    gemma_inputs,
    language_of,
    llava,
    model,
    pixels,
    qwen2_vl,
    qwen_inputs,
    seen,
    sound,
    words,
)
from safetensors.torch import load_file, save_file

Spelling = tuple[tuple[str, str], ...]
"""Regular expressions and what takes their place in a name, one after the other."""
Tensors = dict[str, torch.Tensor]


def whole(opened: Model) -> Model:
    """Most adapters are trained on all of the model."""
    return opened


def as_saved(model: Model, saved: Tensors) -> Tensors:
    """Most files are what transformers writes."""
    return saved


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: Unique; also the seed.
        build: Makes the model that is saved as the base.
        inputs: What both are called with.
        auto: The class in which the folder is opened, for training and for comparing.
        load_options: What `from_pretrained` needs beside the folder.
        table: A token embedding, or several, as adapters target them.
        head: The output layer, as adapters target it; empty where there is none.
        kernel: A convolution.
        linear: Targets of an adapter on "all linear layers".
        output: What of the model's answer is compared.
        task: PEFT's word for what it is trained for, where the base lacks the head for it.
        part: Makes the model that is trained of the one that was opened.
        spelling: How names in the base's file are changed by hand.
        stored: Makes what its one file holds of the model and of what transformers wrote.
        experts: Parameters of several experts each, as adapters target them; the one inside first.
        count: How many experts there are.
        max_shard_size: As for `save_pretrained`.
        dtype: Of the file; what is trained and compared is of float32.
        tied: Whether its table is its head.
    """

    name: str
    build: Callable[[], Model]
    inputs: Callable[[], Inputs]
    auto: str
    load_options: Mapping[str, Any] = field(default_factory=dict)
    table: str = ""
    head: str = ""
    kernel: str = ""
    linear: str | tuple[str, ...] = "all-linear"
    output: str = "logits"
    task: str | None = None
    part: Callable[[Model], Model] = whole
    spelling: Spelling = ()
    stored: Callable[[Model, Tensors], Tensors] = as_saved
    experts: tuple[str, ...] = ()
    count: int = 0
    max_shard_size: str = "50GB"
    dtype: torch.dtype = torch.float32
    tied: bool = False

    @property
    def seed(self) -> int:
        """Stable over processes, which `hash` is not."""
        return zlib.crc32(self.name.encode())

    def save(self, folder: Path) -> None:
        """Write the base. No tensor keeps what a constructor gives to all: ones, zeros, or a norm."""
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.to(self.dtype).save_pretrained(folder, max_shard_size=self.max_shard_size)
        if self.spelling or self.stored is not as_saved:
            file = folder / "model.safetensors"
            save_file(self.as_stored(model, load_file(file)), file, {"format": "pt"})

    def as_stored(self, model: Model, saved: Tensors) -> Tensors:
        """A model's tensors as this family's files have them, of what transformers wrote."""
        return {respelled(name, self.spelling): tensor for name, tensor in self.stored(model, saved).items()}

    def load(self, folder: Path) -> Model:
        """The folder's model; heads that it lacks are the same each time."""
        import transformers

        torch.manual_seed(self.seed)
        if self.auto == "Small":
            return Small.from_pretrained(folder)
        return getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32, **self.load_options).eval()

    def answer(self, model: Model, inputs: Inputs | None = None) -> torch.Tensor:
        """The model's output, for the family's inputs unless others are given."""
        output = model(**(inputs or self.inputs()))
        values: torch.Tensor = output if isinstance(output, torch.Tensor) else output[self.output]
        return values.float()


def respelled(name: str, spelling: Spelling) -> str:
    """A name with every pattern replaced."""
    for pattern, new in spelling:
        name = re.sub(pattern, new, name)
    return name


# Spellings of transformers 4, in files and in adapters, and today's in memory

TODAY: Final[Mapping[str, Spelling]] = {
    "llava": (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    "qwen2-vl": ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
    "vit": (
        (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(layer\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^vit\.encoder\.layer\.", "vit.layers."),
    ),
    "gpt-neox": ((r"^embed_out\.", "lm_head."),),
}
"""From names in files to those in memory."""

PUBLISHED: Final[Spelling] = ((r"^vision_tower\.", "vision_tower.vision_model."),)
"""From today's names in files of seeing models to those that most of them were published with."""

OLD: Final[Mapping[str, Spelling]] = {
    "llava": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
    "qwen2-vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "vit": (
        (r"^vit\.layers\.", "vit.encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    "gpt-neox": ((r"^lm_head\.", "embed_out."),),
}
"""From names in memory today to those of transformers before 4.52, which adapters of that time have."""

BETWEEN: Final[Spelling] = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
"""From today's names in memory to those of transformers 4.52 to 4.57."""

LM, SEQ2SEQ, SEES = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"
CLASSES, IMAGES = "AutoModelForSequenceClassification", "AutoModelForImageClassification"


_LISTED: Final = (
    Family("llama", model("Llama", tie_word_embeddings=False, **DECODER), words, LM, **LLAMA_TABLES),
    Family("llama-tied", model("Llama", tie_word_embeddings=True, **DECODER), words, LM, tied=True, **LLAMA_TABLES),
    Family(
        "llama-bare", model("Llama", "Model", **DECODER), words, CLASSES, FEW, "embed_tokens", "score", task="SEQ_CLS"
    ),
    Family("mistral", model("Mistral", sliding_window=None, **DECODER), words, LM, **LLAMA_TABLES),
    Family("qwen2", model("Qwen2", tie_word_embeddings=True, **DECODER), words, LM, tied=True, **LLAMA_TABLES),
    Family("qwen3", model("Qwen3", tie_word_embeddings=False, **DECODER), words, LM, **LLAMA_TABLES),
    Family("gemma2", model("Gemma2", sliding_window=16, **DECODER), words, LM, tied=True, **LLAMA_TABLES),
    Family("gemma3-text", model("Gemma3Text", sliding_window=16, **DECODER), words, LM, tied=True, **LLAMA_TABLES),
    Family("gemma3", gemma3, gemma_inputs, SEES, kernel="patch_embedding", tied=True, **LLAMA_TABLES),
    Family("phi", model("Phi", **DECODER), words, LM, **LLAMA_TABLES),
    Family("phi3", model("Phi3", **DECODER), words, LM, **LLAMA_TABLES),
    Family(
        "gpt2",
        model("GPT2", "LMHeadModel", vocab_size=WORDS, n_embd=32, n_inner=40, n_layer=2, n_head=4, n_positions=64),
        words,
        LM,
        table="wte",
        head="lm_head",
        tied=True,
    ),
    Family(
        "opt",
        model("OPT", ffn_dim=40, word_embed_proj_dim=32, do_layer_norm_before=True, **ENCODER),
        words,
        LM,
        table="embed_tokens",
        head="lm_head",
        tied=True,
    ),
    Family("gpt-neox", model("GPTNeoX", **ENCODER), words, LM, table="embed_in", head="lm_head"),
    Family(
        "bert",
        model("Bert", "ForMaskedLM", **ENCODER),
        words,
        "AutoModelForMaskedLM",
        table="word_embeddings",
        head="decoder",
        tied=True,
    ),
    Family(
        "bert-bare",
        model("Bert", "Model", **ENCODER),
        words,
        CLASSES,
        FEW,
        "word_embeddings",
        "classifier",
        task="SEQ_CLS",
    ),
    Family(
        "roberta",
        model("Roberta", "ForSequenceClassification", num_labels=LABELS, **ENCODER),
        words,
        CLASSES,
        table="word_embeddings",
        head="classifier.out_proj",
    ),
    Family("roberta-bare", model("Roberta", "Model", **ENCODER), words, CLASSES, FEW, task="SEQ_CLS"),
    Family(
        "t5",
        model(
            "T5",
            "ForConditionalGeneration",
            vocab_size=WORDS,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        both_sides,
        SEQ2SEQ,
        table="embed_tokens",
        head="lm_head",
        tied=True,
    ),
    Family(
        "marian",
        model(
            "Marian",
            "MTModel",
            vocab_size=WORDS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=2,
        ),
        both_sides,
        SEQ2SEQ,
        table="shared",
        head="lm_head",
        tied=True,
    ),
    Family("vit", model("ViT", "ForImageClassification", **EYE, **FEW), pixels, IMAGES, kernel="projection"),
    Family("dinov2", model("Dinov2", "ForImageClassification", **EYE, **FEW), pixels, IMAGES, kernel="projection"),
    Family(  # its files have two matrices of each block as one
        "dinov2-gated",
        model("Dinov2", "ForImageClassification", use_swiglu_ffn=True, **EYE, **FEW),
        pixels,
        IMAGES,
        kernel="projection",
    ),
    Family(  # and these three
        "nomic",
        model("NomicBert", "ForSequenceClassification", num_labels=LABELS, **ENCODER),
        words,
        CLASSES,
        table="word_embeddings",
    ),
    Family(
        "siglip",
        model("SiglipVision", "Model", **EYE),
        pixels,
        "SiglipVisionModel",
        kernel="patch_embedding",
        linear=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),  # the layer in the attention of torch is not called
        output="pooler_output",
    ),
    Family(
        "whisper",
        model(
            "Whisper",
            "ForConditionalGeneration",
            vocab_size=WORDS,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_source_positions=8,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        sound,
        "AutoModelForSpeechSeq2Seq",
        table="embed_tokens",
        head="proj_out",
        tied=True,
        kernel="conv1",
    ),
    Family("llava", llava, seen, SEES, kernel="patch_embedding", **LLAMA_TABLES),
    Family("qwen2-vl", qwen2_vl, qwen_inputs, SEES, kernel="patch_embed.proj", **LLAMA_TABLES),
    Family("small", Small, words, "Small", table="emb", linear=("wide",), kernel="one"),
    # What others do not show: shards, names that were changed by hand, and parts that are trained by themselves.
    Family(
        "llama-shards",
        model("Llama", tie_word_embeddings=True, **DECODER),
        words,
        LM,
        max_shard_size="20KB",
        tied=True,
        **LLAMA_TABLES,
    ),
    Family(
        "llama-bf16",
        model("Llama", tie_word_embeddings=True, **DECODER),
        words,
        LM,
        dtype=torch.bfloat16,
        max_shard_size="20KB",
        tied=True,
        **LLAMA_TABLES,
    ),
    Family(  # of the two names of one tensor, its file has the other
        "llama-head-stored",
        model("Llama", tie_word_embeddings=True, **DECODER),
        words,
        LM,
        spelling=((r"^model\.embed_tokens\.", "lm_head."),),
        tied=True,
        **LLAMA_TABLES,
    ),
    Family("llava-today", llava, seen, SEES, spelling=TODAY["llava"], **LLAMA_TABLES),
    Family("llava-published", llava, seen, SEES, spelling=PUBLISHED, **LLAMA_TABLES),
    Family("gemma3-published", gemma3, gemma_inputs, SEES, spelling=PUBLISHED, tied=True, **LLAMA_TABLES),
    Family("qwen2-vl-today", qwen2_vl, qwen_inputs, SEES, spelling=TODAY["qwen2-vl"], **LLAMA_TABLES),
    Family("vit-today", model("ViT", "ForImageClassification", **EYE, **FEW), pixels, IMAGES, spelling=TODAY["vit"]),
    Family("gpt-neox-today", model("GPTNeoX", **ENCODER), words, LM, spelling=TODAY["gpt-neox"], head="lm_head"),
    Family("llava-text", llava, words, SEES, part=language_of("Llama"), **LLAMA_TABLES),
    Family("gemma3-words", gemma3, words, SEES, part=language_of("Gemma3"), tied=True, **LLAMA_TABLES),
    Family("qwen2-vl-text", qwen2_vl, words, SEES, part=language_of("Qwen2"), **LLAMA_TABLES),
)

FAMILIES: Final = {family.name: family for family in _LISTED}
