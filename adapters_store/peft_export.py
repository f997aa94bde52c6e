"""An adapter of low-rank entries as a folder that PEFT loads.

PEFT has one r and one alpha per adapter and exceptions by pattern: the commonest pair is written plainly, what differs
goes to rank_pattern and alpha_pattern under the whole path, anchored with ^. alpha is scale * r, so that PEFT divides
its way back to the scale.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.errors import UnsupportedError
from adapters_store.peft_config import CONFIG_NAME
from adapters_store.peft_heads import HEAD_NAME, HEAD_TENSORS_NAME, LAYOUTS, Layout
from adapters_store.primitives import Entry
from adapters_store.primitives.head import Head
from adapters_store.tensors import write_tensors


def write_folder(
    folder: Path, adapter: Adapter, *, prefix: str = "", model_type: str = "", base_model: str | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, and the head.

    prefix: name of the backbone inside the model that PEFT will wrap: "bert" for BertForSequenceClassification, "" for
    AutoModel. With a prefix and a model_type whose ForSequenceClassification has such a head, the head is written as
    PEFT saves it, with its labels in head.json; otherwise as head.json and head.safetensors, which PEFT does not read.
    Raises UnsupportedError for anything that is not one lowrank entry per site.
    """
    _check(adapter)
    layout = _layout(adapter.head, prefix, model_type)
    tensors = _lora_tensors(adapter, prefix)
    if adapter.head and layout:
        tensors |= {f"base_model.model.{key}": adapter.head.tensors[name] for name, key in layout.keys.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(write_tensors(_on_cpu(tensors)))
    if adapter.head:
        _write_head(folder, adapter.head, is_saved=layout is not None)
    config = _config(adapter, prefix, base_model) | _head_fields(layout)
    config["fan_in_fan_out"] = model_type == "gpt2"  # its Conv1D; for any other layer PEFT finds out by itself
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")  # last: now it is complete


def _check(adapter: Adapter) -> None:
    others = sorted({entry.primitive for entry in adapter.entries} - {"lowrank"})
    if others or not adapter.entries:
        raise UnsupportedError(f"PEFT's LoRA format holds lowrank entries, at least one; this adapter has {others}")
    twice = [site for site, count in Counter(entry.site for entry in adapter.entries).items() if count > 1]
    if twice:
        raise UnsupportedError(f"PEFT's LoRA format holds one entry per site; this adapter has more at {twice[:4]}")


def _layout(head: Head | None, prefix: str, model_type: str) -> Layout | None:
    """The family's layout if this head is one of it, so that PEFT's model computes the same."""
    layout = LAYOUTS.get(model_type)
    if head is None or layout is None or not prefix:
        return None
    spec = head.spec
    same = (spec.type, spec.pooling, spec.hidden_activation) == ("linear", layout.pooling, layout.hidden_activation)
    return layout if same and set(head.tensors) == set(layout.keys) else None


def _path(entry: Entry, prefix: str) -> str:
    return f"{prefix}.{entry.site}" if prefix else entry.site


def _lora_tensors(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    return {
        f"base_model.model.{_path(entry, prefix)}.lora_{factor}.weight": entry.tensors[factor]
        for entry in adapter.entries
        for factor in "AB"
    }


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _config(adapter: Adapter, prefix: str, base_model: str | None) -> dict[str, Any]:
    ranks = {_path(entry, prefix): int(entry.tensors["A"].shape[0]) for entry in adapter.entries}
    alphas = {
        _path(entry, prefix): float(entry.options.get("scale", 1.0)) * entry.tensors["A"].shape[0]
        for entry in adapter.entries
    }
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "rank_pattern": {_anchored(path): value for path, value in ranks.items() if value != r},
        "alpha_pattern": {_anchored(path): value for path, value in alphas.items() if value != alpha},
    }


def _anchored(path: str) -> str:
    return "^" + path.replace(".", r"\.")


def _head_fields(layout: Layout | None) -> dict[str, Any]:
    return {"task_type": "SEQ_CLS", "modules_to_save": layout.modules} if layout else {}


def _write_head(folder: Path, head: Head, *, is_saved: bool) -> None:
    """head.json, with all of the description or, for a head that PEFT saves, only what PEFT does not."""
    fields = head.spec.model_dump(mode="json", exclude={"tensors"}, exclude_none=True)
    if is_saved:
        fields = {name: fields[name] for name in ("labels", "label_texts", "max_length") if name in fields}
    else:
        (folder / HEAD_TENSORS_NAME).write_bytes(write_tensors(_on_cpu(dict(head.tensors))))
    (folder / HEAD_NAME).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
