"""Bytes that are checked: what is broken is named and mended, and what nobody needs is removed."""

import shutil
from pathlib import Path

import pytest

from adapters_store.errors import (
    CorruptError,
)
from adapters_store.store import AdapterStore
from tests.adapters_store.small import GRAPH, assert_same, files, publish, small_adapter


def blob_file(store: AdapterStore, blob: str) -> Path:
    return store.objects.root / "blobs" / "sha256" / blob.removeprefix("sha256:")


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
