"""The command line as people meet it: help, printed settings, refusals of one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from training.cli import app
from training.config import FitConfig
from training.fit import fit

COMMANDS = ["fit", "publish", "relate", "compose", "cotrain", "score", "evaluate", "report", "demo", "styles"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_says_what_every_flag_does(command: str) -> None:
    found = run(command, "--help")

    assert found.exit_code == 0
    assert f"espalier-train {command}" in found.stdout
    assert "--config" in found.stdout
    assert "--token-budget" in found.stdout or command in ("publish", "report", "styles")


def test_every_setting_has_a_description() -> None:
    from training import config as c
    from training.composing import settings as k
    from training.suite import settings as s

    commands = [c.FitConfig, c.RelateConfig, c.PublishConfig, c.ScoreConfig, c.DemoConfig, c.StylesConfig]
    for model in [*commands, k.ComposeConfig, k.CotrainConfig, s.EvaluateConfig, s.ReportConfig]:
        for field, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{field}"


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('data = "d"\nepochs = 7\nlr = 0.5\n[hyperparameters]\nr = 4\n')

    arguments = [
        "--config",
        str(file),
        "--lr",
        "0.25",
        "--tasks",
        "a,b",
        "--one-by-one",
        "--set",
        "target_modules=q,up",
    ]
    found = run("fit", *arguments, "--print-config")

    assert found.exit_code == 0
    settings = json.loads(found.stdout)
    assert settings["epochs"] == 7
    assert settings["lr"] == 0.25
    assert settings["tasks"] == ["a", "b"]
    assert settings["one_by_one"] is True
    assert settings["hyperparameters"] == {"target_modules": ["q", "up"]}
    assert settings["batch_size"] == FitConfig(data=Path("d")).batch_size


def test_printed_settings_are_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(run("fit", "--data", "d", "--epochs", "3", "--print-config").stdout)

    again = run("fit", "--config", str(file), "--print-config")

    assert again.stdout == file.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3", "unknown setting 'epoch'; known are: "),
        ("epochs = 0", "setting 'epochs': "),
        ("epochs =", "expected a readable TOML"),
        ("", "setting 'data' is needed: give --data"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_2(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)

    found = run("fit", "--config", str(file))

    assert found.exit_code == 2
    assert said in found.stderr
    assert found.stderr.count("\n") == 1


def test_an_unknown_flag_and_a_bad_value_are_usage_errors() -> None:
    assert run("fit", "--learning-rate", "1").exit_code == 2
    assert run("fit", "--epochs", "many").exit_code == 2
    assert run("fit", "--set", "r").exit_code == 2


def test_other_errors_are_one_line_and_status_1(tmp_path: Path) -> None:
    for arguments in (
        ["fit", "--data", str(tmp_path / "nowhere")],
        ["publish", "--run", str(tmp_path)],
        ["relate", "--run", str(tmp_path)],
        ["compose", "--run", str(tmp_path)],
        ["cotrain", "--data", str(tmp_path / "nowhere"), "--runs", str(tmp_path)],
        ["score", "--data", str(tmp_path), "--store", str(tmp_path / "store")],
        ["fit", "--resume", "--runs", str(tmp_path)],
        ["evaluate", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")],
        ["report", "--results", str(tmp_path), "--out", str(tmp_path / "report")],
    ):
        found = run(*arguments)
        assert found.exit_code == 1, arguments
        assert found.stderr.startswith("error: ")
        assert found.stderr.count("\n") == 1


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    fit_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    file.write_text(fit_config().model_dump_json())

    found = run("fit", "--config", str(file), "--dry-run")

    assert found.exit_code == 0
    assert "books: 40 train, 12 dev, 2 labels" in found.stderr
    assert not (tmp_path / "runs").exists()


def test_unknown_hyperparameters_and_kinds_are_refused(fit_config: Callable[..., FitConfig], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(fit_config().model_dump_json())

    found = run("fit", "--config", str(file), "--set", "rank=3")
    assert found.exit_code == 2
    assert "unknown hyperparameter of lora 'rank'" in found.stderr
    found = run("fit", "--config", str(file), "--kind", "magic")
    assert found.exit_code == 1
    assert "unknown kind 'magic'" in found.stderr


def test_resume_finds_the_newest_unfinished_run_and_keeps_its_settings(
    fit_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    def stop(done: int) -> None:
        raise InterruptedError

    config = fit_config(checkpoint_s=0)
    with pytest.raises(InterruptedError):
        fit(config, on_step=stop)
    runs = str(config.runs)

    refused = run("fit", "--resume", "--runs", runs, "--lr", "0.5")
    assert refused.exit_code == 2
    assert "where lr is 0.01, not 0.5" in refused.stderr
    shown = run("fit", "--resume", "--runs", runs, "--print-config")
    assert json.loads(shown.stdout) == config.model_dump(mode="json")
    found = run("fit", "--resume", "--runs", runs)
    assert found.exit_code == 0
    assert "resumed" in found.stderr
    assert (config.runs / "one" / "summary.json").is_file()


def test_evaluate_lists_its_jobs_does_them_and_reports(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "evaluate", "--data", str(data_folder), "--name", "tiny", "--examples", "6", "--methods", "single,uniform",
        "--first-layer", "1", "--test-examples", "8", "--backbone", str(bert_folder), "--dtype", "float32",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip

    listed = run(*arguments, "--dry-run")
    assert listed.exit_code == 0
    assert "3 jobs, 3 to do" in listed.stderr
    assert not (tmp_path / "out").exists()
    done = run(*arguments)
    assert done.exit_code == 0
    assert "| uniform | pluggable |" in (tmp_path / "out" / "report" / "report.md").read_text()
    assert run(*arguments, "--examples", "many").exit_code == 2
    assert "unknown method 'magic'" in run(*arguments, "--methods", "magic").stderr


def test_compose_and_cotrain_publish_what_they_made(
    fit_config: Callable[..., FitConfig], bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    folder, store = str(fit(fit_config(epochs=1)).folder), str(tmp_path / "store")

    done = run("compose", "--run", folder, "--store", store, "--set", "c=0.5", "--set", "epsilon=0", "--alias", "dev")
    assert done.exit_code == 0, done.stderr
    assert "composing: 3/3" in done.stderr
    assert "books@1, films@1, intent@1 as @dev, composed by graph version 1" in done.stderr
    arguments = [
        "cotrain", "--data", str(data_folder), "--backbone", str(bert_folder), "--store", store, "--epochs", "1",
        "--runs", str(tmp_path / "runs"), "--examples", "16", "--set", "r=2", "--knob", "c=0.5", "--loss", "relation=0",
    ]  # fmt: skip
    shown = json.loads(run(*arguments, "--print-config").stdout)
    assert (shown["hyperparameters"], shown["knob"], shown["loss"]) == ({"r": 2}, {"c": 0.5}, {"relation": 0})
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "training: 2/2 loss" in done.stderr
    assert "as @prod, composed by graph version 2" in done.stderr
    assert (tmp_path / "runs" / f"{data_folder.name}-cotrain" / "summary.json").is_file()


def test_settings_that_compose_and_cotrain_cannot_use_are_usage_errors(
    fit_config: Callable[..., FitConfig], bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    together = ["cotrain", "--data", str(data_folder), "--backbone", str(bert_folder), "--runs", str(tmp_path)]
    for arguments, said in (
        (["compose", "--run", str(tmp_path), "--set", "depth=1"], "unknown knob 'depth'"),
        (["compose", "--run", str(tmp_path), "--set", "c=1"], "knob 'c': "),
        (["compose", "--run", str(tmp_path), "--relations", "stars"], "'stars' is not one of 'data'"),
        ([*together, "--loss", "beauty=1"], "unknown loss 'beauty'"),
        ([*together, "--loss", "prior=-1"], "loss 'prior': "),
        ([*together, "--knob", "depth=1"], "unknown knob 'depth'"),
        ([*together, "--set", "rank=1"], "unknown hyperparameter of lora 'rank'"),
        ([*together, "--kind", "head"], "nothing to compose"),
        ([*together, "--first-layer", "7"], "first layer 7 is not one of the backbone's layers 0 to 1"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2, (arguments, found.stderr)
        assert said in found.stderr
    assert not (tmp_path / "store").exists()
