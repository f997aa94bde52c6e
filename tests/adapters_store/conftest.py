"""An empty store."""

from pathlib import Path

import pytest

from adapters_store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")
