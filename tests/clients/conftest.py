"""Servers for the clients: `python -m server` in processes of their own, with keys, told to scripts by variables."""

import hashlib
import json
import os
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.models import make_chat_backbone, make_task_store
from tests.server.tools import Process, until

RIGHTS: dict[str, dict[str, Any]] = {
    "CLIENT_API_KEY": {"scopes": ["infer"]},
    "CLIENT_ADMIN_KEY": {"scopes": ["admin"]},
    "CLIENT_TASK_KEY": {"scopes": ["infer"], "tasks": ["fables"]},
}


def make_keys(file: Path) -> dict[str, str]:
    """A key for each variable; the file gets their hashes, as `python -m server.keys` writes them."""
    keys = {variable: secrets.token_urlsafe(32) for variable in RIGHTS}
    entries = [
        {"name": variable, "sha256": hashlib.sha256(key.encode()).hexdigest(), **RIGHTS[variable]}
        for variable, key in keys.items()
    ]
    file.write_text(json.dumps({"keys": entries}))
    return keys


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready") as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a script: a server, one whose queue is soon full, and keys for both."""
    folder = tmp_path_factory.mktemp("clients")
    backbone, store = folder / "stories", folder / "store"
    make_chat_backbone(backbone)
    make_task_store(store, backbone)
    keys = make_keys(folder / "keys.json")
    flags = ("--api-keys", str(folder / "keys.json"), "--poll-s", "3600")
    small = ("--queue-tokens", "256", "--max-sequences", "2")
    with (
        Process(backbone, store, *flags) as server,
        Process(backbone, store, *flags, *small) as full,
    ):
        until(lambda: is_ready(server.url) and is_ready(full.url), "readiness")
        told = {"CLIENT_BASE_URL": f"{server.url}/v1", "CLIENT_SMALL_QUEUE_URL": f"{full.url}/v1"}
        yield os.environ | keys | told | {"CLIENT_TOKENIZER": str(backbone)}
