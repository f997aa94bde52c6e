"""The folder that export writes and uploads bring: what is written is read, anything else is refused by its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import (
    CorruptError,
    EspalierError,
    FormatError,
    KeysError,
    RefusedError,
    ShapeError,
    TooLargeError,
)
from adapters_store.exchange import read_folder, read_parts, write_folder
from adapters_store.manifest import Manifest
from adapters_store.store import AdapterStore
from adapters_store.tensors import TensorLimits, write_tensors
from tests.adapters_store.small import assert_same, files, publish, small_adapter


@pytest.fixture
def published(tmp_path: Path) -> Manifest:
    return publish(AdapterStore(tmp_path / "store"), metrics={"accuracy": 0.5}, hyperparameters={"r": 2})


@pytest.fixture
def folder(tmp_path: Path, published: Manifest) -> Path:
    write_folder(tmp_path / "out", published, small_adapter())
    return tmp_path / "out"


def changed(folder: Path, **changes: Any) -> tuple[bytes, bytes]:
    """The two files, with fields of the manifest replaced; None takes a field out."""
    document = json.loads((folder / "manifest.json").read_bytes()) | changes
    kept = {name: value for name, value in document.items() if value is not None}
    return json.dumps(kept).encode(), (folder / "tensors.safetensors").read_bytes()


def test_a_folder_is_read_as_it_was_written(folder, published):
    manifest, adapter = read_folder(folder)

    assert manifest == published
    assert manifest.digest == published.digest
    assert_same(adapter, small_adapter())
    assert sorted(files(folder)) == ["manifest.json", "tensors.safetensors"]


def test_a_folder_goes_into_another_store_with_the_same_digest(folder, published, tmp_path):
    given, adapter = read_folder(folder)
    other = AdapterStore(tmp_path / "other")

    again = other.publish(adapter, name="films", task="films", kind=given.kind, backbone=given.backbone)

    assert (again.reference, again.digest) == ("films@1", published.digest)


def test_writing_again_replaces_both_files(folder, published):
    write_folder(folder, published, small_adapter(seed=1))

    assert_same(read_folder(folder)[1], small_adapter(seed=1))


def test_what_the_file_says_of_name_version_time_and_size_is_for_people(folder):
    without = changed(folder, name=None, version=None, created_at=None, blob=None, size_bytes=None)
    renamed = changed(folder, name="other", version=7, size_bytes=1)

    for parts in (without, renamed):
        manifest, adapter = read_parts(*parts)
        assert manifest.size_bytes == len(parts[1])
        assert_same(adapter, small_adapter())


def test_another_blob_than_the_manifest_names_is_corrupt(folder):
    with pytest.raises(CorruptError, match="names blob 'sha256:00', the tensors have sha256:"):
        read_parts(*changed(folder, blob="sha256:00"))


def test_tensors_must_be_as_the_manifest_says(folder):
    manifest, _ = changed(folder)
    specs = json.loads(manifest)["tensors"]
    name, spec = next(iter(specs.items()))

    for wrong in (spec | {"shape": [1, 1]}, spec | {"dtype": "bfloat16"}):
        with pytest.raises(ShapeError, match=rf"tensor {name} must be .* as its manifest says"):
            read_parts(*changed(folder, tensors=specs | {name: wrong}))
    with pytest.raises(KeysError, match=r"missing .*'ghost'"):
        read_parts(*changed(folder, tensors=specs | {"ghost": spec}))
    with pytest.raises(KeysError, match="not in the manifest"):
        read_parts(changed(folder, blob=None)[0], write_tensors({"more": small_adapter().entries[0].tensors["A"]}))


def test_sites_must_name_every_tensor_once(folder):
    sites = json.loads(changed(folder)[0])["sites"]

    for wrong in (sites[:1], [sites[0], sites[0]], [sites[0], sites[1] | {"tensors": sites[0]["tensors"]}]):
        with pytest.raises(KeysError, match="manifest and tensors differ"):
            read_parts(*changed(folder, sites=wrong))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": None}, KeysError, "field task is missing"),
        ({"backbone": None}, KeysError, "field backbone is missing"),
        ({"extra": 1}, KeysError, "field extra is not known"),
        (
            {"backbone": {"architecture": "B", "config_digest": "c"}},
            KeysError,
            "field backbone.weights_digest is missing",
        ),
        ({"format_version": 2}, FormatError, "field format_version: .* 2 came"),
        ({"task": 5}, FormatError, "field task: Input should be a valid string, 5 came"),
        ({"version": "1"}, FormatError, "field version: .* '1' came"),
        ({"sites": "all"}, FormatError, "field sites: .* 'all' came"),
        (
            {"sites": [{"site": "x", "primitive": "lowrank", "tensors": {}, "code": "x"}]},
            KeysError,
            "sites.0.code is not known",
        ),
        ({"head": {"labels": [], "tensors": {}}}, FormatError, "field head.labels"),
        ({"metrics": {"loss": 1e999}}, FormatError, "no JSON that can be read"),
        ({"metrics": {"loss": float("nan")}}, FormatError, "no JSON that can be read"),
        ({"golden": [{"text": "x", "logits": [1, "2"]}]}, FormatError, "field golden.0.logits.1"),
        ({"task": "\ud800"}, FormatError, "manifest.json"),
    ],
)
def test_a_field_that_is_wrong_is_named(folder, changes, error, message):
    with pytest.raises(error, match=message):
        read_parts(*changed(folder, **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'"x"', b"null", b"PK\3\4"])
def test_a_manifest_that_is_no_json_object_is_refused(folder, data):
    with pytest.raises(FormatError, match=r"manifest.json (is no JSON|must be a JSON object)"):
        read_parts(data, changed(folder)[1])


def test_sizes_over_the_limits_are_refused(folder):
    manifest, data = changed(folder)

    with pytest.raises(TooLargeError, match=r"manifest\.json has"):
        read_parts(manifest + b" " * (8 << 20), data)
    with pytest.raises(TooLargeError, match="the limit is 100"):
        read_parts(manifest, data, TensorLimits(max_bytes=100))


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_a_folder_without_a_file_is_refused_by_its_name(folder, name):
    (folder / name).unlink()

    with pytest.raises(FormatError, match=f"has no {name}; expected a folder as `export` writes it"):
        read_folder(folder)


def test_no_cut_of_either_file_is_ever_accepted(folder):
    manifest, data = changed(folder)

    for end in range(0, len(manifest), 37):
        with pytest.raises(RefusedError):
            read_parts(manifest[:end], data)
    for end in range(0, len(data), 37):
        with pytest.raises(EspalierError):
            read_parts(manifest, data[:end])
