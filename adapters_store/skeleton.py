"""A backbone without its weights: the module tree that a folder's weight files imply, on the meta device.

Enough to say which sites there are and how wide they are, so that the store's command line can check an adapter
against a backbone without any model library and without reading a single weight.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_store.backbones import BackboneNotFoundError
from adapters_store.sites import Sites

_EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_MAX_HEADER_BYTES = 100 * 2**20


class Conv1D(nn.Module):
    """A linear layer that keeps its weight transposed, as GPT-2 has it; known by its class name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out, device="meta"))


class RMSNorm(nn.Module):
    """A norm without bias; known by its class name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"))


def sites_of(folder: Path) -> Sites:
    """The sites of the backbone in a folder. Raises BackboneNotFoundError for one without safetensors weights."""
    config = json.loads((folder / "config.json").read_text())
    shapes = _without_prefix(_shapes(folder))
    root: Any = nn.Module()
    root.config = type("Config", (), config)
    for name in sorted(shapes):
        path, _, parameter = name.rpartition(".")
        module = _module(path, parameter, shapes, config.get("model_type", ""))
        if module is not None:
            _place(root, path, module)
    hidden_size = config.get("hidden_size") or config.get("n_embd") or config.get("dim")
    return Sites(root, int(hidden_size))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the folder's safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise BackboneNotFoundError(f"{folder} has no *.safetensors, whose headers would say which sites there are")
    return shapes


def _without_prefix(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names as in the bare backbone: a checkpoint of BertForX has them under `bert.`, and its head beside."""
    for name in shapes:
        prefix, _, rest = name.partition(".")
        if prefix not in _EMBEDDINGS and rest.startswith(_EMBEDDINGS):
            return {n.removeprefix(f"{prefix}."): shape for n, shape in shapes.items() if n.startswith(f"{prefix}.")}
    return shapes


def _module(path: str, parameter: str, shapes: dict[str, tuple[int, ...]], model_type: str) -> nn.Module | None:
    """What a weight's shape says its module is; None for embeddings and what is no module's weight."""
    shape = shapes[f"{path}.{parameter}"]
    last = path.rsplit(".", 1)[-1]
    if parameter != "weight" or "embeddings." in path or last in _EMBEDDINGS or last in ("wpe", "embed_positions"):
        is_norm = parameter == "weight" and len(shape) == 1
        if not is_norm:
            return None
    if len(shape) == 1:
        has_bias = f"{path}.bias" in shapes
        return nn.LayerNorm(shape[0], device="meta") if has_bias else RMSNorm(shape[0])
    if len(shape) != 2:
        return None
    return Conv1D(*shape) if model_type == "gpt2" else nn.Linear(shape[1], shape[0], bias=False, device="meta")


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module into the tree, with empty modules on the way."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:  # noqa: SLF001  # names may be numbers, which attributes cannot be
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]  # noqa: SLF001
    root.add_module(last, module)
