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

_PROMPT = "prompts are trained, which go before what the model is given; no weight does that"

REFUSED: Mapping[str, str] = {
    "ADAMSS": (
        "AdaMSS finds by clusters of singular vectors of the base which outputs its factors are for, and its file does "
        "not say it; merge it by PEFT"
    ),
    "ADAPTION_PROMPT": "prompts are trained that layers of attention see besides; no weight does that",
    "CARTRIDGE": "keys and values are trained that layers of attention see besides; no weight does that",
    "CPT": _PROMPT,
    "LILY": "Lily mixes shared factors by what comes in, which no weight does; PEFT does not merge it either",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "Poly mixes factors by the task that is given along with each input, which no weight does",
    "PREFIX_TUNING": "keys and values are trained that layers of attention see besides; no weight does that",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": (
        "PSOFT turns the base's first singular vectors, which its file lacks, and what comes out depends on their "
        "signs, which no rule fixes; merge it by PEFT"
    ),
    "P_TUNING": _PROMPT,
    "SHADOW": "ShadowPEFT corrects what goes through layers by a small model beside them, which no weight does",
    "XLORA": "X-LoRA mixes adapters anew for each token, which no weight does; merge one of its adapters",
}
"""PEFT type → why no merge into weights can do what it does."""
