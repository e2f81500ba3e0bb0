"""LoRA layers in a transformers model, trained by transformers' own Trainer.

The Trainer needs to know nothing of adapters: it sees a model of which few parameters ask for gradients.

Usage: . scripts/environment test; python scripts/training/trainer_example.py [OUT]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lora_cli.nn import Injection, LoRAConfig, inject

LENGTH, STEPS = 32, 40


@dataclass(frozen=True)
class Outcome:
    """What an example leaves.

    Attributes:
        injection: The model, with its adapter.
        first: The first loss that was logged.
        last: The last one.
    """

    injection: Injection
    first: float
    last: float

    @classmethod
    def of(cls, trainer: Trainer, injection: Injection) -> Outcome:
        """Take the losses from the trainer's log."""
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return cls(injection, losses[0], losses[-1])

    def __str__(self) -> str:
        return f"loss {self.first:.3f} at first, {self.last:.3f} at last"


def new_folder(about: str | None, default: str, arguments: Sequence[str] | None = None) -> Path:
    """Return the OUT of a command line; end the program where something is there already."""
    words = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=words)
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=Path(default),
        metavar="OUT",
        help=f"a new folder, for the base and the adapter [{default}]",
    )
    out: Path = parser.parse_args(arguments).out
    if out.exists():
        parser.error(f"{out} exists; name another folder")
    return out


def main(out: Path) -> Outcome:
    """Make a base, train an adapter for it, and save both."""
    set_seed(0)
    model = small_llama()
    model.save_pretrained(out / "base")
    injection = inject(model, LoRAConfig(rank=8, alpha=32, dropout=0.05, seed=0))
    print(injection.summary())
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=STEPS // 4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(Text.read("verse")))
    trainer.train()
    injection.save(out / "adapter", base_model=str(out / "base"))
    return Outcome.of(trainer, injection)


def small_llama() -> LlamaForCausalLM:
    """A model for bytes, with weights as they are drawn."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,  # so that even random weights have something to say
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def examples(text: Text) -> list[dict[str, Tensor]]:
    """A text in windows, as the Trainer takes them: the model itself shifts the labels."""
    return [{"input_ids": window, "labels": window} for window in text.train.unfold(0, LENGTH, LENGTH)]


if __name__ == "__main__":
    print(main(new_folder(__doc__, "trainer-out")))
