"""Every tuner of PEFT: what it does to weights, or why it cannot be merged.

One module for each tuner, or for some of one algebra; listed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_cli.adapters.formula import Method
from lora_cli.adapters.tuners import ia3, loha
from lora_cli.adapters.tuners.tuner import Tuner

_TUNERS = (ia3.TUNER, loha.TUNER)

TUNERS: Mapping[str, Tuner] = {tuner.type: tuner for tuner in _TUNERS}
"""PEFT type → tuner. LORA has a reader of its own, `formats.peft`."""

METHODS: Mapping[str, Method] = {method.kind: method for tuner in _TUNERS for method in tuner.methods}
"""Kind → what is computed."""

REFUSED: Mapping[str, str] = {}
"""PEFT type → why no merge into weights can do what it does."""
