"""Training of generating tasks: alone is in company, a stop changes nothing, the loss falls, what is cut is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.kinds import KINDS
from tests.training.decoders import FAMILIES, WORDS, pairs, write_pairs
from tests.training.test_fit import StopError, blobs, stop_at
from training import fit as fit_module
from training.config import FitConfig
from training.errors import ConfigError
from training.export import read
from training.fit import fit
from training.step import backward

MakeConfig = Callable[..., FitConfig]


@pytest.fixture(scope="module")
def mixed_folder(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that generate and one that classifies."""
    folder = tmp_path_factory.mktemp("mixed")
    for style in ("plain", "turned"):
        shutil.copytree(pairs_folder / style, folder / style)
    rows = [{"text": f"the {word} was", "label": str(i % 2)} for i, word in enumerate(WORDS[3:])]
    (folder / "which").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "which" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [row | {"text": f"so {row['text']}"} for row in rows]
    return folder


def gradients(config: FitConfig, chosen: tuple[str, ...] = (), budget: int = 128) -> dict[str, list[torch.Tensor]]:
    """Of the second step, when no parameter is zero any more; only the chosen tasks take part in it."""
    _, backbone, states = fit_module.prepare(config)
    backward(backbone.encoder, [state.next_part() for state in states], config.token_budget)
    for state in states:
        state.advance()
    mine = [state for state in states if not chosen or state.name in chosen]
    backward(backbone.encoder, [state.next_part() for state in mine], budget)
    return {state.name: [t.grad.clone() for t in state.adapter.tensors().values()] for state in mine}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tasks_gradient_is_the_same_alone_and_in_a_mixed_batch(
    generate_config: MakeConfig, mixed_folder: Path, family: str
) -> None:
    config = generate_config(
        family, data=mixed_folder, batch_size=8, hyperparameters={"target_modules": ["all-linear"]}
    )

    together = gradients(config)

    assert set(together) == {"plain", "turned", "which"}
    for task in together:
        for one, other in zip(gradients(config, (task,))[task], together[task], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            assert one.abs().max() > 0


def test_gradients_do_not_depend_on_the_token_budget(generate_config: MakeConfig, mixed_folder: Path) -> None:
    config = generate_config(data=mixed_folder)

    small, large = gradients(config, budget=16), gradients(config, budget=10_000)

    for task in small:
        for one, other in zip(small[task], large[task], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_tasks_trained_together_are_what_they_are_trained_alone(
    generate_config: MakeConfig, mixed_folder: Path
) -> None:
    together = fit(generate_config(data=mixed_folder, run="together", lr=1e-3))
    alone = fit(generate_config(data=mixed_folder, run="alone", one_by_one=True, lr=1e-3))

    for task in ("plain", "turned", "which"):
        one, other = (load_file(run.adapters / task / "tensors.safetensors") for run in (together, alone))
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("step", [2, 7])
def test_a_crashed_run_resumes_to_the_same_bytes(generate_config: MakeConfig, step: int) -> None:
    config = generate_config(checkpoint_s=0.0)
    whole = fit(generate_config(run="whole"))

    with pytest.raises(StopError):
        fit(config, on_step=stop_at(step))
    resumed = fit(config, resume=True)

    assert blobs(resumed) == blobs(whole)
    assert resumed.metrics() == whole.metrics()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"head"}))
def test_every_kind_with_sites_lowers_the_loss_of_every_family(
    generate_config: MakeConfig, family: str, kind: str
) -> None:
    run = fit(generate_config(family, kind=kind, epochs=8, lr=3e-2, tasks=("plain", "praise")))

    for task in ("plain", "praise"):
        losses = [line["loss"] for line in run.metrics() if line["task"] == task and "loss" in line]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_kind_head_is_refused_with_a_reason(generate_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"'plain' generates and has no head; choose .*: bottleneck, lora, norm, ssf"):
        fit(generate_config(kind="head"))


def test_an_encoder_is_refused_before_anything_is_written(generate_config: MakeConfig, bert_folder: Path) -> None:
    config = generate_config(backbone=str(bert_folder))

    with pytest.raises(ConfigError, match="cannot generate"):
        fit(config)
    assert not config.runs.exists()


def test_a_run_names_its_metrics_for_what_they_are(generate_config: MakeConfig, mixed_folder: Path) -> None:
    run = fit(generate_config(data=mixed_folder, epochs=3))

    ends = [line for line in run.metrics() if "dev_loss" in line]
    keys = {line["task"]: set(line) - {"task", "step", "epoch"} for line in ends}
    assert keys["plain"] == keys["turned"] == {"dev_loss", "dev_token_accuracy"}
    assert keys["which"] == {"dev_loss", "dev_accuracy"}
    summary = run.summary()
    assert summary["mean_dev_accuracy"] == summary["tasks"]["which"]["dev_accuracy"]
    losses = [summary["tasks"][task]["dev_loss"] for task in ("plain", "turned")]
    assert summary["mean_dev_loss"] == pytest.approx(sum(losses) / 2)
    assert (run.folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_best_epoch_is_the_one_with_the_lowest_dev_loss(generate_config: MakeConfig, tmp_path: Path) -> None:
    rows = pairs("praise")
    write_pairs(tmp_path / "praise" / "train.jsonl", rows[:20])
    write_pairs(tmp_path / "praise" / "dev.jsonl", [(prompt, " so dark and red") for prompt, _ in rows[20:]])

    run = fit(generate_config(data=tmp_path, epochs=6, lr=0.05))  # what is learnt of train is wrong in dev

    losses = {line["epoch"]: line["dev_loss"] for line in run.metrics() if "dev_loss" in line}
    best = run.summary()["tasks"]["praise"]
    assert best["epoch"] == min(losses, key=lambda epoch: losses[epoch])
    assert best["dev_loss"] == min(losses.values()) < losses[6]


def test_an_exported_adapter_says_how_it_generates(generate_config: MakeConfig) -> None:
    run = fit(generate_config(epochs=1))

    manifest, adapter = read(run.adapters / "turned")
    assert adapter.head is None
    assert manifest.head is None
    assert manifest.generation is not None
    assert manifest.generation.max_tokens == len(["big", "was", "the", "cat", "and", "so", "it", "is"]) + 1
    assert set(manifest.metrics) >= {"dev_loss", "dev_token_accuracy", "cut_prompts", "cut_completions"}
    assert "dev_accuracy" not in manifest.metrics


def test_what_is_cut_is_told(generate_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"the {'very ' * i}", " cat" * (3 if i < 18 else 14)) for i in range(20)]
    write_pairs(tmp_path / "long" / "train.jsonl", rows)

    run = fit(generate_config(data=tmp_path, max_length=12, epochs=1, dev_fraction=0))

    said = capsys.readouterr().err
    assert (
        "long: of 20 examples 13 prompts are cut at their beginning and 2 completions at their end "
        "to fit --max-length 12; the longest has 36 tokens" in said
    )
    assert run.summary()["tasks"]["long"]["cut_prompts"] == 13
    assert run.summary()["tasks"]["long"]["cut_completions"] == 2


def test_a_dry_run_works_and_writes_nothing(
    generate_config: MakeConfig, mixed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_module.dry_run(generate_config(data=mixed_folder))

    said = capsys.readouterr().err
    assert "turned: 18 train, 6 dev, completions of up to 9 tokens, " in said
    assert "which: 20 train, 20 dev, 2 labels, " in said
    assert not (tmp_path / "runs").exists()
