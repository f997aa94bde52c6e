"""The last block, past its keys and values, for those tokens only behind which one is chosen.

What comes after the last block's attention is read by the choice of a next token alone, and most tokens of a prompt
have none behind them. So the last block runs twice: over all tokens until their keys and values are kept, then over the
few that choose, whose attention reads these. It is found by its place in the backbone, and what it is given is narrowed
by shape, so that no family needs a version of its own; whether it is right is found out by the decoder's probe.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.encoder import Encoder
from adapters_store.mixing import MixedBatch
from server.generation.attention import KeptError, PagedAttention


def last_block(encoder: Encoder) -> nn.Module | None:
    """The last module of the backbone's list of layers; None if it has no such list."""
    lists = [module for module in encoder.model.modules() if isinstance(module, nn.ModuleList)]
    return next((layers[-1] for layers in lists if len(layers) == encoder.num_layers), None)


@contextmanager
def narrowing(block: nn.Module, encoder: Encoder, attention: PagedAttention) -> Iterator[None]:
    """While inside, the forward of a step ends with the states of its plan's choosers, (1, choosers, d)."""
    own, plan, given = block.forward, attention.plan, vars(block).get("forward")
    rows = torch.tensor(plan.choosing or [plan.num_tokens - 1], device=encoder.device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with suppress(KeptError), attention.keeping():
            own(*args, **kwargs)
        attention.plan = plan.choosers
        encoder.sites.batch = MixedBatch.of(plan.choosers.rows, encoder.num_layers, encoder.device)
        few = {name: _narrowed(value, plan.num_tokens, rows) for name, value in kwargs.items()}
        return own(*(_narrowed(value, plan.num_tokens, rows) for value in args), **few)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if given is not None:  # a hook of the model library's, say
            block.forward = given


def _narrowed(value: Any, num_tokens: int, rows: Tensor) -> Any:
    """What a block is given, for some of its tokens: (1, tokens, …) and (tokens,) tensors and tuples of such."""
    if isinstance(value, tuple):
        return tuple(_narrowed(part, num_tokens, rows) for part in value)
    if not isinstance(value, Tensor):
        return value
    dim = 0 if value.ndim == 1 else 1
    return value.index_select(dim, rows) if value.ndim and value.shape[dim] == num_tokens else value
