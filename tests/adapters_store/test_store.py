"""The store: versions that never change, pointers that move, bytes that are checked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.adapter import Adapter
from adapters_store.errors import (
    AdapterNotFoundError,
    ConflictError,
    CorruptError,
    FormatError,
    GraphNotFoundError,
    InvalidError,
    InvalidGraphError,
    InvalidNameError,
    NotFoundError,
)
from adapters_store.manifest import GoldenExample
from adapters_store.objects import LocalObjects
from adapters_store.pointers import ways_back
from adapters_store.primitives import Entry
from adapters_store.references import Reference
from adapters_store.store import AdapterStore
from tests.adapters_store.small import BACKBONE, GRAPH, assert_same, files, publish, small_adapter


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def blob_file(store: AdapterStore, blob: str) -> Path:
    return store.objects.root / "blobs" / "sha256" / blob.removeprefix("sha256:")


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


def test_what_an_alias_points_at_cannot_be_deleted(store):
    publish(store, alias="prod")

    with pytest.raises(ConflictError, match="books@1 is what prod points at"):
        store.delete("books", 1)
    assert store.versions("books") == [1]


def test_a_name_whose_versions_are_all_deleted_is_not_listed(store):
    publish(store)
    store.delete("books", 1)

    assert store.names() == []
    with pytest.raises(AdapterNotFoundError, match="the store has: none"):
        store.resolve("books")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda _: b""]
)
def test_a_corrupt_blob_is_quarantined_and_named_and_publishing_again_mends_it(store, damage):
    manifest = publish(store)
    file = blob_file(store, manifest.blob)
    bad = damage(file.read_bytes())
    file.write_bytes(bad)

    with pytest.raises(
        CorruptError, match=rf"books@1 cannot be loaded: blob {manifest.blob} was corrupt.* quarantine/"
    ):
        store.load(manifest)
    [aside] = store.objects.list("quarantine")
    assert store.objects.read(aside) == bad
    with pytest.raises(CorruptError, match=f"is missing.*{aside}"):
        store.load(manifest)
    assert len(store.verify()) == 1

    publish(store)
    assert_same(store.load(manifest), small_adapter())
    assert store.verify() == []


def test_publishing_over_a_corrupt_blob_replaces_it(store):
    manifest = publish(store)
    blob_file(store, manifest.blob).write_bytes(b"rot")

    publish(store)

    assert store.verify() == []
    assert len(store.objects.list("quarantine")) == 1


def test_a_manifest_that_disagrees_with_its_blob_is_corrupt(store):
    manifest = publish(store)
    name, spec = next(iter(manifest.tensors.items()))
    other = manifest.model_copy(
        update={"tensors": manifest.tensors | {name: spec.model_copy(update={"shape": (9, 9)})}}
    )

    with pytest.raises(CorruptError, match=f"tensor {name} must be"):
        store.load(other)


def test_a_broken_manifest_is_named(store):
    publish(store)
    path = store.objects.root / "adapters/books/versions/00000001.json"
    path.write_text(path.read_text().replace('"kind"', '"kin"'))

    with pytest.raises(CorruptError, match=r"adapters/books/versions/00000001.json is no Manifest: kind"):
        AdapterStore(store.objects.root).resolve("books")


def test_verify_names_everything_that_is_wrong_and_changes_nothing(store):
    for seed, name in enumerate(("broken", "changed", "fine", "gone", "swapped")):
        publish(store, name, seed=seed, alias="prod")
    store.publish_graph(GRAPH)
    root = store.objects.root
    (root / "adapters/broken/versions/00000001.json").write_text("{")
    (root / "adapters/swapped/versions/00000001.json").write_bytes(
        (root / "adapters/fine/versions/00000001.json").read_bytes()
    )
    blob_file(store, store.resolve("changed").blob).write_bytes(b"other")
    blob_file(store, store.resolve("gone").blob).unlink()
    (root / "adapters/fine/aliases/prod/0000002.json").write_text('{"version": 9, "time": "2026-01-01T00:00:00Z"}')
    (root / "graphs/versions/00000001.json").write_text(
        '{"version": 1, "time": "2026-01-01T00:00:00Z", "document": {}}'
    )
    before = files(root)

    found = {problem.key: problem.message for problem in store.verify()}

    assert set(found) == {
        "adapters/broken/versions/00000001.json", "adapters/changed/versions/00000001.json",
        "adapters/gone/versions/00000001.json", "adapters/swapped/versions/00000001.json",
        "adapters/fine/aliases/prod", "graphs/versions/00000001.json",
    }  # fmt: skip
    assert "is missing" in found["adapters/gone/versions/00000001.json"]
    assert files(root) == before


def test_folders_that_no_name_could_have_are_left_alone_and_told_by_verify(store):
    publish(store, alias="prod")
    dropped = publish(store, seed=1)
    store.delete("books", 2)
    root = store.objects.root
    copies = {"adapters/Books", "adapters/books copy", "tombstones/adapters/books copy"}
    copies |= {"adapters/books/aliases/prod copy"}
    for key in sorted(copies):
        shutil.copytree(root / key.split(" ")[0].lower(), root / key)
    shutil.copy(root / "adapters/books/versions/00000001.json", root / "adapters/books/00000009.json")

    assert (store.names(), store.versions("books"), store.aliases("books")) == (["books"], [1], {"prod": 1})
    assert {problem.key for problem in store.verify()} == copies
    assert "move it out of the store" in store.verify()[0].message
    assert store.gc(0) == [f"blobs/sha256/{dropped.blob[7:]}"]
    assert_same(store.load(store.resolve("books@prod")), small_adapter())


def test_gc_removes_what_nobody_needs_and_is_old_enough(store):
    kept, dropped = publish(store, seed=0), publish(store, seed=1)
    store.delete("books", dropped.version)
    leftover = store.objects.root / "blobs" / "sha256" / ".tmp-killed"
    leftover.write_bytes(b"half")
    made_at = blob_file(store, dropped.blob).stat().st_mtime

    assert store.gc(grace_s=60, now=made_at + 59) == []
    removed = store.gc(grace_s=60, now=leftover.stat().st_mtime + 61)

    assert removed == [f"blobs/sha256/{dropped.blob[7:]}", "blobs/sha256/.tmp-killed"]
    assert_same(store.load(kept), small_adapter())
    assert store.verify() == []


def test_gc_keeps_a_blob_that_another_live_version_shares(store):
    publish(store, "books")
    publish(store, "films")
    store.delete("books", 1)

    assert store.gc(0) == []
    assert store.verify() == []


def test_gc_touches_no_blob_while_a_manifest_cannot_be_read(store):
    publish(store)
    store.delete("books", publish(store, seed=1).version)
    (store.objects.root / "adapters/books/versions/00000001.json").write_text("{")

    with pytest.raises(CorruptError, match=r"00000001\.json is no Manifest"):
        AdapterStore(store.objects.root).gc(0)
    assert len(store.objects.list("blobs")) == 2


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
