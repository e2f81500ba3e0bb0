"""Every tuner of PEFT: what it does to weights, or why it cannot be merged.

One module for each tuner, or for some of one algebra; listed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_cli.adapters.formula import Method
from lora_cli.adapters.tuners import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    miss,
    oft,
    osf,
    peanut,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from lora_cli.adapters.tuners.tuner import Tuner

_TUNERS = (
    adalora.TUNER,
    beft.TUNER,
    boft.TUNER,
    c3a.TUNER,
    deft.TUNER,
    delora.TUNER,
    fourierft.TUNER,
    frod.TUNER,
    glora.TUNER,
    gralora.TUNER,
    hira.TUNER,
    hra.TUNER,
    ia3.TUNER,
    ln_tuning.TUNER,
    loha.TUNER,
    lokr.TUNER,
    miss.BONE,
    miss.TUNER,
    oft.TUNER,
    osf.TUNER,
    peanut.TUNER,
    randlora.TUNER,
    road.TUNER,
    shira.TUNER,
    supertuning.TUNER,
    tinylora.TUNER,
    trainable_tokens.TUNER,
    unilora.TUNER,
    vblora.TUNER,
    vera.PVERA,
    vera.TUNER,
    waveft.TUNER,
)

TUNERS: Mapping[str, Tuner] = {tuner.type: tuner for tuner in _TUNERS}
"""PEFT type → tuner. LORA has a reader of its own, `formats.peft`."""

METHODS: Mapping[str, Method] = {method.kind: method for tuner in _TUNERS for method in tuner.methods}
"""Kind → what is computed."""

NAMES: Mapping[str, str] = {method.kind: tuner.name for tuner in _TUNERS for method in tuner.methods}
"""Kind → what people call the tuner."""

_PROMPT = "it trains prompts that are put before the input, which no weight can hold"
_KEYS = "it trains extra keys and values for attention, which no weight can hold"

REFUSED: Mapping[str, str] = {
    "ADAMSS": (
        "which outputs its factors are for is found by clustering singular vectors of the base, and its file does not "
        "say it; merge it with PEFT"
    ),
    "ADAPTION_PROMPT": "it trains extra prompts for attention layers, which no weight can hold",
    "CARTRIDGE": _KEYS,
    "CPT": _PROMPT,
    "LILY": "it mixes shared factors differently for each input, which no weight can do; PEFT does not merge it either",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "it mixes factors by the task that each input names, which no weight can do",
    "PREFIX_TUNING": _KEYS,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": (
        "it rotates the first singular vectors of the base, which its file does not hold, and the result depends on "
        "their signs, which no rule fixes; merge it with PEFT"
    ),
    "P_TUNING": _PROMPT,
    "SHADOW": "it runs a small model beside the layers that corrects what they pass on, which no weight can do",
    "XLORA": "it mixes its adapters differently for each token, which no weight can do; merge one of its adapters",
}
"""PEFT type → why no merge into weights can do what it does."""
