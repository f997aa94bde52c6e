"""The folder that PEFT's `save_pretrained` writes for a LoRA, read and written without PEFT.

    adapter_config.json           peft_config.py says which fields are read, ignored, refused
    adapter_model.safetensors     base_model.model.<path>.lora_A.weight (r, d_in), .lora_B.weight (d_out, r)
    head.json, head.safetensors   optional, ours: peft_heads.py

<path> is a module of the model that was trained, mostly a ForSomething around the backbone: "bert.encoder.layer.0…".
What stands before the site's name must be the same for all keys. The keys present must be the keys expected, which are
two for each linear module that target_modules means; ranks come from the tensors, and the config may not contradict.
Both d_in and d_out are the module's own, also for Conv1D, whose weight lies transposed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.errors import (
    FormatError,
    KeysError,
    NoSiteError,
    ShapeError,
    TooLargeError,
    UnknownSiteError,
    UnsupportedError,
)
from adapters_store.peft_config import ALL_LINEAR, CONFIG_NAME, MAX_JSON_BYTES, PeftConfig, ends, is_target, read_config
from adapters_store.peft_export import write_folder
from adapters_store.peft_heads import HEAD_NAME, HEAD_TENSORS_NAME, read_head, read_saved, with_head
from adapters_store.places import is_linear
from adapters_store.primitives import Entry
from adapters_store.sites import Sites
from adapters_store.tensors import LIMITS, TensorLimits, read_tensors

TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_MAX_KEY = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Factors = dict[str, Tensor]  # {"A": (r, d_in), "B": (d_out, r)}


@dataclass(frozen=True, eq=False)
class Imported:
    """An adapter from PEFT, with its hyper-parameters as PEFT names them and the backbone that its config claims."""

    adapter: Adapter
    hyperparameters: dict[str, Any]
    base_model: str | None


def read_parts(config_json: bytes, tensors: Mapping[str, Tensor], sites: Sites) -> Imported:
    """The adapter in a config and its tensors, with the head among them if PEFT saved one.

    Call adapter.check next, which refuses NaN, ranks over the limit and zeros. Raises a RefusedError that says why.
    """
    config = read_config(config_json)
    factors, rest = _split(tensors)
    linear = [name for name in sites if is_linear(sites[name].place.module)]
    prefix, at_site = _locate(factors, linear)
    paths = {name: prefix + name for name in linear}
    config.check_patterns(paths.values())
    _check_coverage(config, paths, set(at_site))
    entries = [_entry(config, paths[name], name, at_site[name]) for name in linear if name in at_site]
    sites.check(entries)
    head = read_saved(config, rest, sites)
    return Imported(Adapter(entries, head), _hyperparameters(config), config.base_model_name_or_path)


def read_folder(folder: Path, sites: Sites, limits: TensorLimits = LIMITS) -> Imported:
    """The adapter in a folder. Raises a RefusedError that says why; FormatError for pickle or a missing file."""
    if not (folder / TENSORS_NAME).is_file():
        pickled = f"; {PICKLE_NAME} is a pickle and is never opened" if (folder / PICKLE_NAME).exists() else ""
        raise FormatError(
            f"{folder} has no {TENSORS_NAME}{pickled}; save with save_pretrained(safe_serialization=True)"
        )
    config_json = _read(folder / CONFIG_NAME, MAX_JSON_BYTES)
    if config_json is None:
        raise FormatError(f"{folder} has no {CONFIG_NAME}; PEFT's save_pretrained writes one")
    imported = read_parts(config_json, _tensors(folder / TENSORS_NAME, limits), sites)
    head_json = _read(folder / HEAD_NAME, MAX_JSON_BYTES)
    adapter = with_head(imported.adapter, head_json, _tensors(folder / HEAD_TENSORS_NAME, limits))
    return replace(imported, adapter=adapter)


def _read(file: Path, max_bytes: int) -> bytes | None:
    """The bytes of a file that may be missing, never more than allowed."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TooLargeError(f"{file.name} has more than {max_bytes} bytes")
    return data


def _tensors(file: Path, limits: TensorLimits) -> dict[str, Tensor]:
    data = _read(file, limits.max_bytes)
    return {} if data is None else read_tensors(data, limits)


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """LoRA factors by module path, and what else there is by its name beside the backbone."""
    factors: dict[str, Factors] = {}
    rest: dict[str, Tensor] = {}
    names = set()
    for key, tensor in tensors.items():
        found = _LORA.fullmatch(key) if len(key) <= _MAX_KEY else None
        if found:
            names.add(found["adapter"])
            factors.setdefault(found["path"], {})[found["factor"]] = tensor
        else:
            rest[_beside(key)] = tensor
    if len(names) > 1:
        raise KeysError(f"the keys name several adapters {sorted(map(str, names))[:5]}; save one per folder")
    _check_pairs(factors)
    return factors, rest


