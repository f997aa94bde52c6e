"""What is installed is all there is: files that are not Python must be named as package data."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("adapters_store", "server", "training")
STORE = ROOT / "adapters_store" / "data"  # what `make demo` publishes: not the package's


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_installed_with_it(package: str) -> None:
    folder = ROOT / package
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][package]
    installed = {path for pattern in patterns for path in folder.glob(pattern)}

    found = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    found = {path for path in found if STORE not in path.parents}

    assert found, "nothing was looked at"
    assert sorted(map(str, found - installed)) == []
