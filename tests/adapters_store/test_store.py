"""The store: versions that never change, names, references, deletion and graphs."""

import json

import pytest
import torch

from adapters_store.adapter import Adapter
from adapters_store.errors import (
    AdapterNotFoundError,
    ConflictError,
    FormatError,
    GraphNotFoundError,
    InvalidError,
    InvalidGraphError,
    InvalidNameError,
    NotFoundError,
)
from adapters_store.manifest import GoldenExample
from adapters_store.objects import LocalObjects
from adapters_store.primitives import Entry
from adapters_store.references import Reference
from adapters_store.store import AdapterStore
from tests.adapters_store.small import BACKBONE, GRAPH, assert_same, files, publish, small_adapter


def test_a_root_that_does_not_exist_is_an_empty_store_and_stays_so_by_reading(store):
    assert (store.names(), store.versions("books"), store.aliases("books"), store.graph_versions()) == ([], [], {}, [])
    assert (store.verify(), store.gc(0), store.alias_history("books", "prod")) == ([], [], [])
    assert not store.objects.root.exists()


def test_what_is_published_is_what_is_loaded(store):
    golden = [GoldenExample(text="good", logits=(0.25, -1.5))]

    published = publish(store, hyperparameters={"r": (2,)}, metrics={"accuracy": 0.5}, golden=golden, actor="ann")
    resolved = AdapterStore(store.objects.root).resolve("books")

    assert resolved == published
    assert resolved.digest == published.digest
    assert (resolved.version, resolved.task, resolved.golden) == (1, "books", tuple(golden))
    assert (resolved.hyperparameters, resolved.provenance) == ({"r": [2]}, {"actor": "ann"})
    assert_same(store.load(resolved), small_adapter())


def test_files_lie_where_the_layout_says(store):
    first, second = publish(store, alias="prod"), publish(store, seed=1)
    store.publish_graph(GRAPH, alias="prod")
    store.delete("books", 2)

    assert set(files(store.objects.root)) == {
        f"blobs/sha256/{first.blob[7:]}", f"blobs/sha256/{second.blob[7:]}", "adapters/books/aliases/prod/0000001.json",
        "adapters/books/versions/00000001.json", "adapters/books/versions/00000002.json",
        "tombstones/adapters/books/00000002.json",
        "graphs/versions/00000001.json", "graphs/aliases/prod/0000001.json",
    }  # fmt: skip


def test_equal_contents_share_a_blob_and_a_digest(store):
    first, second = publish(store, "books"), publish(store, "films", task="books")

    assert first.blob == second.blob
    assert first.digest == second.digest
    assert len(store.objects.list("blobs")) == 1


def test_a_published_file_never_changes(store):
    publish(store, alias="prod")
    before = files(store.objects.root)

    publish(store, seed=1, alias="prod")
    store.rollback("books", "prod")
    store.delete("books", 2)
    store.gc(0)

    after = files(store.objects.root)
    assert {key: after.get(key) for key in before} == before


@pytest.mark.parametrize(
    "reference", ["books", "books@2", "books@new", Reference("books"), Reference("books", version=2)]
)
def test_references_resolve_to_the_newest_the_number_and_the_alias(store, reference):
    publish(store, alias="old")
    publish(store, seed=1, alias="new")

    assert store.resolve(reference).version == 2
    assert store.resolve("books@old").version == 1


def test_a_digest_resolves_by_its_first_twelve_digits(store):
    first, second = publish(store, seed=0), publish(store, seed=1)

    assert store.resolve(f"books@{first.digest}") == first
    assert store.resolve(f"books@{second.digest[:19]}") == second
    with pytest.raises(AdapterNotFoundError, match="fits no version; books has versions"):
        store.resolve("books@sha256:" + "0" * 12)


def test_versions_of_one_digest_are_not_ambiguous_the_newest_answers(store):
    publish(store)
    publish(store)

    assert store.resolve(f"books@{store.resolve('books@1').digest}").version == 2


