"""The upper blocks of a backbone, run on what its lower blocks give, which is computed once per text.

Adapters that act from block `first` on leave everything below as it is, in every step and under every composition: the
hidden states that reach block `first` are read once and kept. A forward then runs the blocks above only, and so does
its gradient. Whether a family can be run so is found out when the tail is made: it must give what the whole backbone
gives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.encoder import Encoder, Rows
from adapters_store.mixing import Mix
from training.errors import ConfigError
from training.step import micro_batches


class Tail:
    """Blocks `first` and above of an encoder. With first = 0 it is the whole backbone and keeps nothing."""

    def __init__(self, encoder: Encoder, first: int) -> None:
        """Raises ConfigError for a block that is not there and for a backbone that cannot be run in parts."""
        self.encoder, self.first = encoder, first
        self._stack = _stack(encoder.model, encoder.num_layers) if first else nn.ModuleList()
        if first and not 0 < first < len(self._stack):
            raise ConfigError(f"first layer {first} is not one of the backbone's layers 0 to {encoder.num_layers - 1}")
        if first:
            self._check()

    def read(self, rows: Rows, token_budget: int) -> list[Tensor | None]:
        """What reaches block `first` for each row: (length, hidden_size) in the backbone's dtype; None with first = 0.

        Rows must not be padded by the backbone, which `_check` has seen to.
        """
        if not self.first:
            return [None] * len(rows)
        found: list[Tensor | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for batch in micro_batches(self.encoder, [len(rows[i]) for i in order], token_budget):
            chosen = [order[n] for n in batch]
            pieces = torch.split(self._reaching([rows[i] for i in chosen]), [len(rows[i]) for i in chosen])
            for i, piece in zip(chosen, pieces, strict=True):
                found[i] = piece.clone()
        return found

    def pool(self, rows: Rows, states: Sequence[Tensor | None], mixes: Sequence[Mix | None], pooling: str) -> Tensor:
        """As Encoder.pool: (rows, hidden_size) float32. states: what `read` gave for the rows."""
        poolings = [pooling] * len(rows)
        if not self.first:
            return self.encoder.pool(rows, mixes, poolings)
        order = self.encoder.order(rows, mixes)
        reaching = torch.cat([_known(states[i]) for i in order])
        with self._above(reaching):
            pooled = self.encoder.pool([rows[i] for i in order], [mixes[i] for i in order], poolings)
        place = torch.empty(len(order), dtype=torch.int64)
        place[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return pooled.index_select(0, place.to(pooled.device))

    @torch.no_grad()
    def _reaching(self, rows: Rows) -> Tensor:
        """(tokens, hidden_size) what reaches block `first`, for rows in order of length."""
        seen: list[Tensor] = []

        def keep(block: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001  # torch's signature
            seen.append(args[0].reshape(-1, args[0].shape[-1]))

        handle = self._stack[self.first].register_forward_pre_hook(keep)
        try:
            self.encoder.pool(rows, [None] * len(rows), ["mean"] * len(rows))
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def _above(self, reaching: Tensor) -> Iterator[None]:
        """While inside, a forward skips the blocks below `first` and reads these states there."""

        def feed(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001  # torch's signature
            return (reaching.view(args[0].shape), *args[1:])

        handle = self._stack[self.first].register_forward_pre_hook(feed)
        below = self._stack[: self.first]
        for block in below:
            block.forward = _skip
        try:
            yield
        finally:
            handle.remove()
            for block in below:
                del block.forward  # the class's own forward is seen again

    def _check(self) -> None:
        rows = [[11 + n + i for i in range(n)] for n in (4, 7, 7)]
        expected = self.encoder.pool(rows, [None] * 3, ["mean"] * 3)
        try:
            with torch.no_grad():
                found = self.pool(rows, self.read(rows, 64), [None] * 3, "mean")
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"this backbone cannot be run from a middle layer on: {error}; use first layer 0"
            ) from error
        if not torch.allclose(found, expected.detach(), rtol=1e-2, atol=1e-3):
            raise ConfigError("this backbone gives something else when run from a middle layer on; use first layer 0")


def _skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG001  # a block's signature
    """A block that does nothing."""
    return hidden_states


def _known(state: Tensor | None) -> Tensor:
    if state is None:
        raise AssertionError("our bug: a row whose states were not read")
    return state


def _stack(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the backbone's blocks: the outermost list of as many modules as there are layers."""
    lists = [m for _, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not lists:
        raise ConfigError("this backbone has no list of blocks to cut; use first layer 0")
    return lists[0]
