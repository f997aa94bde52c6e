"""Training: mixed is one by one, a stop changes nothing, a loss that is no number ends it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.kinds import KINDS
from tests.training.alone import logits_alone
from training import fit as fit_module
from training.backbone import LoadedBackbone, load
from training.config import FitConfig
from training.errors import DivergedError, RunError
from training.export import read
from training.fit import fit
from training.run import Run
from training.step import backward, micro_batches, score
from training.tasks import read_tasks

MakeConfig = Callable[..., FitConfig]


class StopError(Exception):
    """Stands for a crash: nothing is cleaned up, nothing is written any more."""


def stop_at(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done >= step:
            raise StopError

    return on_step


def blobs(run: Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.adapters.glob("*/tensors.safetensors")}


def test_tasks_trained_together_are_what_they_are_trained_alone(fit_config: MakeConfig) -> None:
    together = fit(fit_config(run="together"))
    alone = fit(fit_config(run="alone", one_by_one=True))

    for task in ("books", "films", "intent"):
        one, other = (load_file(run.adapters / task / "tensors.safetensors") for run in (together, alone))
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


def test_a_task_trains_the_same_whoever_trains_along(fit_config: MakeConfig) -> None:
    all_tasks = fit(fit_config(run="all"))
    only = fit(fit_config(run="only", tasks=("films",)))

    one, other = (load_file(run.adapters / "films" / "tensors.safetensors") for run in (all_tasks, only))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("step", [1, 9, 13])
@pytest.mark.parametrize("checkpoint_s", [0.0, 1e6])
def test_a_crashed_run_resumes_to_the_same_bytes(fit_config: MakeConfig, step: int, checkpoint_s: float) -> None:
    config = fit_config(checkpoint_s=checkpoint_s)  # a checkpoint after every step, or none at all
    whole = fit(fit_config(run="whole"))

    with pytest.raises(StopError):
        fit(config, on_step=stop_at(step))
    assert not Run(config.runs / "one").is_finished
    resumed = fit(config, resume=True)

    assert blobs(resumed) == blobs(whole)
    assert resumed.metrics() == whole.metrics()
    assert not resumed.checkpoints.exists()


def test_a_run_one_by_one_resumes_in_its_second_task(fit_config: MakeConfig) -> None:
    config = fit_config(checkpoint_s=0, one_by_one=True)
    whole = fit(fit_config(run="whole", one_by_one=True))

    with pytest.raises(StopError):
        fit(config, on_step=stop_at(8))

    assert blobs(fit(config, resume=True)) == blobs(whole)


def test_a_run_folder_says_everything(fit_config: MakeConfig) -> None:
    run = fit(fit_config())

    assert run.config() == fit_config()
    assert run.environment()["versions"]["torch"] == torch.__version__
    assert (run.folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    summary = run.summary()
    assert set(summary["tasks"]) == {"books", "films", "intent"}
    steps = [line for line in run.metrics() if "loss" in line]
    assert {line["task"] for line in steps} == {"books", "films", "intent"}
    assert [line["step"] for line in steps if line["task"] == "books"] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in run.metrics() if "dev_loss" in line and line["task"] == "books"] == [1, 2]
    assert [path for path in run.folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")] == []


def test_a_taken_run_folder_is_refused_and_a_finished_one_not_resumed(fit_config: MakeConfig) -> None:
    fit(fit_config(epochs=1))

    with pytest.raises(RunError, match="choose another --run"):
        fit(fit_config(epochs=1))
    with pytest.raises(RunError, match="nothing to resume"):
        fit(fit_config(epochs=1), resume=True)


def test_changed_data_is_not_resumed(fit_config: MakeConfig, data_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data_folder, copy)
    config = fit_config(data=copy, checkpoint_s=0)
    with pytest.raises(StopError):
        fit(config, on_step=stop_at(1))
    with (copy / "books" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a new one", "label": "positive"}) + "\n")

    with pytest.raises(RunError, match=r"changed since it began \(books"):
        fit(config, resume=True)


def test_a_loss_that_is_no_number_names_the_task(fit_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit_module.prepare

    def poisoned(config: FitConfig) -> object:
        tasks, backbone, states = real(config)
        with torch.no_grad():
            states[1].adapter.objective.tensors()["bias"].fill_(float("nan"))
        return tasks, backbone, states

    monkeypatch.setattr(fit_module, "prepare", poisoned)

    with pytest.raises(DivergedError, match="task 'films' became nan at step 1"):
        fit(fit_config())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_trains_and_lowers_the_loss(fit_config: MakeConfig, kind: str) -> None:
    run = fit(fit_config(kind=kind, epochs=4))

    for task in ("books", "intent"):
        losses = [line["loss"] for line in run.metrics() if line["task"] == task and "loss" in line]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_decoder_trains_with_last_token_pooling(fit_config: MakeConfig, gpt2_folder: Path) -> None:
    run = fit(fit_config(backbone=str(gpt2_folder), epochs=4, tasks=("intent",)))

    manifest, _ = read(run.adapters / "intent")
    assert manifest.head is not None
    assert manifest.head.pooling == "last"
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_a_bfloat16_backbone_trains_float32_adapters_with_float32_golden_logits(fit_config: MakeConfig) -> None:
    run = fit(fit_config(dtype="bfloat16", tasks=("books",)))

    manifest, adapter = read(run.adapters / "books")
    assert manifest.backbone.dtype == "bfloat16"
    assert {tensor.dtype for entry in adapter.entries for tensor in entry.tensors.values()} == {torch.float32}
    again = logits_alone(load(fit_config().backbone), adapter, [example.text for example in manifest.golden])
    torch.testing.assert_close(again, torch.tensor([example.logits for example in manifest.golden]))


def test_patience_stops_a_task_early(fit_config: MakeConfig) -> None:
    run = fit(fit_config(epochs=6, patience=1, lr=1e-9, head_lr=1e-9, tasks=("books", "films")))

    assert max(line["epoch"] for line in run.metrics()) < 6


def test_nothing_stays_in_the_sites_after_a_step(fit_config: MakeConfig) -> None:
    _, backbone, states = fit_module.prepare(fit_config())
    backward(backbone.encoder, [state.next_part() for state in states], 64)
    score(backbone.encoder, [state.dev_part() for state in states], 64)

    assert all(not bank.slots for site in backbone.encoder.sites.values() for bank in site.banks.values())


def test_gradients_do_not_depend_on_the_token_budget(fit_config: MakeConfig) -> None:
    _, backbone, states = fit_module.prepare(fit_config())
    found = []
    for budget in (16, 10_000):
        backward(backbone.encoder, [state.next_part() for state in states], budget)
        found.append(
            [t.grad.clone() for state in states for t in state.adapter.tensors().values() if t.grad is not None]
        )
        for state in states:
            state.optimizer.zero_grad(set_to_none=True)

    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_micro_batches_keep_the_order_and_the_budget(backbone: LoadedBackbone) -> None:
    lengths = [5, 9, 3, 3, 20, 1, 1]

    batches = list(micro_batches(backbone.encoder, lengths, 12))

    assert [i for batch in batches for i in batch] == list(range(7))
    assert all(len(batch) == 1 or backbone.encoder.tokens_run([lengths[i] for i in batch]) <= 12 for batch in batches)


def test_a_dry_run_writes_nothing(fit_config: MakeConfig, tmp_path: Path) -> None:
    fit_module.dry_run(fit_config())

    assert not (tmp_path / "runs").exists()


def test_labels_come_in_the_order_of_the_task(fit_config: MakeConfig, data_folder: Path) -> None:
    run = fit(fit_config(epochs=1))

    for task in read_tasks(data_folder):
        manifest, adapter = read(run.adapters / task.name)
        assert manifest.head is not None
        assert manifest.head.labels == task.labels
        assert adapter.head is not None
