"""LN tuning: layer norms are trained as they are, and held whole (Zhao et al. 2023).

In PEFT (`peft.tuners.ln_tuning`) a module has `ln_tuning_layers.weight`, and `ln_tuning_layers.bias` if it has one.
"""

from __future__ import annotations

from lora_cli.adapters.adapter import Replacement
from lora_cli.adapters.tuners.tuner import Changes, Module, Tuner

_LAYERS = "ln_tuning_layers."


def _read(module: Module) -> Changes:
    for part, tensor in module.tensors.items():
        yield Replacement(f"{module.name}.{part.removeprefix(_LAYERS)}", tensor, "a trained norm")


TUNER = Tuner(
    type="LN_TUNING",
    name="LN tuning",
    source="Zhao et al. 2023, arXiv:2312.11420",
    modules="norms, whole",
    parts=(f"{_LAYERS}weight", f"{_LAYERS}bias"),
    read=_read,
    needs=(),
    whole=True,
)
