"""LoRA layers in a transformers model, trained by TRL's SFTTrainer.

The trainer is given no `peft_config`: the adapter is in the model already.

Usage: . scripts/environment test; python scripts/training/sft_example.py [OUT]
"""

from __future__ import annotations

from pathlib import Path

import torch
from corpus import Text
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainer_example import LENGTH, STEPS, Outcome, new_folder, small_llama
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from lora_cli.nn import LoRAConfig, inject


def main(out: Path) -> Outcome:
    """Make a base, train an adapter for it, and save both."""
    set_seed(0)
    model = small_llama()
    model.save_pretrained(out / "base")
    injection = inject(model, LoRAConfig(rank=8, alpha=32, dropout=0.05, seed=0))
    print(injection.summary())
    arguments = SFTConfig(
        output_dir=str(out / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=STEPS // 4,
        max_length=LENGTH,
        packing=False,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    verse = bytes(Text.read("verse").train.tolist()).decode()
    lines = Dataset.from_dict({"text": [line for line in verse.splitlines() if line]})
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=lines, processing_class=byte_tokenizer())
    trainer.train()
    injection.save(out / "adapter", base_model=str(out / "base"))
    return Outcome.of(trainer, injection)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, without merges; the last of the 256 stands for the end."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:255])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")  # noqa: S106


if __name__ == "__main__":
    print(main(new_folder(__doc__, "sft-out")))
