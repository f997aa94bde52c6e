"""head: pooled hidden states -> scores of a task's labels. Belongs to a task and is never mixed.

Tensors: weight (labels, d), optional bias (labels,), and for a hidden layer in between dense_weight (d, d_in) and
dense_bias (d,) with `hidden_activation`.
linear: logits = W h + b. cosine: logits = scale * cos(W_c, h) per label c.
Tasks with different numbers of labels share a batch: labels are padded, and padded logits cut off again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters_store.errors import KeysError, LabelsError, ShapeError
from adapters_store.manifest import HeadSpec
from adapters_store.primitives.bottleneck import ACTIVATIONS


@dataclass(frozen=True, eq=False)
class Head:
    """A head's description and tensors by the primitive's own names."""

    spec: HeadSpec
    tensors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Head":
        """The same head, float32 on a device: heads are small, and logits deserve full precision."""
        return Head(self.spec, {name: tensor.to(device, torch.float32) for name, tensor in self.tensors.items()})


def check(head: Head, hidden_size: int) -> None:
    """Refuse a head that does not fit its labels or the backbone. Raises KeysError, LabelsError or ShapeError."""
    names = set(head.tensors)
    if "weight" not in names or not names <= {"weight", "bias", "dense_weight", "dense_bias"}:
        raise KeysError(f"a head has weight and may have bias, dense_weight, dense_bias; it has {sorted(names)}")
    labels = head.spec.labels
    if len(set(labels)) != len(labels):
        raise LabelsError(f"labels must differ from each other: {list(labels)}")
    weight = head.tensors["weight"]
    if weight.ndim != 2 or weight.shape[0] != len(labels):
        raise LabelsError(f"head.weight has shape {tuple(weight.shape)} for {len(labels)} labels {list(labels)}")
    if "bias" in names and tuple(head.tensors["bias"].shape) != (len(labels),):
        raise LabelsError(f"head.bias has shape {tuple(head.tensors['bias'].shape)} for {len(labels)} labels")
    if head.spec.type == "cosine" and "bias" in names:
        raise KeysError("a cosine head has no bias: it would be ignored")
    _check_widths(head, hidden_size)


def _check_widths(head: Head, hidden_size: int) -> None:
    dense = head.tensors.get("dense_weight")
    if (dense is None) != (head.spec.hidden_activation is None):
        raise KeysError("hidden_activation and dense_weight belong together: give both or neither")
    if dense is not None and (dense.ndim != 2 or dense.shape[1] != hidden_size):
        raise ShapeError(f"head.dense_weight has shape {tuple(dense.shape)}, the backbone gives {hidden_size} features")
    width = hidden_size if dense is None else dense.shape[0]
    bias = head.tensors.get("dense_bias")
    if bias is not None and (dense is None or tuple(bias.shape) != (width,)):
        raise ShapeError(f"head.dense_bias has shape {tuple(bias.shape)}, it needs a dense_weight with as many rows")
    if head.tensors["weight"].shape[1] != width:
        raise ShapeError(f"head.weight has shape {tuple(head.tensors['weight'].shape)}, its input has {width} features")


def reference(head: Head, pooled: Tensor) -> Tensor:
    """Logits of one head: the specification. pooled: (rows, d); returns (rows, labels) float32."""
    hidden = _hidden(head, pooled.float())
    weight, bias = head.tensors["weight"].float(), head.tensors.get("bias")
    if head.spec.type == "cosine":
        return head.spec.scale * F.normalize(hidden, dim=-1) @ F.normalize(weight, dim=-1).mT
    return F.linear(hidden, weight, None if bias is None else bias.float())


def _hidden(head: Head, pooled: Tensor) -> Tensor:
    if "dense_weight" not in head.tensors:
        return pooled
    bias = head.tensors.get("dense_bias")
    dense = F.linear(pooled, head.tensors["dense_weight"].float(), None if bias is None else bias.float())
    return ACTIVATIONS[str(head.spec.hidden_activation)](dense)


def batched(heads: Sequence[Head], pooled: Tensor) -> list[Tensor]:
    """Logits of each row by its own head. pooled: (rows, d); heads: one per row, repeats welcome.

    Returns per row (labels,) float32. Heads with a hidden layer or cosine run per distinct head; plain linear ones
    run as one product over the labels of all distinct heads.
    """
    plain = [i for i, head in enumerate(heads) if head.spec.type == "linear" and "dense_weight" not in head.tensors]
    logits: list[Tensor] = [pooled] * len(heads)
    for i, row in zip(plain, _linear([heads[i] for i in plain], pooled[plain].float()), strict=True):
        logits[i] = row
    rest: dict[int, list[int]] = {}
    for i in sorted(set(range(len(heads))) - set(plain)):
        rest.setdefault(id(heads[i]), []).append(i)
    for rows in rest.values():
        for i, row in zip(rows, reference(heads[rows[0]], pooled[rows]), strict=True):
            logits[i] = row
    return logits


def _linear(heads: Sequence[Head], pooled: Tensor) -> list[Tensor]:
    if not heads:
        return []
    distinct = list({id(head): head for head in heads}.values())
    start, begin = {}, 0
    for head in distinct:
        start[id(head)] = begin
        begin += len(head.spec.labels)
    weight = torch.cat([head.tensors["weight"].float() for head in distinct])  # (all labels, d)
    bias = torch.cat([_bias(head) for head in distinct])
    everything = F.linear(pooled, weight, bias)  # (rows, all labels)
    return [
        row[start[id(head)] : start[id(head)] + len(head.spec.labels)]
        for row, head in zip(everything, heads, strict=True)
    ]


def _bias(head: Head) -> Tensor:
    bias = head.tensors.get("bias")
    return head.tensors["weight"].new_zeros(len(head.spec.labels)).float() if bias is None else bias.float()
