"""Flags, variables, help, logs: what an operator meets first."""

import json
import logging
from pathlib import Path

import pytest

from server import logs
from server.config import Settings, check_environment
from server.serve import serve


def stopped(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as raised:
        serve(arguments)
    return int(raised.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-token", "64"], "batch-token"),
        (["--batch-tokens", "3"], "--batch-tokens (ESPALIER_BATCH_TOKENS)"),
        (["--dtype", "int8"], "--dtype"),
        (["--port", "99999"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--port", "eighty"], "--port"),
    ],
)
def test_a_flag_that_cannot_be_stops_with_2_and_names_it(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(arguments) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_variable_stops_with_2_and_lists_the_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESPALIER_BATCHTOKENS", "64")

    assert stopped([]) == 2
    error = capsys.readouterr().err
    assert "ESPALIER_BATCHTOKENS" in error
    assert "ESPALIER_BATCH_TOKENS" in error


def test_a_variable_that_cannot_be_stops_with_2_and_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESPALIER_SLOTS", "-1")

    assert stopped([]) == 2
    assert "ESPALIER_SLOTS" in capsys.readouterr().err


def test_variables_and_flags_set_the_same_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic_settings import CliApp

    monkeypatch.setenv("ESPALIER_BATCH_TOKENS", "64")
    monkeypatch.setenv("ESPALIER_SLOTS", "5")
    monkeypatch.setenv("ESPALIER_PRELOAD", "false")

    settings = CliApp.run(Settings, cli_args=["--slots", "7", "--allow-zero"])

    check_environment()
    assert (settings.batch_tokens, settings.slots, settings.preload, settings.allow_zero) == (64, 7, False, True)


def test_settings_cannot_change() -> None:
    settings = Settings()

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_help_lists_every_setting_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(["--help"]) == 0

    shown = "".join(capsys.readouterr().out.split())  # lines are broken at spaces and hyphens
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(str(field.description).split()) in shown, name


def test_a_store_or_backbone_that_is_not_there_stops_with_1_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as raised:
        serve(["--backbone", str(tmp_path / "nowhere"), "--store", str(tmp_path)])

    assert "nowhere" in str(raised.value.code)


def record(**keys: object) -> logging.LogRecord:
    made = logging.LogRecord("espalier", logging.INFO, "x.py", 1, "loaded", (), None)
    made.keys = keys  # type: ignore[attr-defined]
    return made


def test_json_lines_hold_the_event_and_its_keys() -> None:
    line = json.loads(logs.JsonLines().format(record(adapters=3, path="a=b level=x", seconds=0.5)))

    assert (line["event"], line["adapters"], line["path"], line["seconds"]) == ("loaded", 3, "a=b level=x", 0.5)
    assert line["level"] == "INFO"


def test_text_lines_are_for_people() -> None:
    line = logs.TextLines().format(record(adapters=3, detail="two words", seconds=1.23456))

    assert line.endswith('loaded adapters=3 detail="two words" seconds=1.235')


@pytest.mark.parametrize("error", [ValueError("the text"), KeyError("the text"), UnicodeError("the text")])
def test_a_trace_keeps_what_may_be_a_clients_text_to_itself(error: Exception) -> None:
    raised = RuntimeError("out of memory")
    raised.__cause__ = error

    trace = logs.trace_of(raised)

    assert "RuntimeError: out of memory" in trace
    assert type(error).__name__ in trace
    assert "the text" not in trace