def _beside(key: str) -> str:
    """Name beside the backbone of a tensor that is no LoRA factor of a linear layer."""
    if not key.startswith(_PREFIX):
        raise KeysError(f"{key[:_MAX_KEY]!r} is no key of PEFT's: they begin with {_PREFIX!r}")
    if ".lora_" in key or len(key) > _MAX_KEY:
        raise UnsupportedError(f"{key[:_MAX_KEY]!r}: only lora_A.weight and lora_B.weight of linear layers are served")
    return key.removeprefix(_PREFIX)


def _check_pairs(factors: Mapping[str, Factors]) -> None:
    if not factors:
        raise NoSiteError(f"no key of the form {_PREFIX}<module>.lora_A.weight: the adapter would change nothing")
    alone = [f"{path}.lora_{'B' if 'A' in pair else 'A'}.weight" for path, pair in factors.items() if len(pair) < 2]
    if alone:
        raise KeysError(f"{len(alone)} LoRA factors lack their partner; missing {sorted(alone)[:5]}")


def _locate(factors: Mapping[str, Factors], linear: Iterable[str]) -> tuple[str, dict[str, Factors]]:
    """The prefix that all paths share before a site's name ("bert."), and the factors by site."""
    known = set(linear)
    prefixes = {path: _prefixes(path, known) for path in factors}
    lost = sorted(path for path, found in prefixes.items() if not found)
    if lost:
        some = ", ".join(sorted(known)[:4])
        error = NoSiteError if len(lost) == len(factors) else UnknownSiteError
        raise error(f"the backbone has no linear module {lost[:4]}; it has for example {some}")
    shared = set.intersection(*prefixes.values())
    if "" in shared:
        return "", dict(factors)
    if len(shared) != 1:
        raise UnknownSiteError(
            f"the keys do not agree on what stands before the backbone's module names: {sorted(prefixes)[:4]}"
        )
    prefix = shared.pop()
    return prefix, {path.removeprefix(prefix): pair for path, pair in factors.items()}


def _prefixes(path: str, known: set[str]) -> set[str]:
    """What may be taken off the path to reach a known name: "" or whole components with their dot."""
    parts = path.split(".")
    return {path[: len(path) - len(end)] for i in range(len(parts)) if (end := ".".join(parts[i:])) in known}


def _check_coverage(config: PeftConfig, paths: Mapping[str, str], present: set[str]) -> None:
    """Refuse unless the sites present are those that target_modules means.

    A pooler counts only if it is present: some ForSomething leave it out of the backbone.
    """
    if config.targets is None:
        return  # all-linear depends on the model's own head, so the keys decide
    meant = {name for name, path in paths.items() if _is_meant(config, path)}
    missing = sorted(name for name in meant - present if "pooler" not in name.split("."))
    extra = sorted(present - meant)
    if missing or extra:
        raise KeysError(
            f"target_modules and keys differ: {len(missing)} modules without keys {missing[:4]}, "
            f"{len(extra)} keys without a target {extra[:4]}"
        )
    _check_targets(config, [path for name, path in paths.items() if name in present or name not in meant])


def _check_targets(config: PeftConfig, reached: Iterable[str]) -> None:
    """Refuse a listed target that means none of these modules and no part of a head that is saved whole."""
    ends_reached = {end for path in reached for end in ends(path)}
    idle = [name for name in config.targets or () if name not in ends_reached and not config.is_saved_whole(name)]
    if idle:
        raise KeysError(f"target_modules lists {sorted(idle)[:5]}, for which the file has no keys")


def _is_meant(config: PeftConfig, path: str) -> bool:
    return (
        is_target(path, config.targets or ())
        and not is_target(path, config.excluded)
        and not config.is_saved_whole(path)
    )


def _entry(config: PeftConfig, path: str, site: str, pair: Factors) -> Entry:
    for factor, tensor in pair.items():
        if tensor.ndim != 2 or tensor.dtype not in _DTYPES or 0 in tensor.shape:
            raise ShapeError(
                f"lora_{factor} at {site} must be a float matrix; it is {tensor.dtype} {tuple(tensor.shape)}"
            )
    rank, promised = int(pair["A"].shape[0]), config.rank(path)
    if rank != promised:
        raise ShapeError(f"{CONFIG_NAME} says rank {promised} at {path}, and lora_A has {rank} rows")
    return Entry(site, "lowrank", {"A": pair["A"], "B": pair["B"]}, {"scale": config.scale(path, rank)})


def _hyperparameters(config: PeftConfig) -> dict[str, Any]:
    """What the manifest keeps, named as in PEFT and in kinds/lora.py."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": [ALL_LINEAR] if config.targets is None else sorted(config.targets),
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
    }


__all__ = ["Imported", "read_folder", "read_head", "read_parts", "with_head", "write_folder"]
