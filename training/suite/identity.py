"""What results depend on, in one digest: lines under different digests are never mixed.

Data by content and the backbone by its weights, so that folders may move; not seeds, examples and methods, which may be
added to later, nor workers and threads.
"""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters_store.backbones import fingerprint, locate
from adapters_store.manifest import canonical_json, digest_of
from training.errors import DataError
from training.suite.nodes import RECIPE
from training.suite.settings import EvaluateConfig

_FILES = ("train.jsonl", "test.jsonl", "dev.jsonl", "task.toml", "meta.json")


def identity(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that decides a line's numbers, by name. Raises DataError, BackboneNotFoundError."""
    own = config.model_dump(mode="json", include={"test_examples", "max_length", "first_layer", "token_budget"})
    data = {name: _digest(folder) for name, folder in _by_name(config.data).items()}
    backbone = fingerprint(locate(config.backbone), config.dtype).model_dump(mode="json")
    return {"suite": config.suite, "data": data, "backbone": backbone, "recipe": asdict(RECIPE)} | own


def digest(found: Mapping[str, Any]) -> str:
    """Twelve hex digits of it, enough to tell settings apart."""
    return digest_of(canonical_json(dict(found))).removeprefix("sha256:")[:12]


def commit() -> str | None:
    """The commit that runs; None outside of a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by name; several of one name are counted, so that none is left out."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        found[name if name not in found else f"{name} {len(found) + 1}"] = folder
    return found


def _digest(folder: Path) -> str:
    """Of the files of all tasks."""
    files = [path / name for path in _tasks(folder) for name in _FILES if (path / name).is_file()]
    state = hashlib.sha256()
    for file in files:
        state.update(f"{file.parent.name}/{file.name}\0".encode())
        state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()[:12]


def _tasks(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with one folder per task, each with a train.jsonl")
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_.")
