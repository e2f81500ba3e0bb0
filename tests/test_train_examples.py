"""The examples with other people's trainers: they learn, and what they save is what PEFT and the merge make of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

import lora_cli

SCRIPTS = Path(__file__).parents[1] / "scripts" / "training"
sys.path.append(str(SCRIPTS))

import trainer_example  # noqa: E402

if TYPE_CHECKING:
    from trainer_example import Outcome

# PEFT and TRL still ask transformers for this by the older name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(2 * trainer_example.LENGTH).view(2, -1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_transformers_trainer(tmp_path: Path) -> None:
    check(trainer_example.main(tmp_path), tmp_path)


def test_sft_trainer(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import sft_example

    check(sft_example.main(tmp_path), tmp_path)
    tokenizer = sft_example.byte_tokenizer()
    words = "Shall I compare thee\nto a summer's day?"
    assert len(tokenizer(words).input_ids) == len(words)
    assert tokenizer.decode(tokenizer(words).input_ids) == words


def test_the_folder_of_an_example_is_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer_example.new_folder("about", "some-out", []) == Path("some-out")
    assert trainer_example.new_folder("about", "some-out", [str(tmp_path / "new")]) == tmp_path / "new"
    with pytest.raises(SystemExit) as stopped:
        trainer_example.new_folder("about", "some-out", [str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err


@torch.no_grad()
def check(outcome: Outcome, out: Path) -> None:
    assert outcome.last < outcome.first - 0.5
    model = outcome.injection.model.eval()
    learned = logits(model)
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    with outcome.injection.disabled():
        torch.testing.assert_close(logits(model), logits(base))
    assert float((logits(base) - learned).abs().max()) > 0.1
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, out / "adapter").eval()), learned)
    lora_cli.merge(out / "base", [out / "adapter"], out / "merged")
    merged = LlamaForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), learned, rtol=1e-4, atol=1e-4)


def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found
