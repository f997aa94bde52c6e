"""README's commands are run, and what it names exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.bench import tables
from tests.server.generation.tiny_decoder import make_decoder, publish
from tests.server.tiny import make_backbone, make_store, peft_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
CURLS = [block for block in BLOCKS if block.startswith("curl")]
PYTHONS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    if not block.startswith("curl")
    for line in block.splitlines()
    if line.strip()
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with tasks of README's names on a tiny backbone."""
    root = tmp_path_factory.mktemp("readme")
    backbone = make_backbone(root / "backbone")
    make_store(root / "store", backbone, ("books", "films", "banking", "news_topic", "spam"))
    with server(root / "store", backbone) as found:
        yield found


@pytest.fixture(scope="module")
def generating_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same on a tiny decoder."""
    root = tmp_path_factory.mktemp("texts")
    backbone = make_decoder(root / "stories260k")
    for seed, name in enumerate(("cheerful", "spooky", "magical")):
        publish(root / "store", backbone, name, seed)
    with server(root / "store", backbone) as found:
        yield found


@contextmanager
def server(store: Path, backbone: Path) -> Iterator[str]:
    """A server process; its URL."""
    command = [
        sys.executable,
        "-m",
        "server",
        "--store",
        store,
        "--backbone",
        backbone,
        "--port",
        "0",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "running on http" in line)
        yield re.search(r"http://[\d.:]+", line)[0]  # type: ignore[index]
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_curl_of_the_readme_answers(url: str, generating_url: str, tmp_path: Path) -> None:
    (tmp_path / "my-lora").mkdir()
    for name, data in peft_files(3).items():
        (tmp_path / "my-lora" / name).write_bytes(data)

    for block in CURLS:
        script = (
            block.replace("http://127.0.0.1:8000", url)
            .replace("http://127.0.0.1:8001", generating_url)
            .replace("curl -s", "curl -sS --fail-with-body")
        )
        done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("script", PYTHONS)
def test_every_python_script_of_the_readme_runs(generating_url: str, script: str) -> None:
    script = script.replace("http://127.0.0.1:8001", generating_url)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "graph_version" in done.stdout


def test_the_answer_shown_has_the_fields_of_a_real_one(url: str) -> None:
    import json

    shown = json.loads(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0])
    body = {"inputs": [{"task": "banking", "text": "any"}]}

    real = httpx.post(f"{url}/v1/infer", json=body).json()

    assert set(real) == set(shown)
    assert set(real["outputs"][0]) == set(shown["outputs"][0])
    assert set(real["outputs"][0]["composition"]) == set(shown["outputs"][0]["composition"])
    assert set(real["outputs"][0]["composition"]["adapters"][0]) == set(
        shown["outputs"][0]["composition"]["adapters"][0]
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_one(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    module = {"espalier-train": "training", "espalier-store": "adapters_store", "espalier-serve": "server"}[
        Path(words[0]).name
    ]
    options = [word for word in words if word.startswith("--")]
    subcommand = words[1:2] if module != "server" else []
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", module, *subcommand, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in options), f"{options} not all in {done.stdout}"


def test_the_tree_in_the_readme_names_folders_that_exist() -> None:
    tree = README.split("## The house")[1].split("```")[1]

    named = [line.split()[0] for line in tree.splitlines() if line.strip()]

    assert {name for name in named if not name.startswith(("primitives", "kinds"))} <= {
        f"{path.name}/" for path in ROOT.iterdir()
    }


def test_every_make_target_is_listed_with_its_meaning() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))

    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert targets <= {line.split()[0] for line in listed.splitlines()} | {"help"}
    assert {"setup", "demo", "serve", "train", "test", "check", "fmt", "bench"} <= targets


def test_the_numbers_are_those_of_the_committed_results() -> None:
    assert tables.with_tables(README) == README, "run python -m tests.bench.tables"
