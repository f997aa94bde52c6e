"""Relation views against naive formulas, their fusion, and the graph that comes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.adapter import Adapter
from adapters_store.graph import RelationGraph
from adapters_store.kinds import kind
from adapters_store.primitives import Entry
from adapters_store.sites import Sites
from adapters_store.store import AdapterStore
from tests.training.alone import logits_alone
from training.backbone import LoadedBackbone
from training.config import FitConfig, PublishConfig, RelateConfig
from training.errors import ConfigError
from training.fit import fit
from training.objectives import Asked, Labels, begin
from training.progress import bar
from training.publish import publish
from training.relate import relate
from training.relations import embedding, heatmap, weights
from training.relations.evidence import evidence
from training.relations.transfer import measure
from training.run import Run
from training.tasks import read_tasks
from training.trainable import TrainableAdapter


def random_adapters(sites: Sites, name: str, **config: object) -> list[Adapter]:
    """Three adapters of a kind with random parameters; the second has another rank where the kind has ranks."""
    method, adapters = kind(name), []
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        chosen = method.Config(**(config | ({"r": 2 + k} if "r" in method.Config.model_fields else {})))
        entries: list[Entry] = []
        for site in method.sites(sites, chosen):
            place = sites[site].place
            values = method.parameters(place, chosen, generator)
            values = {key: value + torch.randn(value.shape, generator=generator) for key, value in values.items()}
            entries += method.export(place, values, chosen)
        adapters.append(Adapter(entries))
    return adapters


def dense(entry: Entry, sites: Sites) -> torch.Tensor:
    """DW of a low-rank entry, or the change that an affine one makes, written out."""
    tensors, place = entry.tensors, sites[entry.site].place
    if entry.primitive == "lowrank":
        return (entry.options["scale"] * tensors["B"].double() @ tensors["A"].double()).flatten()
    if entry.primitive == "bottleneck":
        return (entry.options["scale"] * tensors["up"].double() @ tensors["down"].double()).flatten()
    if entry.primitive == "scale_shift":
        return torch.cat([tensors["scale"].double() - 1, tensors["shift"].double()])
    own = dict(place.module.named_parameters(recurse=False))
    return torch.cat([tensors[name].double() - own[name].double() for name in ("weight", "bias")])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lora", {"target_modules": ("q", "o", "down")}),
        ("bottleneck", {"mode": "parallel"}),
        ("ssf", {}),
        ("norm", {}),
    ],
)
def test_weight_similarity_is_the_cosine_of_the_dense_deltas(
    backbone: LoadedBackbone, name: str, config: dict[str, object]
) -> None:
    sites = backbone.encoder.sites
    adapters = random_adapters(sites, name, **config)

    vectors = torch.stack(
        [torch.cat([dense(e, sites) for e in sorted(a.entries, key=lambda e: e.site)]) for a in adapters]
    )
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1).detach().numpy()
    np.testing.assert_allclose(weights.similarity(adapters, sites), expected, rtol=1e-9, atol=1e-12)

    by_layer = weights.similarity_by_layer(adapters, sites)
    assert by_layer.shape == (2, 3, 3)
    for layer in range(2):
        of_layer = [
            torch.cat(
                [dense(e, sites) for e in sorted(a.entries, key=lambda e: e.site) if sites[e.site].place.layer == layer]
            )
            for a in adapters
        ]
        here = torch.stack(of_layer)
        expected = torch.nn.functional.cosine_similarity(here[:, None], here[None], dim=-1).detach().numpy()
        np.testing.assert_allclose(by_layer[layer], expected, rtol=1e-9, atol=1e-12)


def test_adapters_without_a_common_site_are_unrelated(backbone: LoadedBackbone) -> None:
    sites = backbone.encoder.sites
    q, v = (random_adapters(sites, "lora", target_modules=(role,))[0] for role in ("q", "v"))

    assert weights.similarity([q, v, Adapter([])], sites).tolist() == np.eye(3).tolist()


def test_embedding_similarity_is_the_centred_cosine_of_means() -> None:
    generator = np.random.default_rng(0)
    texts = [generator.normal(size=(n, 5)) + 3 for n in (4, 7, 5)]

    means = [t.mean(axis=0) for t in texts]
    centre = sum(means) / 3
    found = embedding.similarity(texts)

    for i in range(3):
        for j in range(3):
            a, b = means[i] - centre, means[j] - centre
            assert found[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_transfer_is_the_change_in_log_likelihood_under_another_adapter(
    fit_config: Callable[..., FitConfig], backbone: LoadedBackbone, data_folder: Path
) -> None:
    sites = backbone.encoder.sites
    tasks = read_tasks(data_folder)
    trained = [
        TrainableAdapter(kind("lora"), kind("lora").Config(), sites, begin(task, backbone, 32, "mean", k), k)
        for k, task in enumerate(tasks)
    ]
    for k, one in enumerate(trained):
        torch.manual_seed(k)
        one.load({name: tensor + torch.randn_like(tensor) / 4 for name, tensor in one.copy().items()})
    adapters = [one.adapter() for one in trained]
    heads = [Labels(backbone, adapter.head) for adapter in adapters]
    dev = [Asked(head, head.texts(task.dev), None) for head, task in zip(heads, tasks, strict=True)]

    with bar(3, "test") as shown:
        found = measure(backbone.encoder, adapters, dev, 64, shown)

    for i, task in enumerate(tasks):
        targets = torch.tensor(task.targets(task.dev))
        texts = [example.text for example in task.dev]
        for j in range(3):
            under, base = (
                logits_alone(backbone, Adapter(entries, adapters[i].head), texts).log_softmax(-1)
                for entries in (adapters[j].entries, [])
            )
            change = (under - base).gather(1, targets[:, None])[:, 0]
            assert found.change[i, j] == pytest.approx(float(change.mean()), abs=1e-5)
            assert found.error[i, j] == pytest.approx(float(change.std()) / len(texts) ** 0.5, abs=1e-5)


def test_evidence_is_the_deviation_of_a_layer_from_the_mean() -> None:
    by_layer = np.stack([np.array([[1, 0.1], [0.1, 1]]), np.array([[1, 0.5], [0.5, 1]])])

    found = evidence(["a", "b"], by_layer, {("a", "b"): 0.4, ("b", "a"): -1.0})

    assert found["a"]["b"] == pytest.approx([-0.2, 0.2])
    assert found["a"]["a"] == [0, 0]
    assert "a" not in found["b"]


def test_related_tasks_stand_side_by_side(tmp_path: Path) -> None:
    groups = np.array([0, 1, 0, 1, 0, 1])
    relations = np.where(groups[:, None] == groups[None], 0.9, 0.1)

    order = [int(groups[k]) for k in heatmap.cluster(relations)]

    assert order in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    heatmap.draw([f"task_{k}" for k in range(6)], relations, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_relate_writes_a_graph_that_a_server_can_use(fit_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    run = fit(fit_config())
    store = AdapterStore(tmp_path / "store")
    publish(PublishConfig(run=run.folder, store=tmp_path / "store", tasks=("books", "intent")))

    where = {"run": run.folder, "store": tmp_path / "store"}
    assert relate(RelateConfig(**where, view_weights={"transfer": 2}, knobs={"c": 0.5})) == 1
    assert relate(RelateConfig(**where, evidence=False, neighbours=1, views=("embedding", "weights"))) == 2

    graph = RelationGraph.from_json(store.graph(1)[1])
    assert graph.knobs.c == 0.5
    assert graph.node("books").adapter == "books@prod"
    assert graph.node("films").adapter == "films"
    assert graph.attributes.views == {"embedding": 0.25, "weights": 0.25, "transfer": 0.5}
    edge = next(iter(graph.network.edges(data=True)))[2]
    assert set(edge["views"]) == {"embedding", "weights", "transfer"}
    assert all(len(row) == 2 for module in graph.attributes.evidence.values() for row in module.values())
    second = RelationGraph.from_json(store.graph(2)[1])
    assert second.attributes.evidence == {}
    assert max(dict(second.network.out_degree()).values()) == 1
    report = json.loads((run.folder / "relations.json").read_text())
    assert report["graph_version"] == 2
    assert (run.folder / "relations.png").is_file()


def test_relate_refuses_unknown_knobs_and_views(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown knob 'warmth'"):
        relate(RelateConfig(run=tmp_path, knobs={"warmth": 1}))
    with pytest.raises(ValueError, match="embedding"):
        RelateConfig(run=tmp_path, views=("smell",))
    assert not Run(tmp_path).exists
