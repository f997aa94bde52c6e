"""Four clients as their users run them: each script of this folder passes against real servers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE_S = 120.0

pytestmark = pytest.mark.clients


def check(command: list[str], variables: dict[str, str]) -> None:
    """Run a script; what it said stands in the failure."""
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["openai_sdk.py", "langchain_sdk.py"])
def test_a_python_client_is_served(script: str, variables: dict[str, str]) -> None:
    check([sys.executable, str(HERE / script)], variables)


def test_hugging_faces_client_is_served(variables: dict[str, str]) -> None:
    online = {name: value for name, value in variables.items() if name != "HF_HUB_OFFLINE"}  # offline it calls nobody

    check([sys.executable, str(HERE / "huggingface_sdk.py")], online)


def test_the_npm_client_is_served(variables: dict[str, str]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (HERE / "node_modules" / "openai").is_dir():
        pytest.skip("make test-clients installs the npm package (npm ci --prefix tests/clients)")

    check([node, str(HERE / "openai_npm.mjs")], variables)
