"""`scripts/train` from end to end, in seconds: what it trains, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import lora_cli
from lora_cli.nn import LoRAConfig, inject

SCRIPTS = Path(__file__).parents[1] / "scripts" / "training"
sys.path.append(str(SCRIPTS))

import pipeline  # noqa: E402
from corpus import Text  # noqa: E402
from decoder import Decoder, Shape  # noqa: E402
from loop import Plan, Whole, evaluate, fit  # noqa: E402

QUICK = pipeline.Settings(base_steps=12, steps=12, every=5, batch=4, length=32)
TINY = Shape(hidden_size=32, intermediate_size=48, num_attention_heads=2, max_position_embeddings=32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "out"
    pipeline.run(out, QUICK, resume=False)
    return out


def never(_: int) -> None:
    raise AssertionError("no step was to be made")


def stop_at(step: int) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return after_step


# The script


def test_it_ends_with_a_merge_that_is_undone(finished: Path) -> None:
    base, merged = load_file(finished / "base" / "model.safetensors"), load_file(finished / "merged/model.safetensors")
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {key for key in base if "_proj." in key}
    for file in (finished / "base").iterdir():
        assert file.read_bytes() == (finished / "unmerged" / file.name).read_bytes()
    assert lora_cli.verify(finished / "merged", finished / "base", [finished / "adapter"]).verified


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(out, QUICK, resume=False, after_step=stop_at(8))
    assert (out / "training.pt").is_file()
    assert not (out / "adapter").exists()
    steps: list[int] = []
    pipeline.run(out, pipeline.Settings(**pipeline.settings_of(out)), resume=True, after_step=steps.append)
    assert steps == [6, 7, 8, 9, 10, 11, 12]
    for name in ("base", "adapter", "merged"):
        for file in (finished / name).glob("*.safetensors"):
            assert file.read_bytes() == (out / name / file.name).read_bytes()


def test_a_run_goes_on_only_with_its_own_settings(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"other settings.*'rank': 8"):
        pipeline.run(finished, replace(QUICK, rank=4), resume=True, after_step=never)
    with pytest.raises(SystemExit, match="no run that could go on"):
        pipeline.run(tmp_path, QUICK, resume=True, after_step=never)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious").write_text("mine")
    with pytest.raises(SystemExit, match="did not make"):
        pipeline.run(tmp_path, QUICK, resume=False, after_step=never)
    assert (tmp_path / "base" / "precious").read_text() == "mine"


def test_the_command_line_says_what_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[object] = []
    monkeypatch.setattr(pipeline, "run", lambda out, settings, *, resume: seen.append((out, settings, resume)))
    pipeline.main([])
    pipeline.main([str(tmp_path), "--steps", "7", "--alpha", "2.5"])
    assert seen == [
        (Path("train-out"), pipeline.Settings(), False),
        (tmp_path, pipeline.Settings(steps=7, alpha=2.5), False),
    ]
    with pytest.raises(SystemExit, match="no run that could go on"):
        pipeline.main([str(tmp_path), "--resume"])


def test_a_run_goes_on_with_what_it_was_started_with(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(pipeline, "run", lambda out, settings, *, resume: seen.append((settings, resume)))
    pipeline.main([str(finished), "--resume"])
    pipeline.main([str(finished), "--resume", "--rank", "2"])
    assert seen == [(QUICK, True), (replace(QUICK, rank=2), True)]


def test_who_stops_it_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    with pytest.raises(SystemExit, match=f"To go on: scripts/train {re.escape(str(tmp_path))} --resume"):
        pipeline.main([str(tmp_path)])


def test_an_adapter_that_learned_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="learned nothing"):
        pipeline.run(tmp_path, replace(QUICK, steps=0), resume=False)


def test_a_merged_file_that_computes_something_else_is_a_failure(finished: Path, tmp_path: Path) -> None:
    model = Decoder.load(finished / "base")
    injection = inject(model, LoRAConfig(rank=QUICK.rank, seed=0))
    loss = evaluate(model, Text.read("verse"), QUICK.length)
    with pytest.raises(SystemExit, match="computes something else"):
        pipeline.check_merged(finished, QUICK, injection, loss + 1)
    # The loss as it should be, but not the weights: the adapter here is a fresh one.
    merged_loss = evaluate(Decoder.load(finished / "merged"), Text.read("verse"), QUICK.length)
    with pytest.raises(SystemExit, match="in memory and merged on files differ"):
        pipeline.check_merged(finished, QUICK, injection, merged_loss)


def test_a_command_that_fails_is_a_failure(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "something").touch()
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(finished / name)
    with pytest.raises(SystemExit) as stopped:
        pipeline.check_files(tmp_path)
    assert stopped.value.code == 30


def test_a_base_that_does_not_come_back_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "command", lambda *words: None)
    for name in ("base", "unmerged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"as it was")
    pipeline.check_files(tmp_path)
    (tmp_path / "unmerged" / "model.safetensors").write_bytes(b"as it is")
    with pytest.raises(SystemExit, match="did not come back"):
        pipeline.check_files(tmp_path)


# The model and the loop


def test_the_model_is_what_transformers_calls_llama(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Decoder(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save(tmp_path / "base")
    tokens = torch.randint(256, (2, 32))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(Decoder.load(tmp_path / "base")(tokens), model(tokens))
    assert set(theirs.state_dict()) == set(model.state_dict())


def test_a_checkpoint_that_lacks_a_tensor_is_not_loaded(tmp_path: Path) -> None:
    Decoder(TINY).save(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        Decoder.load(tmp_path / "base")


def test_texts_are_what_they_are_said_to_be() -> None:
    for name, word in (("prose", b"Alice"), ("verse", b"thou")):
        text = Text.read(name)
        whole = bytes(torch.cat([text.train, text.held_out]).tolist())
        assert whole == (SCRIPTS / f"{name}.txt").read_bytes()
        assert whole.isascii()
        assert word in whole
        assert len(text.held_out) / len(whole) == pytest.approx(0.1, abs=0.001)


def test_windows_hold_what_follows() -> None:
    text = Text.read("verse")
    tokens, following = text.batch(3, 20, torch.Generator().manual_seed(0))
    assert tokens.shape == following.shape == (3, 20)
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    tokens, following = text.windows(20)
    assert torch.equal(tokens.flatten(), text.held_out[: tokens.numel()])
    assert torch.equal(following.flatten(), text.held_out[1 : tokens.numel() + 1])
    assert len(text.held_out) - tokens.numel() <= 20


def test_the_loop_learns_and_leaves_the_model_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, text = Decoder(TINY), Text.read("prose")
    before = evaluate(model, text, 32)
    assert model.training
    fit(model, Whole(model), text, Plan(30, 1e-2, 4, 32), label="test")
    assert not model.training
    assert evaluate(model, text, 32) < before - 1


def test_the_base_stays_frozen_while_the_adapter_learns() -> None:
    torch.manual_seed(0)
    model, text = Decoder(TINY), Text.read("verse")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    injection = inject(model, LoRAConfig(rank=4, dropout=0.1, seed=0))
    loss = evaluate(model, text, 32)
    fit(model, injection, text, Plan(20, 2e-2, 4, 32), label="test")
    assert evaluate(model, text, 32) < loss
    state = injection.base_state()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


def test_the_state_on_disk_opens_without_pickle(tmp_path: Path) -> None:
    model = Decoder(TINY)
    fit(model, Whole(model), Text.read("verse"), Plan(3, 1e-3, 2, 16, every=2), label="t", state=tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# The real thing


@pytest.mark.slow
def test_the_script_as_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "pipeline.py", tmp_path / "out"],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    settings = json.loads((tmp_path / "out" / "training.json").read_text())
    assert settings["steps"] == 200
    assert "(bit for bit)" in done.stdout
    base, merged = (Decoder.load(tmp_path / "out" / name) for name in ("base", "merged"))
    verse = Text.read("verse")
    assert evaluate(merged, verse, 64) < evaluate(base, verse, 64) - 0.2
