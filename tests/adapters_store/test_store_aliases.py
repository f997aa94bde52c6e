"""Aliases: pointers that move, remember and go back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import (
    AdapterNotFoundError,
    ConflictError,
    CorruptError,
)
from adapters_store.objects import LocalObjects
from adapters_store.pointers import ways_back
from adapters_store.store import AdapterStore
from tests.adapters_store.small import publish


def test_an_alias_moves_and_remembers(store):
    publish(store, alias="prod", actor="ann")
    publish(store, seed=1)

    record = store.set_alias("books", "prod", 2, actor="bob")

    assert store.aliases("books") == {"prod": 2}
    history = store.alias_history("books", "prod")
    assert [(move.version, move.actor) for move in history] == [(1, "ann"), (2, "bob")]
    assert history[-1] == record
    assert history[0].time <= history[1].time


def test_an_alias_needs_a_version(store):
    publish(store)

    with pytest.raises(AdapterNotFoundError, match=r"books@2 is not in the store; books has versions: 1"):
        store.set_alias("books", "prod", 2)
    assert store.aliases("books") == {}


def test_an_alias_that_cannot_be_read_is_named_and_keeps_no_other_from_resolving(store):
    publish(store, alias="prod")
    store.set_alias("books", "staging", 1)
    (store.objects.root / "adapters/books/aliases/staging/0000001.json").write_text("{")

    assert store.resolve("books@prod").version == 1
    assert store.alias("books", "canary") is None
    with pytest.raises(CorruptError, match=r"aliases/staging/0000001\.json is no AliasRecord"):
        store.resolve("books@staging")
    assert [problem.key for problem in store.verify()] == ["adapters/books/aliases/staging"]


class TakenBack(LocalObjects):
    """Somebody else takes a move back just after it was listed."""

    def read(self, key: str) -> bytes:
        if key.endswith("aliases/prod/0000002.json"):
            self.delete(key)
        return super().read(key)


def test_a_move_that_is_taken_back_while_it_is_read_counts_no_more(store):
    publish(store, alias="prod")
    publish(store, seed=1, alias="prod")
    root = store.objects.root

    assert AdapterStore(root, objects=TakenBack(root)).aliases("books") == {"prod": 1}


def test_what_an_alias_points_at_cannot_be_deleted(store):
    publish(store, alias="prod")

    with pytest.raises(ConflictError, match="books@1 is what prod points at"):
        store.delete("books", 1)
    assert store.versions("books") == [1]


def test_rollback_goes_back_step_by_step_and_then_says_so(store):
    for seed in range(3):
        publish(store, seed=seed, alias="prod")

    assert store.rollback("books", "prod", actor="ann").version == 2
    assert store.rollback("books", "prod").version == 1
    with pytest.raises(AdapterNotFoundError, match="nothing to roll back to; it has pointed at: 1, 2, 3, 2, 1"):
        store.rollback("books", "prod")
    assert store.aliases("books") == {"prod": 1}
    with pytest.raises(AdapterNotFoundError, match="nothing to roll back to"):
        store.rollback("books", "canary")


def test_rollback_skips_deleted_versions(store):
    for seed in range(3):
        publish(store, seed=seed, alias="prod")
    store.delete("books", 2)

    assert store.rollback("books", "prod").version == 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), max_size=12))
def test_rolling_back_undoes_the_last_move_from_wherever(moves):
    back = ways_back(moves)

    assert len(back) < max(len(moves), 1)
    if back:
        assert back[0] != moves[-1]
        assert ways_back([*moves, back[0]]) == back[1:]
    new = max(moves, default=0) + 1
    assert ways_back([*moves, new])[:1] == moves[-1:]