def test_a_digest_that_fits_two_versions_is_ambiguous(store):
    publish(store, seed=0)
    publish(store, seed=1)

    with pytest.raises(AdapterNotFoundError, match="fits several versions"):
        store.resolve(Reference("books", digest="sha256:"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("musik", "no adapter 'musik'; the store has: books"),
        ("books@7", r"books@7 is not in the store; books has versions: 1"),
        ("books@canary", r"books has no alias 'canary'; its aliases: prod"),
        (Reference("books", version=0), "books has versions: 1"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(store, reference, message):
    publish(store, alias="prod")

    with pytest.raises(AdapterNotFoundError, match=message):
        store.resolve(reference)


@pytest.mark.parametrize("name", ["../up", "/etc", "Books", "a/b", "", "books\n", "bücher", "a" * 65])
def test_a_name_that_is_a_path_or_a_twin_is_refused_everywhere(store, name):
    for ask in (
        store.versions,
        store.aliases,
        store.resolve,
        lambda name: store.resolve(Reference(name)),
        lambda name: store.delete(name, 1),
        lambda name: store.set_alias(name, "prod", 1),
        lambda name: store.alias_history("books", name),
        lambda name: publish(store, name),
        lambda name: publish(store, task=name),
        lambda name: publish(store, alias=name),
    ):
        with pytest.raises(InvalidNameError):
            ask(name)
    assert store.names() == []


def test_facts_that_json_cannot_hold_are_refused_and_leave_nothing(store):
    for facts in (
        {"metrics": {"loss": float("nan")}},
        {"hyperparameters": {"r": {1, 2}}},
        {"provenance": {"x": 1e999}},
    ):
        with pytest.raises(InvalidError, match="not be plain JSON"):
            publish(store, **facts)
    assert not store.objects.root.exists()


def test_tensors_of_other_dtypes_are_refused(store):
    adapter = Adapter([Entry("x", "lowrank", {"A": torch.zeros(1, 2, dtype=torch.float64), "B": torch.zeros(2, 1)})])

    with pytest.raises(FormatError, match="'float64' came"):
        store.publish(adapter, name="books", task="books", kind="lora", backbone=BACKBONE)
    assert not store.objects.root.exists()


def test_a_deleted_version_is_gone_and_its_number_never_comes_back(store):
    publish(store)
    publish(store, seed=1)

    store.delete("books", 2, actor="ann")

    assert store.versions("books") == [1]
    assert store.resolve("books").version == 1
    for ask in (
        lambda: store.resolve("books@2"),
        lambda: store.delete("books", 2),
        lambda: store.set_alias("books", "a", 2),
    ):
        with pytest.raises(AdapterNotFoundError, match=r"books@2 was deleted; books has versions: 1"):
            ask()
    assert publish(store).version == 3
    assert json.loads(store.objects.read("tombstones/adapters/books/00000002.json"))["actor"] == "ann"


def test_a_number_is_not_reused_even_if_the_deleted_manifest_was_pruned(store):
    publish(store)
    publish(store)
    store.delete("books", 2)
    store.objects.delete("adapters/books/versions/00000002.json")

    assert publish(store).version == 3


def test_a_name_whose_versions_are_all_deleted_is_not_listed(store):
    publish(store)
    store.delete("books", 1)

    assert store.names() == []
    with pytest.raises(AdapterNotFoundError, match="the store has: none"):
        store.resolve("books")


def test_graph_versions_count_up_and_the_latest_is_the_default(store):
    with pytest.raises(GraphNotFoundError, match="no relation graph; publish one"):
        store.graph()

    assert store.publish_graph(GRAPH, actor="ann") == 1
    other = GRAPH | {"edges": []}
    assert store.publish_graph(other, alias="prod") == 2

    assert store.graph() == (2, other)
    assert store.graph(1) == (1, GRAPH)
    assert (store.graph_versions(), store.graph_aliases()) == ([1, 2], {"prod": 2})
    assert store.graph_record(1).actor == "ann"
    with pytest.raises(GraphNotFoundError, match="no version 3 of the relation graph; it has versions 1, 2"):
        store.graph(3)


def test_a_graph_is_replaced_only_by_who_knows_the_latest(store):
    assert store.publish_graph(GRAPH, expected_version=0) == 1
    assert store.publish_graph(GRAPH, expected_version=1) == 2

    for outdated in (0, 1, 3):
        with pytest.raises(ConflictError, match=f"the graph is at version 2, not {outdated}"):
            store.publish_graph(GRAPH, expected_version=outdated)
    assert store.graph_versions() == [1, 2]


def test_an_impossible_graph_is_not_published(store):
    with pytest.raises(InvalidGraphError, match="which is no node"):
        store.publish_graph({"nodes": [], "edges": [{"source": "a", "target": "b", "weight": 1}]})
    with pytest.raises(InvalidGraphError, match="not plain JSON"):
        store.publish_graph(GRAPH | {"nodes": [*GRAPH["nodes"], {"id": "x", "extra": object()}]})
    assert store.graph_versions() == []


@pytest.mark.parametrize(
    "key", ["", "..", "a/../b", "/a", "a//b", "a/", ".hidden", "a/.tmp-x", "a\\b", "a\x00b", "a\n"]
)
def test_keys_that_could_leave_the_folder_are_refused(tmp_path, key):
    objects = LocalObjects(tmp_path)
    for verb in (objects.read, objects.list, objects.delete, objects.exists, objects.modified_at):
        with pytest.raises(InvalidNameError):
            verb(key)
    with pytest.raises(InvalidNameError):
        objects.create(key, b"")


def test_an_object_is_created_once(tmp_path):
    objects = LocalObjects(tmp_path / "not" / "yet")

    objects.create("a/b", b"first")
    with pytest.raises(ConflictError, match=r"a/b exists already"):
        objects.create("a/b", b"second")

    assert objects.read("a/b") == b"first"
    assert objects.list("a") == ["a/b"]
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    for verb in (objects.read, objects.modified_at):
        with pytest.raises(NotFoundError):
            verb("a/b")
