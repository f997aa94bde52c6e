"""Generating tasks from a run into a store, a graph and an evaluation: every number again by a slower way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters_store.completions import joined_ids
from adapters_store.graph import RelationGraph
from adapters_store.mixing import Mix
from adapters_store.store import AdapterStore
from tests.training.decoders import FAMILIES
from training import export
from training.backbone import LoadedBackbone, load
from training.config import FitConfig, PublishConfig, RelateConfig, ScoreConfig
from training.errors import DataError
from training.fit import fit
from training.publish import publish
from training.relate import relate
from training.run import Run
from training.score import score
from training.tasks import Task, read_task

MakeConfig = Callable[..., FitConfig]
TASKS = ("plain", "praise", "turned")


def losses_alone(backbone: LoadedBackbone, adapter: object, task: Task, split: str) -> list[list[float]]:
    """Per pair the losses of its tokens under one adapter (None: the model as transformers runs it)."""
    found = []
    model = AutoModelForCausalLM.from_pretrained(backbone.folder)
    for pair in getattr(task, split):
        row, start = joined_ids(backbone.tokenizer, pair.prompt, pair.completion)
        with torch.no_grad():
            if adapter is None:
                shares = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
                found.append([-float(shares[at - 1, row[at]]) for at in range(start, len(row))])
                continue
            with export.resident(backbone, adapter) as mix:
                [logprobs] = backbone.causal.logprobs([row], [mix], [start])
                found.append((-logprobs).tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_published_adapters_give_their_golden_log_probabilities_in_one_mixed_batch(
    generate_config: MakeConfig, tmp_path: Path, family: str
) -> None:
    run = fit(generate_config(family))

    assert publish(PublishConfig(run=run.folder, store=tmp_path / "store")) == [f"{task}@1" for task in TASKS]

    store, backbone = AdapterStore(tmp_path / "store"), load(run.config().backbone, generates=True)
    rows, mixes, starts, expected = [], [], [], []
    for slot, name in enumerate(TASKS):
        manifest = store.resolve(f"{name}@prod")
        assert manifest.generation == export.read(run.adapters / name)[0].generation
        assert len(manifest.golden) == 3
        backbone.encoder.sites.put(slot, store.load(manifest).entries)
        for example in manifest.golden:
            row, start = joined_ids(backbone.tokenizer, example.text, example.completion)
            rows.append(row)
            starts.append(start)
            mixes.append(Mix.one_hot(slot, backbone.encoder.num_layers))
            expected.append(torch.tensor(example.logprobs))
    with torch.no_grad():
        found = backbone.causal.logprobs(rows, mixes, starts)
        bare = backbone.causal.logprobs(rows, [None] * len(rows), starts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert max(float((one - other).abs().max()) for one, other in zip(bare, expected, strict=True)) > 0.1


def test_a_bfloat16_backbone_still_promises_float32_log_probabilities(generate_config: MakeConfig) -> None:
    run = fit(generate_config(dtype="bfloat16", tasks=("plain",)))

    manifest, adapter = export.read(run.adapters / "plain")
    assert manifest.backbone.dtype == "bfloat16"
    again = export.golden(load(run.config().backbone, generates=True), adapter, read_task(run.config().data / "plain"))
    for one, other in zip(manifest.golden, again, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.fixture
def related(generate_config: MakeConfig, tmp_path: Path) -> tuple[Run, Path]:
    """A run of three tasks and the store with its adapters and graph."""
    run = fit(generate_config(epochs=6))
    publish(PublishConfig(run=run.folder, store=tmp_path / "store"))
    assert relate(RelateConfig(run=run.folder, store=tmp_path / "store", knobs={"threshold": 0.0})) == 1
    return run, tmp_path / "store"


def test_transfer_is_the_gain_in_log_probability_per_token(related: tuple[Run, Path]) -> None:
    run, store = related
    backbone = load(run.config().backbone, generates=True)
    report = run._read(run.folder / "relations.json")

    for i, target in enumerate(TASKS):
        task = read_task(run.config().data / target)
        bare = losses_alone(backbone, None, task, "dev")
        for j, source in enumerate(TASKS):
            under = losses_alone(backbone, export.read(run.adapters / source)[1], task, "dev")
            changes = [(sum(b) - sum(u)) / len(b) for b, u in zip(bare, under, strict=True)]
            found = report["views"]["transfer"][i][j]
            assert found == pytest.approx(sum(changes) / len(changes), abs=1e-4)
            error = report["transfer_error"][i][j]
            if i != j and found < -2 * error:
                assert report["relations"][i][j] < 0
    assert all(report["views"]["transfer"][k][k] > 0 for k in range(3))
    graph = RelationGraph.from_json(AdapterStore(store).graph()[1])
    assert set(graph.nodes) == set(TASKS)
    assert set(graph.attributes.views) == {"embedding", "weights", "transfer"}


def test_score_gives_loss_and_accuracy_per_token(related: tuple[Run, Path], tmp_path: Path) -> None:
    run, store = related
    config = run.config()

    outcomes = score(ScoreConfig(data=config.data, store=store, backbone=config.backbone, out=tmp_path / "out.jsonl"))

    found = {(o.task, o.mode): o.scores for o in outcomes}
    assert set(found) == {(task, mode) for task in TASKS for mode in ("none", "single", "prior")}
    backbone = load(config.backbone, generates=True)
    for name in TASKS:
        task = read_task(config.data / name)
        for mode, adapter in (("none", None), ("single", export.read(run.adapters / name)[1])):
            losses = [loss for row in losses_alone(backbone, adapter, task, "test") for loss in row]
            assert found[name, mode]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
            assert 0 <= found[name, mode]["token_accuracy"] <= 1
        assert found[name, "single"]["loss"] < found[name, "none"]["loss"]
    line = (tmp_path / "out.jsonl").read_text().splitlines()[0]
    assert '"loss": ' in line
    assert '"token_accuracy": ' in line
    assert '"accuracy": ' not in line


def test_labels_for_a_task_that_generates_are_refused(
    related: tuple[Run, Path], data_folder: Path, tmp_path: Path
) -> None:
    run, store = related
    shutil.copytree(data_folder / "books", tmp_path / "data" / "plain")

    with pytest.raises(DataError, match="the adapter of plain does not know all of its labels"):
        score(ScoreConfig(data=tmp_path / "data", store=store, backbone=run.config().backbone, modes=("single",)))
