"""The algebra of renaming: whatever a mapper takes, its inverse gives back, alone and in any composition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.adapters.names import (
    Chain,
    First,
    Identity,
    Mapper,
    Parametrize,
    Prefix,
    Subtree,
    Table,
    Unparametrize,
    Unwrap,
    Wrap,
    colliding,
)

# Few words, so that names meet one another and the mappers' own parts.
WORDS = ("a", "b", "model", "base", "base_layer", "weight", "bias", "q", "ab")
parts = st.sampled_from(WORDS)
names = st.lists(parts, min_size=1, max_size=5).map(".".join)
SOME = ("a", "b", "a.b", "model.q", "base", "a.base")
some_modules = st.sampled_from(SOME)
TAILS = (".weight", ".bias", ".base.weight", ".base_layer.bias", ".base.base.weight", "")
tails = st.sampled_from([*TAILS, ".parametrizations.weight.original", ".parametrizations.weight.0.A"])
any_name = (
    names
    | st.builds(str.__add__, some_modules, tails)
    | st.text(max_size=12)
    | st.lists(st.sampled_from([*WORDS, ""]), max_size=5).map(".".join)
)
prefixes = st.just("") | names.map("{}.".format)
modules = st.just(frozenset(SOME)) | st.frozensets(some_modules | names, max_size=5)
children = st.sampled_from(["base", "base_layer"])
parameters = modules.map(lambda found: frozenset(f"{name}.weight" for name in found) | {"weight", "."})


def _table(pairs: list[tuple[str, str]]) -> Table:
    seen: dict[str, str] = {}
    for old, new in pairs:
        if old not in seen and new not in seen.values():
            seen[old] = new
    return Table(seen)


LEAVES: dict[str, st.SearchStrategy[Mapper]] = {
    "identity": st.just(Identity()),
    "prefix": st.builds(Prefix, prefixes, prefixes),
    "subtree": st.builds(Subtree, names, names),
    "table": st.lists(st.tuples(any_name, any_name), max_size=6).map(_table),
    "wrap": st.builds(Wrap, modules, children),
    "unwrap": st.builds(Unwrap, modules, children),
    "parametrize": st.builds(Parametrize, parameters),
    "unparametrize": st.builds(Unparametrize, parameters),
}
leaves: st.SearchStrategy[Mapper] = st.one_of(*LEAVES.values())
mappers: st.SearchStrategy[Mapper] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda steps: Chain(tuple(steps)))
        | st.lists(inner, max_size=4).map(lambda choices: First(tuple(choices)))
    ),
    max_leaves=8,
)


def assert_takes_back(mapper: Mapper, name: str) -> bool:
    """Hold a mapper against its promise for one name; True if the name concerned it."""
    new = mapper(name)
    if new is None:
        return False
    assert mapper.inverse(new) == name, (str(mapper), name, new)
    assert mapper.inverse.inverse(name) == new, (str(mapper), name, new)
    return True


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_takes_back_what_it_gave(leaf: str) -> None:
    concerned = []

    @given(LEAVES[leaf], any_name)
    @settings(max_examples=200, derandomize=True)
    def check(mapper: Mapper, name: str) -> None:
        concerned.append(assert_takes_back(mapper, name))
        assert_takes_back(mapper.inverse, name)

    check()
    assert any(concerned), "no name was mapped: the test proved nothing"


@given(mappers, any_name)
@settings(max_examples=300)
def test_every_composition_takes_back_what_it_gave(mapper: Mapper, name: str) -> None:
    assert_takes_back(mapper, name)
    assert_takes_back(mapper.inverse, name)
    assert_takes_back(First((mapper, Identity())), name)


@given(mappers, st.sets(any_name, min_size=2, max_size=6))
def test_no_two_names_become_one(mapper: Mapper, some: set[str]) -> None:
    results = [new for name in some if (new := mapper(name)) is not None]
    assert len(set(results)) == len(results)


@given(mappers, st.lists(any_name, unique=True, max_size=8))
def test_colliding_finds_every_collision(mapper: Mapper, some: list[str]) -> None:
    """With names outside the domain left as they are, two may meet; by brute force."""
    becomes: dict[str, list[str]] = defaultdict(list)
    for name in some:
        new = mapper(name)
        becomes[name if new is None else new].append(name)
    expected = {result: tuple(group) for result, group in becomes.items() if len(group) > 1}
    found: dict[str, tuple[str, ...]] = {}
    for first, second, result in colliding(mapper, some):
        assert (found[result][-1] if result in found else first) == first
        found[result] = (*found.get(result, (first,)), second)
    assert found == expected


def test_colliding_on_an_example() -> None:
    folded = Unwrap(frozenset({"m.q"}))
    assert colliding(folded, ["m.q.base.weight", "m.k.weight", "m.q.weight"]) == [
        ("m.q.base.weight", "m.q.weight", "m.q.weight")
    ]
    assert colliding(folded, ["m.q.base.weight", "m.q.base.bias", "m.k.base.weight", "m.k.weight"]) == []


EXAMPLES: list[tuple[Mapper, str, str | None]] = [
    (Identity(), "", ""),
    (Prefix("model.", ""), "model.a", "a"),
    (Prefix("model.", ""), "models.a", None),
    (Prefix("", "model."), "model.a", "model.model.a"),
    (Prefix("a.", "b."), "a.a.x", "b.a.x"),
    (Subtree("a.b", "c"), "a.b.weight", "c.weight"),
    (Subtree("a.b", "c"), "a.b", "c"),
    (Subtree("a.b", "c"), "a.bc.weight", None),
    (Subtree("a", "a.b"), "a.x", "a.b.x"),
    (Table({"x": "y"}), "x", "y"),
    (Table({"x": "y"}), "x.weight", None),
    (Wrap(frozenset({"m.q"})), "m.q.weight", "m.q.base.weight"),
    (Wrap(frozenset({"m.q"})), "m.q.bias", "m.q.base.bias"),
    (Wrap(frozenset({"m.q"})), "m.q", None),
    (Wrap(frozenset({"m.q"})), "m.q.lora_A.weight", None),
    (Wrap(frozenset({"m.q"})), "m.k.weight", None),
    (Wrap(frozenset({"m.q"}), "base_layer"), "m.q.weight", "m.q.base_layer.weight"),
    (Parametrize(frozenset({"m.q.weight"})), "m.q.weight", "m.q.parametrizations.weight.original"),
    (Parametrize(frozenset({"m.q.weight"})), "m.q.bias", None),
    (Parametrize(frozenset({"weight"})), "weight", "parametrizations.weight.original"),
    (Unparametrize(frozenset({"m.q.weight"})), "m.q.parametrizations.weight.original", "m.q.weight"),
    (Unparametrize(frozenset({"m.q.weight"})), "m.q.parametrizations.weight.original0", None),
    (Unparametrize(frozenset({"m.q.weight"})), "m.q.parametrizations.bias.original", None),
    (Unparametrize(frozenset({"m.q.weight"})), "m.q.parametrizations.weight.0.original", None),
    (Unwrap(frozenset({"m.q"})), "m.q.base.weight", "m.q.weight"),
    (Unwrap(frozenset({"m.q"})), "m.q.base_layer.weight", None),
    (Unwrap(frozenset({"m.q"})), "m.k.base.weight", None),
    (Unwrap(frozenset({"m.q"})), "m.q.weight", None),
    (Chain(()), "a", "a"),
    (Chain((Prefix("a.", ""), Prefix("", "b."))), "a.x", "b.x"),
    (Chain((Prefix("a.", ""), Prefix("b.", ""))), "a.x", None),
    (First(()), "a", None),
    (First((Prefix("a.", "b."), Prefix("", "c."))), "a.x", "b.x"),
    (First((Prefix("a.", "b."), Prefix("", "c."))), "x", "c.x"),
    # `b.x` would come back as `a.x`: a name that cannot be given back is outside.
    (First((Prefix("a.", "b."), Identity())), "b.x", None),
]


@pytest.mark.parametrize(("mapper", "name", "expected"), EXAMPLES, ids=str)
def test_what_a_mapper_makes_of_a_name(mapper: Mapper, name: str, expected: str | None) -> None:
    assert mapper(name) == expected
    if expected is not None:
        assert mapper.inverse(expected) == name


@pytest.mark.parametrize("child", ["base", "base_layer"])
def test_wrap_and_unwrap_undo_each_other(child: str) -> None:
    wrapped = frozenset({"model.layers.0.q", "lm_head"})
    keys = ["model.layers.0.q.weight", "model.layers.0.q.bias", "lm_head.weight", "model.norm.weight"]
    there, back = Wrap(wrapped, child), Unwrap(wrapped, child)
    assert (there.inverse, back.inverse) == (back, there)
    assert [there(key) for key in keys] == [
        f"model.layers.0.q.{child}.weight",
        f"model.layers.0.q.{child}.bias",
        f"lm_head.{child}.weight",
        None,
    ]
    assert [back(new) if (new := there(key)) else key for key in keys] == keys


def test_a_table_cannot_make_one_name_of_two() -> None:
    with pytest.raises(ValueError, match="one"):
        Table({"a": "c", "b": "c"})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Identity, "as they are"),
        (lambda: Prefix("model.", ""), "model.* → *"),
        (lambda: Subtree("a", "b"), "a → b"),
        (lambda: Chain((Prefix("a.", ""), Prefix("", "b."))), "a.* → *, then * → b.*"),
        (lambda: First((Prefix("a.", "b."), Prefix("c.", "d."))), "a.* → b.*; c.* → d.*"),
        (lambda: Chain(()), "as they are"),
        (lambda: Wrap(frozenset("ab")), "X.weight → X.base.weight for 2 modules"),
        (lambda: Parametrize(frozenset("ab")), "X.P → X.parametrizations.P.original for 2 parameters"),
        (lambda: Unparametrize(frozenset("ab")), "X.parametrizations.P.original → X.P for 2 parameters"),
        (lambda: Unwrap(frozenset("ab")), "X.base.weight → X.weight for 2 modules"),
        (lambda: Table({"a": "b"}), "1 names by table"),
    ],
)
def test_a_mapper_says_what_it_does(make: Callable[[], Mapper], words: str) -> None:
    assert str(make()) == words
