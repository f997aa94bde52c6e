"""From a run into a store and back: what was trained is what is stored, and gives what its golden examples say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters_store.mixing import Mix
from adapters_store.primitives import head as head_primitive
from adapters_store.store import AdapterStore
from tests.training.alone import logits_alone
from training import export
from training.backbone import LoadedBackbone
from training.composing.apart import compose
from training.composing.settings import ComposeConfig
from training.config import FitConfig, PublishConfig, RelateConfig, ScoreConfig
from training.errors import DataError, RunError
from training.fit import fit
from training.publish import publish
from training.relate import relate
from training.score import score
from training.tasks import read_task

MakeConfig = Callable[..., FitConfig]


@pytest.mark.parametrize("kind", ["lora", "head", "bottleneck"])
def test_a_published_adapter_gives_its_golden_logits_in_a_mixed_batch(
    fit_config: MakeConfig, backbone: LoadedBackbone, tmp_path: Path, kind: str
) -> None:
    run = fit(fit_config(kind=kind))

    references = publish(PublishConfig(run=run.folder, store=tmp_path / "store"))

    assert references == ["books@1", "films@1", "intent@1"]
    store, encoder = AdapterStore(tmp_path / "store"), backbone.encoder
    rows, mixes, poolings, heads, expected = [], [], [], [], []
    for slot, name in enumerate(store.names()):
        manifest = store.resolve(f"{name}@prod")
        adapter = store.load(manifest)
        assert len(manifest.golden) == 3
        assert manifest.backbone == backbone.fingerprint
        if adapter.entries:
            encoder.sites.put(slot, adapter.entries)
        for example in manifest.golden:
            rows += backbone.encode([example.text], adapter.head.spec.max_length)
            mixes.append(Mix.one_hot(slot, encoder.num_layers) if adapter.entries else None)
            poolings.append(adapter.head.spec.pooling)
            heads.append(adapter.head)
            expected.append(torch.tensor(example.logits))
    with torch.no_grad():
        found = head_primitive.batched(heads, encoder.pool(rows, mixes, poolings))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for slot in range(3):
        encoder.sites.drop(slot)


def test_a_manifest_says_where_an_adapter_comes_from(fit_config: MakeConfig, tmp_path: Path) -> None:
    config = fit_config(seed=3, hyperparameters={"r": 2})
    run = fit(config)
    publish(PublishConfig(run=run.folder, store=tmp_path / "store", alias=None, tasks=("intent",)))

    store = AdapterStore(tmp_path / "store")
    manifest = store.resolve("intent")
    assert store.names() == ["intent"]
    assert store.aliases("intent") == {}
    assert manifest.kind == "lora"
    assert manifest.hyperparameters["r"] == 2
    assert manifest.provenance["seed"] == 3
    assert manifest.provenance["data_digest"].startswith("sha256:")
    assert set(manifest.provenance["versions"]) == {"torch", "transformers", "espalier"}
    assert 0 <= manifest.metrics["dev_accuracy"] <= 1
    assert manifest.head is not None
    assert manifest.head.label_texts == {"song": "music", "lamp": "light", "alarm": "time"}


def test_an_exported_adapter_that_was_tampered_with_is_refused(fit_config: MakeConfig, tmp_path: Path) -> None:
    run = fit(fit_config(epochs=1))
    blob = run.adapters / "books" / "tensors.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")

    with pytest.raises(RunError, match="not the file that its manifest"):
        publish(PublishConfig(run=run.folder, store=tmp_path / "store"))


def test_an_unfinished_run_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a finished run"):
        publish(PublishConfig(run=tmp_path, store=tmp_path / "store"))


def test_relate_then_score_by_the_graph(
    fit_config: MakeConfig, data_folder: Path, tmp_path: Path, bert_folder: Path
) -> None:
    run = fit(fit_config(epochs=10))
    store = tmp_path / "store"
    publish(PublishConfig(run=run.folder, store=store))
    assert relate(RelateConfig(run=run.folder, store=store, knobs={"c": 0.6, "threshold": 0.0})) == 1

    out = tmp_path / "results" / "one.jsonl"
    outcomes = score(ScoreConfig(data=data_folder, store=store, backbone=str(bert_folder), out=out))

    assert [(o.task, o.mode) for o in outcomes] == [
        (task, mode) for mode in ("none", "single", "prior") for task in ("books", "films", "intent")
    ]
    single = {o.task: o.scores["accuracy"] for o in outcomes if o.mode == "single"}
    assert single["intent"] > 0.8
    assert {o.graph_version for o in outcomes if o.mode == "prior"} == {1}
    assert len(out.read_text().splitlines()) == 9
    assert {o.adapter for o in outcomes if o.task == "books"} == {"books@1"}


def test_one_task_is_scored_with_all_that_the_graph_composes_it_with(
    fit_config: MakeConfig, data_folder: Path, tmp_path: Path, bert_folder: Path
) -> None:
    """Other tasks' adapters, and a module that is no task's, are loaded for it."""
    run, store = fit(fit_config(epochs=10)), tmp_path / "store"
    publish(PublishConfig(run=run.folder, store=store))
    relate(RelateConfig(run=run.folder, store=store, knobs={"c": 0.9, "threshold": 0.0}))
    document = AdapterStore(store).graph()[1]
    for node in document["nodes"]:
        node["role"] = "module" if node["id"] == "intent" else "task"
    AdapterStore(store).publish_graph(document)
    asked = ScoreConfig(data=data_folder, store=store, backbone=str(bert_folder), modes=("prior",))

    whole, alone = score(asked), score(asked.model_copy(update={"tasks": ("films",)}))

    assert [(o.task, o.width) for o in alone] == [("films", 3)]
    assert alone[0].scores == pytest.approx({o.task: o.scores for o in whole}["films"])


def test_prior_is_scored_with_the_versions_that_the_graph_names(
    fit_config: MakeConfig, data_folder: Path, tmp_path: Path, bert_folder: Path
) -> None:
    """As the server answers; a version published since is scored alone, and so is a task that the graph lacks."""
    run, store = fit(fit_config(epochs=3)), tmp_path / "store"
    compose(ComposeConfig(run=run.folder, store=store))
    asked = ScoreConfig(data=data_folder, store=store, backbone=str(bert_folder), modes=("prior", "single"))
    before = {(o.task, o.mode): o for o in score(asked)}
    publish(PublishConfig(run=fit(fit_config(epochs=1, run="next")).folder, store=store))
    document = AdapterStore(store).graph()[1]
    kept = [node for node in document["nodes"] if node["id"] != "intent"]
    edges = [edge for edge in document["edges"] if "intent" not in (edge["source"], edge["target"])]
    document["graph"].get("mass", {}).pop("intent", None)
    AdapterStore(store).publish_graph(document | {"nodes": kept, "edges": edges})

    after = {(o.task, o.mode): o for o in score(asked)}

    assert after["books", "prior"].adapter == "books@1"
    assert after["books", "prior"].scores == pytest.approx(before["books", "prior"].scores)
    assert after["books", "single"].adapter == "books@2"
    assert (after["intent", "prior"].graph_version, after["intent", "prior"].width) == (None, 1)
    assert after["intent", "prior"].scores == after["intent", "single"].scores


def test_single_accuracy_is_that_of_the_adapter_alone(
    fit_config: MakeConfig, data_folder: Path, tmp_path: Path, bert_folder: Path, backbone: LoadedBackbone
) -> None:
    run = fit(fit_config())
    publish(PublishConfig(run=run.folder, store=tmp_path / "store"))
    outcomes = score(
        ScoreConfig(data=data_folder, store=tmp_path / "store", backbone=str(bert_folder), modes=("single",))
    )

    task = read_task(data_folder / "films")
    _, adapter = export.read(run.adapters / "films")
    found = logits_alone(backbone, adapter, [example.text for example in task.test]).argmax(dim=-1).tolist()
    right = sum(one == other for one, other in zip(found, task.targets(task.test), strict=True))
    assert {o.task: o.scores["accuracy"] for o in outcomes}["films"] == pytest.approx(right / len(task.test))


def test_evaluating_an_empty_store_says_so(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has an adapter in"):
        score(ScoreConfig(data=data_folder, store=tmp_path / "store"))
