"""Fixtures of the server's tests: one tiny backbone per session, a store and a client per test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import make_app
from server.config import Settings
from server.service import Service
from tests.server.tiny import make_backbone, make_store


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def store_root(tmp_path: Path, backbone: Path) -> Path:
    make_store(tmp_path / "store", backbone)
    return tmp_path / "store"


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(backbone: Path, store_root: Path) -> Iterator[Serve]:
    """A function that starts a server with given settings and gives its client."""
    with ExitStack() as stack:

        def start(**changes: Any) -> TestClient:
            settings = Settings(
                **({"store": store_root, "backbone": str(backbone), "threads": 1, "poll_s": 3600} | changes)
            )
            client = TestClient(make_app(Service(settings)), raise_server_exceptions=False)
            return stack.enter_context(client)

        yield start


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """A server with defaults."""
    return serve()
