"""What an adapter alone gives, asked in the slowest way: a text per forward."""

from collections.abc import Sequence

from torch import Tensor

from adapters_store.adapter import Adapter
from training.backbone import LoadedBackbone
from training.export import resident
from training.objectives import Labels


def logits_alone(backbone: LoadedBackbone, adapter: Adapter, texts: Sequence[str]) -> Tensor:
    """(texts, labels)."""
    assert adapter.head is not None
    with resident(backbone, adapter) as mix:
        return Labels(backbone, adapter.head).logits(backbone.encoder, mix, texts)
