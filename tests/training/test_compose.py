"""compose and cotrain: what they leave in store and run folder, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters_store.graph import RelationGraph
from adapters_store.store import AdapterStore
from training.composing.apart import compose
from training.composing.settings import ComposeConfig, CotrainConfig
from training.composing.together import cotrain
from training.config import FitConfig, PublishConfig, RelateConfig
from training.errors import ConfigError, DataError, RunError
from training.fit import fit
from training.publish import publish
from training.relate import relate

MakeConfig = Callable[..., FitConfig]


def test_a_new_version_has_the_same_adapter_and_says_what_was_done(fit_config: MakeConfig, tmp_path: Path) -> None:
    run, root = fit(fit_config()), tmp_path / "store"
    publish(PublishConfig(run=run.folder, store=root))

    compose(ComposeConfig(run=run.folder, store=root, own_head=0.5, actor="me"))

    store = AdapterStore(root)
    assert store.aliases("books") == {"prod": 2}
    before, after = store.resolve("books@1"), store.resolve("books@prod")
    for one, other in zip(store.load(before).entries, store.load(after).entries, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert [one.logits for one in before.golden] != [one.logits for one in after.golden]
    assert after.provenance["composed"]["own_head"] == 0.5
    assert after.provenance["actor"] == "me"
    assert 0 <= after.metrics["dev_accuracy_composed"] <= 1
    version, document = store.graph()
    graph = RelationGraph.from_json(document)
    assert graph.node("books").adapter == "books@2"
    assert graph.knobs.c == 0.95
    assert {"books", "films"} <= set(graph.attributes.mass)  # intent is related to neither: mass 1
    report = json.loads((run.folder / "composed.json").read_text())
    assert report["graph_version"] == version
    assert report["adapters"] == ["books@2", "films@2", "intent@2"]


def test_relations_may_come_from_the_store(fit_config: MakeConfig, tmp_path: Path) -> None:
    run, store = fit(fit_config()), tmp_path / "store"
    publish(PublishConfig(run=run.folder, store=store))
    relate(RelateConfig(run=run.folder, store=store, views=("labels",)))

    compose(ComposeConfig(run=run.folder, store=store, relations="store"))

    graphs = [RelationGraph.from_json(AdapterStore(store).graph(version)[1]) for version in (1, 2)]
    before, after = ({(a, b): w for a, b, w in one.network.edges(data="weight") if w > 0} for one in graphs)
    assert after == before


def test_a_co_trained_run_is_a_run_that_can_be_published_again(
    cotrain_config: Callable[..., CotrainConfig], tmp_path: Path
) -> None:
    config = cotrain_config()
    run = cotrain(config).run

    summary = run.summary()
    assert json.loads((run.folder / "relations.json").read_text())["graph_version"] == 1
    assert RelationGraph.from_json(json.loads((run.folder / "graph.json").read_text())).tasks == list(summary["tasks"])
    assert 0 <= summary["mean_dev_accuracy"] <= 1
    assert len(run.metrics()) == 6
    assert (run.folder / "learning_curve.png").is_file()
    assert publish(PublishConfig(run=run.folder, store=tmp_path / "other")) == ["books@1", "films@1", "intent@1"]
    with pytest.raises(RunError, match="holds a run already"):
        cotrain(config)
    with pytest.raises(RunError, match="is a run of cotrain"):
        relate(RelateConfig(run=run.folder, store=tmp_path / "store"))


def test_the_same_seed_trains_the_same_adapters(cotrain_config: Callable[..., CotrainConfig], tmp_path: Path) -> None:
    runs = [cotrain(cotrain_config(run=name, store=tmp_path / name, epochs=1)).run for name in ("one", "two")]
    blobs = [(run.adapters / "films" / "tensors.safetensors").read_bytes() for run in runs]
    assert blobs[0] == blobs[1]


def test_what_cannot_be_composed_is_refused(
    fit_config: MakeConfig, cotrain_config: Callable[..., CotrainConfig], generate_config: MakeConfig,
    pairs_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    run = fit(fit_config(epochs=1)).folder
    with pytest.raises(ConfigError, match="unknown knob 'depth'"):
        compose(ComposeConfig(run=run, store=tmp_path / "store", knobs={"depth": 1}))
    with pytest.raises(ConfigError, match="unknown loss 'beauty'"):
        cotrain(cotrain_config(loss={"beauty": 1.0}))
    with pytest.raises(ConfigError, match="nothing to compose"):
        cotrain(cotrain_config(kind="head"))
    with pytest.raises(DataError, match="generates"):
        cotrain(cotrain_config(data=pairs_folder))
    with pytest.raises(DataError, match="generates; compose is for tasks that classify"):
        compose(ComposeConfig(run=fit(generate_config(run="texts", epochs=1)).folder, store=tmp_path / "store"))
    assert not (tmp_path / "store").exists()
