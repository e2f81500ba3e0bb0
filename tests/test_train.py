"""`scripts/train` from end to end, in seconds: what it trains, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import lora_cli
from lora_cli.errors import UsageError
from lora_cli.nn import LoRAConfig, inject

SCRIPTS = Path(__file__).parents[1] / "scripts" / "training"
sys.path.append(str(SCRIPTS))

import pipeline  # noqa: E402
from corpus import Text  # noqa: E402
from decoder import Decoder, Shape  # noqa: E402
from loop import Plan, Whole, evaluate, fit  # noqa: E402
from settings import Settings  # noqa: E402

QUICK = Settings(base_steps=12, steps=12, every=5, batch=4, length=32)
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
    pipeline.run(out, QUICK)
    return out


def never(_: str, __: int) -> None:
    raise AssertionError("no step was to be made")


def stop_at(text: str, step: int) -> Callable[[str, int], None]:
    def after_step(learned: str, done: int) -> None:
        if (learned, done) == (text, step):
            raise KeyboardInterrupt

    return after_step


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The script


def test_it_ends_with_a_merge_that_is_undone(finished: Path) -> None:
    left = {"adapter", "base", "merged", "training.json", "training.pt", "unmerged"}
    assert {path.name for path in finished.iterdir()} == left
    base, merged = load_file(finished / "base" / "model.safetensors"), load_file(finished / "merged/model.safetensors")
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {key for key in base if "_proj." in key}
    for file in (finished / "base").iterdir():
        assert file.read_bytes() == (finished / "unmerged" / file.name).read_bytes()
    assert lora_cli.verify(finished / "merged", finished / "base", [finished / "adapter"]).verified


@pytest.mark.parametrize(
    ("text", "state", "left"),
    [
        ("verse", "training.pt", [("verse", step) for step in range(6, 13)]),
        (
            "prose",
            "base-training.pt",
            [*(("prose", step) for step in range(6, 13)), *(("verse", step) for step in range(1, 13))],
        ),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    text: str, state: str, left: list[tuple[str, int]], finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(out, QUICK, after_step=stop_at(text, 8))
    assert (out / state).is_file()
    assert not (out / "adapter").exists()
    steps: list[tuple[str, int]] = []
    pipeline.run(out, Settings.read(out), "resume", lambda *step: steps.append(step))
    assert steps == left
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in finished.iterdir())
    for name in ("base", "adapter", "merged"):
        for file in (finished / name).glob("*.safetensors"):
            assert file.read_bytes() == (out / name / file.name).read_bytes()


def test_a_run_goes_on_only_with_its_own_settings(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"other settings.*found --rank 4, not 8;") as refused:
        pipeline.run(finished, replace(QUICK, rank=4), "resume", never)
    assert refused.value.exit_code == 2
    with pytest.raises(UsageError, match="no run that could go on"):
        pipeline.run(tmp_path, QUICK, "resume", never)
    for broken in ("{", "[]", '{"steps": 3}'):
        (tmp_path / "training.json").write_text(broken)
        with pytest.raises(UsageError, match="no run that could go on"):
            Settings.read(tmp_path)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious").write_text("mine")
    for start in ("new", "force"):
        with pytest.raises(UsageError, match="did not make"):
            pipeline.run(tmp_path, QUICK, start, never)
    with pytest.raises(UsageError, match="no folder"):
        pipeline.run(tmp_path / "base" / "precious", QUICK, "new", never)
    assert everything_in(tmp_path) == {"base/precious": b"mine"}


def test_a_run_that_is_there_is_replaced_only_when_told_so(tmp_path: Path) -> None:
    quick = replace(QUICK, base_steps=2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path, quick, after_step=stop_at("verse", 6))
    before = everything_in(tmp_path)
    assert "training.pt" in before
    with pytest.raises(UsageError, match="--resume to go on with it, --force to start anew"):
        pipeline.run(tmp_path, replace(quick, steps=3), "new", never)
    assert everything_in(tmp_path) == before
    steps: list[tuple[str, int]] = []

    def after_step(*step: Any) -> None:
        steps.append(step)
        stop_at("verse", 1)(*step)

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path, quick, "force", after_step)
    assert steps == [("prose", 1), ("prose", 2), ("verse", 1)]
    assert not (tmp_path / "training.pt").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["--rank", "0"], "--rank makes no sense; found 0; expected 1 to 128"),
        (["--alpha", "nan"], "alpha"),
        (["--steps", "0"], "--steps makes no sense"),
        (["--batch", "-1"], "--batch makes no sense"),
        (["--length", "100000"], "--length makes no sense"),
        (["--every", "-1"], "--every makes no sense"),
        (["--seed", "-1"], "--seed makes no sense"),
    ],
)
def test_settings_are_looked_at_before_the_folder_is(
    said: list[str], words: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(finished)
    with pytest.raises(SystemExit) as stopped:
        pipeline.main([str(finished), "--force", *said])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert everything_in(finished) == before


def test_the_command_line_says_what_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(pipeline, "run", lambda *arguments: seen.append(arguments))
    pipeline.main([])
    pipeline.main([str(tmp_path), "--steps", "7", "--alpha", "2.5"])
    pipeline.main([str(tmp_path), "--force"])
    assert seen == [
        (Path("train-out"), Settings(), "new"),
        (tmp_path, Settings(steps=7, alpha=2.5), "new"),
        (tmp_path, Settings(), "force"),
    ]
    for said, words in ((["--resume"], "no run that could go on"), (["--resume", "--force"], "not allowed with")):
        with pytest.raises(SystemExit) as stopped:
            pipeline.main([str(tmp_path), *said])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pipeline.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: scripts/train ")


def test_a_run_goes_on_with_what_it_was_started_with(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(pipeline, "run", lambda out, settings, start: seen.append((settings, start)))
    pipeline.main([str(finished), "--resume"])
    pipeline.main([str(finished), "--resume", "--rank", "2"])
    assert seen == [(QUICK, "resume"), (replace(QUICK, rank=2), "resume")]


def test_who_stops_it_is_told_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    for there in (False, True):
        with pytest.raises(SystemExit) as stopped:
            pipeline.main([str(tmp_path)])
        assert stopped.value.code == 130
        assert (f"To go on: scripts/train {tmp_path} --resume" in capsys.readouterr().err) is there
        QUICK.write(tmp_path)


def test_an_adapter_that_learned_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="learned nothing"):
        pipeline.run(tmp_path, replace(QUICK, steps=1, alpha=1e-30))


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
