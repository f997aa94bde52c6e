"""Heads that travel with a PEFT adapter.

Two ways in. Whole modules that PEFT saves (`modules_to_save`) for sequence classification: which tensors, which
activation and which pooling belong to a family's ForSequenceClassification is written in LAYOUTS. Or our own two files
beside it: head.json, a HeadSpec without "tensors", and head.safetensors with weight, bias, dense_weight, dense_bias.
With a head of the first way, head.json may still give it the names of its labels, which PEFT does not save.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from adapters_store.adapter import Adapter
from adapters_store.errors import FormatError, KeysError, LabelsError, ShapeError, UnsupportedError
from adapters_store.manifest import HeadSpec
from adapters_store.peft_config import PeftConfig, strict_json
from adapters_store.primitives import head as head_primitive
from adapters_store.primitives.head import Head
from adapters_store.sites import Sites

HEAD_NAME = "head.json"
HEAD_TENSORS_NAME = "head.safetensors"
_RENAMING = {"labels", "label_texts", "max_length"}  # what head.json may say of a head that PEFT saved


@dataclass(frozen=True)
class Layout:
    """The head of a family's ForSequenceClassification.

    keys: names of the head primitive's tensors -> names that they have beside the backbone.
    """

    pooling: Literal["cls", "last", "pooler"]
    keys: Mapping[str, str]
    hidden_activation: Literal["tanh", "relu", "gelu"] | None = None

    @property
    def modules(self) -> list[str]:
        """The modules to save, as PEFT lists them."""
        return sorted({key.split(".", 1)[0] for key in self.keys.values()})


_PLAIN = {"weight": "classifier.weight", "bias": "classifier.bias"}
_TWO_LAYERS = {
    "dense_weight": "classifier.dense.weight",
    "dense_bias": "classifier.dense.bias",
    "weight": "classifier.out_proj.weight",
    "bias": "classifier.out_proj.bias",
}
_PRE = {"dense_weight": "pre_classifier.weight", "dense_bias": "pre_classifier.bias"}
_LAST = Layout("last", {"weight": "score.weight"})
_TANH = Layout("cls", _TWO_LAYERS, "tanh")

LAYOUTS: dict[str, Layout] = {
    "bert": Layout("pooler", _PLAIN),
    "albert": Layout("pooler", _PLAIN),
    "roberta": _TANH,
    "xlm-roberta": _TANH,
    "camembert": _TANH,
    "electra": Layout("cls", _TWO_LAYERS, "gelu"),
    "distilbert": Layout("cls", _PRE | _PLAIN, "relu"),
    "gpt2": _LAST,
    "llama": _LAST,
    "mistral": _LAST,
    "qwen2": _LAST,
    "qwen3": _LAST,
}


def model_type(sites: Sites) -> str:
    """Family of the backbone as its config names it, or its class name where it has no config."""
    config: Any = getattr(sites.backbone, "config", None)
    return str(getattr(config, "model_type", "") or type(sites.backbone).__name__)


def read_saved(config: PeftConfig, tensors: Mapping[str, Tensor], sites: Sites) -> Head | None:
    """The head among the whole modules that PEFT saved, or None if it saved none.

    tensors: by their names beside the backbone, "classifier.weight". Raises KeysError, LabelsError, ShapeError,
    UnsupportedError.
    """
    if not tensors:
        if config.modules_to_save:
            raise KeysError(
                f"modules_to_save lists {config.modules_to_save[:5]}, and the file has none of their tensors"
            )
        return None
    unlisted = sorted(name for name in tensors if not config.is_saved_whole(name))
    if unlisted:
        raise KeysError(f"neither LoRA tensors nor in modules_to_save: {unlisted[:5]}")
    layout = _layout(config, sites, sorted(tensors))
    _check_keys(layout, tensors)
    head = _build(layout, tensors)
    head_primitive.check(head, sites.hidden_size)
    return head


def _layout(config: PeftConfig, sites: Sites, names: list[str]) -> Layout:
    family = model_type(sites)
    if config.task_type not in (None, "SEQ_CLS"):
        raise UnsupportedError(f"{names[:4]} of task_type {config.task_type!r}: only heads of SEQ_CLS are served")
    if family not in LAYOUTS:
        raise UnsupportedError(
            f"{names[:4]}: the head of {family} is not known (known: {', '.join(LAYOUTS)}); "
            f"send it as {HEAD_NAME} and {HEAD_TENSORS_NAME}"
        )
    if LAYOUTS[family].pooling == "pooler" and not any(name.startswith("pooler") for name in sites):
        raise UnsupportedError(f"a {family} head reads the pooler, and this backbone was loaded without one")
    return LAYOUTS[family]


def _check_keys(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    expected = set(layout.keys.values())
    other = sorted(set(tensors) - expected)
    if other:
        raise UnsupportedError(
            f"modules_to_save may only be the head {sorted(expected)}; the file also has {other[:5]}"
        )
    missing = sorted(expected - set(tensors))
    if missing:
        raise KeysError(
            f"the head lacks {missing}; PEFT saves a module only if it is in modules_to_save, here {layout.modules}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim != (1 if name.endswith("bias") else 2):
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}")


def _build(layout: Layout, tensors: Mapping[str, Tensor]) -> Head:
    own = {name: tensors[key] for name, key in layout.keys.items()}
    labels = tuple(f"LABEL_{i}" for i in range(own["weight"].shape[0]))
    if not labels:
        raise LabelsError("the head has no labels: its weight has no rows")
    activation = layout.hidden_activation
    spec = HeadSpec(
        labels=labels, pooling=layout.pooling, hidden_activation=activation, tensors={name: name for name in own}
    )
    return Head(spec, own)


def read_head(head_json: bytes, tensors: Mapping[str, Tensor]) -> Head:
    """The head of our two files, checked in itself; adapter.check then holds it against the backbone.

    head_json: labels, and whatever else of HeadSpec but "tensors". tensors: weight (labels, d), optional bias
    (labels,), dense_weight (d, d_in), dense_bias (d,). Raises FormatError, KeysError, LabelsError or ShapeError.
    """
    fields = strict_json(head_json, HEAD_NAME)
    if "tensors" in fields:
        raise FormatError(f"{HEAD_NAME} must not have 'tensors': their names are fixed, weight, bias, dense_weight, …")
    head = Head(_spec(fields | {"tensors": {name: name for name in tensors}}), dict(tensors))
    if "weight" in tensors and tensors["weight"].ndim != 2:
        raise ShapeError(f"weight must be (labels, d), it has shape {tuple(tensors['weight'].shape)}")
    first = tensors.get("dense_weight", tensors.get("weight"))
    head_primitive.check(head, first.shape[-1] if first is not None and first.ndim else 0)
    return head


def with_head(adapter: Adapter, head_json: bytes | None, tensors: Mapping[str, Tensor] | None) -> Adapter:
    """The adapter with what head.json and head.safetensors add: a head, or names for the labels of the head it has."""
    if head_json is None and not tensors:
        return adapter
    if head_json is None:
        raise KeysError(f"{HEAD_TENSORS_NAME} came without {HEAD_NAME}, which gives its labels")
    if adapter.head is None:
        return replace(adapter, head=read_head(head_json, tensors or {}))
    if tensors:
        raise KeysError(f"two heads: one among the adapter's tensors and one in {HEAD_TENSORS_NAME}; send one")
    return replace(adapter, head=_renamed(adapter.head, strict_json(head_json, HEAD_NAME)))


def _renamed(head: Head, fields: dict[str, Any]) -> Head:
    other = sorted(set(fields) - _RENAMING)
    if other:
        raise KeysError(
            f"the adapter brings its own head, so {HEAD_NAME} may only have {sorted(_RENAMING)}, not {other[:5]}"
        )
    spec = _spec(head.spec.model_dump() | fields)
    if len(spec.labels) != len(head.spec.labels) or len(set(spec.labels)) != len(spec.labels):
        raise LabelsError(
            f"{HEAD_NAME} must name {len(head.spec.labels)} different labels, it names {list(spec.labels)[:20]}"
        )
    return Head(spec, head.tensors)


def _spec(fields: dict[str, Any]) -> HeadSpec:
    try:
        return HeadSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise FormatError(f"{HEAD_NAME}: {where}: {first['msg']}") from None
