"""Node adapters of a cell: one per task, trained apart with the tasks' own heads, kept as safetensors and JSON."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.primitives import Entry
from training.errors import RunError
from training.suite.heads import Heads
from training.suite.joint import Recipe, train
from training.suite.ledger import write_json
from training.suite.methods import Nodes
from training.suite.modules import Modules, mixes, one_hot
from training.suite.workbench import Workbench

RECIPE = Recipe()


def train_nodes(bench: Workbench, recipe: Recipe = RECIPE) -> Nodes:
    """An adapter and a head per task; all start from the same values."""
    modules = Modules(bench.tail, len(bench.tasks), bench.setting.seed, alike=True)
    heads = Heads(bench.tasks, bench.hidden_size, bench.setting.seed)
    apart = mixes(one_hot(len(bench.tasks), bench.num_layers))
    train(bench, modules, heads, lambda _: apart, recipe)
    return Nodes(modules.adapters(), heads.frozen())


def save(nodes: Nodes, tasks: list[str], folder: Path) -> None:
    """Write nodes.safetensors, then nodes.json: with the second the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    entries = []
    for t, adapter in enumerate(nodes.adapters):
        for i, entry in enumerate(adapter.entries):
            tensors |= {f"{t}.{i}.{name}": tensor for name, tensor in entry.tensors.items()}
        entries.append([[e.site, e.primitive, dict(e.options), list(e.tensors)] for e in adapter.entries])
        tensors[f"{t}.head.weight"], tensors[f"{t}.head.bias"] = nodes.heads[t]
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "nodes.safetensors")
    write_json(folder / "nodes.json", {"tasks": tasks, "entries": entries})


def load(folder: Path, tasks: list[str]) -> Nodes:
    """What `save` wrote. Raises RunError if it is not there or of other tasks."""
    try:
        about = json.loads((folder / "nodes.json").read_text())
        tensors = load_file(folder / "nodes.safetensors")
    except FileNotFoundError as error:
        raise RunError(f"{error.filename or folder} is missing: remove the cell's file of lines to train it") from error
    if about["tasks"] != tasks:
        raise RunError(f"{folder} has nodes of other tasks: {', '.join(about['tasks'])}")
    adapters = [
        Adapter([
            Entry(site, primitive, {name: tensors[f"{t}.{i}.{name}"] for name in names}, options)
            for i, (site, primitive, options, names) in enumerate(entries)
        ])
        for t, entries in enumerate(about["entries"])
    ]  # fmt: skip
    return Nodes(adapters, [(tensors[f"{t}.head.weight"], tensors[f"{t}.head.bias"]) for t in range(len(tasks))])
