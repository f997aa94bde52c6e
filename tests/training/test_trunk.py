"""The shared trunk and what is seen on its way: lookahead and gradients against slow ways, Fisher, shared costs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.adapter import Adapter
from adapters_store.store import AdapterStore
from training import objectives
from training.backbone import LoadedBackbone
from training.config import FitConfig, RelateConfig
from training.errors import ConfigError
from training.export import resident
from training.fit import fit
from training.objectives import Texts
from training.progress import bar
from training.relate import relate
from training.relations import gradients, lookahead, task2vec, trunk
from training.relations.material import Material
from training.relations.views import VIEWS, Shared, measure
from training.run import Run
from training.tasks import Task, read_tasks

RECIPE = trunk.Recipe(epochs=1, texts=16, batch_size=8, probe=6, points=2, lr=1e-2)


@pytest.fixture
def tasks(data_folder: Path) -> list[Task]:
    return read_tasks(data_folder)


def material_of(tasks: list[Task], backbone: LoadedBackbone) -> Material:
    begun = [objectives.begin(task, backbone, 32, "mean", 0) for task in tasks]
    return Material(tasks, [Adapter([], one.head) for one in begun], begun, backbone)


@pytest.fixture
def walked(tasks: list[Task], backbone: LoadedBackbone) -> tuple[trunk.Trunk, list[Texts]]:
    """A trunk at the end of its training and the probe texts there."""
    made = trunk.begin(material_of(tasks, backbone), RECIPE, 128)
    return made, list(trunk.walk(made, RECIPE))[-1]


def slow_loss(made: trunk.Trunk, backbone: LoadedBackbone, task: int, texts: Texts) -> float:
    """A text at a time, the head written out."""
    adapter = made.adapters[task].adapter()
    head, losses = adapter.head, []
    with resident(backbone, Adapter(adapter.entries)) as mix, torch.no_grad():
        for row, target in zip(texts.rows, texts.targets, strict=True):
            pooled = backbone.encoder.pool([row], [mix], ["mean"])[0].double()
            logits = head.tensors["weight"].double() @ pooled + head.tensors["bias"].double()
            losses.append(float(-logits.log_softmax(-1)[target]))
    return float(np.mean(losses))


def test_all_tasks_train_one_trunk_and_heads_of_their_own(
    walked: tuple[trunk.Trunk, list[Texts]], tasks: list[Task], backbone: LoadedBackbone
) -> None:
    made, _ = walked
    fresh = trunk.begin(material_of(tasks, backbone), RECIPE, 128)

    assert all(one.parameters is made.adapters[0].parameters for one in made.adapters)
    assert len({id(one.head_tensors()["head/weight"]) for one in made.adapters}) == 3
    assert any(not torch.equal(a, b) for a, b in zip(made.shared, fresh.shared, strict=True))
    assert all(tensor.grad is None for one in made.adapters for tensor in one.tensors().values())


def test_a_walk_lowers_the_loss_and_is_the_same_again(tasks: list[Task], backbone: LoadedBackbone) -> None:
    recipe = trunk.Recipe(epochs=3, texts=24, probe=24, points=3, lr=1e-2)

    def walk() -> list[list[float]]:
        made = trunk.begin(material_of(tasks, backbone), recipe, 128)
        before = made.losses(made.texts)
        return [before, *(made.losses(made.texts) for _ in trunk.walk(made, recipe))]

    first = walk()

    assert len(first) == 4
    assert np.mean(first[-1]) < np.mean(first[0])
    assert walk() == first


def test_the_gradient_is_that_of_finite_differences(
    walked: tuple[trunk.Trunk, list[Texts]], backbone: LoadedBackbone
) -> None:
    made, probes = walked
    gradient = made.gradient(0, probes[0])
    direction = gradient / gradient.norm()

    lookahead._move(made.shared, direction, 1e-2)
    above = slow_loss(made, backbone, 0, probes[0])
    lookahead._move(made.shared, direction, -2e-2)
    below = slow_loss(made, backbone, 0, probes[0])

    assert (above - below) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_lookahead_is_the_share_of_loss_that_a_step_takes_away(
    walked: tuple[trunk.Trunk, list[Texts]], backbone: LoadedBackbone
) -> None:
    made, probes = walked
    before = [tensor.detach().clone() for tensor in made.shared]
    steps = [made.gradient(k, probes[k]) for k in range(3)]

    found = lookahead.affinity(made, steps, probes, eta=0.05)

    for tensor, old in zip(made.shared, before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, atol=1e-6, rtol=1e-6)  # the trunk is where it was
    losses = [slow_loss(made, backbone, i, probes[i]) for i in range(3)]
    for j in range(3):
        lookahead._move(made.shared, steps[j], -0.05)
        for i in range(3):
            assert found[i, j] == pytest.approx(1 - slow_loss(made, backbone, i, probes[i]) / losses[i], abs=2e-5)
        lookahead._move(made.shared, steps[j], 0.05)
    assert (np.diagonal(found) > 0).all()  # a step helps the task that it is for


def test_two_equal_tasks_pull_in_the_same_direction(tasks: list[Task], backbone: LoadedBackbone) -> None:
    twice = [tasks[0], tasks[0], tasks[2]]
    made = trunk.begin(material_of(twice, backbone), RECIPE, 128)
    probes = list(trunk.walk(made, RECIPE))[-1]

    points = [[made.gradient(k, texts) for k, texts in enumerate(probes)]]
    fishers = np.stack([task2vec.fisher(made, k, texts) for k, texts in enumerate(probes)])

    assert gradients.similarity(points)[0, 1] == pytest.approx(1, abs=1e-5)
    assert gradients.similarity(points)[0, 2] < 0.99
    assert task2vec.similarity(fishers)[0, 1] == pytest.approx(1, abs=1e-5)
    affinity = lookahead.affinity(made, points[0], probes)
    assert affinity[0, 1] == pytest.approx(affinity[0, 0], abs=1e-5)


def test_the_fisher_is_the_mean_of_squared_gradients_text_by_text(walked: tuple[trunk.Trunk, list[Texts]]) -> None:
    made, probes = walked

    found = task2vec.fisher(made, 1, probes[1])

    squares = [made.gradient(1, probes[1].take([n])).double().numpy() ** 2 for n in range(len(probes[1]))]
    np.testing.assert_allclose(found, np.mean(squares, axis=0), rtol=1e-4, atol=1e-12)
    assert not np.allclose(found, made.gradient(1, probes[1]).numpy() ** 2)


def test_all_views_are_measured_and_the_trunk_is_trained_once(
    fit_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    run = fit(fit_config())
    where = {"run": run.folder, "store": tmp_path / "store"}
    views = tuple(VIEWS)

    relate(RelateConfig(**where, views=views, trunk_epochs=1, transfer_examples=8))
    report = run._read(run.folder / "relations.json")

    assert set(report["views"]) == set(report["spearman_with_transfer"]) == set(views)
    assert set(report["seconds"]) == {*views, "trunk"}
    assert min(report["seconds"].values()) >= 0
    assert report["spearman_of_fitted_left_one_target_out"] is None
    graph = AdapterStore(tmp_path / "store").graph(1)[1]
    assert graph["graph"]["provenance"]["seconds"] == report["seconds"]
    assert graph["graph"]["provenance"]["fusion"] == "fixed"


def test_fitted_weights_leave_transfer_its_share(fit_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    run = fit(fit_config())
    where = {"run": run.folder, "store": tmp_path / "store"}

    relate(RelateConfig(**where, views=("arrow", "embedding", "transfer"), fusion="fitted"))
    report = run._read(run.folder / "relations.json")

    assert report["view_weights"]["transfer"] == pytest.approx(1 / 3)
    assert sum(report["view_weights"].values()) == pytest.approx(1)
    for views in (("arrow", "embedding"), ("transfer",)):
        with pytest.raises(ConfigError, match="fitted needs the view transfer"):
            relate(RelateConfig(**where, views=views, fusion="fitted"))


def test_generating_tasks_have_every_view(generate_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    run: Run = fit(generate_config())
    tasks = read_tasks(run.config().data)
    config = RelateConfig(run=run.folder, store=tmp_path / "store", views=tuple(VIEWS), trunk_epochs=1)

    assert relate(config) == 1

    report = run._read(run.folder / "relations.json")
    assert all(np.isfinite(view).all() for view in report["views"].values())
    assert np.array(report["views"]["labels"]).tolist() == np.eye(len(tasks)).tolist()


def test_costs_are_told_apart(tasks: list[Task], backbone: LoadedBackbone, tmp_path: Path) -> None:
    config = RelateConfig(run=tmp_path, views=("gradients", "labels"))
    with bar(6, "test") as shown:
        shared = Shared(material_of(tasks, backbone), config, shown)
        measure(shared)

    assert list(shared.seconds) == ["trunk", "gradients", "labels"]
    assert shared.seconds["trunk"] > shared.seconds["gradients"] >= 0
