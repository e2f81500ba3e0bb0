"""What is said of quantised tensors: by what stands beside them, and by the config with its exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.quantised import Quantised, method
from lora_cli.errors import UnsupportedError

ONE = np.ones(1, np.float32)


def quantised(folder: Path, *names: str, **settings: Any) -> Quantised:
    config = {"quantization_config": settings} if settings else {}
    return Quantised(open_checkpoint(tiny.write_base(folder, dict.fromkeys(names, ONE), shards=1, config=config)))


BESIDE = {
    "block fp8": (("a.q.weight", "a.q.weight_scale_inv"), "a.q.weight", "a.q.weight_scale_inv"),
    "the first of several": (("q.weight", "q.SCB", "q.weight_scale"), "q.weight", "q.weight_scale"),
    "bitsandbytes": (("q.weight", "q.weight.absmax"), "q.weight", "q.weight.absmax"),
    "GPTQ": (("q.qweight", "q.weight"), "q.weight", "q.qweight"),
    "stack": (("experts.up_blocks", "experts.up_scales", "experts.up"), "experts.up", "experts.up_scales"),
    "of another": (("q.weight", "qq.weight_scale", "a.q.weight_scale", "q.weight_scaled"), "q.weight", None),
    "a longer name": (("x.q.weight", "q.weight_scale"), "x.q.weight", None),
}


@pytest.mark.parametrize(("names", "key", "companion"), BESIDE.values(), ids=BESIDE)
def test_by_what_stands_beside(tmp_path: Path, names: tuple[str, ...], key: str, companion: str | None) -> None:
    assert quantised(tmp_path, *names)(key) == (companion and f"{companion} stands beside it")


EXCEPTED = {
    "part": (["mlp"], True),
    "parts": (["layers.0.mlp"], True),
    "the whole": (["model.layers.0.mlp.gate"], True),
    "half a part": (["mlp.gat", "ayers.0", "gate.up"], False),
    "parts that do not follow": (["layers.mlp"], False),
    "glob": (["*.gate"], True),
    "glob of what is above": (["*layers.0"], True),
    "pattern from the start": (["re:.*gate"], True),
    "pattern from elsewhere": (["re:gate"], False),
    "nothing": ([], False),
    "no text": ([None, 3, ["mlp"]], False),
}


@pytest.mark.parametrize("field", ["ignore", "modules_to_not_convert"])
@pytest.mark.parametrize(("entries", "expected"), EXCEPTED.values(), ids=EXCEPTED)
def test_by_the_config_and_its_exceptions(tmp_path: Path, field: str, entries: list[Any], expected: bool) -> None:
    said = quantised(tmp_path, "x", quant_method="fp8", **{field: entries})
    words = "the quantization_config of config.json (fp8) covers it"
    assert said("model.layers.0.mlp.gate.weight") == (None if expected else words)
    assert said("model.layers.0.mlp.gate.bias") is None


def test_the_first_exception_that_matches_decides(tmp_path: Path) -> None:
    """A pattern that cannot be read is refused only where it is reached."""
    assert quantised(tmp_path / "1", "x", bits=4, ignore=["q", "re:("])("m.q.weight") is None
    with pytest.raises(UnsupportedError):
        quantised(tmp_path / "2", "x", bits=4, ignore=["re:(", "q"])("m.q.weight")
    assert quantised(tmp_path / "3", "x", bits=4, ignore=["q"])("m.k.weight") == (
        "the quantization_config of config.json (unnamed) covers it"
    )


def test_without_a_config_nothing_is_declared(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_base(tmp_path, {"q.weight": ONE}, shards=1))
    assert (method(checkpoint), Quantised(checkpoint)("q.weight")) == (None, None)
