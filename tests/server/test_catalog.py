"""Snapshots of a store that others write and damage: what a task resolves to, and what is told of the rest."""

import shutil
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFoundError
from adapters_store.store import AdapterStore
from server import catalog
from server.catalog import Catalog
from tests.adapters_store.small import publish

FIRST_MOVE = "0000001.json"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Version 1 of books is promoted, version 2 is not."""
    store = AdapterStore(tmp_path / "store")
    publish(store, alias="prod")
    publish(store, seed=1)
    return store


def read(store: AdapterStore, previous: Catalog | None = None) -> Catalog:
    return catalog.read(AdapterStore(store.objects.root), previous or Catalog(), 2)


def truncate(store: AdapterStore, key: str) -> None:
    (store.objects.root / key).write_text('{"versi')


def test_an_alias_that_cannot_be_read_hides_no_other(store):
    store.set_alias("books", "staging", 2)
    truncate(store, f"adapters/books/aliases/staging/{FIRST_MOVE}")

    found = read(store)

    assert found.manifest_of_task("books").version == 1
    assert found.aliases == {"books": {"prod": 1}}
    assert set(found.broken) == {"books@staging"}
    with pytest.raises(AdapterNotFoundError, match=r"no books@staging that can be read; books has: 1, 2, prod"):
        found.resolve("books@staging")


def test_an_alias_that_cannot_be_read_any_more_stays_where_it_was(store):
    before = read(store)
    store.set_alias("books", "prod", 2)
    truncate(store, "adapters/books/aliases/prod/0000002.json")

    found = read(store, before)

    assert found.manifest_of_task("books").version == 1
    assert read(store, found).manifest_of_task("books").version == 1
    assert "0000002.json is no AliasRecord" in found.broken["books@prod"]
    store.set_alias("books", "prod", 2)
    assert read(store, found).manifest_of_task("books").version == 2
    assert read(store, found).broken == {}


def test_a_prod_that_was_never_read_leaves_its_task_unanswered_instead_of_the_latest_answering(store):
    truncate(store, f"adapters/books/aliases/prod/{FIRST_MOVE}")

    found = read(store)

    assert found.tasks == []
    assert set(found.broken) == {"books@prod"}
    assert found.resolve("books").version == 2
    with pytest.raises(AdapterNotFoundError, match=r"no books@prod that can be read; books has: 1, 2"):
        found.manifest_of_task("books")


def test_a_prod_whose_version_cannot_be_read_does_not_move_to_the_latest(store):
    before = read(store)
    promoted = publish(store, seed=2, alias="prod")
    publish(store, seed=3)
    truncate(store, f"adapters/books/versions/{promoted.version:08}.json")

    assert read(store, before).manifest_of_task("books").version == 1
    assert set(read(store, before).broken) == {"books@3", "books@prod"}
    assert read(store).tasks == []


@pytest.mark.parametrize("copy", ["adapters/Books", "adapters/books copy", "adapters/books/aliases/prod copy"])
def test_a_folder_that_no_name_could_have_is_passed_over(store, copy):
    root = store.objects.root
    shutil.copytree(root / copy.split(" ")[0].lower(), root / copy)

    found = read(store)

    assert list(found.manifests) == found.tasks == ["books"]
    assert found.aliases == {"books": {"prod": 1}}
    assert found.broken == {}


def test_a_folder_that_no_alias_could_have_is_noted_and_stops_nothing(store):
    aliases = store.objects.root / "adapters/books/aliases"
    shutil.copytree(aliases / "prod", aliases / "latest")

    found = read(store)

    assert found.manifest_of_task("books").version == 1
    assert "'latest' is implied" in found.broken["books@latest"]


def test_what_is_not_promoted_takes_no_task_from_what_is(store):
    publish(store, "rival", task="books")
    publish(store, "books", task="music")

    found = read(store)

    assert found.reference_of_task("books") == "books@prod"
    assert found.tasks == ["books"]
    store.set_alias("rival", "prod", 1)
    assert read(store).reference_of_task("books") == "books@prod"  # of the two, the one of the task's name


def test_of_adapters_that_are_promoted_alike_the_newest_answers(store):
    for name in ("one", "two"):
        publish(store, name, task="music")
    assert read(store).reference_of_task("music") == "two"

    store.set_alias("one", "prod", 1)
    assert read(store).reference_of_task("music") == "one@prod"
    store.set_alias("two", "prod", 1)
    publish(store, "one", task="music")

    assert read(store).reference_of_task("music") == "two@prod"


def test_a_promoted_adapter_goes_before_one_of_the_tasks_name_that_is_not(store):
    publish(store, "one", task="music", alias="prod")
    publish(store, "music")

    assert read(store).reference_of_task("music") == "one@prod"
    store.set_alias("music", "prod", 1)
    assert read(store).reference_of_task("music") == "music@prod"


def test_a_prod_that_cannot_be_read_keeps_its_task_from_others(store):
    publish(store, "old", task="music", alias="prod")
    publish(store, "new", task="music")
    truncate(store, f"adapters/old/aliases/prod/{FIRST_MOVE}")

    assert read(store).tasks == ["books"]
