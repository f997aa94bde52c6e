"""espalier-store: a newcomer's way through it, and one line for whatever goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapters_store.cli import app
from adapters_store.store import AdapterStore
from tests.adapters_store.small import publish

COMMANDS = ["ls", "show", "publish", "alias", "rollback", "rm", "verify", "export", "gc"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish(AdapterStore(tmp_path / "store"), alias="prod", metrics={"accuracy": 0.5})
    publish(AdapterStore(tmp_path / "store"), seed=1)
    return tmp_path / "store"


def run(*words: object, store: Path | None = None) -> Result:
    environment = {"ESPALIER_STORE": str(store)} if store else {}
    return CliRunner().invoke(app, [str(word) for word in words], env=environment)


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_help_names_every_command_and_what_a_reference_is():
    result = run("--help")

    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)
    assert "books@prod" in result.stdout
    for command in COMMANDS:
        help_text = run(command, "--help").stdout
        assert "--store" in help_text
        assert "ESPALIER_STORE" in help_text


def test_ls_lists_each_name_with_versions_aliases_task_kind_and_size(root):
    result = run("ls", "--store", root)

    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "books" in line)
    assert all(part in row for part in ("1, 2", "prod=1", "lora", " B"))


def test_ls_of_an_empty_store_says_what_to_do(tmp_path):
    result = run("ls", "--store", tmp_path / "none")

    assert result.exit_code == 0
    assert "has no adapters; `publish`" in result.stdout
    assert not (tmp_path / "none").exists()


def test_show_tells_a_version_readably_and_as_json(root):
    text = run("show", "books@prod", store=root).stdout
    document = json.loads(run("show", "books@prod", "--json", store=root).stdout)

    assert all(
        part in text for part in ("books@1", "sha256:", "2 lowrank", "labels a, b", "accuracy = 0.5", "BertModel")
    )
    assert (document["name"], document["version"]) == ("books", 1)


def test_export_and_publish_carry_an_adapter_to_another_store(root, tmp_path):
    exported = run("export", "books@2", tmp_path / "out", store=root)
    result = run(
        "publish", tmp_path / "out", "--name", "films", "--task", "films", "--alias", "prod", store=tmp_path / "b"
    )

    assert (exported.exit_code, result.exit_code) == (0, 0)
    assert result.stdout.startswith("published films@1 sha256:")
    other = AdapterStore(tmp_path / "b").resolve("films@prod")
    assert other.digest == AdapterStore(root).resolve("books@2").digest


def test_alias_rollback_and_rm_do_what_they_say(root):
    assert run("alias", "books", "prod", 2, store=root).stdout == "books@prod is now books@2\n"
    assert_refused(run("rm", "books@2", store=root), "books@2 is what prod points at; move the alias, then delete")
    assert run("rollback", "books", "prod", store=root).stdout == "books@prod is now books@1\n"
    assert run("rm", "books@2", store=root).stdout == "deleted books@2\n"
    assert AdapterStore(root).versions("books") == [1]


@pytest.mark.parametrize("reference", ["books", "books@prod"])
def test_rm_wants_to_know_exactly_which_version(root, reference):
    assert_refused(run("rm", reference, store=root), "say which to delete, as books@3")


def test_gc_removes_the_tensors_of_deleted_versions(root):
    run("rm", "books@2", store=root)

    assert run("gc", store=root).stdout == "0 removed\n"
    assert "1 removed" in run("gc", "--grace-s", 0, store=root).stdout


def test_verify_exits_with_one_if_something_is_wrong(root):
    assert run("verify", store=root).stdout == "everything is as it was published\n"

    next((root / "blobs" / "sha256").iterdir()).write_bytes(b"rot")

    result = run("verify", store=root)
    assert result.exit_code == 1
    assert "has other bytes" in result.stdout
    assert result.stdout.endswith("1 problems\n")


def test_what_goes_wrong_is_one_line_and_status_one(root, tmp_path):
    (tmp_path / "file").write_text("x")
    for words, message in [
        (["show", "musik"], "no adapter 'musik'; the store has: books"),
        (["show", "books@9"], "books has versions: 1, 2"),
        (["show", "../books"], "is not allowed: use 1 to 64 of"),
        (["alias", "books", "7", "1"], "numbers are versions"),
        (["rollback", "books", "prod"], "nothing to roll back to"),
        (["publish", tmp_path, "--name", "x", "--task", "x"], "has no manifest.json and no tensors.safetensors"),
        (["export", "books", tmp_path / "file"], "file"),
    ]:
        assert_refused(run(*words, store=root), message)


def test_the_module_runs_and_ends_with_its_status(root):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "adapters_store", "show", "musik", "--store", str(root)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no adapter 'musik'; the store has: books\n"
