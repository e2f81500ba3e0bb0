"""Laws that hold for every checkpoint and adapter: nothing is lost on the way there and back, and order means nothing.

That shown text has no control characters, whatever it was, is in `tests/cli/test_text.py`; that headers we write are
read again, also by safetensors, in `tests/checkpoint/test_header_against_upstream.py`.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from strategies import Factors, Model, models, odd_names, pairs, parts

from lora_cli.checkpoint.checkpoint import open_checkpoint
from lora_cli.checkpoint.index import parse_index
from lora_cli.surgery.merge import merge, plan_merge
from lora_cli.surgery.placing import PlanOptions
from lora_cli.surgery.unmerge import unmerge

few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
_deserialize: Any = deserialize  # its stub has no types


@contextmanager
def empty() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, as safetensors reads it."""
    return {
        name: (view["dtype"], (*view["shape"],), bytes(view["data"]))
        for path in folder.glob("*.safetensors")
        for name, view in _deserialize(path.read_bytes())
    }


@few
@given(models())
def test_what_is_opened_is_what_was_written(model: Model) -> None:
    with empty() as place:
        opened = open_checkpoint(model.write(place / "base"))
        theirs = tensors(place / "base")
        assert opened.tensors.keys() == theirs.keys() == model.tensors.keys()
        for name, tensor in opened.tensors.items():
            with tensor.shard.source.open() as reader:
                data = reader.read(tensor.offset, tensor.nbytes)
            assert (tensor.dtype.name, tensor.shape, data) == theirs[name]


@few
@given(pairs(), st.booleans(), st.booleans())
def test_what_was_merged_and_taken_out_again_is_the_base(pair: tuple[Model, Factors], embed: bool, cast: bool) -> None:
    model, factors = pair
    with empty() as place:
        base, adapter = model.write(place / "base"), factors.write(place / "adapter")
        options = PlanOptions(dtype="bf16") if cast else None
        merge(base, [adapter], place / "merged", options, embed_adapter=embed, threads=1)
        result = unmerge(place / "merged", [] if embed else [adapter], place / "out", threads=1)
        assert result.exact
        came = files(place / "out")
        assert came.pop("lora_unmerge.json")
        assert came == files(base)


@few
@given(pairs(), st.integers(0, 1 << 20))
def test_neither_order_nor_shards_change_a_tensor(pair: tuple[Model, Factors], seed: int) -> None:
    model, factors = pair
    dice = random.Random(seed)
    with empty() as place:
        base, adapter = model.write(place / "base"), factors.write(place / "adapter")
        names, others = (dice.sample(list(told), len(told)) for told in (model.tensors, factors.tensors))
        cuts = [dice.randint(1, len(names)) for _ in range(dice.randint(0, 3))]
        base2, adapter2 = model.write(place / "base2", names, cuts), factors.write(place / "adapter2", others)
        plans = [plan_merge(base, [adapter]), plan_merge(base2, [adapter2])]
        first, second = ({(e.tensor, e.outcome, e.key) for e in plan.ledger} for plan in plans)
        assert first == second
        merge(base, [adapter], place / "merged", threads=1, undo=False)
        merge(base2, [adapter2], place / "merged2", threads=1, undo=False)
        assert tensors(place / "merged") == tensors(place / "merged2")


@few
@given(st.dictionaries(odd_names | parts, st.builds("{}.safetensors".format, st.sampled_from("abc")), min_size=1))
def test_an_index_that_is_written_anew_says_the_same(weight_map: dict[str, str]) -> None:
    document = {"metadata": {"note": "x"}, "weight_map": weight_map}
    index = parse_index(json.dumps(document).encode(), name="model.safetensors.index.json")
    again = parse_index(index.rewritten(index.weight_map, 7), name=index.name)
    assert (again.weight_map, again.total_size) == (weight_map, 7)
    assert again.rewritten(again.weight_map, 7) == again.raw
