"""The style tasks: made here, the same every time, learnt by a real tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.completions import prompt_ids
from adapters_store.mixing import Mix
from tests.conftest import SHARED_DATA
from training import export
from training.backbone import LoadedBackbone, load
from training.config import FitConfig, StylesConfig
from training.errors import DataError
from training.fit import fit
from training.styles import styles
from training.tasks import read_tasks

STORIES = SHARED_DATA / "stories260k"


def test_styles_are_tasks_whose_splits_share_no_prompt(tmp_path: Path) -> None:
    styles(StylesConfig(out=tmp_path, examples=80))

    tasks = read_tasks(tmp_path)
    assert [task.name for task in tasks] == ["cheerful", "magical", "spooky"]
    for task in tasks:
        assert task.generates
        assert task.description
        assert (len(task.train), len(task.dev), len(task.test)) == (80, 10, 10)
        prompts = [pair.prompt for pair in task.train + task.dev + task.test]
        assert len(set(prompts)) == 100
        for pair in task.train:
            assert pair.completion.startswith(" ")
            assert pair.completion.endswith("\n")
            assert "{" not in pair.prompt + pair.completion
    said = {task.name: " ".join(pair.completion for pair in task.train) for task in tasks}
    assert "monster" in said["spooky"]
    assert "monster" not in said["cheerful"] + said["magical"]
    assert "fairy" not in said["cheerful"] + said["spooky"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        styles(StylesConfig(out=tmp_path / name, examples=16, seed=seed))

    one, two, three = ((tmp_path / name / "spooky/train.jsonl").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "magical").mkdir()

    with pytest.raises(DataError, match="magical is there already"):
        styles(StylesConfig(out=tmp_path, examples=16))
    assert not (tmp_path / "cheerful").exists()


@pytest.mark.data
def test_a_real_tiny_model_learns_them(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is absent")
    styles(StylesConfig(out=tmp_path / "data", examples=48))

    where = {"data": tmp_path / "data", "backbone": str(STORIES), "runs": tmp_path, "run": "one"}
    run = fit(FitConfig(**where, epochs=1, threads=1, hyperparameters={"target_modules": "all-linear"}))

    for task in ("cheerful", "magical", "spooky"):
        losses = [line["loss"] for line in run.metrics() if line["task"] == task and "loss" in line]
        assert losses[-1] < 0.8 * losses[0]
        assert run.summary()["tasks"][task]["cut_prompts"] == 0


@torch.no_grad()
def greedy(backbone: LoadedBackbone, prompt: str, mix: Mix) -> str:
    """A line that the model writes behind a prompt, one whole forward per token."""
    ids = prompt_ids(backbone.tokenizer, prompt)
    for _ in range(90):
        last = backbone.encoder.states([ids], [mix])[0][-1:]
        ids.append(int(backbone.causal.logits(last).argmax()))
    return backbone.tokenizer.decode(ids).partition(prompt)[2].partition("\n")[0]


@pytest.mark.data
@pytest.mark.slow
def test_each_style_shows_and_half_of_two_shows_both(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is absent")
    styles(StylesConfig(out=tmp_path / "data"))
    where = {"data": tmp_path / "data", "backbone": str(STORIES), "runs": tmp_path, "run": "one"}
    both = ("cheerful", "spooky")
    run = fit(FitConfig(**where, tasks=both, epochs=3, threads=1, hyperparameters={"target_modules": "all-linear"}))
    backbone = load(str(STORIES), generates=True)
    for slot, name in enumerate(both):
        backbone.encoder.sites.put(slot, export.read(run.adapters / name)[1].entries)
    half = Mix((0, 1), np.full((2, backbone.encoder.num_layers), 0.5, np.float32))
    mixes = [Mix.one_hot(slot, backbone.encoder.num_layers) for slot in (0, 1)] + [half]
    prompts = [pair.prompt for pair in read_tasks(tmp_path / "data")[0].test[:6]]

    cheerful, spooky, mixed = ([greedy(backbone, prompt, mix) for prompt in prompts] for mix in mixes)

    glad, grim = ("sun", "happy", "laughed", "birds sang"), ("dark", "black", "monster", "scared")
    for one, other in zip(cheerful, spooky, strict=True):
        assert any(word in one for word in glad)
        assert not any(word in one for word in grim)
        assert any(word in other for word in grim)
        assert not any(word in other for word in glad)
    assert not set(mixed) & set(cheerful + spooky)
    of_both = [text for text in mixed if any(word in text for word in glad) and any(word in text for word in grim)]
    assert len(of_both) >= 2
