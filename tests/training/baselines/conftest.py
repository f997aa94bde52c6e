"""A tiny bench of three tasks, and node adapters of three ranks with random updates."""

from pathlib import Path

import pytest
import torch

from adapters_store.adapter import Adapter
from adapters_store.primitives import Entry
from training.backbone import LoadedBackbone
from training.suite.heads import Heads
from training.suite.joint import Recipe
from training.suite.methods import Nodes
from training.suite.modules import Modules
from training.suite.workbench import Setting, Workbench, prepare


@pytest.fixture(params=[0, 1], ids=["whole", "tail"])
def bench(request: pytest.FixtureRequest, data_folder: Path, backbone: LoadedBackbone) -> Workbench:
    setting = Setting((data_folder,), 12, test_examples=10, first_layer=request.param, token_budget=64)
    return prepare(setting, backbone)


@pytest.fixture
def nodes(bench: Workbench) -> Nodes:
    adapters = []
    for k in range(len(bench.tasks)):
        made = Modules(bench.tail, 1, 0, hyperparameters={"r": 2 + k}).adapters()[0]
        adapters.append(Adapter([_filled(entry) for entry in made.entries]))
    return Nodes(adapters, Heads(bench.tasks, bench.hidden_size, 0).frozen())


def _filled(entry: Entry) -> Entry:
    tensors = {name: torch.randn(tensor.shape) * 0.15 for name, tensor in entry.tensors.items()}
    return Entry(entry.site, entry.primitive, tensors, {"scale": 1.5})


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(epochs=2, batch_size=6, max_tokens=128)
