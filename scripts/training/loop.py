"""The training loop: plain torch, and a state on disk from which a run goes on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from corpus import Text
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (everyone's name for it)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: Updates.
        rate: The highest learning rate.
        batch: Windows at once.
        length: Tokens of each.
        every: Steps between two states on disk; 0 for none.
        seed: Decides which windows come when, and what dropout leaves out.
    """

    steps: int
    rate: float
    batch: int = 16
    length: int = 64
    every: int = 0
    seed: int = 0


class Trained(Protocol):
    """What is trained: an `Injection`, or `Whole`."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What goes to disk."""

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""


@dataclass(frozen=True)
class Whole:
    """A model of which all is trained."""

    model: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.model.parameters())

    def trainable_state(self) -> dict[str, Tensor]:
        """The model's state."""
        return dict(self.model.state_dict())

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Load it."""
        self.model.load_state_dict(state)


def fit(
    model: nn.Module,
    trained: Trained,
    text: Text,
    plan: Plan,
    *,
    label: str,
    state: Path | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train in place, from where the state on disk says, else from the beginning.

    Args:
        model: Computes logits from tokens.
        trained: The parameters that are to move.
        text: What to learn.
        plan: How.
        label: What the bar is called.
        state: Where the state is kept.
        after_step: Called with the number of steps that are done.
    """
    torch.manual_seed(plan.seed)
    windows = torch.Generator().manual_seed(plan.seed)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    done = _resume(state, trained, optimizer, windows) if state is not None and state.is_file() else 0
    model.train()
    with _bar(label, plan.steps, done) as show:
        for step in range(done, plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * _share(step, plan.steps)
            loss = mean_loss(model, *text.batch(plan.batch, plan.length, windows))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            show(step + 1, float(loss.detach()))
            if state is not None and plan.every and (step + 1) % plan.every == 0:
                _keep(state, step + 1, trained, optimizer, windows)
            after_step(step + 1)
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, length: int) -> float:
    """Return the mean loss on what was held out, in nats a byte."""
    was_training = model.training
    model.eval()
    loss = float(mean_loss(model, *text.windows(length)))
    model.train(was_training)
    return loss


def mean_loss(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    """Return the mean cross entropy of the tokens that follow."""
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def _share(step: int, steps: int) -> float:
    """Share of the learning rate: up in a tenth of the steps, then down along a cosine."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _keep(path: Path, step: int, trained: Trained, optimizer: torch.optim.Optimizer, windows: torch.Generator) -> None:
    """Write the state, complete or not at all.

    Equal states can have other bytes: pickle refers back where two values are one object, and they no longer are in a
    state that was loaded.
    """
    content = {
        "step": step,
        "trained": trained.trainable_state(),
        "optimizer": optimizer.state_dict(),
        "windows": windows.get_state(),
        "dropout": torch.get_rng_state(),
    }
    making = path.with_name(f"{path.name}.making")
    torch.save(content, making)
    making.replace(path)


def _resume(path: Path, trained: Trained, optimizer: torch.optim.Optimizer, windows: torch.Generator) -> int:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    trained.load_trainable_state(content["trained"])
    optimizer.load_state_dict(content["optimizer"])
    windows.set_state(content["windows"])
    torch.set_rng_state(content["dropout"])
    return int(content["step"])


@contextmanager
def _bar(label: str, steps: int, done: int) -> Iterator[Callable[[int, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]}")) as progress:
        task = progress.add_task(label, total=steps, completed=done, loss="…")
        yield lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}")
